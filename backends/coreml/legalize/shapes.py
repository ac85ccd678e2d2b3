"""Views in the few spellings that the converter reads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import argument, aten, cast, dtype, rank, source
from resplice.backends.legal import Legalizer
from resplice.backends.legal_rules import drop_idle_squeeze

_END = torch.iinfo(torch.int64).max
_DEEPEST = 5


def permute_by_equation(build: Builder, node: fx.Node) -> fx.Node | None:
    """einsum("nhwpqc->nchpwq", x) of one operand without sums -> permute."""
    if node.target is not aten.einsum.default:
        return None
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    before, arrow, after = equation.partition("->")
    plain = "," not in before and "." not in before and arrow and len(set(before)) == len(before)
    if not plain or sorted(before) != sorted(after):
        return None
    assert isinstance(operands, list | tuple)
    return build(aten.permute.default, operands[0], [before.index(letter) for letter in after])


def one_reshape(build: Builder, node: fx.Node) -> fx.Node | None:
    """flatten, unflatten, view, expand of sizes -> reshape;  reshape(reshape(x)) -> reshape(x)."""
    if node.target in (
        aten.flatten.using_ints, aten.unflatten.int, aten.view.default, aten._unsafe_view.default,
        aten.view_as.default, aten.reshape_as.default,
    ):  # fmt: skip
        return build.reshape(source(node), _target_sizes(build, node))
    if node.target is aten.reshape.default and source(node).target is aten.reshape.default:
        inner = source(source(node))
        return build.reshape(inner, _target_sizes(build, node))
    return None


def _target_sizes(build: Builder, node: fx.Node) -> list[Any]:
    """Sizes of the result; a single dynamic one is -1, so that nothing need be computed."""
    sizes: list[Any] = list(node.meta["val"].shape)
    dynamic = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dynamic) == 1:
        sizes[dynamic[0]] = -1
        return sizes
    return build.sizes(node)


def product(build: Builder, sizes: list[Any]) -> Any:
    """The product of sizes, of which some are nodes."""
    total: Any = 1
    for size in sizes:
        if isinstance(total, int) and isinstance(size, int):
            total *= size
        elif total == 1:
            total = size
        elif size != 1:
            total = build(operator.mul, total, size)
    return total


def chunks_by_split(build: Builder, node: fx.Node) -> fx.Node | None:
    """chunk(x, n, d), split(x, s, d) -> split_with_sizes;  unbind(x, d) -> select each."""
    if node.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    sizes = [part.shape[int(argument(node, "dim") or 0)] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or rank(source(node)) > _DEEPEST:
        return None
    return build(aten.split_with_sizes.default, node.args[0], sizes, argument(node, "dim") or 0)


def parts_by_slices(build: Builder, node: fx.Node) -> fx.Node | None:
    """getitem(split(x, s, d), i) with dynamic sizes or many axes -> slice(x, d, start, end)."""
    if node.target is not operator.getitem:
        return None
    parts = source(node)
    if parts.target not in (
        aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    ):  # fmt: skip
        return None
    axis, index = int(argument(parts, "dim") or 0), int(node.args[1])  # type: ignore[arg-type]  # an int by construction
    sizes = [part.shape[axis] for part in parts.meta["val"]]
    if all(isinstance(size, int) for size in sizes) and rank(source(parts)) <= _DEEPEST:
        return None
    start: Any = 0
    for place in range(index):
        start = _sum(build, start, build.size_of(sizes[place]))
    end = _END if index == len(sizes) - 1 else _sum(build, start, build.size_of(sizes[index]))
    return build(aten.slice.Tensor, source(parts), axis, start, end)


def _sum(build: Builder, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return right if left == 0 else build(operator.add, left, right)


def expand_to_sizes(build: Builder, node: fx.Node) -> fx.Node | None:
    """expand_as(x, y), broadcast_to -> expand(x, sizes of y)."""
    if node.target is aten.expand_as.default:
        other = source(node, 1)
        return build(aten.expand.default, node.args[0], build.sizes(other))
    if node.target is aten.broadcast_to.default:
        return build(aten.expand.default, *node.args)
    return None


def expand_booleans(build: Builder, node: fx.Node) -> fx.Node | None:
    """expand(mask) -> expand(int(mask)) != 0: MIL `tile` has no booleans on every device."""
    moving = (aten.expand.default, aten.repeat.default)
    if node.target not in moving or dtype(node) != torch.bool:
        return None
    wide = build(node.target, cast(build, node.args[0], torch.int32), *node.args[1:])
    return build(aten.ne.Scalar, wide, 0)


def repeat_each(build: Builder, node: fx.Node) -> fx.Node | None:
    """repeat_interleave(x: [a,b], n, 1) -> reshape(expand(x[:, :, None], [a,b,n]), [a,b*n])."""
    if node.target is not aten.repeat_interleave.self_int:
        return None
    x, repeats, axis = source(node), node.args[1], argument(node, "dim")
    if axis is None:
        x, axis = build.reshape(x, [-1]), 0
    axis = int(axis) % max(rank(x), 1)
    sizes: list[Any] = [-1] * (rank(x) + 1)
    sizes[axis + 1] = repeats
    spread = build(aten.expand.default, build(aten.unsqueeze.default, x, axis + 1), sizes)
    final = build.sizes(x)
    final[axis] = product(build, [final[axis], repeats])
    return build.reshape(spread, final)


def one_dtype_in_lists(build: Builder, node: fx.Node) -> fx.Node | None:
    """Cat and stack of ints and floats -> of the dtype torch gives the result."""
    if node.target not in (aten.cat.default, aten.stack.default, aten.concat.default):
        return None
    items: Any = node.args[0]
    wanted = dtype(node)
    assert wanted is not None
    empty = [i for i in items if tuple(i.meta["val"].shape) == (0,)]
    if all(dtype(item) == wanted for item in items) and not empty and wanted != torch.bool:
        return None
    carried = torch.int32 if wanted == torch.bool else wanted
    new = [cast(build, item, carried) for item in items if item not in empty]
    joined = build(node.target, new, *node.args[1:])
    return build(aten.ne.Scalar, joined, 0) if wanted == torch.bool else joined


def pad_in_floats(build: Builder, node: fx.Node) -> fx.Node | None:
    """pad(mask), pad(ints) -> pad(float(x)), cast back: the converter's result is float anyway."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    kind = dtype(node)
    if kind is None or kind.is_floating_point:
        return None
    wide = build(node.target, cast(build, node.args[0], torch.float32), *node.args[1:])
    return build(aten._to_copy.default, wide, dtype=kind)


