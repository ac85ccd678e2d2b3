"""Tables and masks for merged frames.

`compact`: merged frames stand at positions 0, 1, ..., as published; their rotary table is that of
the first frames. `centred`: at the middle of their group, pair * m + (pair - 1) / 2; the angles are
interpolated where the graph computes them, else (a stored or given table) the sine and cosine are
turned half-way between neighbouring frames, which holds for less than half a turn per frame.

A key is open after merging if one of its frames was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from resplice.build import Builder
from resplice.passes.tdtm.frames import Frames, Refused, carried, shape_of
from resplice.passes.tdtm.rebuild import Rebuild, is_spread
from resplice.pattern import target_name

aten = torch.ops.aten
Change = Callable[[Builder, fx.Node, int], fx.Node]
"""Builds [rows, count, rest] from [rows, T, rest]."""


def compact(rebuild: Rebuild, node: fx.Node, frames: Frames) -> fx.Node:
    """The table of the first frames."""
    key = ("compact", node, *frames.key(), rebuild.pair)
    if key not in rebuild.shared:
        build = rebuild.beside(node)
        rebuild.shared[key] = rebuild.within(
            build, node, frames,
            lambda part: _framewise(build, part, frames, rebuild.count(frames), _first),
        )  # fmt: skip
    return rebuild.shared[key]


def merged_mask(rebuild: Rebuild, node: fx.Node, frames: Frames) -> fx.Node:
    """A mask, boolean or additive, whose merged positions are as open as the most open of them."""
    key = ("mask", node, *frames.key(), rebuild.pair)
    if key not in rebuild.shared:
        build, pair = rebuild.beside(node), rebuild.pair
        boolean = node.meta["val"].dtype == torch.bool
        join = aten.logical_or.default if boolean else aten.maximum.default

        def joined(build: Builder, split: fx.Node, count: int) -> fx.Node:
            missing = count * pair - frames.count
            if missing:
                last = build(aten.slice.Tensor, split, 1, frames.count - 1, frames.count)
                split = build(aten.cat.default, [split, *([last] * missing)], 1)
            rest = build.size(split, 2)
            groups = build.reshape(split, [-1, count, pair, rest])
            result = build(aten.select.int, groups, 2, 0)
            for i in range(1, pair):
                result = build(join, result, build(aten.select.int, groups, 2, i))
            return result

        rebuild.shared[key] = rebuild.within(
            build, node, frames,
            lambda part: _framewise(build, part, frames, rebuild.count(frames), joined),
        )  # fmt: skip
    return rebuild.shared[key]


def centred(rebuild: Rebuild, node: fx.Node, frames: Frames) -> fx.Node:
    """The table at the middle of each group.

    Raises:
        Refused: Its angles are not computed in the graph, and it is not one of a pair of tables.
    """
    if _computes_angles(node, frames):
        return _at_angles(rebuild, node, frames)
    raise Refused(
        f"the angles of its rotary table {node.name} are not computed in the graph; "
        "rope-positions=compact needs none"
    )


def _computes_angles(node: fx.Node, frames: Frames) -> bool:
    """Whether all frames of a table come out of cosines and sines."""
    if target_name(node) in ("aten.cos", "aten.sin"):
        return True
    try:
        operands = carried(node, frames)
    except Refused:
        return False
    return bool(operands) and all(
        _computes_angles(n, own) or is_spread(n, own) for n, own in operands
    )


def _at_angles(rebuild: Rebuild, node: fx.Node, frames: Frames) -> fx.Node:
    key = ("centred", node, *frames.key(), rebuild.pair)
    if key in rebuild.shared:
        return rebuild.shared[key]
    if target_name(node) not in ("aten.cos", "aten.sin"):
        inner = Rebuild(rebuild.program, rebuild.pair, _at_angles, rebuild.shared)
        inner.made = rebuild.made
        rebuild.shared[key] = inner.value(node, frames)
        return rebuild.shared[key]
    angles = node.args[0]
    assert isinstance(angles, fx.Node)
    build, pair = rebuild.beside(node), rebuild.pair

    def halfway(build: Builder, split: fx.Node, count: int) -> fx.Node:
        """Angles are linear in the position: start + (pair m + (pair - 1) / 2) * difference."""
        first = build(aten.slice.Tensor, split, 1, 0, 1)
        second = build(aten.slice.Tensor, split, 1, 1, 2)
        step = build(aten.sub.Tensor, second, first)
        value = split.meta["val"]
        places = pair * torch.arange(count, dtype=value.dtype) + (pair - 1) / 2
        name = f"tdtm.places_{count}_{pair}_{str(value.dtype).rpartition('.')[2]}"
        steps = build.constant(name, places[None, :, None])
        return build(aten.add.Tensor, first, build(aten.mul.Tensor, steps, step))

    new = rebuild.within(
        build, angles, frames,
        lambda part: _framewise(build, part, frames, rebuild.count(frames), halfway),
    )  # fmt: skip
    rebuild.shared[key] = build(node.target, new)
    return rebuild.shared[key]


def _first(build: Builder, split: fx.Node, count: int) -> fx.Node:
    return build(aten.slice.Tensor, split, 1, 0, count)


def _framewise(
    build: Builder, node: fx.Node, frames: Frames, count: int, change: Change
) -> fx.Node:
    """Change [rows, T, rest], a view of a value, and give the result the value's rank again."""
    sizes = build.sizes(node)
    place = frames.axis % len(sizes)
    rest = frames.inner
    tail = shape_of(node)[place + 1 :]
    if not all(isinstance(size, int) for size in tail):
        raise Refused(f"{node.name} has a dynamic size behind its frames")
    for size in tail:
        rest *= size
    split = build.reshape(node, [-1, frames.count, rest])
    changed = change(build, split, count)
    whole = shape_of(node)[place]
    if isinstance(whole, int):
        sizes[place] = whole // frames.count * count
    else:
        sizes[place] = -1
    if sum(not isinstance(size, int) for size in sizes) + (sizes[place] == -1) == 1:
        sizes = [size if isinstance(size, int) else -1 for size in sizes]
    return build.reshape(changed, sizes)
