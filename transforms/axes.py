"""Where the axes of every value come from: which input axis, in what order, and what beside it.

    x: f32[B,C,T,H,W]            the axes of an input, each an atom of its own
    conv3d(x): [B,D,T,H',W']     an axis that a convolution shortens is still the same axis
    flatten(2): [B,D,T*H'*W']    atoms (T, H', W') in this order on one axis
    cat([video, text], 1)        two segments on one axis

So a token axis tells the grid that it was made of, whatever the model's modules are called. Values
are followed forwards through operators that keep the order of an axis; any other operator starts
new atoms of unknown origin, and nothing is concluded from those.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.pattern import arg, argument
from resplice.program import Program

aten = torch.ops.aten
Size = Any  # int or torch.SymInt
Known = dict[Any, Any]


@dataclass(frozen=True)
class Atom:
    """A part of an axis that was an axis once.

    Attributes:
        source: The input or node it comes from, by name.
        axis: Which of its axes.
        size: How many positions; an int or a symbol.
        step: Positions of the source axis between two of these (after a split).
        origin: "input", "constant" for what depends on no input, or "unknown" where the order of
            an input's axis was lost.
    """

    source: str
    axis: int
    size: Size
    step: int = 1
    origin: Literal["input", "constant", "unknown"] = "input"


Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]
"""Segments in a row; an axis of size 1 is one segment without atoms."""

_ONE: Axis = ((),)
_INPUTS = object()
_SCALARS = (int, float, torch.SymInt, torch.SymFloat)


def size_of(segment: Segment) -> Size:
    """Positions of a segment."""
    return math.prod(atom.size for atom in segment)


def axes_of(program: Program) -> dict[fx.Node, list[Axis]]:
    """The axes of every tensor value of a program."""
    found: Known = {_INPUTS: _depending(program)}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found[node] = _tensor(node, value, found)
        elif isinstance(value, list | tuple):
            found[node] = _several(node, value, found)
    return {node: axes for node, axes in found.items() if node is not _INPUTS and _is_tensor(node)}


def _depending(program: Program) -> set[fx.Node]:
    """Nodes that depend on an input's values (sizes don't count)."""
    result: set[fx.Node] = set()
    for node in program.graph.nodes:
        if _name(node) in _BLANK:
            continue
        sources = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), _SCALARS)]
        if node.op == "placeholder" or any(n in result for n in sources):
            result.add(node)
    return result


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _tensor(node: fx.Node, value: torch.Tensor, found: Known) -> list[Axis]:
    fresh = _fresh(node, value, found)
    if node.op != "call_function":
        return fresh
    if node.target is operator.getitem:
        items, index = found.get(_node(node.args[0])), node.args[1]
        return items[index] if items else fresh
    rule = _RULES.get(_name(node)) or (_pointwise if _is_pointwise(node) else None)
    axes = rule(node, value, found) if rule else None
    if axes is None:
        return fresh
    return [own if axis is None else axis for axis, own in zip(axes, fresh, strict=True)]


def _fresh(node: fx.Node, value: torch.Tensor, found: Known) -> list[Axis]:
    origin = _origin(node, found)
    return [_single(Atom(node.name, i, s, origin=origin)) for i, s in enumerate(value.shape)]


def _origin(node: fx.Node, found: Known) -> Literal["input", "constant", "unknown"]:
    if node.op == "placeholder":
        return "input"
    return "unknown" if node in found[_INPUTS] else "constant"


def _single(atom: Atom) -> Axis:
    return _ONE if _same(atom.size, 1) else ((atom,),)


def _same(a: Size, b: Size) -> bool:
    return bool(statically_known_true(a == b))


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node), value
    return value


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


Found = list[Axis | None] | None
Rule = Callable[[fx.Node, torch.Tensor, Known], Found]


# ---- operators that keep shapes ----------------------------------------------------------


def _pointwise(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """Axes are aligned at the end; of several descriptions the most detailed one holds."""
    inputs = [n for n in node.all_input_nodes if _is_tensor(n) and n in found]
    return [_joined(inputs, i - value.dim(), value, found) for i in range(value.dim())]


def _joined(
    inputs: Sequence[fx.Node], place: int, value: torch.Tensor, found: Known
) -> Axis | None:
    """The most detailed axis at a place; None if an operand's order there was lost."""
    candidates = []
    for node in inputs:
        shape = node.meta["val"].shape
        if len(shape) >= -place and _same(shape[place], value.shape[place]):
            candidates.append(found[node][place])
    if any(atom.origin == "unknown" for axis in candidates for s in axis for atom in s):
        return None
    return max(candidates, key=_detail, default=None)


