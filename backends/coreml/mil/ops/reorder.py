"""Ops that rearrange, join, split and repeat elements."""

from __future__ import annotations

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.values import Numbers, axes_of, ints
from resplice.backends.coreml.mil.registry import implements

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}


@implements("transpose", moves=True)
def transpose(x: torch.Tensor, perm: Numbers) -> torch.Tensor:
    """Axes in another order."""
    return x.permute(ints(perm))


@implements("concat", moves=True)
def concat(values: list[torch.Tensor], axis: int, interleave: bool = False) -> torch.Tensor:
    """Joined along an axis, one after another or element by element."""
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if not interleave:
        return torch.cat(values, axis)
    place = axis % values[0].dim()
    return torch.stack(values, place + 1).flatten(place, place + 1)


@implements("stack", moves=True)
def stack(values: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Joined along a new axis."""
    return torch.stack(values, axis)


@implements("split", moves=True)
def split(
    x: torch.Tensor,
    axis: int,
    num_splits: int | torch.Tensor | None = None,
    split_sizes: Numbers | None = None,
) -> tuple[torch.Tensor, ...]:
    """Cut along an axis, into equal parts or by sizes."""
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), axis)
    assert num_splits is not None
    return torch.split(x, x.shape[axis] // int(num_splits), axis)


@implements("tile", moves=True)
def tile(x: torch.Tensor, reps: Numbers) -> torch.Tensor:
    """Repeated along each axis."""
    return x.repeat(ints(reps))


@implements("reverse", moves=True)
def reverse(x: torch.Tensor, axes: Numbers | None = None) -> torch.Tensor:
    """Backwards along the given axes, or all."""
    return x.flip(axes_of(axes, x.dim()))


@implements("reverse_sequence", moves=True)
def reverse_sequence(
    x: torch.Tensor, lengths: Numbers, seq_axis: int, batch_axis: int
) -> torch.Tensor:
    """The first `lengths[b]` elements of each sequence backwards."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1))
    result = moved.clone()
    for sample, length in enumerate(ints(lengths)):
        result[sample, :length] = moved[sample, :length].flip(0)
    return result.movedim((0, 1), (batch_axis, seq_axis))


@implements("pad", moves=True)
def pad(
    x: torch.Tensor, pad: Numbers, mode: str = "constant", constant_val: float = 0.0
) -> torch.Tensor:
    """Elements added before and after the last axes."""
    amounts = ints(pad)
    pairs = [(amounts[at], amounts[at + 1]) for at in range(0, len(amounts), 2)]
    if mode == "constant":
        return functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    first = x.dim() - len(pairs)
    for axis, (before, after) in enumerate(pairs, first):
        x = x.index_select(axis, _padded_places(x.shape[axis], before, after, mode))
    return x


def _padded_places(size: int, before: int, after: int, mode: str) -> torch.Tensor:
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)


@implements("depth_to_space", moves=True)
def depth_to_space(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Channels become blocks of pixels; the blocks are the slower part of the channel."""
    n, c, h, w = x.shape
    b = block_size
    parts = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // b**2, h * b, w * b)


@implements("space_to_depth", moves=True)
def space_to_depth(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Blocks of pixels become channels; the inverse of `depth_to_space`."""
    n, c, h, w = x.shape
    b = block_size
    parts = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * b**2, h // b, w // b)


@implements("pixel_shuffle", moves=True)
def pixel_shuffle(x: torch.Tensor, upscale_factor: int) -> torch.Tensor:
    """Channels become blocks of pixels; the blocks are the faster part of the channel."""
    return functional.pixel_shuffle(x, upscale_factor)


@implements("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: torch.Tensor, downscale_factor: int) -> torch.Tensor:
    """The inverse of `pixel_shuffle`."""
    return functional.pixel_unshuffle(x, downscale_factor)


@implements("space_to_batch", moves=True)
def space_to_batch(
    x: torch.Tensor, block_shape: list[int], paddings: list[list[int]]
) -> torch.Tensor:
    """Blocks of padded pixels become samples."""
    (top, bottom), (left, right) = paddings
    x = functional.pad(x, (left, right, top, bottom))
    n, c, h, w = x.shape
    rows, columns = block_shape
    parts = x.reshape(n, c, h // rows, rows, w // columns, columns).permute(3, 5, 0, 1, 2, 4)
    return parts.reshape(n * rows * columns, c, h // rows, w // columns)


@implements("batch_to_space", moves=True)
def batch_to_space(x: torch.Tensor, block_shape: list[int], crops: list[list[int]]) -> torch.Tensor:
    """Samples become blocks of pixels, which are then cropped."""
    n, c, h, w = x.shape
    rows, columns = block_shape
    parts = x.reshape(rows, columns, n // (rows * columns), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = parts.reshape(n // (rows * columns), c, h * rows, w * columns)
    (top, bottom), (left, right) = crops
    return whole[..., top : h * rows - bottom, left : w * columns - right]


@implements("band_part", moves=True)
def band_part(x: torch.Tensor, lower: int, upper: int) -> torch.Tensor:
    """Zero outside a band around the diagonal of the last two axes; -1 keeps a whole side."""
    x = x if lower < 0 else torch.triu(x, -lower)
    return x if upper < 0 else torch.tril(x, upper)
