"""Where the frames of a video lie in a value, followed from an operator's result to its operands.

    reshape([2,192,24] -> [2,192,2,12]), frames on axis -3  ->  operand: frames on axis -2
    mul(q [2,192,2,12], cos [1,192,1,12])                   ->  both: frames on axis -3
    cat([text, video], -2)                                  ->  the video alone

Operands that are spread along the frames (size 1, or an `expand` that makes them) carry none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.axes import Atom, Axis, regrouped, size_of
from resplice.change import Refused
from resplice.pattern import arg, argument, target_name

Size = Any  # int or torch.SymInt
PROJECTIONS = ("aten.linear", "resplice.quant_linear", "resplice.code_linear")


@dataclass(frozen=True)
class Frames:
    """The frames in one axis: `before`, then outer times [count, inner] positions, then `after`.

    Attributes:
        axis: Which axis, counted from the end.
        count: How many frames, T.
        inner: Positions per frame.
        outer: How often.
        before: Positions in front, such as text tokens.
        after: Positions behind.
    """

    axis: int
    count: int
    inner: int
    outer: Size = 1
    before: Size = 0
    after: Size = 0

    @property
    def length(self) -> Size:
        """Positions of the video in the axis."""
        return self.outer * self.count * self.inner

    def merged(self, count: int) -> Frames:
        """The same with another number of frames."""
        return replace(self, count=count)

    @property
    def alone(self) -> bool:
        """Whether the axis holds nothing else."""
        return same(self.before, 0) and same(self.after, 0)

    def key(self) -> tuple[Any, ...]:
        """Something to look it up by."""
        return (self.axis, self.count, self.inner, str(self.before))


Carried = list[tuple[fx.Node, Frames]]
Rule = Callable[[fx.Node, Frames], Carried]


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all inputs."""
    return bool(statically_known_true(a == b))


def shape_of(node: fx.Node) -> Any:
    """The shape of a tensor node."""
    return node.meta["val"].shape


def carried(node: fx.Node, frames: Frames) -> Carried:
    """The operands that carry the frames of a result, and where in each.

    Raises:
        Refused: The operator's effect on the frames is not known, or it mixes them.
    """
    rule = _RULES.get(target_name(node)) or (_aligned if _is_pointwise(node) else None)
    if rule is None:
        raise Refused(f"{target_name(node)} can't be followed along the frames")
    return rule(node, frames)


def is_projection(node: fx.Node) -> bool:
    """Whether a node multiplies the last axis by a matrix."""
    return target_name(node) in PROJECTIONS


