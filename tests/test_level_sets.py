"""Level sets, pruning and their gradient, against definitions written out anew in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.gaussian_grid import ALPHA
from resplice.kernels.hadamard import hadamard_matrix
from resplice.kernels.level_sets import bits_of, decode, encode, expected_mse, level_values, step_of
from resplice.kernels.pruning import compress, expand, kept_units, kept_values
from resplice.kernels.quest_quantize import quest_quantize
from resplice.kernels.round_to_levels import quest_round
from resplice.passes.quest.packed import Form, pack_weight

SETS = ("int1", "int2", "int3", "int4", "int8", "fp4")
PATTERNS: dict[int, Any] = {0: "off", 1: "2:4", 2: "4:8"}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def levels_of(name: str) -> Tensor:
    """The levels of a row of root mean square one, ascending, from the paper's numbers."""
    if name == "fp4":
        return torch.tensor([-v for v in reversed(E2M1)] + E2M1[1:]).double() * 0.48707976
    return torch.linspace(-1, 1, 2 ** bits_of(name), dtype=torch.float64) * ALPHA[bits_of(name)]


def nearest(values: Tensor, name: str) -> Tensor:
    """Each value's nearest level, the root mean square taken over its row."""
    rms = values.square().mean(-1, keepdim=True).sqrt()
    levels = levels_of(name)
    return levels[(values[..., None] / rms[..., None] - levels).abs().argmin(-1)] * rms


def largest_half(values: Tensor, unit: int) -> Tensor:
    """One where a value stays: two of every four units, tried one by one."""
    found = torch.ones_like(values)
    for row, mask in zip(values, found, strict=True):
        for start in range(0, len(row), 4 * unit):
            units = [range(start + i * unit, start + (i + 1) * unit) for i in range(4)]
            norm = [sum(float(row[k]) ** 2 for k in own) for own in units]
            for i in sorted(range(4), key=lambda i: (-norm[i], i))[2:]:
                mask[list(units[i])] = 0
    return found


def rows(seed: int = 0, count: int = 6, size: int = 256) -> Tensor:
    """Gaussian rows of several sizes, one with an outlier, one shifted."""
    x = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[1] *= 7
    x[2, 3] *= 40
    x[3] = x[3].abs()
    return x


@pytest.mark.parametrize("name", SETS)
def test_a_value_takes_the_nearest_level(name: str) -> None:
    x = rows()
    step = step_of(x, name)
    codes = encode(x, step, name)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 2 ** bits_of(name)
    found = decode(codes, name, torch.float64) * step
    assert torch.allclose(found, nearest(x, name), rtol=1e-6, atol=1e-7)
    assert torch.equal(level_values(name)[codes].double() * step, found)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_gaussian_values_err_as_expected(name: str, unit: int) -> None:
    x = torch.randn(400, 1024, generator=torch.Generator().manual_seed(1))
    error = quest_round(x, name, sparse=PATTERNS[unit], rotate_back=False) - _rotated(x)
    measured = float(error.square().mean() / x.square().mean())
    assert measured == pytest.approx(expected_mse(name, unit), rel=0.02)


def test_the_published_errors() -> None:
    """0.215 for pruned 4-bit weights, 0.208 for pruning alone; 0.012685 for FP4."""
    assert expected_mse("int4", 2) == pytest.approx(0.215, abs=5e-4)
    assert expected_mse("int8", 2) - expected_mse("int8") == pytest.approx(0.208, abs=5e-4)
    assert expected_mse("fp4") == pytest.approx(0.012685, rel=1e-3)
    assert expected_mse("int4") == pytest.approx(0.0115429, rel=1e-3)


@pytest.mark.parametrize("unit", [1, 2])
def test_the_two_largest_of_four_units_stay(unit: int) -> None:
    x = rows(size=64)
    kept = kept_units(x, unit)
    assert torch.equal(kept_values(kept, unit).double(), largest_half(x, unit))
    assert (kept.sum(-1) == 2).all()
    small, places = compress(x, kept, unit)
    assert small.shape[-1] == 32
    assert torch.equal(expand(small, places, unit), x * largest_half(x, unit))


