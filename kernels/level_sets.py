"""The level sets of QuEST by name: `int1` to `int8`, the mid-rise grids, and `fp4`.

Source: Panferov et al., arXiv 2502.05003, section 3 and appendix. fp4 has the levels of E2M1,
+-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, times 0.48707976 rms: the scale of least squared error for N(0, 1).
Its trust bound is the largest half interval, one scale, as the paper says; the published code keeps
0.3186 rms, half of the last Lloyd-Max interval of the levels that it replaces afterwards.

A code is stored in `bits_of` bits. Integers count the levels upwards; fp4 is E2M1 itself: the sign,
then the place among the magnitudes.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from resplice.kernels.gaussian_grid import (
    ALPHA,
    TINY,
    grid_step,
    root_mean_square,
    to_codes,
)

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_SCALE = 0.48707976
LEVEL_SETS = (*(f"int{bits}" for bits in range(1, 9)), "fp4")
_POINTS = 2001
_REACH = 8.0


def bits_of(levels: str) -> int:
    """Bits of a code."""
    return 4 if levels == "fp4" else int(levels.removeprefix("int"))


def level_values(levels: str) -> Tensor:
    """The value of every code in units of the step: float32 [2**bits]."""
    if levels == "fp4":
        return torch.tensor([*FP4, *(-value for value in FP4)])
    count: int = 2 ** bits_of(levels)
    return torch.arange(count, dtype=torch.float32) - (count - 1) / 2


def outermost(levels: str) -> float:
    """The largest level of a row whose root mean square is one."""
    return FP4[-1] * FP4_SCALE if levels == "fp4" else ALPHA[bits_of(levels)]


def half_interval(levels: str) -> float:
    """The largest distance to a level inside the range, for such a row: T of the trust rule."""
    if levels == "fp4":
        return FP4_SCALE
    gaps: int = 2 ** bits_of(levels) - 1
    return ALPHA[bits_of(levels)] / gaps


def step_of(values: Tensor, levels: str) -> Tensor:
    """The step of every row (the last axis), in float32 or float64: [..., 1]."""
    if levels != "fp4":
        return grid_step(values, bits_of(levels))
    return FP4_SCALE * root_mean_square(values) + TINY


def encode(values: Tensor, step: Tensor, levels: str) -> Tensor:
    """The code of the level next to each value (int64)."""
    if levels != "fp4":
        return to_codes(values, step, bits_of(levels))
    size, middle = (values / step).abs(), pairwise(FP4)
    place = torch.stack([size > (low + high) / 2 for low, high in middle]).sum(0)
    return torch.where((values < 0) & (place > 0), place + len(FP4), place)


def decode(codes: Tensor, levels: str, dtype: torch.dtype) -> Tensor:
    """The levels behind codes in units of the step; plain arithmetic, so that it exports."""
    if levels != "fp4":
        middle: float = (2 ** bits_of(levels) - 1) / 2
        return codes.to(dtype) - middle
    number = codes.to(dtype)
    below = (number >= len(FP4)).to(dtype)
    place, total = number - len(FP4) * below, torch.zeros_like(number)
    for index, (low, high) in enumerate(pairwise(FP4)):
        total = total + (place > index + 0.5).to(dtype) * (high - low)
    return total * (1 - 2 * below)


@cache
def expected_mse(levels: str, unit: int = 0) -> float:
    """Mean squared error over mean square for Gaussian values, by quadrature.

    Args:
        levels: A level set.
        unit: 0 is dense. Pruned, two of four units of 1 or 2 neighbours stay (`pruning.py`).
    """
    x = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    scale = outermost(levels) / float(level_values(levels).abs().max())
    step = torch.full((1,), scale, dtype=torch.float64)
    rounded = decode(encode(x, step, levels), levels, torch.float64) * step
    error, power = (x - rounded).square(), x.square()
    if unit == 0:
        return float((density * error).sum())
    norm = power if unit == 1 else power[:, None] + power
    larger = torch.erfc((norm / 2).sqrt()) if unit == 1 else torch.exp(-norm / 2)
    kept = (1 - larger) ** 3 + 3 * larger * (1 - larger) ** 2  # at most one of three is larger
    weight = density if unit == 1 else density[:, None] * density
    if unit == 2:
        error, power = error[:, None], power[:, None]
    return float((weight * (kept * error + (1 - kept) * power)).sum())