def _detail(axis: Axis) -> tuple[int, int]:
    atoms = [atom for segment in axis for atom in segment]
    return len(atoms), sum(atom.origin == "input" for atom in atoms)


def _same_but_last(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return [*found[_node(node.args[0])][:-1], None]


def _as_first(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return list(found[_node(node.args[0])])


def _attention(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return [*found[_node(node.args[0])][:-1], None]


def _matmul(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    left = found[_node(node.args[0])]
    return [*left[:-1], None] if len(left) == value.dim() else None


def _scatter(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """Writing into a part: the axes are those of the whole, or of what is written."""
    base, part = _node(node.args[0]), _node(node.args[1])
    aligned = part.meta["val"].dim() == value.dim()
    pair = [base, part] if aligned else [base]
    return [_joined(pair, i - value.dim(), value, found) for i in range(value.dim())]


def _convolution(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    source = found[_node(node.args[0])]
    if len(source) != value.dim():
        return None
    return [source[0], None, *map(_shortened, source[2:], value.shape[2:])]


def _shortened(axis: Axis, size: Size) -> Axis | None:
    if _same(size, 1):
        return _ONE
    if len(axis) != 1 or len(axis[0]) != 1:
        return None
    return ((replace(axis[0][0], size=size, step=1),),)


def _pad(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """An axis that gets more positions at its ends is still the same axis."""
    source, before = found[_node(node.args[0])], _node(node.args[0]).meta["val"].shape
    return [
        axis if _same(old, new) else _shortened(axis, new)
        for axis, old, new in zip(source, before, value.shape, strict=True)
    ]


def _expand(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """An axis of size 1 that is spread holds one value everywhere, so its order says nothing."""
    source = _node(node.args[0])
    axes = [_joined([source], i - value.dim(), value, found) for i in range(value.dim())]
    shape = [1] * (value.dim() - len(source.meta["val"].shape)) + list(source.meta["val"].shape)
    for i, size in enumerate(shape):
        if axes[i] is None and _same(size, 1):
            axes[i] = _single(Atom(node.name, i, value.shape[i], origin="constant"))
    return axes


def _reduce(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    source, dims = found[_node(node.args[0])], argument(node, "dim")
    if dims is None:
        return None
    gone = {d % len(source) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if argument(node, "keepdim"):
        return [_ONE if i in gone else axis for i, axis in enumerate(source)]
    return [axis for i, axis in enumerate(source) if i not in gone]


# ---- operators that move axes ------------------------------------------------------------


def _permute(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    source = found[_node(node.args[0])]
    order: Any = node.args[1]
    return [source[i] for i in order]


def _transpose(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    axes: list[Axis | None] = list(found[_node(node.args[0])])
    a, b = (0, 1) if _name(node) == "aten::t" else (arg(node, 1), arg(node, 2))
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return axes


def _regroup(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    source = _node(node.args[0])
    return regrouped(source.meta["val"].shape, found[source], value.shape)


def regrouped(before: Sequence[Size], axes: Sequence[Axis], after: Sequence[Size]) -> Found:
    """The axes of a reshaped value; None where they can't be told."""
    result: list[Axis | None] = [_ONE if _same(size, 1) else None for size in after]
    left = [i for i, size in enumerate(before) if not _same(size, 1)]
    right = [i for i, size in enumerate(after) if not _same(size, 1)]
    while left and right:
        taken, given = [left.pop(0)], [right.pop(0)]
        while not _same(a := _size(before, taken), b := _size(after, given)):
            if left and _hint(a) < _hint(b):
                taken.append(left.pop(0))
            elif right and _hint(b) < _hint(a):
                given.append(right.pop(0))
            else:
                return result
        parts = _dealt([axes[i] for i in taken], [after[i] for i in given])
        for i, part in zip(given, parts, strict=True):
            result[i] = part
    return result


def _size(sizes: Sequence[Size], chosen: Sequence[int]) -> Size:
    return math.prod(sizes[i] for i in chosen)


def _hint(size: Size) -> int:
    """The size in the sample; only says which group to extend, equality is proved."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def _dealt(axes: list[Axis], sizes: list[Size]) -> list[Axis | None]:
    """Deal the atoms of some axes out to axes of the given sizes."""
    if len(axes) == len(sizes) == 1:
        return [axes[0]]
    if any(len(axis) != 1 for axis in axes):
        return [None] * len(sizes)
    atoms = [atom for axis in axes for atom in axis[0]]
    result: list[Axis | None] = []
    for size in sizes:
        taken: list[Atom] = []
        while atoms and not _same(size_of(tuple(taken)), size):
            head = _head(atoms, size, size_of(tuple(taken)))
            if head is None:
                return [*result, *([None] * (len(sizes) - len(result)))]
            taken.append(head)
        result.append((_merged(taken),))
    return result


def _head(atoms: list[Atom], size: Size, have: Size) -> Atom | None:
    """The next atom, or its outer part where that is all that fits."""
    atom = atoms.pop(0)
    wanted = [size, have, atom.size]
    if not all(isinstance(item, int) for item in wanted) or have * atom.size <= size:
        return atom
    outer = size // have
    if size % have or atom.size % outer:
        return None
    inner = atom.size // outer
    atoms.insert(0, replace(atom, size=inner))
    return replace(atom, size=outer, step=atom.step * inner)


def _merged(atoms: list[Atom]) -> Segment:
    """Neighbouring parts of one axis put together again."""
    result: list[Atom] = []
    for atom in atoms:
        last = result[-1] if result else None
        if (
            last is not None
            and (last.source, last.axis) == (atom.source, atom.axis)
            and _same(last.step, atom.step * atom.size)
        ):
            result[-1] = replace(atom, size=last.size * atom.size)
        else:
            result.append(atom)
    return tuple(result)


# ---- operators that cut and join ---------------------------------------------------------


def _cat(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    pieces = [_node(item) for item in arg(node, 0)]
    dim = argument(node, "dim") % value.dim()
    pieces = [piece for piece in pieces if piece.meta["val"].dim() == value.dim()]
    axes = [_joined(pieces, i - value.dim(), value, found) for i in range(value.dim())]
    axes[dim] = tuple(segment for piece in pieces for segment in found[piece][dim])
    return axes


def _stack(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    dim = argument(node, "dim") % value.dim()
    axes: list[Axis | None] = list(found[_node(arg(node, 0)[0])])
    axes.insert(dim, None)
    return axes


def _slice(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    source = _node(node.args[0])
    dim = argument(node, "dim") % value.dim()
    axes: list[Axis | None] = list(found[source])
    start, step = argument(node, "start") or 0, argument(node, "step")
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    length = value.shape[dim]
    axes[dim] = _cut(axes[dim], start, length) if step == 1 else None
    return axes


def _cut(axis: Axis | None, start: Size, length: Size) -> Axis | None:
    """`length` positions from `start` on: whole segments, or a part of a single atom."""
    if axis is None:
        return None
    if len(axis) == 1 and len(axis[0]) == 1:
        return ((replace(axis[0][0], size=length),),)
    rest, kept = list(axis), list[Segment]()
    while rest and not _same(start, 0):
        start = start - size_of(rest.pop(0))
    while rest and not _same(length, 0):
        kept.append(rest.pop(0))
        length = length - size_of(kept[-1])
    return tuple(kept) if kept and _same(length, 0) else None


def _select(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    axes: list[Axis | None] = list(found[_node(node.args[0])])
    del axes[argument(node, "dim") % len(axes)]
    return axes


def _several(node: fx.Node, values: Sequence[Any], found: Known) -> Any:
    """Operators with several results: a list of axes each."""
    name = _name(node)
    if name == "aten::meshgrid":
        ij = argument(node, "indexing") if "indexing" in str(node.target._schema) else "ij"  # type: ignore[union-attr]
        if ij != "ij":
            return None
        sizes = values[0].shape
        origin = _origin(node, found)
        atoms = [Atom(node.name, i, size, origin=origin) for i, size in enumerate(sizes)]
        return [list(map(_single, atoms))] * len(values)
    if name not in _CUTS:
        return None
    source = _node(node.args[0])
    axes = found[source]
    dim = argument(node, "dim") % len(axes)
    start: Size = 0
    result = []
    for value in values:
        own: list[Axis | None] = list(axes)
        if name == "aten::unbind":
            del own[dim]
        else:
            own[dim] = _cut(own[dim], start, value.shape[dim])
            start = start + value.shape[dim]
        fresh = _fresh(node, value, found)
        result.append([f if a is None else a for a, f in zip(own, fresh, strict=True)])
    return result


def _outer(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return [found[_node(node.args[0])][0], found[_node(node.args[1])][0]]


def _embedding(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return [*found[_node(node.args[1])], None]


def _repeat_interleave(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """Each position several times in a row: one more, inner atom."""
    axes = _expand(node, value, found)
    source, repeats = found[_node(node.args[0])], node.args[1]
    if axes is None or not isinstance(repeats, int) or argument(node, "dim") is None:
        return axes
    dim = argument(node, "dim") % value.dim()
    if axes[dim] is None and len(source[dim]) == 1:
        inner = Atom(node.name, dim, repeats, origin="constant")
        axes[dim] = ((*source[dim][0], inner),)
    return axes


def _merge_frames(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    """Every so many positions of the frames' atom are one."""
    return _restepped(node, value, found, merged=True)


def _unmerge_frames(node: fx.Node, value: torch.Tensor, found: Known) -> Found:
    return _restepped(node, value, found, merged=False)


def _restepped(node: fx.Node, value: torch.Tensor, found: Known, merged: bool) -> Found:
    axes: list[Axis | None] = list(found[_node(node.args[0])])
    dim, frames, inner, pair = (argument(node, n) for n in ("dim", "frames", "inner", "pair"))
    count = -(-frames // pair)
    old, new = (frames, count) if merged else (count, frames)
    axis = axes[dim]
    axes[dim] = None
    if axis is None or len(axis) != 1:
        return axes
    if old == 1:
        return list(found[_node(node.args[0])]) if new == 1 else axes
    for i, atom in enumerate(axis[0]):
        if _same(atom.size, old) and _same(size_of(axis[0][i + 1 :]), inner):
            step = atom.step * pair if merged else max(atom.step // pair, 1)
            own = () if new == 1 else (replace(atom, size=new, step=step),)
            axes[dim] = ((*axis[0][:i], *own, *axis[0][i + 1 :]),)
    return axes


_BLANK = ("aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like",
          "aten::new_zeros", "aten::new_ones", "aten::new_empty", "aten::new_full")  # fmt: skip
_CUTS = ("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind")
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten::linear",), _same_but_last),
    **dict.fromkeys(
        ("aten::layer_norm", "aten::rms_norm", "aten::softmax", "aten::_softmax", "aten::clone",
         "aten::contiguous", "aten::to", "aten::_to_copy", "aten::alias", "aten::detach",
         "aten::dropout", "aten::group_norm"), _as_first),
    **dict.fromkeys(
        ("aten::scaled_dot_product_attention", "resplice::tile_attention"), _attention),
    **dict.fromkeys(("aten::conv2d", "aten::conv3d", "aten::convolution"), _convolution),
    **dict.fromkeys(
        ("aten::reshape", "aten::view", "aten::flatten", "aten::unflatten", "aten::squeeze",
         "aten::unsqueeze", "aten::_unsafe_view", "aten::view_as"), _regroup),
    **dict.fromkeys(("aten::pad", "aten::constant_pad_nd"), _pad),
    **dict.fromkeys(("aten::cat", "aten::concat"), _cat),
    **dict.fromkeys(("aten::transpose", "aten::t"), _transpose),
    **dict.fromkeys(("aten::slice_scatter", "aten::select_scatter"), _scatter),
    **dict.fromkeys(("aten::expand", "aten::expand_as", "aten::repeat"), _expand),
    "aten::repeat_interleave": _repeat_interleave,
    "resplice::merge_frames": _merge_frames, "resplice::unmerge_frames": _unmerge_frames,
    "resplice::quant_linear": _same_but_last, "resplice::hadamard": _as_first,
    "resplice::code_linear": _same_but_last,
    **dict.fromkeys(("aten::mean", "aten::sum"), _reduce),
    "aten::matmul": _matmul, "aten::permute": _permute, "aten::stack": _stack,
    "aten::slice": _slice, "aten::select": _select, "aten::outer": _outer,
    "aten::embedding": _embedding,
}  # fmt: skip
