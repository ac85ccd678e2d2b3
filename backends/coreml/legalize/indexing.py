"""Reads and writes by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import argument, aten, cast, is_bool, rank, source
from resplice.backends.coreml.mil_op import mil_like
from resplice.backends.legal import Legalizer

_MODES = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
_NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": -3e38, "amin": 3e38}


def indices_from_the_front(build: Builder, node: fx.Node) -> fx.Node | None:
    """x[i] with i that may be negative -> x[where(i < 0, i + size, i)].

    A pass of coremltools stores small indices as uint16, where -1 is 65535.
    """
    if node.target not in (aten.index.Tensor, aten.index_put.default):
        return None
    x, given = source(node), node.args[1]
    assert isinstance(given, list | tuple)
    new = [
        _wrapped(build, index, build.size(x, axis)) if isinstance(index, fx.Node) else index
        for axis, index in enumerate(given)
    ]
    if node.meta.get("resplice_front") or all(a is b for a, b in zip(new, given, strict=True)):
        return None
    fresh = build(node.target, x, new, *node.args[2:])
    fresh.meta["resplice_front"] = True
    return fresh


def _wrapped(build: Builder, index: fx.Node, size: Any) -> fx.Node:
    if index.meta["val"].dtype in (torch.bool, torch.uint8) or _never_negative(build, index):
        return index
    shifted = build(aten.add.Tensor, index, size)
    negative = build(aten.lt.Scalar, index, 0)
    chosen = build(aten.where.self, negative, shifted, index)
    chosen.meta["resplice_front"] = True
    return chosen


def _never_negative(build: Builder, index: fx.Node) -> bool:
    """Whether an index is known not to be negative: counted up, or a constant."""
    if index.meta.get("resplice_front"):
        return True
    if index.op == "get_attr":
        value = build.program.weight(index)
        return value.numel() == 0 or int(value.min()) >= 0
    moves = (aten.unsqueeze.default, aten.reshape.default, aten.expand.default,
             aten._to_copy.default, aten.view.default, aten.to.dtype)  # fmt: skip
    if index.target in moves:
        return _never_negative(build, source(index))
    if index.target in (aten.arange.default, aten.argmax.default):
        return True
    return (
        index.target is aten.arange.start and isinstance(index.args[0], int) and index.args[0] >= 0
    )


def add_at_index(build: Builder, node: fx.Node) -> fx.Node | None:
    """index_add(x, d, i, y, alpha) -> MIL scatter(add);  index_copy, index_fill alike."""
    modes = {aten.index_add.default: "add", aten.index_copy.default: "update"}
    if node.target not in modes:
        return None
    x, axis, index, update = node.args[:4]
    assert isinstance(x, fx.Node)
    assert isinstance(axis, int)
    if node.target is aten.index_add.default and argument(node, "alpha") != 1:
        update = build(aten.mul.Tensor, update, argument(node, "alpha"))
    assert isinstance(update, fx.Node)
    assert isinstance(index, fx.Node)
    axis %= max(rank(x), 1)
    index = _wrapped(build, index, build.size(x, axis))
    if modes[node.target] == "update" and _one_static(index):
        return _written_slice(build, node, x, axis, index, update)
    value = cast(build, update, x.meta["val"].dtype)
    return mil_like(
        build, "scatter", {"data": x, "indices": index, "updates": value}, node, axis=axis,
        mode=modes[node.target],
    )  # fmt: skip


def _one_static(index: fx.Node) -> bool:
    return tuple(index.meta["val"].shape) == (1,)


def _written_slice(
    build: Builder, node: fx.Node, x: fx.Node, axis: int, index: fx.Node, update: fx.Node
) -> fx.Node | None:
    """One position: where(arange(n) == i, y, x), which every compute unit runs."""
    counted = build(aten.arange.default, build.size(x, axis))
    here = build(aten.eq.Tensor, counted, index)
    shaped = build.reshape(here, [-1, *[1] * (rank(x) - axis - 1)])
    return build(aten.where.self, shaped, cast(build, update, x.meta["val"].dtype), x)


def fill_at_index(build: Builder, node: fx.Node) -> fx.Node | None:
    """index_fill(x, d, i, v) -> index_copy of an expanded value."""
    if node.target not in (aten.index_fill.int_Scalar, aten.index_fill.int_Tensor):
        return None
    x, axis, index, value = node.args[:4]
    assert isinstance(x, fx.Node)
    assert isinstance(axis, int)
    assert isinstance(index, fx.Node)
    sizes = build.sizes(x)
    sizes[axis] = build.size(index, 0)
    piece = build(aten.full.default, sizes, value, dtype=x.meta["val"].dtype)
    return build(aten.index_copy.default, x, axis, index, piece)


def scatter_with_reduction(build: Builder, node: fx.Node) -> fx.Node | None:
    """scatter_reduce(x, d, i, y, how, include_self) -> MIL scatter_along_axis."""
    if node.target is aten.scatter_add.default:
        x, axis, index, update = node.args
        return _along_axis(build, node, x, axis, index, update, "add")
    if node.target not in (aten.scatter_reduce.two, aten.scatter.reduce):
        return None
    x, axis, index, update = node.args[:4]
    how = str(argument(node, "reduce"))
    how = {"add": "sum", "multiply": "prod"}.get(how, how)
    if how == "mean":
        return _scattered_mean(build, node)
    if node.target is aten.scatter_reduce.two and not argument(node, "include_self"):
        assert isinstance(x, fx.Node)
        blank = build(aten.full_like.default, update, _neutral(how, x.meta["val"].dtype))
        x = _along_axis(build, node, x, axis, index, blank, "update")
    return _along_axis(build, node, x, axis, index, update, _MODES[how])


def _neutral(how: str, kind: torch.dtype) -> float | int:
    """The value that a reduction leaves alone."""
    if kind.is_floating_point or how in ("sum", "prod"):
        return _NEUTRAL[how] if kind.is_floating_point else int(_NEUTRAL[how])
    limits = torch.iinfo(torch.int32)
    return limits.min if how == "amax" else limits.max


def _along_axis(
    build: Builder, node: fx.Node, x: Any, axis: Any, index: Any, update: Any, mode: str
) -> fx.Node:
    inputs = {"data": x, "indices": index, "updates": cast(build, update, x.meta["val"].dtype)}
    return mil_like(
        build, "scatter_along_axis", inputs, node, axis=axis % max(rank(x), 1), mode=mode
    )


def _scattered_mean(build: Builder, node: fx.Node) -> fx.Node:
    x, axis, index, update = node.args[:4]
    ones = build(aten.ones_like.default, update)
    start = x
    assert isinstance(x, fx.Node)
    counts = build(aten.ones_like.default, x)
    if not argument(node, "include_self"):
        zero = build(aten.zeros_like.default, update)
        start = _along_axis(build, node, x, axis, index, zero, "update")
        counts = _along_axis(build, node, counts, axis, index, zero, "update")
    total = _along_axis(build, node, start, axis, index, update, "add")
    counts = _along_axis(build, node, counts, axis, index, ones, "add")
    return build(aten.div.Tensor, total, build(aten.clamp.default, counts, 1.0))


def masks_read_as_integers(build: Builder, node: fx.Node) -> fx.Node | None:
    """mask[i], gather(mask, d, i), index_select(mask, d, i) -> of integers: MIL reads no others."""
    reads = (aten.index.Tensor, aten.gather.default, aten.index_select.default)
    if node.target not in reads or not is_bool(node):
        return None
    read = build(node.target, cast(build, source(node), torch.int32), *node.args[1:])
    read.meta |= {key: node.meta[key] for key in ("resplice_front",) if key in node.meta}
    return build(aten.ne.Scalar, read, 0)


def gather_alike(build: Builder, node: fx.Node) -> fx.Node | None:
    """take_along_dim(x, i, d) -> gather(x, d, i) where nothing broadcasts."""
    axis: Any = argument(node, "dim") if node.target is aten.take_along_dim.default else None
    if axis is None:
        return None
    x, index = source(node), source(node, 1)
    shapes = [list(v.meta["val"].shape) for v in (x, index)]
    for shape in shapes:
        shape.pop(int(axis))
    if shapes[0] != shapes[1]:
        return None
    return build(aten.gather.default, x, int(axis) % rank(x), index)


def gather_rows(build: Builder, node: fx.Node) -> fx.Node | None:
    """embedding(w, i, ...) -> embedding(w, i): padding and sparsity matter to training only."""
    if node.target is aten.embedding.default and (len(node.args) > 2 or node.kwargs):
        return build(aten.embedding.default, *node.args[:2])
    return None


RULES: tuple[Legalizer, ...] = (
    indices_from_the_front, masks_read_as_integers, fill_at_index, add_at_index,
    scatter_with_reduction, gather_alike, gather_rows,
)  # fmt: skip
