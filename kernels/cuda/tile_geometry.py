"""What the tile attention kernels share: windows of an axis, tokens of a box, rows of a tensor.

The keys that a query tile sees form a box of the canvas, on ragged canvases too. Its tokens are
numbered through in raster order, so that a loop over blocks of them has at most one partial block,
its last, whatever the sizes of tile, canvas and block. Two multiplications turn a number into a
raster position: nothing is permuted into tile order, before or after.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def axis_keys(index: Any, tile: Any, extent: Any, size: Any) -> Any:
    """Keys that query tile `index` sees on an axis of `size` tokens.

    Returns:
        First token and length of the query tile, first token and length of its keys.
    """
    count = (size + tile - 1) // tile
    first = tl.minimum(tl.maximum(index - extent // 2, 0), count - extent)
    start, stop = first * tile, tl.minimum((first + extent) * tile, size)
    own = index * tile
    return own, tl.minimum(tile, size - own), start, stop - start


@triton.jit
def axis_queries(index: Any, tile: Any, extent: Any, size: Any) -> Any:
    """Queries that see key tile `index`: the inverse, an interval as well.

    Query tile i sees the tiles from clamp(i - r, 0, count - extent) on, r = extent // 2, which
    never falls with i. So j is seen from j - r (from 0 if j < extent) to j + r (to the last tile
    if j >= count - extent).

    Returns:
        First token and length of the key tile, first token and length of its queries.
    """
    count = (size + tile - 1) // tile
    first = tl.where(index < extent, 0, index - extent // 2)
    last = tl.where(index >= count - extent, count - 1, index + extent // 2)
    start, stop = first * tile, tl.minimum((last + 1) * tile, size)
    own = index * tile
    return own, tl.minimum(tile, size - own), start, stop - start


@triton.jit
def reciprocal(size: Any) -> Any:
    """m with n // size == umulhi(n, m) while n * size < 2**32, as the bits of an int32."""
    return ((0xFFFFFFFF // size.to(tl.uint32)) + 1).to(tl.int32, bitcast=True)


@triton.jit
def box_tokens(
    numbers: Any, start: Any, size_h: Any, size_w: Any, per_h: Any, per_w: Any, h: Any, w: Any
) -> Any:
    """Raster positions of a box's tokens.

    Args:
        numbers: int32, which tokens of the box.
        start: Raster position of its first token.
        size_h: Height of the box.
        size_w: Width of the box.
        per_h: `reciprocal(size_h)`.
        per_w: `reciprocal(size_w)`.
        h: Height of the canvas.
        w: Width of the canvas.
    """
    line = tl.where(size_w == 1, numbers, tl.umulhi(numbers, per_w))
    plane = tl.where(size_h == 1, line, tl.umulhi(line, per_h))
    column, line = numbers - line * size_w, line - plane * size_h
    return start + plane * (h * w) + line * w + column


@triton.jit
def row_pointers(
    base: Any, tokens: Any, stride: Any, width: tl.constexpr, wide: tl.constexpr
) -> Any:
    """Pointers to [tokens, width]; `wide` where a tensor of one head passes 2**31 elements."""
    places = tokens.to(tl.int64) if wide else tokens
    return base + places[:, None] * stride + tl.arange(0, width)[None, :]


@triton.jit
def load_rows(
    base: Any, tokens: Any, stride: Any, valid: Any, size: tl.constexpr, width: tl.constexpr,
    wide: tl.constexpr, partial: tl.constexpr,
) -> Any:  # fmt: skip
    """Rows [tokens, width] of a tensor with `size` channels; zeros where they end.

    Args:
        base: Of one batch item and head.
        tokens: int32 [rows].
        stride: Elements from token to token.
        valid: Boolean [rows], looked at only if `partial`.
        size: Channels.
        width: Next power of two.
        wide: See `row_pointers`.
        partial: Whether rows may be missing.
    """
    pointers = row_pointers(base, tokens, stride, width, wide)
    columns = tl.arange(0, width)[None, :]
    if partial and size < width:
        return tl.load(pointers, mask=valid[:, None] & (columns < size), other=0.0)
    elif partial:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    elif size < width:
        return tl.load(pointers, mask=columns < size, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(
    base: Any, tokens: Any, stride: Any, valid: Any, values: Any, size: tl.constexpr,
    width: tl.constexpr, wide: tl.constexpr,
) -> None:  # fmt: skip
    """Store the valid rows of [tokens, width], in the dtype of the tensor."""
    pointers = row_pointers(base, tokens, stride, width, wide)
    inside = valid[:, None] & (tl.arange(0, width)[None, :] < size)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def key_scores(
    scores: Any, base: Any, places: Any, stride: Any, valid: Any, masking: tl.constexpr
) -> Any:
    """Scores, base two, under a mask of keys.

    Args:
        scores: [rows, keys].
        base: The mask of one batch item and head.
        places: int32 [keys], where a key's entry is.
        stride: Elements from entry to entry.
        valid: Boolean [keys]; other keys keep their scores.
        masking: 1: zero means "not seen". 2: entries are added, base e.
    """
    entries = tl.load(base + places.to(tl.int64) * stride, mask=valid, other=1 - masking // 2)
    if masking == 1:
        return tl.where((entries != 0)[None, :], scores, -float("inf"))
    else:
        return scores + (entries.to(tl.float32) * 1.4426950408889634)[None, :]
