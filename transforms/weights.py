"""Weights of a graph module by dotted name: get, set, drop, and who shares storage with whom."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def get(root: nn.Module, name: str) -> torch.Tensor:
    """The parameter, buffer or constant called `name`."""
    path, _, leaf = name.rpartition(".")
    value = getattr(root.get_submodule(path), leaf)
    assert isinstance(value, torch.Tensor), f"{name} is not a tensor"
    return value


def has(root: nn.Module, name: str) -> bool:
    """Whether a tensor of that name exists."""
    try:
        get(root, name)
    except (AttributeError, AssertionError):
        return False
    return True


def put(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Register `value` under `name`, making the modules on the way; replaces what was there.

    A `nn.Parameter` becomes a parameter, any other tensor a buffer.
    """
    path, _, leaf = name.rpartition(".")
    owner = _make_path(root, path)
    drop(root, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def drop(root: nn.Module, name: str) -> None:
    """Forget the tensor called `name`, if it exists."""
    if has(root, name):
        path, _, leaf = name.rpartition(".")
        delattr(root.get_submodule(path), leaf)


def named(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer with its name; a tensor under two names comes twice."""
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def frozen_view(value: torch.Tensor) -> torch.Tensor:
    """The same storage behind a new object that takes no gradient.

    The caller's parameter object is never shared, so nothing we set on ours reaches it.
    """
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach(), requires_grad=False)
    return value.detach()


def key(value: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Identifies one view of one storage: tied weights have equal keys."""
    return (
        value.untyped_storage().data_ptr(),
        int(value.storage_offset()),
        tuple(value.shape),
        tuple(value.stride()),
        value.dtype,
    )


def total_bytes(root: nn.Module) -> int:
    """Bytes of all distinct storages."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in named(root)
    }
    return sum(storages.values())


def _make_path(root: nn.Module, path: str) -> nn.Module:
    owner = root
    for part in filter(None, path.split(".")):
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    return owner
