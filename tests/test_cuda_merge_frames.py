"""merge_frames and unmerge_frames in Triton, and merging fused with norm and modulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, compiled, error, launches, meta, poison, wide

from resplice.errors import OpError
from resplice.kernels.cuda import merge_frames as cuda
from resplice.kernels.cuda import merge_norm
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.merge_frames import merge_frames, unmerge_frames

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    (op, host, sample)
    for op, host in ((merge_frames, cuda.merge_frames), (unmerge_frames, cuda.unmerge_frames))
    for sample in op.samples()
    if not sample.refused
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("op", "host", "sample"), CASES, ids=lambda x: getattr(x, "label", ""))
def test_samples(op: Any, host: Any, sample: Any, dtype: torch.dtype) -> None:
    x, *rest = sample.args
    x = x.to(dtype)
    with poison():
        found = host(x, *rest)
    assert found.dtype == dtype
    within = bar(dtype) if dtype != torch.float64 else 1e-14
    assert error(found, op.reference(x.double(), *rest)) <= within


@pytest.mark.parametrize("block", [16, 64, 256])
def test_block_sizes_and_spread_inputs(block: int) -> None:
    x = torch.randn(2, 11 * 3, 7, 2).transpose(1, 2)[..., 0]
    config = Config({"block": block}, 4, 1)
    with using(merge_frames_mean=config, unmerge_frames_copy=config), poison():
        found = cuda.merge_frames(x, -1, 11, 3, 4)
        assert error(found, merge_frames.reference(x, -1, 11, 3, 4)) <= 1e-5
        spread = cuda.unmerge_frames(found, -1, 11, 3, 4)
    assert torch.equal(spread, unmerge_frames.reference(found, -1, 11, 3, 4))


def test_nothing_is_launched_for_nothing() -> None:
    assert cuda.merge_frames(torch.empty(0, 4, 3), 1, 4, 1, 2).shape == (0, 2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("frames", "pair", "channels", "block"), [(4, 2, 24, 8), (5, 3, 17, 2)])
def test_merging_with_norm_and_modulation(
    frames: int, pair: int, channels: int, block: int, first: bool, dtype: torch.dtype
) -> None:
    x = (3 + 2 * torch.randn(2, frames * 5, channels)).to(dtype)
    scale, shift = (torch.randn(2, channels).to(dtype) for _ in range(2))
    args = (x, scale, shift, frames, pair, 1e-5, first)
    with using(merge_norm_modulate=Config({"block": block}, 4, 1)), poison():
        found = merge_norm.merged_norm(*args)
    assert error(found, merge_norm.reference(*wide(args))) <= bar(dtype)


def test_other_shapes_of_modulation_are_refused() -> None:
    x, table = torch.randn(2, 8, 6), torch.randn(2, 6)
    with pytest.raises(OpError, match=r"scale is \[6\], not \[2, 6\]"):
        merge_norm.merged_norm(x, table[0], table, 4, 2)
    with pytest.raises(OpError, match="has 8 tokens, not a multiple of 3 frames"):
        merge_norm.merged_norm(x, table, table, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_code(arch: str, tmp_path: Path) -> None:
    for dtype in DTYPES:
        x, table = meta(2, 16 * 1024, 1152, dtype=dtype), meta(2, 1152, dtype=dtype)
        items = launches(cuda.merge_frames, (x, 1, 16, 1024, 2), arch)
        items += launches(cuda.unmerge_frames, (x, 1, 32, 1024, 2), arch)
        items += launches(merge_norm.merged_norm, (x, table, table, 16, 2), arch)
        for item in items:
            code = compiled(item, arch, tmp_path)
            assert code.spills == 0, (item.name, dtype)
            if arch.startswith("sm_"):
                assert code.count("LDG", "LDS", "LDGSTS") > 0
