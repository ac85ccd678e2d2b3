"""Normal form: one spelling for what torch writes in many, so that patterns can be short.

    to.dtype_layout(x, dtype=f32) (same dtype)  ->  x
    slice(x, 3, 0, 9223372036854775807)         ->  x
    view(x, s), _unsafe_view(x, s)              ->  reshape(x, s)
    dropout(x, p, False), clone(x)              ->  x
    cat([a, b], 3) of rank 4                    ->  cat([a, b], -1)     dims count from the end

Every rule is exact: values, dtypes and gradients stay. It holds because programs are functional.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument

from resplice.dims import same_shape
from resplice.fxtypes import input_node, value_of
from resplice.infer import infer_node
from resplice.origin import inherit
from resplice.program import Program

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
          aten.type_as.default)  # fmt: skip
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default,
           aten.lift_fresh_copy.default, aten.lift_fresh.default)  # fmt: skip
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_RANK_PLUS_ONE = (aten.unsqueeze.default, aten.stack.default, aten.diag_embed.default)

Rule = Callable[[Program, fx.Node], fx.Node | None]


def normalize(program: Program) -> int:
    """Bring a program to normal form in place; returns the number of nodes changed."""
    changed = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        changed += _dims_from_the_end(node)
        for rule in _RULES:
            replacement = rule(program, node)
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                program.graph.erase_node(node)
                changed += 1
                break
    program.module.recompile()
    return changed


def _drop_cast(program: Program, node: fx.Node) -> fx.Node | None:
    """`to`-like ops: dropped where nothing changes, else spelled `to.dtype`."""
    if node.target not in _CASTS:
        return None
    source = input_node(node)
    if value_of(source).device != value_of(node).device:
        return None
    if _dtype(source) == _dtype(node):
        return _unless_returned(node, source)
    if node.target is aten.to.dtype:
        return None
    return _insert(program, node, aten.to.dtype, source, _dtype(node))


def _drop_copy(program: Program, node: fx.Node) -> fx.Node | None:
    if node.target not in _COPIES or _is_state(node.args[0]):
        return None
    return _unless_returned(node, node.args[0])


def _is_state(value: Any) -> bool:
    """Whether a weight is written at the end: reads before that are copies."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return any(u.target is aten.copy_.default and u.args[0] is value for u in value.users)


def _drop_dropout(program: Program, node: fx.Node) -> fx.Node | None:
    off = node.target is aten.dropout.default and (node.args[2] is False or node.args[1] == 0)
    return _unless_returned(node, node.args[0]) if off else None


def _drop_slice(program: Program, node: fx.Node) -> fx.Node | None:
    if node.target is not aten.slice.Tensor or not _keeps_shape(node):
        return None
    return _unless_returned(node, node.args[0])


def _drop_expand(program: Program, node: fx.Node) -> fx.Node | None:
    shapely = node.target in (aten.expand.default, aten.reshape.default, *_VIEWS)
    return _unless_returned(node, node.args[0]) if shapely and _keeps_shape(node) else None


def _drop_neutral(program: Program, node: fx.Node) -> fx.Node | None:
    """`mul(x, 1)` and integer `add(x, 0)`; a float `add` would turn -0.0 into 0.0."""
    integer = (
        not _dtype(node).is_floating_point
        if isinstance(node.meta.get("val"), torch.Tensor)
        else False
    )
    neutral = (node.target is aten.mul.Tensor and node.args[1] == 1) or (
        node.target in (aten.add.Tensor, aten.sub.Tensor) and integer and node.args[1] == 0
    )
    if not neutral or isinstance(node.args[1], fx.Node) or _dtype(input_node(node)) != _dtype(node):
        return None
    return _unless_returned(node, node.args[0])


def _view_is_reshape(program: Program, node: fx.Node) -> fx.Node | None:
    if node.target not in _VIEWS:
        return None
    return _insert(program, node, aten.reshape.default, node.args[0], node.args[1])


