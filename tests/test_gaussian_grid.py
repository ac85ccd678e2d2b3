"""The quantisation grid: the reference's vectors, and the optimum it claims to be."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from resplice.kernels.gaussian_grid import (
    ALPHA,
    RELATIVE_MSE,
    expected_sqnr_db,
    from_codes,
    grid_step,
    to_codes,
)
from resplice.kernels.hadamard import hadamard, hadamard_matrix

DATA = Path(__file__).with_name("data") / "quest_quantizers.npz"
FORWARD_ERROR = 1e-5
"""The reference computes in float32; ours differs by the order of sums (its specification)."""
BF16_SCALE = float(torch.tensor(2.0**-3.5).bfloat16()) / 2.0**-3.5
"""The reference holds its Hadamard matrix in bfloat16: entries 0.08837891, not 0.08838835. All are
off by one factor, so every rotation scales by it and codes stay the same."""
CHOSEN_ALPHA_OFF = {
    1: 5e-6, 2: 5e-6, 3: 5e-6, 4: 8e-5, 5: 6e-5, 6: 1.4e-3, 7: 1.01e-2, 8: 3.73e-2,
}  # fmt: skip
"""How far the published constants are from the optimum (its table): exact up to 3 bits."""


@cache
def vectors() -> dict[str, Tensor]:
    """The reference's inputs and outputs."""
    with np.load(DATA) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def quantized(values: Tensor, bits: int) -> Tensor:
    """Values rounded to the grid, a row at a time."""
    step = grid_step(values, bits)
    return from_codes(to_codes(values, step, bits), step, bits)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest error of a row over its root mean square; rows of zeros count absolutely."""
    scale = expected.double().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
    return float(((expected.double() - found.double()).abs() / scale).max())


# ---- the reference's vectors -------------------------------------------------------------
# Rows of x: Gaussian, seven times larger, one outlier, shifted exponential, tiny, zeros.


@pytest.mark.parametrize("bits", [1, 4])
def test_plain_rows_match_the_reference(bits: int) -> None:
    expected, x = vectors()[f"y_Trust_b{bits}"], vectors()["x"]
    assert relative_error(expected[:-1], quantized(x, bits)[:-1]) <= FORWARD_ERROR


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(("matrix", "scale"), [("_exactH", 1.0), ("", BF16_SCALE)])
def test_rotated_rows_match_the_reference(bits: int, matrix: str, scale: float) -> None:
    expected = vectors()[f"y_HalfHadTrust{matrix}_b{bits}"]
    found = quantized(hadamard(vectors()["x"], 128), bits) * scale
    assert relative_error(expected[:-1], found[:-1]) <= FORWARD_ERROR


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(("matrix", "scale"), [("_exactH", 1.0), ("", BF16_SCALE)])
def test_rows_rotated_back_match_the_reference(bits: int, matrix: str, scale: float) -> None:
    expected = vectors()[f"y_HadTrust{matrix}_b{bits}"]
    found = hadamard(quantized(hadamard(vectors()["x"], 128), bits), 128) * scale**2
    assert relative_error(expected[:-1], found[:-1]) <= FORWARD_ERROR


@pytest.mark.parametrize("bits", [1, 4])
def test_a_row_of_zeros_becomes_the_innermost_level(bits: int) -> None:
    """Zero lies between two levels; the reference takes the lower one, a floor the upper one."""
    x = vectors()["x"][-1:]
    assert not x.any()
    expected, found = vectors()[f"y_Trust_b{bits}"][-1:], quantized(x, bits)
    assert torch.equal(found.abs(), expected.abs())
    assert float(found.abs().max()) == pytest.approx(1e-8 / (2**bits - 1))


@pytest.mark.parametrize("bits", [1, 4])
def test_a_layer_with_both_operands_quantised_matches_the_reference(bits: int) -> None:
    x, w, y = (vectors()[f"lin_b{bits}_{name}"] for name in "xwy")
    found = quantized(hadamard(x, 128), bits) @ quantized(hadamard(w, 128), bits).t()
    assert relative_error(y, found * BF16_SCALE**2) <= FORWARD_ERROR


def test_the_matrix_is_the_reference_matrix() -> None:
    signs, official = vectors()["H128_exact_sign"], vectors()["H128_official"]
    assert torch.equal(hadamard_matrix(128).sign(), signs.double())
    assert torch.equal(hadamard_matrix(128), signs.double() / math.sqrt(128))
    assert torch.equal(hadamard_matrix(128).bfloat16(), official.bfloat16())


# ---- the grid itself ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALPHA)
def test_levels_are_symmetric_evenly_spaced_and_end_at_the_clip(bits: int) -> None:
    step = torch.tensor([1.0], dtype=torch.float64)
    levels = from_codes(torch.arange(2**bits), step, bits)
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels.diff(), torch.ones(2**bits - 1, dtype=torch.float64))
    values = torch.ones(1, 4, dtype=torch.float64)
    outer = grid_step(values, bits) * levels[-1]
    assert float(outer) == pytest.approx(ALPHA[bits] + 1e-8, rel=1e-15)


@pytest.mark.parametrize("bits", ALPHA)
def test_every_value_goes_to_its_nearest_level(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 4096, generator=generator, dtype=torch.float64)
    step = grid_step(values, bits)
    levels = from_codes(torch.arange(2**bits), step[0], bits)
    nearest = (values[0, :, None] - levels).abs().argmin(-1)
    assert torch.equal(to_codes(values, step, bits)[0], nearest)


@pytest.mark.parametrize("bits", ALPHA)
def test_levels_are_their_own_codes(bits: int) -> None:
    step = torch.tensor([0.37], dtype=torch.float64)
    codes = torch.arange(2**bits)
    assert torch.equal(to_codes(from_codes(codes, step, bits), step, bits), codes)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_values_beyond_the_clip_take_the_outer_level(bits: int) -> None:
    step = torch.tensor([1.0])
    assert to_codes(torch.tensor([-1e6, 1e6]), step, bits).tolist() == [0, 2**bits - 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_steps_are_at_least_float32(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 65, dtype=torch.float64).to(dtype)[None]
    step = grid_step(values, 4)
    assert step.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert step.shape == (1, 1)
    exact = 2 * (ALPHA[4] * math.sqrt(float(values.double().square().mean())) + 1e-8) / 15
    assert float(step) == pytest.approx(exact, rel=1e-6)


def test_every_group_has_its_own_step() -> None:
    values = torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]).reshape(3, 2)
    step = grid_step(values, 2)
    assert step.shape == (3, 1)
    assert float(step[1] / step[0]) == pytest.approx(2, rel=1e-6)
    assert float(step[2]) > 0


def test_the_grid_scales_with_its_values() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        to_codes(values, grid_step(values, 3), 3), to_codes(values * 8, grid_step(values * 8, 3), 3)
    )


# ---- the optimum, computed on its own ----------------------------------------------------


def mean_squared_error(alpha: float, bits: int) -> float:
    """E (x - Q(x))**2 for x ~ N(0, 1) and 2**bits levels on [-alpha, alpha], in closed form.

    On an interval [a, b) with level c: the integral of (x - c)**2 times the density is
    (1 + c**2) (F(b) - F(a)) + (a - 2 c) f(a) - (b - 2 c) f(b).
    """
    levels = np.linspace(-alpha, alpha, 2**bits)
    edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    inside = np.isfinite(edges)
    density = np.where(
        inside, np.exp(-(np.where(inside, edges, 0) ** 2) / 2) / math.sqrt(2 * math.pi), 0
    )
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    moment = np.where(inside, edges, 0) * density
    c = levels
    total = (1 + c**2) * np.diff(below) - np.diff(moment) + 2 * c * np.diff(density)
    return float(total.sum())


def best_alpha(bits: int) -> float:
    """The minimiser by golden-section search; the error is convex around it."""
    low, high, ratio = 0.5, 5.0, (math.sqrt(5) - 1) / 2
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if mean_squared_error(a, bits) < mean_squared_error(b, bits):
            high = b
        else:
            low = a
    return (low + high) / 2


def test_the_closed_form_agrees_with_integration() -> None:
    """Simpson's rule on a fine mesh between the edges."""
    alpha, bits = 1.3, 2
    levels = np.linspace(-alpha, alpha, 4)
    edges = [-12.0, *((levels[1:] + levels[:-1]) / 2), 12.0]
    total = 0.0
    for low, high, level in zip(edges[:-1], edges[1:], levels, strict=True):
        x = np.linspace(low, high, 20_001)
        y = (x - level) ** 2 * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        weights = np.ones_like(x)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        total += float((weights * y).sum() * (x[1] - x[0]) / 3)
    assert mean_squared_error(alpha, bits) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("bits", ALPHA)
