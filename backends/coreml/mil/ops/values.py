"""Reading op inputs that may be Python values or tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Numbers = Sequence[int] | torch.Tensor
"""A vector of integers: a constant, or computed by the program."""


def ints(value: Numbers) -> list[int]:
    """The integers of a constant or computed vector; a single number counts as a vector."""
    items = value.tolist() if isinstance(value, torch.Tensor) else value
    return [int(items)] if isinstance(items, int | float) else [int(item) for item in items]


def axes_of(axes: Numbers | None, rank: int) -> list[int]:
    """Axes counted from the front; None means all of them."""
    return list(range(rank)) if axes is None else [axis % rank for axis in ints(axes)]


def channels(value: torch.Tensor, rank: int) -> torch.Tensor:
    """A vector over axis 1, shaped so that it broadcasts over a tensor of `rank` axes."""
    return value.reshape(1, -1, *[1] * (rank - 2)) if value.dim() else value
