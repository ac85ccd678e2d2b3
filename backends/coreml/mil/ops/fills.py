"""Tensors made from sizes, numbers and positions."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, ints
from resplice.backends.coreml.mil.registry import implements


@implements("fill")
def fill(shape: Numbers, value: float) -> torch.Tensor:
    """One value everywhere."""
    return torch.full(ints(shape), value)


@implements("fill_like")
def fill_like(ref_tensor: torch.Tensor, value: float) -> torch.Tensor:
    """One value everywhere, in the shape of another tensor."""
    return torch.full(ref_tensor.shape, value)


@implements("range_1d")
def range_1d(end: torch.Tensor, start: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """From `start` in steps until before `end`."""
    first, last, by = (torch.as_tensor(value).item() for value in (start, end, step))
    return torch.arange(first, last, by)


@implements("one_hot")
def one_hot(
    indices: torch.Tensor,
    one_hot_vector_size: int | torch.Tensor,
    axis: int,
    on_value: float = 1,
    off_value: float = 0,
) -> torch.Tensor:
    """`on_value` where the position along a new axis equals the index."""
    places = torch.arange(int(one_hot_vector_size))
    hits = indices.long().unsqueeze(-1) == places
    on, off = torch.as_tensor(on_value), torch.as_tensor(off_value)
    return torch.where(hits, on, off).movedim(-1, axis)


@implements("non_zero")
def non_zero(x: torch.Tensor) -> torch.Tensor:
    """Positions of elements that are not zero, one a row."""
    return torch.nonzero(x)


@implements("cumsum")
def cumsum(x: torch.Tensor, axis: int, exclusive: bool, reverse: bool) -> torch.Tensor:
    """Running sums, without the element itself if `exclusive`, from the end if `reverse`."""
    x = x.flip(axis) if reverse else x
    sums = torch.cumsum(x, axis)
    sums = sums - x if exclusive else sums
    return sums.flip(axis) if reverse else sums
