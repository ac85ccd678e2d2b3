"""Computing values again with fewer frames: the nodes of an attention, copied beside themselves.

A node is copied right behind the original, so that copies stand in the order of the originals.
Operands that come out of a projection are copied too; a projection reads merged frames; tables and
masks lose frames as `tables.py` says; what carries no frames is shared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.build import Builder
from resplice.change import Refused
from resplice.kernels.merge_frames import group_count, merge_frames, unmerge_frames
from resplice.passes.tdtm.frames import (
    Carried,
    Frames,
    carried,
    is_projection,
    same,
    shape_of,
    split_bounds,
    split_source,
)
from resplice.pattern import arg, argument, target_name
from resplice.program import Program

aten = torch.ops.aten
Table = Callable[["Rebuild", fx.Node, Frames], fx.Node]


@dataclass
class Rebuild:
    """Copies for one attention.

    Attributes:
        program: Edited in place.
        pair: Frames of a group.
        table: Makes the table of the merged frames of one that is not computed by a projection.
        copies: (node, frames) -> copy, for this attention.
        shared: The same for tables and merged inputs, shared by all attentions.
        made: New nodes in order.
    """

    program: Program
    pair: int
    table: Table
    shared: dict[Any, fx.Node]
    copies: dict[Any, fx.Node] = field(default_factory=dict)
    made: list[fx.Node] = field(default_factory=list)
    old: dict[fx.Node, Frames | None] = field(default_factory=dict)

    def count(self, frames: Frames) -> int:
        """How many frames are left."""
        return group_count(frames.count, self.pair)

    def beside(self, node: fx.Node) -> Builder:
        """Builds right behind a node."""
        before = node.next
        while before.op == "placeholder":
            before = before.next
        return _Tracking(self.program, before, "tdtm", node, made=self.made)

    def value(self, node: fx.Node, frames: Frames) -> fx.Node:
        """The copy of a value that projections computed.

        Raises:
            Refused: Something on the way can't be followed.
        """
        key = (node, *frames.key())
        if key not in self.copies:
            operands = carried(node, frames)
            new = self._projected(node, operands) if is_projection(node) else None
            self.copies[key] = new or self._copied(node, frames, operands)
            self.old[node] = frames
        return self.copies[key]

    def known(self, node: fx.Node, frames: Frames, new: fx.Node) -> None:
        """Use `new` for a node that was rebuilt by other means."""
        self.copies[(node, *frames.key())] = new
        self.old[node] = frames

    def _projected(self, node: fx.Node, operands: Carried) -> fx.Node:
        source, frames = operands[0]
        new = self.copies.get((source, *frames.key())) or self.merged(source, frames)
        return self.beside(node)(node.target, new, *node.args[1:], **node.kwargs)

    def merged(self, node: fx.Node, frames: Frames) -> fx.Node:
        """A projection's input with merged frames."""
        key = ("merged", node, *frames.key(), self.pair)
        if key not in self.shared:
            self.shared[key] = self._merged(node, frames)
        return self.shared[key]

    def _merged(self, node: fx.Node, frames: Frames) -> fx.Node:
        if is_spread(node, frames):
            return self.value(node, frames)
        if target_name(node) == "aten.cat" and not frames.alone:
            pieces: Any = node.args[0]
            (piece, inner), *_ = carried(node, frames)
            new = self.merged(piece, inner)
            swapped = [new if p is piece else p for p in pieces]
            return self.beside(node)(node.target, swapped, *node.args[1:])
        build = self.beside(node)
        return self.within(
            build, node, frames,
            lambda part: build(
                merge_frames.overload, part, frames.axis, frames.count, frames.inner, self.pair
            ),
        )  # fmt: skip

    def unmerged(self, new: fx.Node, frames: Frames, node: fx.Node) -> fx.Node:
        """A merged result with all frames again."""
        build, few = self.beside(new), frames.merged(self.count(frames))
        build.of = node
        return self.within(
            build, new, few,
            lambda part: build(
                unmerge_frames.overload, part, frames.axis, frames.count, frames.inner, self.pair
            ),
        )  # fmt: skip

    def within(
        self, build: Builder, node: fx.Node, frames: Frames, change: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        """Apply a change to the video alone, where the axis holds other tokens too."""
        if frames.alone:
            return change(node)
        head, body, tail = _thirds(build, node, frames)
        parts = [p for p in (head, change(body), tail) if p is not None]
        return build(aten.cat.default, parts, frames.axis)

    # ---- copies ------------------------------------------------------------------------------

    def _copied(self, node: fx.Node, frames: Frames, operands: Carried) -> fx.Node:
        few = frames.merged(self.count(frames))
        if split_source(node) is not None:
            return self._piece(node, few, *operands[0])
        mapping = {operand: self._operand(operand, own) for operand, own in operands}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping.get(n, n))
        args = tuple(_resized(self.beside(node), node, args, frames, few))
        if node.target in _RESHAPES:
            return self.beside(node)(aten.reshape.default, args[0], args[1])
        kwargs = {k: v for k, v in kwargs.items() if k != "output_size"}
        return self.beside(node)(node.target, *args, **kwargs)

    def _operand(self, node: fx.Node, frames: Frames) -> fx.Node:
        if (node, *frames.key()) in self.copies or is_computed(node, frames):
            return self.value(node, frames)
        if is_spread(node, frames):
            return self.value(node, frames)
        return self.table(self, node, frames)

    def _piece(self, node: fx.Node, few: Frames, source: fx.Node, frames: Frames) -> fx.Node:
        """A piece of a split: the split again, or, along the tokens, a slice."""
        new = self._operand(source, frames)
        split: Any = node.args[0]
        bounds = split_bounds(node)
        if bounds is None or bounds[0] != frames.axis:
            key = ("split", split, *frames.key())
            if key not in self.copies:
                self.copies[key] = self.beside(split)(split.target, new, *split.args[1:])
            return self.beside(node)(operator.getitem, self.copies[key], node.args[1])
        axis, start, length = bounds
        stop = start + length - (frames.count - few.count) * frames.inner * frames.outer
        return self.beside(node)(aten.slice.Tensor, new, axis, start, stop)

    def other_part(self, node: fx.Node, source: fx.Node, frames: Frames) -> fx.Node:
        """A slice of a rebuilt value that holds none of its frames.

        Raises:
            Refused: It holds some of them.
        """
        bounds = split_bounds(node)
        if bounds is None or bounds[0] != frames.axis:
            raise Refused(f"{node.name} takes some of the frames")
        axis, start, length = bounds
        stop = start + length
        if not (_at_most(stop, frames.before) or _at_most(frames.before + frames.length, start)):
            raise Refused(f"{node.name} takes some of the frames")
        build = self.beside(node)
        lost = frames.length - frames.merged(self.count(frames)).length
        shift = 0 if _at_most(stop, frames.before) else lost
        new = self.copies[source, *frames.key()]
        ends = [_bound(node, place - shift) for place in (start, stop)]
        return build(aten.slice.Tensor, new, axis, *ends)


