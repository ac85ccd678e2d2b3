"""quest_quantize against the reference algorithm's vectors and against float64 by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.gaussian_grid import ALPHA
from resplice.kernels.hadamard import hadamard_matrix
from resplice.kernels.quest_quantize import quest_quantize

DATA = Path(__file__).parent / "data" / "quest_quantizers.npz"
VECTORS = {name: torch.from_numpy(value) for name, value in np.load(DATA).items()}
EXACT, OFFICIAL_MATRIX = 1e-5, 1e-3  # the authors' matrix holds bfloat16 entries
CASES: dict[str, tuple[int, dict[str, Any], float]] = {
    f"{name}_b{bits}": (bits, options, EXACT)
    for bits in (1, 4)
    for name, options in {
        "STE": {"hadamard": "off", "estimator": "ste"},
        "Clip": {"hadamard": "off", "estimator": "clip"},
        "Trust": {"hadamard": "off"},
        "HalfHadTrust_exactH": {"rotate_back": False},
        "HadTrust_exactH": {},
    }.items()
} | {
    "Clip_b1_s1.25": (1, {"hadamard": "off", "estimator": "clip", "clip": 1.25}, EXACT),
    "HadClip_b1_s1.30": (1, {"estimator": "clip", "clip": 1.30}, OFFICIAL_MATRIX),
    "HalfHadClip_b1_s1.30": (
        1, {"estimator": "clip", "clip": 1.30, "rotate_back": False}, OFFICIAL_MATRIX,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_reference_vectors(name: str) -> None:
    bits, options, bar = CASES[name]
    x = VECTORS["x"].clone().requires_grad_()
    y = quest_quantize(x, bits, **options)
    y.backward(VECTORS["g"])
    for found, expected in ((y, VECTORS[f"y_{name}"]), (x.grad, VECTORS[f"gx_{name}"])):
        assert found is not None
        assert (found - expected).abs().max() <= bar * max(1.0, float(expected.abs().max()))


def by_hand(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Nearest level and trust mask of every value, in float64, level by level."""
    values = (x.double().unflatten(-1, (-1, block)) @ hadamard_matrix(block)).flatten(-2)
    rms = values.square().mean(-1, keepdim=True).sqrt()
    scale = ALPHA[bits] * rms
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64) * scale[..., None]
    nearest = (values[..., None] - levels).abs().argmin(-1, keepdim=True)
    rounded = levels.expand(*values.shape, -1).gather(-1, nearest)[..., 0]
    trusted = (rounded - values).abs() <= scale / (2**bits - 1) * (1 + 1e-6)
    return rounded, trusted


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("block", [1, 8, 64])
def test_levels_and_gradients_by_hand(bits: int, block: int) -> None:
    generator = torch.Generator().manual_seed(bits * 100 + block)
    x = torch.randn(5, 192, generator=generator, dtype=torch.float64) * 3
    x.requires_grad_()
    expected, mask = by_hand(x.detach(), bits, block)
    y = quest_quantize(x, bits, hadamard=block, rotate_back=False)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    gradient = torch.randn(5, 192, generator=generator, dtype=torch.float64)
    y.backward(gradient)
    back = ((gradient * mask).unflatten(-1, (-1, block)) @ hadamard_matrix(block)).flatten(-2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, back, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [1, 64])
def test_only_rows_with_outliers_get_a_wider_grid(bits: int, block: int) -> None:
    generator = torch.Generator().manual_seed(bits * 10 + block)
    x = torch.randn(6, 192, generator=generator).clamp(-2, 2)
    x[1, :64] += 30 if block > 1 else 0  # turned, one value of eight times the sum
    x[1, 5], x[4, 17] = 90, -40
    x.requires_grad_()
    options: dict[str, Any] = {"hadamard": block, "rotate_back": False}
    y, plain = quest_quantize(x, bits, widen=True, **options), quest_quantize(x, bits, **options)
    turned = (x.detach().double().unflatten(-1, (-1, block)) @ hadamard_matrix(block)).flatten(-2)
    rms = turned.square().mean(-1).sqrt()
    far = turned.abs().amax(-1) > 1.25 * ALPHA[bits] * rms
    assert far[1]
    assert block > 1 or far[4]
    assert bits < 8 or far.sum() <= 2
    assert torch.equal(y[~far], plain[~far])
    torch.testing.assert_close(y[far].abs().amax(-1).double(), turned[far].abs().amax(-1))
    step = 2 * turned[far].abs().amax(-1, keepdim=True) / (2**bits - 1)
    assert ((y[far] - turned[far]).abs() <= step / 2 * (1 + 1e-4)).all()
    y.sum().backward()
    inside = (torch.ones_like(turned).unflatten(-1, (-1, block)) @ hadamard_matrix(block)).flatten(
        -2
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad[far].double(), inside[far], rtol=1e-5, atol=1e-5)


def test_gaussian_rows_are_not_widened() -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2))
    same = (quest_quantize(x, 8) == quest_quantize(x, 8, widen=True)).all(-1)
    assert same.sum() >= 62


def test_rotating_back_is_the_inverse_transform() -> None:
    x = torch.randn(3, 96)
    rotated = quest_quantize(x, 4, hadamard=32, rotate_back=False)
    back = (rotated.double().unflatten(-1, (-1, 32)) @ hadamard_matrix(32)).flatten(-2)
    torch.testing.assert_close(quest_quantize(x, 4, hadamard=32).double(), back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(4, 128, dtype=dtype, requires_grad=True)
    y = quest_quantize(x, 4)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_auto_takes_the_largest_block_that_divides() -> None:
    x = torch.randn(2, 576)
    assert torch.equal(quest_quantize(x, 4, hadamard="auto"), quest_quantize(x, 4, hadamard=64))


def test_gaussian_values_err_as_theory_says() -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    for bits, expected in ((1, 0.363380), (2, 0.118846), (4, 0.0115429), (8, 8.782e-5)):
        error = (quest_quantize(x, bits) - x).norm() / x.norm()
        assert math.isclose(error, math.sqrt(expected), rel_tol=0.02), bits


def test_a_row_of_zeros_stays_tiny_and_passes_no_gradient() -> None:
    x = torch.zeros(1, 128, requires_grad=True)
    y = quest_quantize(x, 4)
    y.sum().backward()
    assert y.abs().max() < 1e-6
    assert x.grad is not None
    assert not x.grad.any()


def test_it_compiles_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 128, requires_grad=True)
    quest_quantize(x, 2).square().sum().backward()
    expected = x.grad
    x.grad = None
    checkpoint(lambda v: quest_quantize(v, 2), x, use_reentrant=False).square().sum().backward()
    assert expected is not None
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    compiled = torch.compile(lambda v: quest_quantize(v, 2), backend="aot_eager", fullgraph=True)
    x.grad = None
    compiled(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 9}, "1 to 8"),
        ({"hadamard": 48}, "not a power of two"),
        ({"hadamard": 512}, "dividing 256"),
        ({"estimator": "lsq"}, "not one of"),
        ({"clip": -1.0}, "must be positive"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], reason: str) -> None:
    options = {"bits": 4, **options}
    with pytest.raises(OpError, match=reason):
        quest_quantize(torch.randn(2, 256), **options)
