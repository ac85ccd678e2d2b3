"""Gathering and scattering by computed positions.

A scatter's positions are what the matching gather would read from a tensor of positions.
"""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements


def _wrapped(indices: torch.Tensor, size: int) -> torch.Tensor:
    places = indices.long()
    return torch.where(places < 0, places + size, places)


@implements("gather", moves=True)
def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    axis: int | torch.Tensor = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> torch.Tensor:
    """Slices along an axis; the first `batch_dims` axes of both tensors go together."""
    place = int(axis) % x.dim()
    wanted = _wrapped(torch.as_tensor(indices), x.shape[place])
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
    x: torch.Tensor, indices: torch.Tensor, axis: int = 0, validate_indices: bool = False
) -> torch.Tensor:
    """One element per index, taken along an axis at the index's own place."""
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


@implements("gather_nd", moves=True)
def gather_nd(
    x: torch.Tensor, indices: torch.Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> torch.Tensor:
    """Slices at positions given by the last axis of `indices`."""
    batch, depth = x.shape[:batch_dims], indices.shape[-1]
    tail = x.shape[batch_dims + depth :]
    flat = x.reshape(batch.numel(), *x.shape[batch_dims:])
    places = indices.reshape(batch.numel(), -1, depth)
    sizes = flat.shape[1 : 1 + depth]
    picks = [_wrapped(places[..., at], size) for at, size in enumerate(sizes)]
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
    validate_indices: bool = False,
) -> torch.Tensor:
    """Slices along an axis combined with updates."""
    return _combine(data, gather(_places(data), indices, axis), updates, mode)


@implements("scatter_along_axis")
def scatter_along_axis(
    data: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> torch.Tensor:
    """Elements along an axis combined with updates."""
    return _combine(data, gather_along_axis(_places(data), indices, axis), updates, mode)


@implements("scatter_nd")
def scatter_nd(
    data: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> torch.Tensor:
    """Slices at positions combined with updates."""
    return _combine(data, gather_nd(_places(data), indices), updates, mode)