def scatter_by_cat(build: Builder, node: fx.Node) -> fx.Node | None:
    """slice_scatter(x, y, d, a, b) -> cat([x[:a], y, x[b:]], d);  select_scatter alike."""
    if node.target is aten.select_scatter.default:
        axis, index = int(node.args[2]), node.args[3]  # type: ignore[arg-type]  # ints by schema
        if not isinstance(index, int):
            return None
        piece = build(aten.unsqueeze.default, node.args[1], axis)
        start = index if index >= 0 else index + node.meta["val"].shape[axis]
        return _spliced(build, node, piece, axis, start, start + 1)
    if node.target is not aten.slice_scatter.default or argument(node, "step") not in (1, None):
        return None
    axis = int(argument(node, "dim") or 0)
    size = source(node).meta["val"].shape[axis]
    start, end = argument(node, "start") or 0, argument(node, "end")
    bounds = [_bound(start, size), _bound(_END if end is None else end, size)]
    if not all(isinstance(bound, int) for bound in bounds):
        return None
    return _spliced(build, node, source(node, 1), axis, *bounds)


def _bound(value: Any, size: Any) -> Any:
    if not isinstance(value, int):
        return value
    if value == _END or (isinstance(size, int) and value >= size):
        return size if isinstance(size, int) else _END
    return value + size if value < 0 else value


def _spliced(
    build: Builder, node: fx.Node, piece: fx.Node, axis: int, start: int, end: int
) -> fx.Node:
    x = source(node)
    size = x.meta["val"].shape[axis]
    piece = cast(build, piece, node.meta["val"].dtype)
    parts = [build(aten.slice.Tensor, x, axis, 0, start)] if start else []
    parts.append(piece)
    if not (isinstance(size, int) and end >= size) and end != _END:
        parts.append(build(aten.slice.Tensor, x, axis, end, _END))
    if len(parts) == 1:
        sizes = build.sizes(x)
        return build(aten.expand.default, piece, sizes)
    return build(aten.cat.default, parts, axis)


def strided_writes(build: Builder, node: fx.Node) -> fx.Node | None:
    """slice_scatter(x, y, d, a, b, step) -> cat of the phases, where step divides the size."""
    if node.target is not aten.slice_scatter.default:
        return None
    step, axis = int(argument(node, "step") or 1), int(argument(node, "dim") or 0)
    x, size = source(node), source(node).meta["val"].shape[axis]
    start, end = argument(node, "start") or 0, argument(node, "end")
    whole = end is None or end == _END or (isinstance(size, int) and end >= size)
    if (
        step == 1
        or not isinstance(size, int)
        or size % step
        or not whole
        or start not in range(step)
    ):
        return None
    axis %= rank(x)
    phases = [
        source(node, 1) if phase == start else build(aten.slice.Tensor, x, axis, phase, _END, step)
        for phase in range(step)
    ]
    stacked = build(aten.stack.default, phases, axis + 1)
    return build.reshape(stacked, build.sizes(x))


RULES: tuple[Legalizer, ...] = (
    permute_by_equation, one_reshape, drop_idle_squeeze, pad_in_floats, parts_by_slices,
    chunks_by_split, expand_to_sizes, repeat_each, expand_booleans, one_dtype_in_lists,
    scatter_by_cat, strided_writes,
)  # fmt: skip