def is_tensor(value: Any) -> bool:
    """Whether a value is a node with a tensor result."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def split_source(node: fx.Node) -> fx.Node | None:
    """What a piece was cut from: the operand of a `split`, `chunk` or `unbind` behind `getitem`."""
    if node.target is not operator.getitem or target_name(arg(node, 0)) not in _SPLITS:
        return None
    found: fx.Node = arg(arg(node, 0), 0)
    return found


def split_bounds(node: fx.Node) -> tuple[int, Size, Size] | None:
    """Axis (from the end), start and length of a piece of `split` or `chunk`, or of a slice."""
    value = shape_of(node)
    if target_name(node) == "aten.slice":
        if argument(node, "step") != 1:
            return None
        dim = argument(node, "dim") % len(value) - len(value)
        return dim, _start(node), value[dim]
    source = split_source(node)
    if source is None or target_name(arg(node, 0)) == "aten.unbind":
        return None
    pieces = arg(node, 0).meta["val"]
    dim = argument(arg(node, 0), "dim") % len(value) - len(value)
    start = sum(piece.shape[dim] for piece in pieces[: node.args[1]])
    return dim, start, value[dim]


def _start(node: fx.Node) -> Size:
    start = argument(node, "start")
    start = start.meta["val"] if isinstance(start, fx.Node) else start or 0
    if isinstance(start, int) and start < 0:
        return shape_of(arg(node, 0))[argument(node, "dim")] + start
    return start


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node), node
    return source


def _aligned(node: fx.Node, frames: Frames) -> Carried:
    """Operands of an elementwise operator, aligned at the end."""
    return _aligned_among(node, frames, [n for n in node.all_input_nodes if is_tensor(n)])


def _aligned_among(node: fx.Node, frames: Frames, operands: list[fx.Node]) -> Carried:
    result: Carried = []
    for operand in operands:
        shape = shape_of(operand)
        if len(shape) < -frames.axis or same(shape[frames.axis], 1):
            continue
        if not same(shape[frames.axis], shape_of(node)[frames.axis]):
            raise Refused(f"{operand.name} has another number of tokens")
        result.append((operand, frames))
    return result


def _same_but_last(node: fx.Node, frames: Frames) -> Carried:
    if frames.axis == -1:
        raise Refused(f"{target_name(node)} mixes the frames")
    return [(_first(node), frames)]


def _norm(node: fx.Node, frames: Frames) -> Carried:
    if -frames.axis <= len(argument(node, "normalized_shape")):
        raise Refused(f"{target_name(node)} mixes the frames")
    return [(_first(node), frames)]


def _along(node: fx.Node, frames: Frames) -> Carried:
    """Operators along one axis that keep the shape."""
    if argument(node, "dim") in (frames.axis, frames.axis % len(shape_of(node))):
        raise Refused(f"{target_name(node)} mixes the frames")
    return [(_first(node), frames)]


def _reduce(node: fx.Node, frames: Frames) -> Carried:
    source, dims = _first(node), argument(node, "dim")
    rank = len(shape_of(source))
    if dims is None:
        raise Refused(f"{target_name(node)} mixes the frames")
    gone = {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if argument(node, "keepdim"):
        place = frames.axis % rank
    else:
        kept = [i for i in range(rank) if i not in gone]
        place = kept[frames.axis]
    if place in gone:
        raise Refused(f"{target_name(node)} mixes the frames")
    return [(source, replace(frames, axis=place - rank))]


def _permute(node: fx.Node, frames: Frames) -> Carried:
    order: Any = node.args[1]
    rank = len(order)
    return [(_first(node), replace(frames, axis=order[frames.axis] % rank - rank))]


def _transpose(node: fx.Node, frames: Frames) -> Carried:
    rank = len(shape_of(node))
    dims: Any = (0, 1) if target_name(node) == "aten.t" else node.args[1:3]
    a, b = (dim % rank for dim in dims)
    place = frames.axis % rank
    return [(_first(node), replace(frames, axis={a: b, b: a}.get(place, place) - rank))]


def _regroup(node: fx.Node, frames: Frames) -> Carried:
    source = _first(node)
    found = regrouped_frames(shape_of(node), frames, shape_of(source))
    if found is None:
        raise Refused(f"{target_name(node)} cuts across the frames")
    return [(source, found)]


def regrouped_frames(before: Any, frames: Frames, after: Any) -> Frames | None:
    """Where frames lie after a reshape, if they stay together."""
    axes = [_axis(i, size) for i, size in enumerate(before)]
    axes[frames.axis] = _marked(frames)
    for i, axis in enumerate(regrouped(before, axes, after) or []):
        found = frames_in(axis, ("frames", 0), frames.count, i - len(after))
        if found is not None:
            return found
    return None


def frames_in(axis: Axis | None, mark: tuple[str, int], count: Size, place: int) -> Frames | None:
    """The frames in an axis, told by the source and axis of their atom; None without them."""
    segments = axis or ()
    for number, segment in enumerate(segments):
        for i, atom in enumerate(segment):
            if (atom.source, atom.axis) != mark or not same(atom.size, count):
                continue
            before = sum(map(size_of, segments[:number]))
            after = sum(map(size_of, segments[number + 1 :]))
            inner, outer = size_of(segment[i + 1 :]), size_of(segment[:i])
            if not isinstance(inner, int):
                raise Refused(f"its grid is dynamic: {inner} tokens per frame")
            return Frames(place, count, inner, outer, before, after)
    return None


def _axis(place: int, size: Size) -> Axis:
    return ((),) if same(size, 1) else ((Atom(f"axis {place}", 0, size),),)


def _marked(frames: Frames) -> Axis:
    parts = (
        ("outer", frames.outer), ("frames", frames.count), ("inner", frames.inner)
    )  # fmt: skip
    video = tuple(Atom(name, 0, size) for name, size in parts if not same(size, 1))
    ends = [
        () if same(size, 0) else ((Atom(name, 0, size),),)
        for name, size in (("before", frames.before), ("after", frames.after))
    ]
    return (*ends[0], video, *ends[1])


def _expand(node: fx.Node, frames: Frames) -> Carried:
    """Frames that an `expand` makes from size 1 have no source; `_as` operands give sizes only."""
    return _aligned_among(node, frames, [_first(node)])


def _repeat(node: fx.Node, frames: Frames) -> Carried:
    """`repeat`: whole copies in a row."""
    source, times = _first(node), argument(node, "repeats")[frames.axis]
    if times == 1:
        return [(source, frames)]
    if frames.alone and times == frames.count and same(frames.outer, 1):
        return []
    raise Refused("repeat cuts across the frames")


def _repeat_interleave(node: fx.Node, frames: Frames) -> Carried:
    """Each position several times in a row: these copies may be the frames, or lie within one."""
    rank, times = len(shape_of(node)), argument(node, "repeats")
    if argument(node, "dim") is None or not isinstance(times, int):
        raise Refused("repeat_interleave can't be followed along the frames")
    if argument(node, "dim") % rank - rank != frames.axis:
        return [(_first(node), frames)]
    if frames.alone and times == frames.count and frames.inner == 1:
        return []
    if frames.alone and frames.inner % times == 0:
        return [(_first(node), replace(frames, inner=frames.inner // times))]
    raise Refused("repeat_interleave cuts across the frames")


def _cat(node: fx.Node, frames: Frames) -> Carried:
    rank = len(shape_of(node))
    pieces = [p for p in arg(node, 0) if p.meta["val"].dim() == rank]
    if argument(node, "dim") % rank - rank != frames.axis:
        return [(piece, frames) for piece in pieces]
    before = frames.before
    for piece in pieces:
        size = shape_of(piece)[frames.axis]
        if bool(statically_known_true(before < size)):
            after = size - before - frames.length
            if not bool(statically_known_true(after >= 0)):
                break
            return [(piece, replace(frames, before=before, after=after))]
        before = before - size
    raise Refused("cat cuts across the frames")


def _stack(node: fx.Node, frames: Frames) -> Carried:
    rank = len(shape_of(node))
    dim, place = argument(node, "dim") % rank, frames.axis % rank
    if dim == place:
        raise Refused("stack makes the frames")
    lower = place - (place > dim) - (rank - 1)
    pieces: Any = node.args[0]
    return [(piece, replace(frames, axis=lower)) for piece in pieces]


def _getitem(node: fx.Node, frames: Frames) -> Carried:
    source = split_source(node)
    if source is None:
        raise Refused(f"{node.args[0]} can't be followed along the frames")
    bounds = split_bounds(node)
    if bounds is not None:
        return _cut(source, frames, *bounds)
    rank = len(shape_of(source))
    return [_with_axis(source, frames, argument(arg(node, 0), "dim") % rank)]


def _with_axis(source: fx.Node, frames: Frames, dim: int) -> tuple[fx.Node, Frames]:
    """The source had one more axis, `dim` from the front."""
    rank = len(shape_of(source))
    place = frames.axis % (rank - 1)
    return source, replace(frames, axis=place + (place >= dim) - rank)


def _slice(node: fx.Node, frames: Frames) -> Carried:
    bounds = split_bounds(node)
    source = _first(node)
    if bounds is None:
        rank = len(shape_of(node))
        if argument(node, "dim") % rank - rank == frames.axis:
            raise Refused("slice takes some of the frames")
        return [(source, frames)]
    return _cut(source, frames, *bounds)


def _cut(source: fx.Node, frames: Frames, axis: int, start: Size, length: Size) -> Carried:
    """A piece that holds all frames of the whole."""
    if axis != frames.axis:
        return [(source, frames)]
    rest = shape_of(source)[axis] - start - length
    return [(source, replace(frames, before=frames.before + start, after=frames.after + rest))]


def _select(node: fx.Node, frames: Frames) -> Carried:
    source = _first(node)
    return [_with_axis(source, frames, argument(node, "dim") % len(shape_of(source)))]


def _slice_scatter(node: fx.Node, frames: Frames) -> Carried:
    """Writing into a part: frames wholly inside the part are in both operands."""
    base, part = _first(node), node.args[1]
    assert isinstance(part, fx.Node)
    rank = len(shape_of(node))
    if argument(node, "dim") % rank - rank != frames.axis:
        return [(base, frames), (part, frames)]
    before = frames.before - _start(node)
    after = shape_of(part)[frames.axis] - before - frames.length
    if argument(node, "step") != 1 or not all(
        bool(statically_known_true(x >= 0)) for x in (before, after)
    ):
        raise Refused("slice_scatter cuts across the frames")
    return [(base, frames), (part, replace(frames, before=before, after=after))]


_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind")
_RULES: dict[str, Rule] = {
    **dict.fromkeys((*PROJECTIONS, "resplice.hadamard"), _same_but_last),
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _norm),
    **dict.fromkeys(("aten.softmax", "aten._softmax"), _along),
    **dict.fromkeys(("aten.mean", "aten.sum", "aten.amax", "aten.var"), _reduce),
    **dict.fromkeys(
        ("aten.clone", "aten.contiguous", "aten.to", "aten._to_copy", "aten.alias",
         "aten.empty_like", "aten.zeros_like", "aten.ones_like"), _aligned),
    **dict.fromkeys(
        ("aten.reshape", "aten.view", "aten.flatten", "aten.unflatten", "aten.squeeze",
         "aten.unsqueeze", "aten._unsafe_view", "aten.view_as"), _regroup),
    **dict.fromkeys(("aten.expand", "aten.expand_as"), _expand),
    **dict.fromkeys(("aten.transpose", "aten.t"), _transpose),
    **dict.fromkeys(("aten.cat", "aten.concat"), _cat),
    "aten.permute": _permute, "aten.stack": _stack, "aten.slice": _slice,
    "aten.select": _select, "aten.slice_scatter": _slice_scatter, "getitem": _getitem,
    "aten.repeat": _repeat, "aten.repeat_interleave": _repeat_interleave,
}  # fmt: skip
