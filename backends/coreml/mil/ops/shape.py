"""Ops that change the shape and keep the order of the elements."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, axes_of, ints
from resplice.backends.coreml.mil.registry import implements


@implements("reshape", moves=True)
def reshape(x: torch.Tensor, shape: Numbers) -> torch.Tensor:
    """A new shape; -1 stands for what remains.

    0 keeps the size at the same place counted from the end (1 if there is none); up to iOS 16,
    where zeros need equal ranks, it makes no difference from which end.
    """
    sizes = ints(shape)
    if 0 in sizes:
        kept = [1] * (len(sizes) - x.dim()) + list(x.shape[max(x.dim() - len(sizes), 0) :])
        sizes = [old if size == 0 else size for size, old in zip(sizes, kept, strict=True)]
    return x.reshape(sizes)


@implements("reshape_like", moves=True)
def reshape_like(
    x: torch.Tensor,
    ref_tensors: list[torch.Tensor],
    begins: list[int],
    ends: list[int],
    end_masks: list[bool],
) -> torch.Tensor:
    """The shape is joined from pieces of the shapes of other tensors."""
    sizes: list[int] = []
    for ref, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += ref.shape[int(begin) : None if bool(to_the_end) else int(end)]
    return x.reshape(sizes)


@implements("flatten2d", moves=True)
def flatten2d(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Two axes: all before `axis`, and the rest."""
    cut = axis if axis >= 0 else axis + x.dim()
    return x.reshape(torch.Size(x.shape[:cut]).numel(), -1)


@implements("expand_dims", moves=True)
def expand_dims(x: torch.Tensor, axes: Numbers) -> torch.Tensor:
    """New axes of size 1, at positions of the result."""
    places = ints(axes)
    rank = x.dim() + len(places)
    for place in sorted(place % rank for place in places):
        x = x.unsqueeze(place)
    return x


@implements("squeeze", moves=True)
def squeeze(x: torch.Tensor, axes: Numbers | None = None) -> torch.Tensor:
    """Without the given axes of size 1, or without all of them."""
    return x.squeeze() if axes is None else x.squeeze(axes_of(axes, x.dim()))


@implements("shape")
def shape(x: torch.Tensor) -> torch.Tensor:
    """The sizes as a vector."""
    return torch.tensor(x.shape, dtype=torch.int32)
