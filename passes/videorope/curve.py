"""How the score of a key with the same content falls with its distance in frames.

For a band of angles that follow one row: S(g) = mean over the band of cos(step g inv_freq[n]), for
g = 0 .. G frames; `step` is the distance of two frames in positions. M-RoPE gives time the fastest
angles, so S comes back again and again; with the slowest ones it only falls. Source: VideoRoPE,
arXiv 2502.05173, figures 3 and 4, which show single bands too: the score over all angles tells
nothing, since the diagonal layout moves the same patch along all three rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RECURRENCE_FROM = 50
"""Frames from where a high score counts as a recurrence."""


@dataclass(frozen=True)
class Oscillation:
    """Numbers of a curve S(0) .. S(G).

    Attributes:
        extrema: Local extrema (sign changes of the first difference).
        variation: Total variation, the sum of |S(g+1) - S(g)|.
        ratio: Variation / |S(0) - S(G)|; 1 for a monotone curve.
        recurrence: Largest S(g) from `RECURRENCE_FROM` frames on; NaN for shorter curves.
        recurrence_at: Where that is, in frames.
    """

    extrema: int
    variation: float
    ratio: float
    recurrence: float
    recurrence_at: int


def score_curve(
    inv_freq: Tensor,
    axis_map: Sequence[int],
    *,
    axis: int = 0,
    step: float = 1.0,
    frames: int = 3000,
) -> Tensor:
    """S(g) of the band that follows a row.

    Args:
        inv_freq: Angle per position, floating point [N].
        axis_map: Row per angle, N values.
        axis: The row of the band; 0 is t.
        step: Positions between two frames.
        frames: G.

    Returns:
        float64 [G + 1]; ones where no angle follows the row.
    """
    band = [n for n, row in enumerate(axis_map) if row == axis]
    gaps = torch.arange(frames + 1, dtype=torch.float64) * step
    if not band:
        return torch.ones_like(gaps)
    return torch.outer(gaps, inv_freq.double()[band]).cos().mean(1)


def oscillation(curve: Tensor) -> Oscillation:
    """The numbers of a curve, float64 [G + 1] with G >= 1."""
    steps = curve.diff()
    signs = steps[steps != 0].sign()
    variation = float(steps.abs().sum())
    drop = float((curve[0] - curve[-1]).abs())
    tail = curve[RECURRENCE_FROM:]
    at = int(tail.argmax()) + RECURRENCE_FROM if len(tail) else 0
    return Oscillation(
        extrema=int((signs.diff() != 0).sum()),
        variation=variation,
        ratio=variation / drop if drop else float("inf"),
        recurrence=float(tail.max()) if len(tail) else float("nan"),
        recurrence_at=at,
    )
