"""Small reads that rules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.pattern import argument

aten = torch.ops.aten

__all__ = ["argument", "aten", "cast", "dtype", "fake", "is_bool", "is_float", "rank", "source"]


def fake(value: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None for anything that is no tensor."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None


def source(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node), node
    return found


def dtype(value: Any) -> torch.dtype | None:
    """The dtype of a node's tensor."""
    found = fake(value)
    return None if found is None else found.dtype


def rank(node: fx.Node) -> int:
    """The number of axes of a node's tensor."""
    found: torch.Tensor = node.meta["val"]
    return found.dim()


def is_bool(value: Any) -> bool:
    """Whether a value is boolean, tensor or not."""
    return dtype(value) == torch.bool or isinstance(value, bool)


def is_float(value: Any) -> bool:
    """Whether a value is a floating-point tensor or a Python float."""
    found = dtype(value)
    return found.is_floating_point if found else isinstance(value, float)


def cast(build: Builder, value: Any, to: torch.dtype) -> Any:
    """A node in another dtype; numbers and nodes that have it already are returned as they are."""
    if not isinstance(value, fx.Node) or dtype(value) in (None, to):
        return value
    return build(aten._to_copy.default, value, dtype=to)