def test_alpha_is_the_optimum_as_far_as_its_table_says(bits: int) -> None:
    assert abs(ALPHA[bits] - best_alpha(bits)) <= CHOSEN_ALPHA_OFF[bits]


def test_one_bit_has_a_closed_form() -> None:
    assert math.sqrt(2 / math.pi) == ALPHA[1]
    assert mean_squared_error(ALPHA[1], 1) == pytest.approx(1 - 2 / math.pi, rel=1e-12)


@pytest.mark.parametrize("bits", RELATIVE_MSE)
def test_the_error_table_is_the_error_of_the_grid(bits: int) -> None:
    """Printed digits, so half a unit of the last one."""
    text = f"{RELATIVE_MSE[bits]:.10g}"
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    half_unit = 0.5 * 10.0 ** (-digits + int(exponent or 0))
    assert abs(RELATIVE_MSE[bits] - mean_squared_error(ALPHA[bits], bits)) <= half_unit


@pytest.mark.parametrize("bits", RELATIVE_MSE)
def test_the_chosen_clip_costs_next_to_nothing(bits: int) -> None:
    """8 bits is worst: 0.15 % over the optimum."""
    best = mean_squared_error(best_alpha(bits), bits)
    assert best * (1 - 1e-9) <= mean_squared_error(ALPHA[bits], bits) <= best * 1.0016


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gaussian_values_show_the_expected_ratio(bits: int) -> None:
    """A million values: the sample error of a mean square is a few in a thousand (0.05 dB)."""
    values = torch.randn(64, 16384, generator=torch.Generator().manual_seed(0))
    error = (quantized(values, bits) - values).double().square().sum()
    found = -10 * math.log10(float(error / values.double().square().sum()))
    assert found == pytest.approx(expected_sqnr_db(bits), abs=0.05)


@pytest.mark.parametrize(
    ("bits", "decibels"),
    [(1, 4.40), (2, 9.25), (3, 14.27), (4, 19.38), (5, 24.57), (6, 29.83), (7, 35.17), (8, 40.57)],
)
def test_expected_ratios_are_those_of_the_table(bits: int, decibels: float) -> None:
    assert round(expected_sqnr_db(bits), 2) == pytest.approx(decibels, abs=0.011)
