"""Rank at most 5: MIL has no tensor of more axes.

An operator on more axes is computed on merged ones, between two reshapes. Neighbouring reshapes
then melt into one, so nothing of a higher rank remains.

    %2 = exp(%1: [a,b,c,d,e,f])  ->  reshape(exp(reshape(%1, [a*b*c*d*e*f])), [a,b,c,d,e,f])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.shapes import product
from resplice.backends.coreml.legalize.values import argument, aten, fake, rank, source
from resplice.backends.legal import Legalizer

LIMIT = 5
_ALONG = {
    aten.softmax.int: "dim", aten.log_softmax.int: "dim", aten.sum.dim_IntList: "dim",
    aten.mean.dim: "dim", aten.amax.default: "dim", aten.amin.default: "dim",
    aten.cumsum.default: "dim", aten.slice.Tensor: "dim", aten.select.int: "dim",
    aten.index_select.default: "dim", aten.flip.default: "dims", aten.argmax.default: "dim",
    aten.any.dim: "dim", aten.all.dim: "dim",
}  # fmt: skip
_POINTWISE = (
    aten._to_copy.default, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
)  # fmt: skip
_NO_AXES = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)


def is_deep(node: fx.Node) -> bool:
    """Whether a node reads or computes a tensor of too many axes."""
    values: list[Any] = [fake(n) for n in node.all_input_nodes]
    found = node.meta.get("val")
    values += list(found) if isinstance(found, list | tuple) else [found]
    return any(isinstance(v, torch.Tensor) and v.dim() > LIMIT for v in values)


def new_axes_by_reshape(build: Builder, node: fx.Node) -> fx.Node | None:
    """unsqueeze, squeeze of many axes -> reshape."""
    if node.target not in _NO_AXES or not is_deep(node):
        return None
    x = source(node)
    sizes = build.sizes(x)
    if node.target is aten.unsqueeze.default:
        axis = int(argument(node, "dim")) % (rank(x) + 1)
        return build.reshape(x, [*sizes[:axis], 1, *sizes[axis:]])
    asked: Any = argument(node, "dim") if node.target is not aten.squeeze.default else None
    axes = (
        range(rank(x)) if asked is None else asked if isinstance(asked, list | tuple) else [asked]
    )
    ones = {a % rank(x) for a in axes if x.meta["val"].shape[a] == 1}
    return build.reshape(x, [size for axis, size in enumerate(sizes) if axis not in ones])


def permute_by_swaps(build: Builder, node: fx.Node) -> fx.Node | None:
    """Permute of many axes -> of merged ones, else swaps of neighbouring blocks at rank 4."""
    if node.target not in (aten.permute.default, aten.transpose.int) or not is_deep(node):
        return None
    x = source(node)
    order = _order(node, rank(x))
    runs = _runs(order, x)
    sizes, final = build.sizes(x), [build.sizes(x)[axis] for axis in order]
    groups = sorted(runs, key=lambda run: run[0])
    merged = [product(build, [sizes[axis] for axis in group]) for group in groups]
    places = [groups.index(run) for run in runs]
    if len(groups) <= LIMIT:
        small = build.reshape(x, merged)
        return build.reshape(build(aten.permute.default, small, places), final)
    return build.reshape(_by_swaps(build, x, merged, places), final)


def _order(node: fx.Node, count: int) -> list[int]:
    if node.target is aten.permute.default:
        dims: Any = argument(node, "dims")
        return [axis % count for axis in dims]
    order = list(range(count))
    a, b = int(argument(node, "dim0")) % count, int(argument(node, "dim1")) % count
    order[a], order[b] = order[b], order[a]
    return order


def _runs(order: Sequence[int], x: fx.Node) -> list[list[int]]:
    """Axes that stay next to each other; axes of size 1 move for free."""
    shape = x.meta["val"].shape
    runs: list[list[int]] = []
    free = [axis for axis in order if isinstance(shape[axis], int) and shape[axis] == 1]
    real = [axis for axis in range(len(order)) if axis not in free]
    for axis in order:
        if axis in free:
            continue
        previous = real.index(axis) - 1
        if runs and previous >= 0 and runs[-1][-1] == real[previous]:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs or [[order[0]]]


def _by_swaps(build: Builder, x: fx.Node, sizes: list[Any], places: list[int]) -> fx.Node:
    """Bring block after block to its place: [a,b,c,d] -> [a,c,b,d]."""
    now = list(range(len(sizes)))
    for target, block in enumerate(places):
        at = now.index(block)
        if at == target:
            continue
        parts = [now[:target], now[target:at], [block], now[at + 1 :]]
        view = [product(build, [sizes[b] for b in part]) for part in parts]
        x = build(aten.permute.default, build.reshape(x, view), [0, 2, 1, 3])
        now = [*parts[0], block, *parts[1], *parts[3]]
    return x


def elementwise_on_merged_axes(build: Builder, node: fx.Node) -> fx.Node | None:
    """An elementwise operator -> on axes merged wherever no operand broadcasts differently."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or node.target in _POINTWISE
    )
    if not pointwise or not is_deep(node):
        return None
    nodes = [n for n in node.all_input_nodes if fake(n) is not None]
    groups = _merging(node, nodes)
    if len(groups) > LIMIT:
        return None
    small = {n: _merge(build, n, groups, rank(node)) for n in nodes}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: small.get(n, n))
    return build.reshape(build(node.target, *args, **kwargs), build.sizes(node))


