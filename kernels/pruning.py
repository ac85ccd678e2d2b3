"""Half of the weights pruned in groups of four units, as sparse tensor cores take them.

Of every four consecutive units the two with the largest norm stay. A unit is one weight (2:4), or
an adjacent pair (4:8; arXiv 2502.05003, section 4.4: 4-bit sparse cores need pairs). Of equal ones
the first stays. What stays is stored densely, with one 2-bit place per unit that stays: b/2 + 1
bits a weight for 2:4 at b bits, b/2 + 1/2 for 4:8.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = {"off": 0, "2:4": 1, "4:8": 2}
"""Weights per unit, by the name of the pattern; 0 is dense."""
_OF, _KEPT = 4, 2


def fits(size: int, unit: int) -> bool:
    """Whether rows of that size are whole groups."""
    return unit == 0 or size % (_OF * unit) == 0


def kept_units(values: Tensor, unit: int) -> Tensor:
    """Which units stay: bool [..., groups, 4] for values [..., groups * 4 * unit]."""
    norm = values.unflatten(-1, (-1, _OF, unit)).square().sum(-1)
    own, other = norm.unsqueeze(-1), norm.unsqueeze(-2)
    number = torch.arange(_OF, device=values.device)
    first = number.unsqueeze(0) < number.unsqueeze(1)
    ahead = (other > own) | ((other == own) & first)
    found: Tensor = ahead.sum(-1) < _KEPT
    return found


def kept_values(kept: Tensor, unit: int) -> Tensor:
    """The same for single values: bool [..., groups * 4 * unit]."""
    return kept.unsqueeze(-1).expand(*kept.shape, unit).flatten(-3)


def compress(codes: Tensor, kept: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """What stays and where it stood.

    Args:
        codes: [..., K].
        kept: From `kept_units`.
        unit: 1 or 2.

    Returns:
        Codes [..., K/2], and places 0 to 3 in each group, ascending: int64 [..., K / (2 * unit)].
    """
    places = (~kept).int().argsort(dim=-1, stable=True)[..., :_KEPT]
    units = codes.unflatten(-1, (-1, _OF, unit))
    found = units.gather(-2, places.unsqueeze(-1).expand(*places.shape, unit))
    return found.flatten(-3), places.flatten(-2)


def expand(values: Tensor, places: Tensor, unit: int) -> Tensor:
    """Inverse of `compress`, with zeros where nothing stayed: [..., K/2] -> [..., K]."""
    slots = places.unflatten(-1, (-1, _KEPT)).unsqueeze(-1)
    taken = slots == torch.arange(_OF, device=values.device, dtype=places.dtype)
    units = values.unflatten(-1, (-1, _KEPT, 1, unit))
    found: Tensor = (taken.unsqueeze(-1).to(values.dtype) * units).sum(-3).flatten(-3)
    return found
