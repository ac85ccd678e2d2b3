"""rope3d in Triton: samples, layouts, large angles, queries and keys together, compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, compiled, error, launches, meta, poison, wide

from resplice.kernels.cuda import rope3d as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.rope3d import rope3d

SAMPLES = [sample for sample in rope3d.samples() if not sample.refused]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(n: int) -> torch.Tensor:
    return 1e4 ** -(torch.arange(n) / n)


def exact(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The reference, its angles in float32 like the op's and the rest in float64."""
    return rope3d.reference(x.float(), *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any, dtype: torch.dtype) -> None:
    x, *rest = sample.args
    x = x.to(dtype)
    with poison():
        found = cuda.rope3d(x, *rest)
    assert found.dtype == dtype
    assert error(found, exact(x, *rest)) <= bar(dtype)


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("pairs", [False, True])
def test_block_sizes_and_layouts(block: int, pairs: bool) -> None:
    """Any number of angles; heads before and after the tokens, spread out in memory."""
    positions, axis_map = torch.randint(-50, 900, (3, 2, 7)) / 4, [0, 1, 2, 2, 1, 0]
    rest = (positions, angles(6), axis_map, 1.25, pairs)
    before = torch.randn(2, 7, 3, 12).transpose(1, 2)
    after = torch.randn(2, 2, 7, 3, 24)[..., ::2]
    with using(rope3d_rotate=Config({"block_s": block}, 4, 1)), poison():
        assert error(cuda.rope3d(before, *rest), exact(before, *rest)) <= 1e-5
        assert error(cuda.rope3d(after, *rest, -3), exact(after, *rest, -3)) <= 1e-5


def test_angles_of_long_videos() -> None:
    """Cosine and sine of angles up to 2**24, against float64 of the same float32 angles."""
    x = torch.tensor([1.0, 0.0]).repeat(1, 1, 4096, 1)
    positions = torch.cat((torch.linspace(-20, 20, 2048), torch.logspace(0, 7.2, 2048)))
    found = cuda.rope3d(x, positions[None, None], torch.ones(1), [0], 1.0, False, -2)
    assert float((found[0, 0, :, 0].double() - positions.double().cos()).abs().max()) <= 2e-7
    assert float((found[0, 0, :, 1].double() - positions.double().sin()).abs().max()) <= 2e-7


@pytest.mark.parametrize("token_axis", [-2, -3])
def test_queries_and_keys_take_one_launch(token_axis: int) -> None:
    def drawn(heads: int) -> torch.Tensor:
        return torch.randn((2, heads, 9, 16) if token_axis == -2 else (2, 9, heads, 16))

    q, k = drawn(4), drawn(2)
    positions = torch.randint(0, 99, (3, 1, 9))
    rest = (positions, angles(8), [0, 0, 1, 1, 2, 2, 2, 2], 1.0, False, token_axis)
    with poison():
        found = cuda.rope3d_both(q, k, *rest)
    assert all(error(a, exact(b, *rest)) <= 1e-5 for a, b in zip(found, (q, k), strict=True))
    assert len(launches(cuda.rope3d_both, (q, k, *rest), "sm_90")) == 1


def test_float64_goes_the_way_of_the_reference() -> None:
    args = wide(SAMPLES[0].args)
    assert torch.equal(cuda.rope3d(*args), rope3d.reference(*args))


def test_the_gradient_turns_back() -> None:
    x, positions, inv_freq, *rest = SAMPLES[0].args
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)
    (expected,) = torch.autograd.grad(
        rope3d.reference(leaf, positions, inv_freq, *rest), leaf, grad
    )
    assert error(cuda.rope3d(grad, positions, -inv_freq, *rest), expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pairs", [False, True])
def test_compiled_code(arch: str, pairs: bool, tmp_path: Path) -> None:
    for dtype in DTYPES:
        q, k = meta(1, 24, 4096, 128, dtype=dtype), meta(1, 8, 4096, 128, dtype=dtype)
        positions, inv_freq = meta(3, 1, 4096, dtype=torch.float32), meta(64, dtype=torch.float32)
        rest = (positions, inv_freq, [0] * 16 + [1, 2] * 24, 1.0, pairs)
        for item in launches(cuda.rope3d_both, (q, k, *rest), arch):
            assert compiled(item, arch, tmp_path).spills == 0, dtype