def _at_most(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a <= b))


class _Tracking(Builder):
    """Also remembers what it made elsewhere."""

    def __init__(
        self, program: Program, before: fx.Node, made_by: str, of: fx.Node, made: list[fx.Node]
    ) -> None:
        super().__init__(program, before, made_by, of)
        self.made = made


def is_computed(node: fx.Node, frames: Frames) -> bool:
    """Whether the frames of a value come out of a projection."""
    return _leads(node, frames, lambda n, _: is_projection(n), {})


def _leads(node: fx.Node, frames: Frames, wanted: Any, known: dict[fx.Node, bool]) -> bool:
    if node not in known:
        known[node] = False
        try:
            operands = carried(node, frames)
        except Refused:
            return False
        known[node] = wanted(node, operands) or any(
            _leads(n, own, wanted, known) for n, own in operands
        )
    return known[node]


def is_spread(node: fx.Node, frames: Frames) -> bool:
    """Whether all frames are provably alike: made by an `expand` or `repeat`."""
    if is_projection(node):
        return False
    try:
        operands = carried(node, frames)
    except Refused:
        return False
    return all(is_spread(n, own) for n, own in operands)


def _thirds(
    build: Builder, node: fx.Node, frames: Frames
) -> tuple[fx.Node | None, fx.Node, fx.Node | None]:
    """What stands before the video, the video, what stands behind it."""
    length, axis, end = frames.length, frames.axis, torch.iinfo(torch.int64).max
    if isinstance(frames.before, int):
        start, stop = frames.before, frames.before + length
    elif isinstance(frames.after, int):
        start = -(length + frames.after)
        stop = -frames.after if frames.after else end
    else:
        raise Refused("it has text of dynamic length on both sides")
    head = None if same(frames.before, 0) else build(aten.slice.Tensor, node, axis, 0, start)
    tail = None if same(frames.after, 0) else build(aten.slice.Tensor, node, axis, stop, end)
    return head, build(aten.slice.Tensor, node, axis, start, stop), tail