@pytest.mark.parametrize("unit", [1, 2])
def test_of_equal_units_the_first_stay(unit: int) -> None:
    kept = kept_units(torch.ones(1, 8 * unit), unit)
    assert kept.tolist() == [[[True, True, False, False]] * 2]
    assert kept_units(torch.zeros(1, 4 * unit), unit).sum() == 2


def _rotated(x: Tensor, block: int = 128) -> Tensor:
    return (x.unflatten(-1, (-1, block)) @ hadamard_matrix(block).to(x.dtype)).flatten(-2)


@pytest.mark.parametrize(("name", "unit"), itertools.product(SETS, [0, 1, 2]))
def test_forward_and_gradient_by_definition(name: str, unit: int) -> None:
    """M = 1 where |Q(v) - v| <= T rms, pruned entries with Q(v) = 0; applied after the rotation."""
    x, grad = rows(2), rows(3)
    v = _rotated(x)
    rms = v.square().mean(-1, keepdim=True).sqrt()
    half = 0.48707976 if name == "fp4" else ALPHA[bits_of(name)] / (2 ** bits_of(name) - 1)
    expected = nearest(v, name) * (largest_half(v, unit) if unit else 1)
    distance = (expected - v).abs() / rms - half
    mask = (distance <= 0).double()
    given = x.clone().requires_grad_()
    found = quest_round(given, name, sparse=PATTERNS[unit])
    assert torch.allclose(found.detach(), _rotated(expected), rtol=1e-6, atol=1e-6)
    found.backward(grad)
    border = distance.abs() < 1e-6  # inside the range the largest distance is T itself
    difference = _rotated(given.grad) - mask * _rotated(grad)  # type: ignore[arg-type]
    assert difference[~border].abs().max() < 1e-9
    assert border.float().mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("estimator", ["trust", "clip", "ste"])
def test_dense_integers_are_those_of_the_plain_quantiser(bits: int, estimator: Any) -> None:
    x, grad = rows(4).float(), rows(5).float()
    results = []
    for function, what in ((quest_quantize, bits), (quest_round, f"int{bits}")):
        given = x.clone().requires_grad_()
        found = function(
            given, what, estimator=estimator, clip=1.3 if estimator == "clip" else None
        )  # type: ignore[operator]
        found.backward(grad)
        results.append((found.detach(), given.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_trust_bound_of_fp4_is_the_largest_half_interval() -> None:
    """7 scales let a gradient pass; the published code's bound of 0.3186 rms would stop at 6.65."""
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([6.6, 6.9, 7.1, -6.9])
    row[0, 4:] = ((128 / 0.48707976**2 - row.square().sum()) / 124).sqrt()
    x = row.requires_grad_()
    quest_round(x, "fp4", hadamard="off").sum().backward()
    assert x.grad is not None
    assert x.grad[0, :4].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 48)])
def test_packed_weights_are_the_rounded_ones(name: str, unit: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    packed = pack_weight(x, Form(name, unit), 16)
    sparse = PATTERNS[unit]
    assert torch.equal(
        packed.rotated(), quest_round(x, name, sparse=sparse, hadamard=16, rotate_back=False)
    )
    assert torch.equal(packed.dequantize(), quest_round(x, name, sparse=sparse, hadamard=16))
    bits = bits_of(name) if unit == 0 else bits_of(name) / 2 + (1 if unit == 1 else 0.5)
    assert packed.nbytes == x.numel() * bits / 8 + 4 * x[..., 0].numel()


def test_a_row_of_zeros_stays_finite_and_passes_nothing() -> None:
    for name, unit in itertools.product(SETS, [0, 1, 2]):
        x = torch.zeros(2, 16, requires_grad=True)
        found = quest_round(x, name, sparse=PATTERNS[unit], hadamard=16)
        found.sum().backward()
        assert found.abs().max() < 1e-7
        assert x.grad is not None
        assert not x.grad.any()


def test_other_patterns_are_refused() -> None:
    with pytest.raises(OpError, match="'1:2', not one of off, 2:4, 4:8"):
        quest_round(torch.randn(2, 8), "int4", sparse="1:2")  # type: ignore[arg-type]
