"""Reading and writing boxes of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, ints
from resplice.backends.coreml.mil.registry import implements


@dataclass(frozen=True)
class Box:
    """A box of a tensor in torch's terms, which know no negative steps.

    Attributes:
        index: One integer or slice an axis.
        flips: Axes of the result that run backwards.
    """

    index: tuple[int | slice, ...]
    flips: tuple[int, ...]


def box(
    sizes: torch.Size,
    begin: Numbers,
    end: Numbers,
    stride: Numbers | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Box:
    """The box that MIL's slicing inputs describe.

    Args:
        sizes: Of the tensor that is sliced.
        begin: First element along each axis, negative from the end.
        end: One past the last element.
        stride: Steps, 1 by default.
        begin_mask: Axes that start at their first element (the last for negative steps).
        end_mask: Axes that run to their end.
        squeeze_mask: Axes of which only the first element is taken, and which vanish.
    """
    rank = len(sizes)
    first, last = ints(begin), ints(end)
    steps = [1] * rank if stride is None else ints(stride)
    from_start, to_end, single = (
        [False] * rank if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)
    )
    index: list[int | slice] = []
    flips: list[int] = []
    kept = 0
    for axis, size in enumerate(sizes):
        if single[axis]:
            index.append(0 if from_start[axis] else first[axis])
            continue
        low = None if from_start[axis] else first[axis]
        high = None if to_end[axis] else last[axis]
        places = range(*slice(low, high, steps[axis]).indices(size))
        if steps[axis] < 0:
            flips.append(kept)
            places = places[::-1]
        index.append(slice(places.start, places.stop, places.step))
        kept += 1
    return Box(tuple(index), tuple(flips))


@implements("slice_by_index", moves=True)
def slice_by_index(
    x: torch.Tensor,
    begin: Numbers,
    end: Numbers,
    stride: Numbers | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> torch.Tensor:
    """A box of `x`."""
    found = box(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x[found.index]
    return result.flip(found.flips) if found.flips else result


@implements("slice_update", moves=True)
def slice_update(
    x: torch.Tensor,
    update: torch.Tensor,
    begin: Numbers,
    end: Numbers,
    stride: Numbers | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> torch.Tensor:
    """`x` with a box replaced."""
    found = box(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.clone()
    result[found.index] = update.flip(found.flips) if found.flips else update
    return result


@implements("slice_by_size", moves=True)
def slice_by_size(x: torch.Tensor, begin: Numbers, size: Numbers) -> torch.Tensor:
    """A box by its corner and sizes; size -1 means up to the end."""
    for axis, (start, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if length < 0 else length)
    return x


@implements("sliding_windows", moves=True)
def sliding_windows(x: torch.Tensor, axis: int, size: int, stride: int) -> torch.Tensor:
    """All windows along an axis; their elements lie on a new axis behind it."""
    place = axis % x.dim()
    return x.unfold(place, size, stride).movedim(-1, place + 1)


@implements("crop", moves=True)
def crop(x: torch.Tensor, crop_height: list[int], crop_width: list[int]) -> torch.Tensor:
    """Rows and columns cut off at both ends of the last two axes."""
    height, width = x.shape[-2:]
    return x[
        ...,
        crop_height[0] : height - crop_height[1],
        crop_width[0] : width - crop_width[1],
    ]
