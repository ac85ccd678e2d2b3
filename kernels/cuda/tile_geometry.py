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
def axis_keys(index: tl.tensor, tile: tl.tensor, extent: tl.tensor, size: tl.tensor) -> Any:
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
def axis_queries(index: tl.tensor, tile: tl.tensor, extent: tl.tensor, size: tl.tensor) -> Any:
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
def reciprocal(size: tl.tensor) -> Any:
    """M with n // size == umulhi(n, m) while n * size < 2**32, as the bits of an int32."""
    return ((0xFFFFFFFF // size.to(tl.uint32)) + 1).to(tl.int32, bitcast=True)


@triton.jit
def box_tokens(
    numbers: tl.tensor,
    start: tl.tensor,
    size_h: tl.tensor,
    size_w: tl.tensor,
    per_h: tl.tensor,
    per_w: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
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
    base: tl.tensor, tokens: tl.tensor, stride: tl.tensor, width: tl.constexpr, wide: tl.constexpr
) -> Any:
    """Pointers to [tokens, width]; `wide` where a tensor of one head passes 2**31 elements."""
    places = tokens.to(tl.int64) if wide else tokens
    return base + places[:, None] * stride + tl.arange(0, width)[None, :]


@triton.jit
def load_rows(
    base: tl.tensor, tokens: tl.tensor, stride: tl.tensor, valid: tl.tensor, size: tl.constexpr,
    width: tl.constexpr, wide: tl.constexpr, partial: tl.constexpr,
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
    base: tl.tensor, tokens: tl.tensor, stride: tl.tensor, valid: tl.tensor, values: tl.tensor,
    size: tl.constexpr, width: tl.constexpr, wide: tl.constexpr,
) -> None:  # fmt: skip
    """Store the valid rows of [tokens, width], in the dtype of the tensor."""
    pointers = row_pointers(base, tokens, stride, width, wide)
    inside = valid[:, None] & (tl.arange(0, width)[None, :] < size)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def key_bias(
    base: tl.tensor, places: tl.tensor, stride: tl.tensor, present: tl.tensor,
    masking: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What a mask of keys adds to their scores, base two.

    Args:
        base: The mask of one batch item and head.
        places: int32 [keys], where a key's entry is.
        stride: Elements from entry to entry.
        present: Boolean [keys]; nothing is added to other keys.
        masking: 1: zero means "not seen". 2: entries are added, base e.
    """
    pointers = base + places.to(tl.int64) * stride
    if masking == 1:
        return tl.where(tl.load(pointers, mask=present, other=1) == 0, -float("inf"), 0.0)
    else:
        entries = tl.load(pointers, mask=present, other=0.0)
        return entries.to(tl.float32) * 1.4426950408889634


@triton.jit
def own_and_seen(
    entry: tl.tensor, block: tl.tensor, t: tl.tensor, h: tl.tensor, w: tl.tensor,
    text: tl.tensor, image_start: tl.tensor, text_start: tl.tensor, size: tl.constexpr,
    inverse: tl.constexpr,
) -> Any:  # fmt: skip
    """Which queries a program owns and which keys they see, or, inversely, keys and queries.

    Blocks of text come first, for text sees everything; then blocks of `size` tokens tile by tile.

    Args:
        entry: The head's row of the table: tile and extent on three axes.
        block: Number of the program.
        t: Frames of the canvas.
        h: Height.
        w: Width.
        text: Text tokens.
        image_start: Where the image begins in the sequence.
        text_start: Where the text begins.
        size: Tokens of a block.
        inverse: Whether the program owns keys.

    Returns:
        Positions in the sequence of the program's own tokens, int32 [size], and which are valid;
        of the box seen: position of its first token, height, width and number of tokens; text
        tokens seen. A program beyond the last block sees nothing.
    """
    text_blocks = tl.cdiv(text, size)
    is_text = block < text_blocks
    tile_t = tl.where(is_text, t, tl.load(entry))
    tile_h = tl.where(is_text, h, tl.load(entry + 1))
    tile_w = tl.where(is_text, w, tl.load(entry + 2))
    count_t, count_h, count_w = tl.cdiv(t, tile_t), tl.cdiv(h, tile_h), tl.cdiv(w, tile_w)
    extent_t = tl.minimum(tl.load(entry + 3), count_t)
    extent_h = tl.minimum(tl.load(entry + 4), count_h)
    extent_w = tl.minimum(tl.load(entry + 5), count_w)
    per_tile = tl.cdiv(tile_t * tile_h * tile_w, size)
    number = tl.where(is_text, 0, block - text_blocks)
    tile, part = number // per_tile, number % per_tile
    plane, line, column = tile // (count_h * count_w), tile // count_w % count_h, tile % count_w
    if inverse:
        own_t, size_t, first_t, seen_t = axis_queries(plane, tile_t, extent_t, t)
        own_h, size_h, first_h, seen_h = axis_queries(line, tile_h, extent_h, h)
        own_w, size_w, first_w, seen_w = axis_queries(column, tile_w, extent_w, w)
    else:
        own_t, size_t, first_t, seen_t = axis_keys(plane, tile_t, extent_t, t)
        own_h, size_h, first_h, seen_h = axis_keys(line, tile_h, extent_h, h)
        own_w, size_w, first_w, seen_w = axis_keys(column, tile_w, extent_w, w)

    start = tl.where(is_text, block, part) * size
    count = tl.where(is_text, text, size_t * size_h * size_w)
    exists = (plane < count_t) & (start < count)
    rows = start + tl.arange(0, size)
    valid = rows < tl.where(exists, count, 0)
    lines = rows // size_w
    raster = ((own_t + lines // size_h) * h + own_h + lines % size_h) * w + own_w + rows % size_w
    places = tl.where(is_text, text_start + rows, image_start + raster)
    first = image_start + (first_t * h + first_h) * w + first_w
    seen = tl.where(exists, seen_t * seen_h * seen_w, 0)
    return places, valid, first, seen_h, seen_w, seen, tl.where(exists, text, 0)
