"""Lists of tensors; every op leaves its input list as it is."""

from __future__ import annotations

from typing import Any

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, ints
from resplice.backends.coreml.mil.registry import implements

Elements = list[torch.Tensor | None]
"""None stands for an element that was not written yet."""


@implements("make_list", moves=True)
def make_list(
    init_length: int | torch.Tensor, elem_shape: list[Any] | None = None, **_: object
) -> Elements:
    """A list of unwritten elements; zeros where the element shape is known."""
    sizes = [torch.as_tensor(size) for size in elem_shape or [] if not isinstance(size, str)]
    known = elem_shape is not None and len(sizes) == len(elem_shape)
    element = torch.zeros([int(size) for size in sizes]) if known else None
    return [element] * int(init_length)


@implements("list_length")
def list_length(ls: Elements) -> torch.Tensor:
    """How many elements there are."""
    return torch.tensor(len(ls), dtype=torch.int32)


@implements("list_write", moves=True)
def list_write(ls: Elements, index: int | torch.Tensor, value: torch.Tensor) -> Elements:
    """The list with one element replaced; it grows as far as needed."""
    place = int(index)
    result = ls + [None] * (place + 1 - len(ls))
    result[place] = value
    return result


@implements("list_read", moves=True)
def list_read(ls: Elements, index: int | torch.Tensor) -> torch.Tensor:
    """One element."""
    return _written(ls, int(index))


@implements("list_gather", moves=True)
def list_gather(ls: Elements, indices: Numbers) -> torch.Tensor:
    """Elements stacked along a new first axis."""
    return torch.stack([_written(ls, place) for place in ints(indices)])


@implements("list_scatter", moves=True)
def list_scatter(ls: Elements, indices: Numbers, value: torch.Tensor) -> Elements:
    """The list with elements replaced by slices along the first axis."""
    for place, part in zip(ints(indices), value, strict=True):
        ls = list_write(ls, place, part)
    return ls


def _written(ls: Elements, place: int) -> torch.Tensor:
    element = ls[place]
    if element is None:
        known = next((each for each in ls if each is not None), None)
        assert known is not None, f"element {place} is read before any was written"
        element = torch.zeros_like(known)
    return element