def _copy_is_expand(program: Program, node: fx.Node) -> fx.Node | None:
    """`copy(target, x)`, left by functionalised writes, is `x` in the target's dtype and shape."""
    if node.target is not aten.copy.default or not isinstance(node.args[1], fx.Node):
        return None
    source = node.args[1]
    if _dtype(source) != _dtype(node):
        source = _insert(program, node, aten.to.dtype, source, _dtype(node))
    if same_shape(source.meta["val"], node.meta["val"]):
        return _unless_returned(node, source)
    return _insert(program, node, aten.expand_as.default, source, node.args[0])


def _slice_to_the_end(program: Program, node: fx.Node) -> fx.Node | None:
    """`slice(x, d, s, size)` -> `slice(x, d, s, end)`; negative static bounds become positive."""
    if node.target is not aten.slice.Tensor:
        return None
    given: list[Argument] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    dim, start, end, step = given
    assert isinstance(dim, int), node
    size = value_of(input_node(node)).shape[dim]
    new = (_bound(start, size, 0), _bound(end, size, _END))
    if (start, end) != new or len(node.args) < 4:
        node.args = (node.args[0], dim, *new, *([step] if step != 1 else []))
    return None


_RULES: tuple[Rule, ...] = (
    _drop_cast, _drop_copy, _drop_dropout, _drop_slice, _drop_expand, _drop_neutral,
    _copy_is_expand, _view_is_reshape, _slice_to_the_end,
)  # fmt: skip


def _bound(value: Any, size: Any, default: int) -> Any:
    if value is None:
        return default
    if isinstance(value, int) and isinstance(size, int):
        value = max(value + size, 0) if value < 0 else value
        return _END if default == _END and value >= size else value
    return value


def _dims_from_the_end(node: fx.Node) -> bool:
    """Rewrite `dim`-like integer arguments to count from the end."""
    sizes = (aten.sym_size.int, aten.sym_stride.int)  # exporters read these from the front
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in sizes:
        return False
    rank = _rank(node)
    if rank is None:
        return False
    changed = False
    for index, argument in enumerate(node.target._schema.arguments[: len(node.args)]):
        if argument.name in ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim"):
            value = _negative(node.args[index], rank)
            if value != node.args[index]:
                node.update_arg(index, value)
                changed = True
    return changed


def _negative(value: Any, rank: int) -> Any:
    if isinstance(value, list | tuple):
        return [_negative(item, rank) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rank:
        return value - rank
    return value


def _rank(node: fx.Node) -> int | None:
    """Rank that the op's `dim` arguments refer to."""
    ranks = [tensor.dim() for tensor in _tensors(node.args)]
    if not ranks:
        return None
    if node.target is aten.cat.default:
        return max(ranks)  # torch leaves out 1-D tensors without elements, whatever the rank is
    return ranks[0] + (node.target in _RANK_PLUS_ONE)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            yield value.meta["val"]


def _insert(program: Program, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    with program.graph.inserting_before(node):
        new = program.graph.call_function(target, args)
    inherit(new, node)
    infer_node(program, new)
    return new


def _unless_returned(node: fx.Node, source: Any) -> fx.Node | None:
    """The source, unless that would make an output or a state write alias an input or a weight."""
    if not isinstance(source, fx.Node):
        return None
    return None if _is_stored(source) and _is_kept(node) else source


def _is_stored(node: fx.Node) -> bool:
    """Whether a value is an input or a weight, or may be a view of one."""
    while _may_alias(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _is_kept(node: fx.Node) -> bool:
    """Whether a value, or a view of it, is returned or written to state."""
    ends = ("output", aten.copy_.default)
    return any(
        user.op in ends or user.target in ends or (_may_alias(user) and _is_kept(user))
        for user in node.users
    )


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _dtype(node: fx.Node) -> torch.dtype:
    return value_of(node).dtype


def _keeps_shape(node: fx.Node) -> bool:
    return same_shape(value_of(node), value_of(input_node(node)))