def expand_on_merged_axes(build: Builder, node: fx.Node) -> fx.Node | None:
    """Expand to many axes -> on merged ones;  repeat alike."""
    if node.target is not aten.expand.default or not is_deep(node):
        return None
    x = source(node)
    groups = _merging(node, [x])
    if len(groups) > LIMIT:
        return None
    sizes = _result_sizes(build, node)
    small = _merge(build, x, groups, rank(node))
    wide = [product(build, [sizes[a] for a in group]) for group in groups]
    return build.reshape(build(aten.expand.default, small, wide), sizes)


def _result_sizes(build: Builder, node: fx.Node) -> list[Any]:
    x, asked = source(node), node.args[1]
    assert isinstance(asked, list | tuple)
    shift = len(asked) - rank(x)
    return [build.size(x, axis - shift) if size == -1 else size for axis, size in enumerate(asked)]


def _merging(node: fx.Node, operands: Sequence[fx.Node]) -> list[list[int]]:
    """Neighbouring axes of the result on which every operand is whole, or every one is 1."""
    count = rank(node)
    states = [tuple(_whole(n, axis, count) for n in operands) for axis in range(count)]
    shape = node.meta["val"].shape
    groups: list[list[int]] = []
    last: tuple[bool, ...] | None = None
    for axis in range(count):
        single = isinstance(shape[axis], int) and shape[axis] == 1
        if groups and (single or last == states[axis]):
            groups[-1].append(axis)
        else:
            groups.append([axis])
        last = states[axis] if not single or last is None else last
    return groups


def _whole(node: fx.Node, axis: int, count: int) -> bool:
    place = axis - (count - rank(node))
    size = node.meta["val"].shape[place] if place >= 0 else 1
    return not (isinstance(size, int) and size == 1)


def _merge(build: Builder, x: fx.Node, groups: list[list[int]], count: int) -> fx.Node:
    shift, sizes = count - rank(x), build.sizes(x)
    padded = [*[1] * shift, *sizes]
    return build.reshape(x, [product(build, [padded[axis] for axis in group]) for group in groups])


def one_axis_of_three(build: Builder, node: fx.Node) -> fx.Node | None:
    """softmax, sum, slice, select ... along one axis -> on [before, axis, after]."""
    if node.target not in _ALONG or not is_deep(node):
        return None
    x = source(node)
    asked: Any = argument(node, _ALONG[node.target])
    axes = [a % rank(x) for a in (asked if isinstance(asked, list | tuple) else [asked])]
    if axes != list(range(min(axes), max(axes) + 1)):
        return _one_by_one(build, node, axes)
    sizes, low, high = build.sizes(x), min(axes), max(axes) + 1
    view = [product(build, part) for part in (sizes[:low], sizes[low:high], sizes[high:])]
    small = build.reshape(x, view)
    names = [a.name for a in node.target._schema.arguments]
    index = names.index(_ALONG[node.target])
    args = list(node.args)
    args[0], args[index] = small, [1] if isinstance(asked, list | tuple) else 1
    return build.reshape(build(node.target, *args, **node.kwargs), build.sizes(node))


