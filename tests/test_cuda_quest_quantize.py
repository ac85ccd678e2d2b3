"""quest_quantize as one Triton kernel: transform, step and rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, compiled, error, launches, meta, poison

from resplice.kernels.cuda import quest_quantize as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.gaussian_grid import grid_step
from resplice.kernels.hadamard import hadamard
from resplice.kernels.quest_codes import quest_codes
from resplice.kernels.quest_quantize import rounded

CODES = [sample for sample in quest_codes.samples() if not sample.refused]
SAMPLES = [sample for sample in rounded.samples() if not sample.refused]


def holds(x: Tensor, bits: int, block: int, *rest: Any) -> bool:
    """Levels are those of float64, but where a value lies on the edge between two; then turned."""
    with poison():
        found = cuda.quest_quantize(x, bits, block, *rest)
    assert found.dtype == x.dtype
    back, widen, exact = rest[2], rest[3:] == (True,), x.double()
    turned = exact if block == 1 else hadamard.reference(exact, block)
    step = grid_step(turned, bits, widen)
    other = found.double()
    if back and block > 1:
        other = hadamard.reference(other, block)
    half = 2 ** (bits - 1)
    place = (turned / step).clamp(-half, half)
    edge = (place - place.round()).abs() < 1e-4
    level = (place + 0.5).round().clamp(1 - half, half) - 0.5
    near = torch.where(edge, (other / step + 0.5).round().clamp(1 - half, half) - 0.5, level)
    assert bool(((near - level).abs() <= 1).all())
    nearest = near * step
    exact_result = hadamard.reference(nearest, block) if back and block > 1 else nearest
    return error(found, exact_result) <= bar(x.dtype)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    assert holds(*sample.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "block"), [(24, 8), (20, 1), (384, 128), (2944, 128), (8320, 64)])
def test_any_size(size: int, block: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(3, size)).to(dtype)
    for bits in (1, 2, 4, 8):
        for back in (True, False):
            assert holds(x, bits, block, 0.0, "trust", back)


@pytest.mark.parametrize("sizes", [(1, 16), (4, 4), (2, 32), (16, 1)])
def test_block_sizes(sizes: tuple[int, int]) -> None:
    block_m, blocks = sizes
    config = Config({"block_m": block_m, "blocks": blocks}, 4, 1)
    with using(quest_quantize_rows=config):
        assert holds(torch.randn(5, 640), 4, 128, 0.0, "trust", True)
        assert holds(torch.randn(3, 96), 3, 32, 0.0, "ste", False)


@pytest.mark.parametrize("sample", CODES, ids=lambda s: s.label)
def test_samples_of_codes(sample: Any) -> None:
    with poison():
        found = cuda.quest_codes(*sample.args)
    for one, other in zip(found, quest_codes.reference(*sample.args), strict=True):
        assert error(one, other) <= bar(torch.float32)


@pytest.mark.parametrize(("size", "block", "bits"), [(384, 128, 4), (20, 1, 1), (96, 32, 8)])
def test_codes_and_steps_are_those_of_the_values(size: int, block: int, bits: int) -> None:
    x = torch.randn(2, 3, size)
    x[0, 0] = 0
    with poison():
        codes, step = cuda.quest_codes(x, bits, block)
        values = cuda.quest_quantize(x, bits, block, 0.0, "trust", False)
    assert (codes.dtype, step.shape) == (torch.int8, (2, 3, 1))
    assert torch.equal((codes + 0.5) * step, values)


def test_rows_of_zeros_and_outliers() -> None:
    x = torch.randn(4, 256)
    x[0], x[1, 3], x[2] = 0, 1e4, 1e-6 * x[2]
    assert holds(x, 4, 128, 0.0, "trust", False)
    assert torch.equal(
        cuda.quest_quantize(x[:1], 4, 128, 0.0, "trust", False),
        rounded.reference(x[:1], 4, 128, 0.0, "trust", False),
    )


@pytest.mark.parametrize(("size", "block"), [(1280, 128), (192, 64), (100, 1)])
@pytest.mark.parametrize("sizes", [(1, 16), (4, 4), (2, 2)])
def test_wider_grids(size: int, block: int, sizes: tuple[int, int]) -> None:
    """Rows at once and in parts, the loudest value in the last one."""
    x = torch.randn(7, size)
    x[1, 3], x[4, -1], x[6] = 1e3, -60, 0
    with using(quest_quantize_rows=Config({"block_m": sizes[0], "blocks": sizes[1]}, 4, 1)):
        assert holds(x, 8, block, 0.0, "trust", False, True)
        with poison():
            codes, step = cuda.quest_codes(x, 8, block, True)
    wanted, wide = quest_codes.reference(x, 8, block, True)
    torch.testing.assert_close(step, wide, rtol=1e-6, atol=0)
    assert (codes.int() - wanted).abs().max() <= 1
    assert (codes != wanted).float().mean() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [4096, 11008])
def test_compiled_code(arch: str, size: int, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bits, block, back in ((4, 128, True), (8, 128, False), (1, 32, True), (4, 1, False)):
            args = (meta(512, size, dtype=dtype), bits, block, 0.0, "trust", back)
            (item,) = launches(cuda.quest_quantize, args, arch)
            code = compiled(item, arch, tmp_path)
            assert code.spills == 0, (dtype, bits, block)
            assert (code.tensor_core > 0) == (block > 1)
        (item,) = launches(cuda.quest_codes, (meta(512, size, dtype=dtype), 8, 128, True), arch)
        assert compiled(item, arch, tmp_path).spills == 0, dtype
