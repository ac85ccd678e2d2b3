"""Merging of frames with the layer norm and modulation beside it, in one pass over the tokens.

A transformer block computes norm(x) * (1 + scale) + shift; temporal token merging (arXiv
2502.04363, section 4.2) averages frames in front of the projections, behind that. The fused kernel
reads every token once and writes merged tokens only. Merging first, then the norm, is the same
kernel with one flag.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.cuda.launch import Config, configured, current_arch, launch
from resplice.kernels.merge_frames import group_count
from resplice.kernels.merge_frames import merge_frames as merge


@triton.jit
def normalized(values: tl.tensor, inside: tl.tensor, size: tl.constexpr, eps: tl.tensor) -> Any:
    """Rows [rows, channels] with mean 0 and variance 1; zero outside."""
    mean = tl.sum(values, 1) / size
    centred = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / size
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def merge_norm_modulate(
    x: tl.tensor, scale: tl.tensor, shift: tl.tensor, out: tl.tensor,
    frames: tl.tensor, groups: tl.tensor, inner: tl.tensor, eps: tl.tensor,
    channels: tl.constexpr, width: tl.constexpr, pair: tl.constexpr, first: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """`block` positions of one merged frame; x is [B, frames, inner, channels], contiguous."""
    frame = tl.program_id(1)
    batch, group = (frame // groups).to(tl.int64), frame % groups
    rows = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, width)
    inside = (rows < inner)[:, None] & (column < channels)[None, :]
    cells = rows.to(tl.int64)[:, None] * channels + column[None, :]
    total = tl.zeros([block, width], tl.float32)
    for member in range(pair):
        source = tl.minimum(group * pair + member, frames - 1)
        start = x + (batch * frames + source) * inner * channels
        values = tl.load(start + cells, mask=inside, other=0.0).to(tl.float32)
        total += values if first else normalized(values, inside, channels, eps)
    total = total / pair
    if first:
        total = normalized(total, inside, channels, eps)
    present = column < channels
    factor = tl.load(scale + batch * channels + column, mask=present, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * channels + column, mask=present, other=0.0).to(tl.float32)
    total = total * (1.0 + factor)[None, :] + offset[None, :]
    target = out + (batch * groups + group) * inner * channels
    tl.store(target + cells, total.to(out.dtype.element_ty), mask=inside)


def configs(arch: str, channels: int) -> list[Config]:
    """Configurations, the default first: about 8192 values for 8 warps."""
    width = triton.next_power_of_2(channels)
    sizes = [max(1, values // width) for values in (8192, 4096, 16384)]
    return [Config({"block": size}, 8, 1) for size in dict.fromkeys(sizes)]


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, frames: int, pair: int, eps: float = 1e-6,
    first: bool = False,
) -> Tensor:  # fmt: skip
    """The same with plain operators; see `merged_norm`."""
    inner, channels = x.shape[1] // frames, x.shape[2]

    def modulated(tokens: Tensor) -> Tensor:
        normal = torch.nn.functional.layer_norm(tokens, (channels,), eps=eps)
        return normal * (1 + scale[:, None]) + shift[:, None]

    if first:
        return modulated(merge.reference(x, 1, frames, inner, pair))
    merged: Tensor = merge.reference(modulated(x), 1, frames, inner, pair)
    return merged


def merged_norm(
    x: Tensor, scale: Tensor, shift: Tensor, frames: int, pair: int, eps: float = 1e-6,
    first: bool = False,
) -> Tensor:  # fmt: skip
    """merge_frames of layer_norm(x) * (1 + scale) + shift, or, with `first`, that of the merged x.

    Args:
        x: float16, bfloat16 or float32 [B, frames * inner, C], frame after frame.
        scale: [B,C].
        shift: [B,C].
        frames: T.
        pair: Frames of a group; the last frame fills the last group.
        eps: Of the norm, which has no weights of its own.
        first: Merge before the norm.

    Returns:
        [B, ceil(T / pair) * inner, C] in the dtype of `x`.

    Raises:
        OpError: The tokens are no whole number of frames, or modulation has another shape.
    """
    batch, tokens, channels = x.shape
    if tokens % frames:
        raise OpError("merge_norm", "x", f"has {tokens} tokens, not a multiple of {frames} frames")
    for name, table in (("scale", scale), ("shift", shift)):
        if tuple(table.shape) != (batch, channels):
            raise OpError("merge_norm", name, f"is {list(table.shape)}, not {[batch, channels]}")
    groups, inner = group_count(frames, pair), tokens // frames
    out = x.new_empty(batch, groups * inner, channels)
    chosen = configured("merge_norm_modulate", configs(current_arch(), channels))
    launch(
        merge_norm_modulate, (triton.cdiv(inner, chosen.constants["block"]), batch * groups),
        x=x.contiguous(), scale=scale.contiguous(), shift=shift.contiguous(), out=out,
        frames=frames, groups=groups, inner=inner, eps=eps, channels=channels,
        width=triton.next_power_of_2(channels), pair=pair, first=first, **chosen.options,
    )  # fmt: skip
    return out