def _one_by_one(build: Builder, node: fx.Node, axes: list[int]) -> fx.Node | None:
    """Sums and extremes over scattered axes, one after the other from the last."""
    if node.target not in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default,
                           aten.amin.default, aten.flip.default):  # fmt: skip
        return None
    x = source(node)
    if node.target is aten.flip.default:
        for axis in axes:
            x = build(node.target, x, [axis])
        return x
    for axis in sorted(axes, reverse=True):
        x = build(node.target, x, [axis], True)
    return build.reshape(x, build.sizes(node))


def joined_at_rank_three(build: Builder, node: fx.Node) -> fx.Node | None:
    """Cat and stack of many axes -> cat of [before, axis, after]."""
    if node.target not in (aten.cat.default, aten.stack.default, aten.concat.default):
        return None
    if not is_deep(node):
        return None
    items: Any = node.args[0]
    axis = int(argument(node, "dim") or 0) % rank(node)
    parts = []
    for item in items:
        sizes = build.sizes(item)
        if node.target is aten.stack.default:
            sizes = [*sizes[:axis], 1, *sizes[axis:]]
        before, after = product(build, sizes[:axis]), product(build, sizes[axis + 1 :])
        parts.append(build.reshape(item, [before, sizes[axis], after]))
    return build.reshape(build(aten.cat.default, parts, 1), build.sizes(node))


def matrices_in_one_batch(build: Builder, node: fx.Node) -> fx.Node | None:
    """Matmul of many batch axes -> of one."""
    if node.target is not aten.matmul.default or not is_deep(node):
        return None
    left, right = (source(node, i) for i in range(2))
    if rank(right) == 2:
        sizes = build.sizes(left)
        flat = build.reshape(left, [product(build, sizes[:-1]), sizes[-1]])
        return build.reshape(build(node.target, flat, right), build.sizes(node))
    if rank(left) != rank(right) or left.meta["val"].shape[:-2] != right.meta["val"].shape[:-2]:
        return None
    flat_pair = []
    for x in (left, right):
        sizes = build.sizes(x)
        flat_pair.append(build.reshape(x, [product(build, sizes[:-2]), *sizes[-2:]]))
    return build.reshape(build(node.target, *flat_pair), build.sizes(node))


def linear_on_rows(build: Builder, node: fx.Node) -> fx.Node | None:
    """linear(x: [a,...,f,k]) -> linear of [rows,k]."""
    if node.target is not aten.linear.default or not is_deep(node):
        return None
    x = source(node)
    sizes = build.sizes(x)
    rows = build.reshape(x, [product(build, sizes[:-1]), sizes[-1]])
    return build.reshape(build(node.target, rows, *node.args[1:]), build.sizes(node))


def last_axes_on_rows(build: Builder, node: fx.Node) -> fx.Node | None:
    """layer_norm and pad of the last n axes -> on [rows, those axes]."""
    if node.target not in (aten.layer_norm.default, aten.pad.default, aten.constant_pad_nd.default):
        return None
    if not is_deep(node):
        return None
    x, listed = source(node), node.args[1]
    assert isinstance(listed, list | tuple)
    count = len(listed) if node.target is aten.layer_norm.default else len(listed) // 2
    if count >= LIMIT:
        return None
    sizes = build.sizes(x)
    rows = build.reshape(x, [product(build, sizes[:-count]), *sizes[-count:]])
    return build.reshape(build(node.target, rows, *node.args[1:]), build.sizes(node))


RULES: tuple[Legalizer, ...] = (
    new_axes_by_reshape, permute_by_swaps, elementwise_on_merged_axes, expand_on_merged_axes,
    one_axis_of_three, joined_at_rank_three, matrices_in_one_batch, linear_on_rows,
    last_axes_on_rows,
)  # fmt: skip
