"""Masks and boolean arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import (
    argument,
    aten,
    cast,
    dtype,
    fake,
    is_bool,
    rank,
    source,
)
from resplice.backends.coreml.mil_op import mil, mil_like
from resplice.backends.legal import Legalizer
from resplice.dims import same_shape

_LOGICAL = {
    aten.__and__.Tensor: "logical_and", aten.bitwise_and.Tensor: "logical_and",
    aten.__or__.Tensor: "logical_or", aten.bitwise_or.Tensor: "logical_or",
    aten.__xor__.Tensor: "logical_xor", aten.bitwise_xor.Tensor: "logical_xor",
    aten.logical_and.default: "logical_and", aten.logical_or.default: "logical_or",
    aten.logical_xor.default: "logical_xor",
}  # fmt: skip


def masks_by_logic(build: Builder, node: fx.Node) -> fx.Node | None:
    """A & b, a | b, a ^ b of masks -> logical_and, logical_or, logical_xor."""
    if node.target in _LOGICAL:
        if not is_bool(node):
            return None
        left, right = (_as_bool(build, a) for a in node.args[:2])
        return mil_like(build, _LOGICAL[node.target], {"x": left, "y": right}, node)
    if node.target in (aten.bitwise_not.default, aten.logical_not.default) and is_bool(node):
        return mil_like(build, "logical_not", {"x": _as_bool(build, node.args[0])}, node)
    return None


def _as_bool(build: Builder, value: Any) -> Any:
    if is_bool(value) or not isinstance(value, fx.Node):
        return value
    return build(aten.ne.Scalar, value, 0)


def compare_to_bool(build: Builder, node: fx.Node) -> fx.Node | None:
    """x.to(bool) -> x != 0: MIL casts 0.5 to false."""
    if node.target is not aten._to_copy.default or not is_bool(node) or is_bool(node.args[0]):
        return None
    return build(aten.ne.Scalar, node.args[0], 0)


def select_values(build: Builder, node: fx.Node) -> fx.Node | None:
    """where(c, a, b) with scalars or of booleans, masked_fill -> MIL select of one dtype."""
    chosen: Any
    other: Any
    if node.target in (
        aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    ):  # fmt: skip
        mask, chosen, other = node.args
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        other, mask, chosen = node.args
    else:
        return None
    wanted = dtype(node)
    if is_bool(node):
        return _select_bools(build, node, mask, chosen, other)
    inputs: dict[str, fx.Node] = {"cond": _as_bool(build, mask)}
    numbers: dict[str, Any] = {}
    assert wanted is not None
    for name, value in _one_of_full_size(build, node, chosen, other):
        if isinstance(value, fx.Node):
            inputs[name] = cast(build, value, wanted)
        else:
            numbers[name] = float(value) if wanted.is_floating_point else int(value)
    return mil_like(build, "select", inputs, node, **numbers)


def _one_of_full_size(
    build: Builder, node: fx.Node, chosen: Any, other: Any
) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """MIL gives the result the common shape of `a` and `b`, whatever the condition's is."""
    whole = node.meta["val"]
    found = [fake(value) for value in (chosen, other)]
    full = [value is not None and same_shape(value, whole) for value in found]
    if not any(full):
        sizes = build.sizes(node)
        if isinstance(chosen, fx.Node):
            chosen = build(aten.expand.default, chosen, sizes)
        elif isinstance(other, fx.Node):
            other = build(aten.expand.default, other, sizes)
        else:
            chosen = build(aten.full.default, sizes, chosen, dtype=dtype(node))
    return ("a", chosen), ("b", other)


def _select_bools(
    build: Builder, node: fx.Node, mask: Any, chosen: Any, other: Any
) -> fx.Node | None:
    """(mask & chosen) | (~mask & other)."""
    closed = build(aten.logical_not.default, mask)
    first = _and(build, mask, chosen)
    second = _and(build, closed, other)
    if first is None or second is None:
        return first or second or build(aten.logical_and.default, mask, closed)
    return build(aten.logical_or.default, first, second)


def _and(build: Builder, mask: Any, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return build(aten.logical_and.default, mask, value)
    return mask if value else None


def any_by_maximum(build: Builder, node: fx.Node) -> fx.Node | None:
    """any(x, d) -> max(int(x), d) > 0;  all(x, d) -> min(int(x), d) > 0."""
    found = {
        aten.any.dim: "reduce_max",
        aten.any.default: "reduce_max",
        aten.any.dims: "reduce_max",
        aten.all.dim: "reduce_min",
        aten.all.default: "reduce_min",
        aten.all.dims: "reduce_min",
    }.get(node.target)  # type: ignore[call-overload]  # fx types targets as strings too
    if found is None:
        return None
    x = source(node)
    asked: Any = argument(node, "dim") if len(node.args) > 1 else None
    axes = list(range(rank(x))) if asked is None else asked
    axes = [a % max(rank(x), 1) for a in (axes if isinstance(axes, list | tuple) else [axes])]
    keep = bool(argument(node, "keepdim")) if len(node.args) > 2 else False
    counted = cast(build, _as_bool(build, x), torch.int32)
    best = mil(
        build, found, {"x": counted}, sizes=build.sizes(node), dtype=torch.int32, axes=axes,
        keep_dims=keep,
    )  # fmt: skip
    return build(aten.gt.Scalar, best, 0)


def compare_booleans(build: Builder, node: fx.Node) -> fx.Node | None:
    """A == b of booleans -> of integers."""
    if node.target not in (aten.eq.Tensor, aten.ne.Tensor, aten.eq.Scalar, aten.ne.Scalar):
        return None
    if not is_bool(node.args[0]) or not isinstance(node.args[0], fx.Node):
        return None
    left, right = (cast(build, a, torch.int32) for a in node.args[:2])
    return build(node.target, left, int(right) if isinstance(right, bool) else right)


def triangles_by_position(build: Builder, node: fx.Node) -> fx.Node | None:
    """triu(x, k) -> where(column - row >= k, x, 0);  tril alike.

    The converter multiplies by a triangle of ones: 0 * -inf is NaN.
    """
    if node.target not in (aten.triu.default, aten.tril.default):
        return None
    x, shift = source(node), int(argument(node, "diagonal") or 0)
    rows, columns = build.size(x, -2), build.size(x, -1)
    row = build(aten.unsqueeze.default, build(aten.arange.default, rows), 1)
    column = build(aten.unsqueeze.default, build(aten.arange.default, columns), 0)
    distance = build(aten.sub.Tensor, column, row)
    upper = node.target is aten.triu.default
    kept = build((aten.ge if upper else aten.le).Scalar, distance, shift)
    return build(aten.where.ScalarOther, kept, x, False if is_bool(x) else 0)


RULES: tuple[Legalizer, ...] = (
    masks_by_logic, compare_to_bool, triangles_by_position, select_values, any_by_maximum,
    compare_booleans,
)  # fmt: skip
