"""Tensors made from nothing but sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import argument, aten, cast, dtype, fake
from resplice.backends.legal import Legalizer

_LIKE = {
    aten.new_ones.default: 1, aten.ones_like.default: 1, aten.ones.default: 1,
    aten.new_zeros.default: 0, aten.zeros_like.default: 0, aten.zeros.default: 0,
    aten.empty_like.default: 0, aten.new_empty.default: 0, aten.empty.memory_format: 0,
}  # fmt: skip
_VALUED = {
    aten.new_full.default: 2, aten.full_like.default: 1, aten.full.default: 1,
    aten.fill.Scalar: 1, aten.fill.Tensor: 1, aten.scalar_tensor.default: 0,
}  # fmt: skip


def fill_with_value(build: Builder, node: fx.Node) -> fx.Node | None:
    """new_ones, zeros_like, full, fill, ... -> a constant, expanded; dynamic sizes included."""
    value: Any
    if node.target in _LIKE:
        value = _LIKE[node.target]
    elif node.target in _VALUED:
        value = node.args[_VALUED[node.target]]
    else:
        return None
    kind = dtype(node)
    assert kind is not None
    if isinstance(value, fx.Node):
        return build(aten.expand.default, cast(build, value, kind), build.sizes(node))
    text = str(value).replace("-", "minus_").replace(".", "_")
    name = f"coreml.{str(kind).removeprefix('torch.')}_{text}"
    one = build.constant(name, torch.tensor(value, dtype=kind))
    sizes = build.sizes(node)
    return build(aten.expand.default, one, sizes) if sizes else build(aten.clone.default, one)


def count_by_constant(build: Builder, node: fx.Node) -> fx.Node | None:
    """Arange and linspace of known numbers -> a constant; of a dynamic end -> int arange, cast."""
    found = fake(node)
    if found is None:
        return None
    numbers = [a for a in node.args if not isinstance(a, fx.Node)]
    if node.target not in (
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
        aten.eye.default, aten.eye.m,
    ):  # fmt: skip
        return None
    if len(numbers) == len(node.args):
        make: Any = node.target
        value = make(*node.args, dtype=found.dtype)
        return build.constant(f"coreml.{node.name}", value)
    if found.dtype not in (torch.int64, torch.int32):
        counted: fx.Node = cast(build, build(node.target, *node.args), found.dtype)
        return counted
    return build(node.target, *node.args) if node.kwargs else None


def outer_by_broadcast(build: Builder, node: fx.Node) -> fx.Node | None:
    """outer(a, b) -> a[:, None] * b;  meshgrid stays as expanded views."""
    if node.target is not aten.outer.default:
        return None
    left, right = node.args[:2]
    column = build(aten.unsqueeze.default, left, -1)
    return build(aten.mul.Tensor, column, right)


def one_cast(build: Builder, node: fx.Node) -> fx.Node | None:
    """to.dtype(x, d) -> _to_copy(x, dtype=d), the only spelling the converter reads."""
    if node.target is aten.to.dtype:
        return build(aten._to_copy.default, node.args[0], dtype=node.args[1])
    if node.target in (aten.clone.default, aten.alias.default, aten.detach.default,
                       aten.contiguous.default, aten.lift_fresh_copy.default):  # fmt: skip
        users = [user for user in node.users if user.op == "output"]
        held: Any = node.args[0]
        plain = not users and not any(u.target is aten.copy_.default for u in node.users)
        return held if plain and held.op == "call_function" else None
    return None


def one_hot_by_comparison(build: Builder, node: fx.Node) -> fx.Node | None:
    """one_hot(i, n) -> i[..., None] == arange(n), as integers."""
    if node.target is not aten.one_hot.default:
        return None
    classes = int(argument(node, "num_classes"))
    if classes < 0:
        return None
    steps = build(aten.arange.default, classes)
    equal = build(aten.eq.Tensor, build(aten.unsqueeze.default, node.args[0], -1), steps)
    return build(aten._to_copy.default, equal, dtype=torch.int64)


RULES: tuple[Legalizer, ...] = (
    fill_with_value, count_by_constant, outer_by_broadcast, one_cast, one_hot_by_comparison,
)  # fmt: skip
