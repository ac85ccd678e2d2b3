"""merge_frames and unmerge_frames on GPUs: one read and one write of every element.

Both see the tensor as [rows, frames, width]; a program owns `block` neighbouring elements of one
frame of the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.launch import Config, configured, current_arch, launch
from resplice.kernels.merge_frames import group_count


@triton.jit
def merge_frames_mean(
    x: tl.tensor, out: tl.tensor, frames: tl.tensor, groups: tl.tensor, width: tl.tensor,
    pair: tl.constexpr, double: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Average the frames of one group; the last frame fills the last group."""
    blocks = tl.cdiv(width, block)
    place = tl.program_id(0)
    frame, columns = place // blocks, place % blocks * block + tl.arange(0, block)
    row, group = (frame // groups).to(tl.int64), frame % groups
    inside = columns < width
    kind = tl.float64 if double else tl.float32
    total = tl.zeros([block], kind)
    for member in range(pair):
        source = tl.minimum(group * pair + member, frames - 1)
        pointers = x + (row * frames + source) * width + columns
        total += tl.load(pointers, mask=inside, other=0.0).to(kind)
    result = (total / pair).to(out.dtype.element_ty)
    tl.store(out + frame.to(tl.int64) * width + columns, result, mask=inside)


@triton.jit
def unmerge_frames_copy(
    x: tl.tensor, out: tl.tensor, frames: tl.tensor, groups: tl.tensor, width: tl.tensor,
    pair: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Write one frame: a copy of its group."""
    blocks = tl.cdiv(width, block)
    place = tl.program_id(0)
    frame, columns = place // blocks, place % blocks * block + tl.arange(0, block)
    row, group = (frame // frames).to(tl.int64), frame % frames // pair
    inside = columns < width
    values = tl.load(x + (row * groups + group) * width + columns, mask=inside)
    tl.store(out + frame.to(tl.int64) * width + columns, values, mask=inside)


def configs(arch: str, width: int) -> list[Config]:
    """Configurations, the default first: no block much longer than a frame."""
    most = max(64, triton.next_power_of_2(width))
    return [Config({"block": min(size, most)}, 4, 1) for size in (1024, 2048, 512)]


def _framed(x: Tensor, dim: int, frames: int, inner: int) -> tuple[Tensor, int, int]:
    """The tensor, contiguous; rows; elements of a frame."""
    place = dim % x.dim()
    width = inner * math.prod(x.shape[place + 1 :])
    rows = math.prod(x.shape[:place]) * (x.shape[place] // (frames * inner))
    return x.contiguous(), rows, width


def _result(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape: list[Any] = list(x.shape)
    shape[dim] = shape[dim] // before * after
    return x.new_empty(shape)


def merge_frames(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """The op on a GPU."""
    groups = group_count(frames, pair)
    source, rows, width = _framed(x, dim, frames, inner)
    out = _result(x, dim, frames, groups)
    chosen = configured("merge_frames_mean", configs(current_arch(), width))
    blocks = rows * groups * triton.cdiv(width, chosen.constants["block"])
    if not statically_known_true(blocks == 0):
        launch(
            merge_frames_mean, (blocks,), x=source, out=out, frames=frames, groups=groups,
            width=width, pair=pair, double=x.dtype == torch.float64, **chosen.options,
        )  # fmt: skip
    return out


def unmerge_frames(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """The op on a GPU."""
    groups = group_count(frames, pair)
    source, rows, width = _framed(x, dim, groups, inner)
    out = _result(x, dim, groups, frames)
    chosen = configured("unmerge_frames_copy", configs(current_arch(), width))
    blocks = rows * frames * triton.cdiv(width, chosen.constants["block"])
    if not statically_known_true(blocks == 0):
        launch(
            unmerge_frames_copy, (blocks,), x=source, out=out, frames=frames, groups=groups,
            width=width, pair=pair, **chosen.options,
        )  # fmt: skip
    return out
