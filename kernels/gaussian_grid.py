"""The quantisation grid of QuEST: symmetric, mid-rise, clipped at the Gaussian optimum.

Source: Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
arXiv 2502.05003, section 3. A group of values v with root mean square r is clipped to +-s,
s = alpha_b * r, and rounded to the 2**b levels +-(2k+1) * step / 2 with step = 2 s / (2**b - 1):
there is no zero level and no zero point. alpha_b minimises the mean squared error for N(0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA = {
    1: math.sqrt(2 / math.pi),
    2: 1.4935346200,
    3: 2.0510683541,
    4: 2.5139305786,
    5: 2.9160938835,
    6: 3.2765972826,
    7: 3.6010497188,
    8: 3.8849386788,
}
RELATIVE_MSE = {
    1: 0.363380, 2: 0.118846, 3: 0.0374397, 4: 0.0115429, 5: 0.00349521, 6: 0.00104005,
    7: 3.0437e-4, 8: 8.782e-5,
}  # fmt: skip
"""Expected squared error over squared value for Gaussian values, by bits."""
TINY = 1e-8
"""Added to the clip bound, so that a row of zeros has a step."""


OUTLIER = 1.25
"""Where grids are widened: past this multiple of the clip, which Gaussian values hardly reach."""


def grid_step(values: Tensor, bits: int, widen: bool = False) -> Tensor:
    """Distance between levels, one per group (the last axis), in float32: shape [..., 1].

    Args:
        values: [..., K].
        bits: 1 to 8.
        widen: Whether the outermost level of a group with outliers is its largest value.
    """
    intervals: int = 2**bits - 1
    step = 2 * (ALPHA[bits] * root_mean_square(values) + TINY) / intervals
    if not widen:
        return step
    reach = values.abs().amax(-1, keepdim=True).to(step.dtype) * (2 / intervals)
    return torch.where(reach > OUTLIER * step, reach, step)


def root_mean_square(values: Tensor) -> Tensor:
    """Over the last axis, in float32 or float64: shape [..., 1]."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.square().mean(-1, keepdim=True).sqrt()


def to_codes(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """Index of each value's level, 0 to 2**bits - 1 (int64); ties go to even, zero goes down."""
    half: int = 2 ** (bits - 1)
    return ((values / step + 0.5).round().clamp(1 - half, half) + (half - 1)).long()


def to_grid(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """Each value's level: bit for bit `from_codes(to_codes(values, step, bits), step, bits)`."""
    half: int = 2 ** (bits - 1)
    return ((values / step + 0.5).round().clamp(1 - half, half) - 0.5) * step


def from_codes(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """The levels behind codes, in the dtype of `step`."""
    middle: float = 2 ** (bits - 1) - 0.5
    return (codes.to(step.dtype) - middle) * step


def expected_sqnr_db(bits: int) -> float:
    """Signal-to-noise ratio of Gaussian weights on this grid, in dB."""
    return -10 * math.log10(RELATIVE_MSE[bits])


def expected_error(weight_bits: int, act_bits: int) -> float:
    """Relative error of a product of two Gaussian operands on this grid; 16 bits err by nothing."""
    kept = (1 - RELATIVE_MSE.get(weight_bits, 0.0)) * (1 - RELATIVE_MSE.get(act_bits, 0.0))
    return math.sqrt(1 - kept)
