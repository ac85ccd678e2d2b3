"""Tables and masks for merged frames.

`compact`: merged frames stand at positions 0, 1, ..., as published; their rotary table is that of
the first frames. `centred`: at the middle of their group, pair * m + (pair - 1) / 2; the angles are
interpolated where the graph computes them, else (a stored or given table) those of frame 0 are
turned by multiples of the step from frame 0 to 1, which holds for less than half a turn per frame.

A key is open after merging if one of its frames was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from resplice.build import Builder
from resplice.change import Refused
from resplice.passes.tdtm.frames import Frames, carried, is_projection, shape_of
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
    partner = _partner(node)
    if partner is None or not frames.alone:
        raise Refused(
            f"its table {node.name} is neither computed from angles nor one of a pair of cosines "
            "and sines; rope-positions=compact needs neither"
        )
    return _turned(rebuild, node, partner, frames)


def _partner(node: fx.Node) -> fx.Node | None:
    """The table that a sum of two products pairs with this one: x cos - y sin, x cos + y sin."""
    for product in (u for u in node.users if target_name(u) == "aten.mul"):
        for total in product.users:
            if target_name(total) not in ("aten.add", "aten.sub"):
                continue
            others = [n for n in total.all_input_nodes if n is not product]
            if len(others) == 1 and target_name(others[0]) == "aten.mul":
                found = [
                    n for n in others[0].all_input_nodes if _same_shape(n, node) and n is not node
                ]
                plain = [n for n in found if not any(x is n for x in product.all_input_nodes)]
                tables = [n for n in plain if not _projected(n)]
                if len(tables) == 1:
                    return tables[0]
    return None


def _projected(node: fx.Node) -> bool:
    """Whether a value depends on a projection."""
    return any(map(is_projection, _ancestors(node)))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all it depends on."""
    todo, seen = [node], {node}
    while todo:
        fresh = [n for n in todo.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


def _bring_forward(partner: fx.Node, node: fx.Node) -> None:
    """Compute a table right behind another one, so that both are there when either is used."""
    place = node
    while place.op == "placeholder" and place.next.op == "placeholder":
        place = place.next
    for late in sorted(n for n in _ancestors(partner) if n > place):
        place.append(late)
        place = late


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta.get("val"), b.meta.get("val")
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return left.shape == right.shape


def _turned(rebuild: Rebuild, node: fx.Node, partner: fx.Node, frames: Frames) -> fx.Node:
    """Frame 0 as u + iv times the step to frame 1 to the power of the position.

    It does not matter which of the two tables holds the cosines: swapped, all turns are mirrored.
    """
    key = ("turned", node, *frames.key(), rebuild.pair)
    if key not in rebuild.shared:
        _bring_forward(partner, node)
        build = rebuild.beside(max(node, partner))

        def turned(build: Builder, split: fx.Node, count: int) -> fx.Node:
            other = build.reshape(partner, build.sizes(split))
            u0, u1, v0, v1 = (
                build(aten.slice.Tensor, table, 1, i, i + 1) for table in (split, other)
                for i in (0, 1)
            )  # fmt: skip
            along = build(aten.add.Tensor, _times(build, u0, u1), _times(build, v0, v1))
            across = build(aten.sub.Tensor, _times(build, u0, v1), _times(build, v0, u1))
            angle = build(aten.atan2.default, across, along)
            angles = _times(build, _places(build, split, count, rebuild.pair), angle)
            cos, sin = build(aten.cos.default, angles), build(aten.sin.default, angles)
            return build(aten.sub.Tensor, _times(build, cos, u0), _times(build, sin, v0))

        rebuild.shared[key] = _framewise(build, node, frames, rebuild.count(frames), turned)
    return rebuild.shared[key]


def _times(build: Builder, a: fx.Node, b: fx.Node) -> fx.Node:
    return build(aten.mul.Tensor, a, b)


def _places(build: Builder, split: fx.Node, count: int, pair: int) -> fx.Node:
    """Positions pair m + (pair - 1) / 2, [1,count,1]."""
    kind = split.meta["val"].dtype
    places = pair * torch.arange(count, dtype=kind) + (pair - 1) / 2
    name = f"tdtm.places_{count}_{pair}_{str(kind).rpartition('.')[2]}"
    return build.constant(name, places[None, :, None])


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
        steps = _places(build, split, count, pair)
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