_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.view_as.default,
             aten.unflatten.int, aten.reshape.default)  # fmt: skip
_SIZED = (*_RESHAPES, aten.expand.default, aten.expand_as.default)


def _resized(build: Builder, node: fx.Node, args: Any, frames: Frames, few: Frames) -> list[Any]:
    """Arguments with the sizes and bounds of fewer frames."""
    name = target_name(node)
    if node.target in _SIZED:
        return [args[0], _sizes(build, node, frames, few)]
    if name == "aten.slice" and _axis_of(node) == frames.axis:
        bounds = split_bounds(node)
        if bounds is None:
            raise Refused("slice takes some of the frames")
        _, start, length = bounds
        stop = start + length - (frames.length - few.length)
        return [args[0], frames.axis, args[2] if len(args) > 2 else 0, _bound(node, stop)]
    if name == "aten.slice_scatter" and _axis_of(node) == frames.axis:
        start = argument(node, "start") or 0
        length = shape_of(arg(node, 1))[frames.axis] - (frames.length - few.length)
        stop = argument(node, "end")
        whole = shape_of(node)[frames.axis]
        open_ = stop is None or (isinstance(stop, int) and isinstance(whole, int) and stop >= whole)
        end = torch.iinfo(torch.int64).max if open_ else _bound(node, start + length)
        return [args[0], args[1], frames.axis, start, end]
    if name == "aten.repeat_interleave" and not carried(node, frames):
        return [args[0], few.count, *args[2:]]
    if name == "aten.repeat" and not carried(node, frames):
        times = list(args[1])
        times[frames.axis] = few.count
        return [args[0], times]
    return list(args)


def _bound(node: fx.Node, value: Any) -> Any:
    if isinstance(value, int):
        return value
    raise Refused(f"{node.name} cuts at {value}, which is dynamic")


def _axis_of(node: fx.Node) -> int:
    rank = len(shape_of(node))
    dim: int = argument(node, "dim") % rank - rank
    return dim


def _sizes(build: Builder, node: fx.Node, frames: Frames, few: Frames) -> list[Any]:
    """The sizes of a reshaped or expanded result, those of the frames replaced."""
    given = arg(node, 1)
    if node.target in (aten.view_as.default, aten.expand_as.default, aten.unflatten.int):
        given = [size if isinstance(size, int) else None for size in shape_of(node)]
        unknown = [i for i, size in enumerate(given) if size is None]
        if len(unknown) > 1:
            raise Refused(f"{node.name} has several dynamic sizes")
        given = [-1 if size is None else size for size in given]
    sizes: list[Any] = list(given)
    old = sizes[frames.axis]
    if isinstance(old, int):
        whole = few.before + few.length + few.after
        sizes[frames.axis] = old if old == -1 and not isinstance(whole, int) else whole
        return sizes
    if not frames.alone:
        raise Refused(f"{node.name} has a dynamic number of tokens")
    outer = build(operator.floordiv, old, frames.count)
    sizes[frames.axis] = build(operator.mul, outer, few.count)
    return sizes
