"""Rewrites that more than one backend needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.build import Builder

aten = torch.ops.aten


def drop_idle_squeeze(build: Builder, node: fx.Node) -> fx.Node | None:
    """squeeze(x: [b,n,c], 1): [b,n,c] -> x;  squeeze(x: [b,1,n], [0,1]): [b,n] -> squeeze(x, [1]).

    PyTorch leaves an axis alone unless its size is 1; other runtimes fail on it. Capture has
    already decided each case, and the answer is in the ranks.
    """
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    axes = _squeezed_axes(node, before.dim())
    removed = [axis for axis in axes if statically_known_true(before.shape[axis] == 1)]
    if len(removed) != before.dim() - after.dim() or removed == axes:
        return None
    return build(aten.squeeze.dims, source, removed) if removed else source


def _squeezed_axes(node: fx.Node, rank: int) -> list[int]:
    if node.target is aten.squeeze.default:
        return list(range(rank))
    asked: Any = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    return sorted({axis % rank for axis in asked}) if rank else []


def zero_closed_rows(build: Builder, attention: fx.Node, open_keys: fx.Node) -> fx.Node:
    """Attention [..., L, D] with zeros where its mask [..., L, S] opens no key, as in PyTorch.

    attention -> masked_fill(attention, ~any(open_keys, -1), 0)
    """
    closed = build.shared(aten.logical_not.default, build.shared(aten.any.dim, open_keys, -1, True))
    return build(aten.masked_fill.Scalar, attention, closed, 0.0)
