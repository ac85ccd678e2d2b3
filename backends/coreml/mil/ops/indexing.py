"""Gathering and scattering by computed positions.

A scatter's positions are what the matching gather would read from a tensor of positions.

Up to iOS 16 negative positions count from the end. From iOS 17 on, where the ops have
`validate_indices`, anything out of range is undefined on a device, so it is refused here whatever
that input says.
"""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements
from resplice.errors import InputError


def _wrapped(indices: torch.Tensor, size: int, validate: bool | None) -> torch.Tensor:
    """Positions from the front.

    Raises:
        InputError: One of them is out of range.
    """
    places = indices.long()
    if places.numel() == 0:
        return places
    lowest, highest = (int(bound) for bound in torch.aminmax(places))
    if highest >= size or lowest < (0 if validate is not None else -size):
        wrong = highest if highest >= size else lowest
        raise InputError(
            f"index {wrong} is out of range for an axis of {size}",
            hint="" if wrong >= 0 else "from iOS 17 on, negative indices are undefined",
        )
    return places if lowest >= 0 else torch.where(places < 0, places + size, places)


@implements("gather", moves=True)
def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    axis: int | torch.Tensor = 0,
    batch_dims: int = 0,
    validate_indices: bool | None = None,
) -> torch.Tensor:
    """Slices along an axis; the first `batch_dims` axes of both tensors go together."""
    place = int(axis) % x.dim()
    wanted = _wrapped(torch.as_tensor(indices), x.shape[place], validate_indices)
    batch, outer, inner = x.shape[:batch_dims], x.shape[batch_dims:place], x.shape[place + 1 :]
    shape = [*batch, *outer, *wanted.shape[batch_dims:], *inner]
    if batch_dims == 0:
        return x.index_select(place, wanted.reshape(-1)).reshape(shape)
    flat = x.reshape(batch.numel(), outer.numel(), x.shape[place], inner.numel())
    rows = wanted.reshape(batch.numel(), 1, -1, 1)
    picks = rows.expand(-1, flat.shape[1], -1, flat.shape[3])
    return flat.gather(2, picks).reshape(shape)


@implements("gather_along_axis", moves=True)
def gather_along_axis(
    x: torch.Tensor, indices: torch.Tensor, axis: int = 0, validate_indices: bool | None = None
) -> torch.Tensor:
    """One element per index, taken along an axis at the index's own place."""
    return x.gather(axis, _wrapped(indices, x.shape[axis], validate_indices))


@implements("gather_nd", moves=True)
def gather_nd(
    x: torch.Tensor,
    indices: torch.Tensor,
    batch_dims: int = 0,
    validate_indices: bool | None = None,
) -> torch.Tensor:
    """Slices at positions given by the last axis of `indices`."""
    batch, depth = x.shape[:batch_dims], indices.shape[-1]
    tail = x.shape[batch_dims + depth :]
    flat = x.reshape(batch.numel(), *x.shape[batch_dims:])
    places = indices.reshape(batch.numel(), -1, depth)
    sizes = flat.shape[1 : 1 + depth]
    picks = [_wrapped(places[..., at], size, validate_indices) for at, size in enumerate(sizes)]
    samples = torch.arange(batch.numel()).unsqueeze(-1)
    return flat[(samples, *picks)].reshape(*indices.shape[:-1], *tail)


def _places(data: torch.Tensor) -> torch.Tensor:
    return torch.arange(data.numel()).reshape(data.shape)


def _combine(
    data: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, mode: str
) -> torch.Tensor:
    """`data` with `updates` written to flat `places`; equal places combine."""
    where, new = places.reshape(-1), updates.expand(places.shape).reshape(-1).to(data.dtype)
    flat = data.reshape(-1)
    if mode == "update":
        return flat.index_put((where,), new).reshape(data.shape)
    if mode == "div":
        divisor = torch.ones_like(flat).scatter_reduce(0, where, new, "prod")
        result = flat / divisor if data.is_floating_point() else flat // divisor
        return result.reshape(data.shape)
    new = -new if mode == "sub" else new
    how = {"add": "sum", "sub": "sum", "mul": "prod", "max": "amax", "min": "amin"}[mode]
    return flat.scatter_reduce(0, where, new, how).reshape(data.shape)


@implements("scatter")
def scatter(
    data: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> torch.Tensor:
    """Slices along an axis combined with updates."""
    places = gather(_places(data), indices, axis, 0, validate_indices)
    return _combine(data, places, updates, mode)


@implements("scatter_along_axis")
def scatter_along_axis(
    data: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> torch.Tensor:
    """Elements along an axis combined with updates."""
    places = gather_along_axis(_places(data), indices, axis, validate_indices)
    return _combine(data, places, updates, mode)


@implements("scatter_nd")
def scatter_nd(
    data: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> torch.Tensor:
    """Slices at positions combined with updates."""
    places = gather_nd(_places(data), indices, 0, validate_indices)
    return _combine(data, places, updates, mode)
