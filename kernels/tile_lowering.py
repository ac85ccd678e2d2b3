"""tile_attention as static slices, plain attention and concatenation, for any backend.

Only ATen nodes on tensors of at most five axes are emitted. A run of tiles on an axis becomes
- slices, one attention per query span: no key is copied twice, but calls multiply over the axes;
- or, folded, one more factor of the batch: one call, each key copied `extent` times.
Runs in which a tile sees only itself are always folded; others only while there would be more
than `MOST_CALLS` calls. At most three runs an axis are left then (one at each border, whose windows
do not move, and the ones between), so heads with one window take at most `MOST_CALLS` calls on any
canvas; each axis that is folded costs up to `extent` copies of the keys, and `lowering_cost` says
how many it came to. Masks fold like keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.kernels.tile_grid import Run, Triple, axis_runs, tile_grid, triples, window_groups

aten = torch.ops.aten
MOST_CALLS = 32


@dataclass(frozen=True)
class Plan:
    """Runs per axis; a run of count > 1 is folded.

    Attributes:
        axes: Runs of the three axes, in order.
    """

    axes: tuple[list[Run], list[Run], list[Run]]

    @property
    def calls(self) -> int:
        """Attention calls."""
        return math.prod(map(len, self.axes))

    @property
    def folds(self) -> bool:
        """Whether any run becomes part of the batch."""
        return any(run.count > 1 for runs in self.axes for run in runs)

    @property
    def copied(self) -> int:
        """Keys that are handed to the calls, each counted as often as it is copied."""
        return math.prod(sum(run.count * run.key.length for run in runs) for runs in self.axes)


def plan(canvas: Triple, tile: Triple, window: Triple) -> Plan:
    """Choose slices or folding per axis.

    Args:
        canvas: Tokens on the axes.
        tile: Tokens of a tile.
        window: Tiles seen on the axes.
    """
    sides = list(zip(canvas, tile, window, strict=True))
    whole = [axis_runs(*side) for side in sides]
    split = [[one for run in runs for one in _members(run)] for runs in whole]
    chosen = [w if seen == 1 else s for w, s, seen in zip(whole, split, window, strict=True)]
    for axis in sorted(range(3), key=lambda a: -len(split[a])):
        if math.prod(map(len, chosen)) > MOST_CALLS:
            chosen[axis] = [part for run in whole[axis] for part in _folded(run, tile[axis])]
    return Plan((chosen[0], chosen[1], chosen[2]))


def _members(run: Run) -> list[Run]:
    return [replace(run.members(i, 1), query_step=1, key_step=1) for i in range(run.count)]


def _folded(run: Run, tile: int) -> list[Run]:
    """A run that can be folded as it is, else its members."""
    even = run.query_step == run.key_step == run.query.length == tile
    return [run] if even and run.key.length % tile == 0 else _members(run)


def lowering_cost(
    canvas: Triple, tile: Triple, windows: Sequence[int], heads: int
) -> dict[str, float]:
    """What the lowered form takes.

    Returns:
        `calls`: attention calls on image queries; `copied`: keys handed to them, per head and as
        a multiple of the canvas.
    """
    groups = window_groups(triples(windows), tile_grid(canvas, tile), heads)
    plans = [(plan(canvas, tile, window), len(group)) for window, group in groups.items()]
    copied = sum(found.copied * count for found, count in plans) / heads
    return {"calls": sum(p.calls for p, _ in plans), "copied": copied / math.prod(canvas)}


def lower(
    build: Builder, q: fx.Node, k: fx.Node, v: fx.Node, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: fx.Node | None = None, scale: float | None = None,
) -> fx.Node | None:  # fmt: skip
    """Replace one tile_attention. The batch may be dynamic; the number of heads may not."""
    heads = q.meta["val"].shape[1]
    if not isinstance(heads, int):
        return None
    (canvas3,), (tile3,) = triples(canvas), triples(tile)
    emit = _Emitter(build, canvas3, tile3, text_length, text_first, scale)
    return emit.heads([q, k, v], mask, windows, heads)


@dataclass
class _Emitter:
    """Emits the nodes of one call."""

    build: Builder
    canvas: Triple
    tile: Triple
    text: int
    text_first: bool
    scale: float | None

    def heads(
        self, inputs: list[fx.Node], mask: fx.Node | None, windows: Sequence[int], heads: int
    ) -> fx.Node:
        """Heads with equal windows together, in the order of the heads at the end."""
        groups = window_groups(triples(windows), tile_grid(self.canvas, self.tile), heads)
        done: dict[int, fx.Node] = {}
        for window, group in groups.items():
            chosen = [self.pick(x, group, heads) for x in inputs]
            own = mask
            if mask is not None and mask.meta["val"].shape[1] != 1:
                own = self.pick(mask, group, heads)
            result = self.group(chosen, own, window, len(group))
            runs = _neighbours(group)
            places = list(itertools.accumulate((len(run) for run in runs), initial=0))
            for run, place in zip(runs, places, strict=False):
                whole = len(runs) == 1
                done[run[0]] = result if whole else self.cut(result, 1, place, len(run))
        return self.cat([done[first] for first in sorted(done)], 1)

    def pick(self, x: fx.Node, group: list[int], heads: int) -> fx.Node:
        """Some heads."""
        if len(group) == heads:
            return x
        return self.cat([self.cut(x, 1, run[0], len(run)) for run in _neighbours(group)], 1)

    def group(
        self, inputs: list[fx.Node], mask: fx.Node | None, window: Triple, heads: int
    ) -> fx.Node:
        """Heads with one window: [B,heads,S,D] each."""
        size = math.prod(self.canvas)
        if window == tile_grid(self.canvas, self.tile):
            return self.attend(inputs, self.widened(mask, size))
        place = self.text if self.text_first else 0
        parts = [self.cut(x, 2, place, size) for x in inputs]
        words = [self.cut(x, 2, 0 if self.text_first else size, self.text) for x in inputs]
        runs = plan(self.canvas, self.tile, window)
        own = self.spread(mask, heads) if runs.folds else mask
        found = _Boxes(self, runs, heads, words, own).all(parts)
        if not self.text:
            return found
        return self.joined(self.attend([words[0], *inputs[1:]], self.widened(mask, size)), found, 2)

    def attend(self, inputs: Sequence[fx.Node], mask: fx.Node | None) -> fx.Node:
        """Plain attention."""
        options: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        if mask is not None:
            options["attn_mask"] = mask
        return self.build(aten.scaled_dot_product_attention.default, *inputs, **options)

    def widened(self, mask: fx.Node | None, keys: int) -> fx.Node | None:
        """A mask of text keys, with `keys` open image keys."""
        if mask is None or mask.meta["val"].shape[3] != self.text:
            return mask
        if not self.text:
            return None
        kind = mask.meta["val"].dtype
        open_key = torch.full((1, 1, 1, 1), kind == torch.bool, dtype=kind)
        one = self.build.constant(f"tile_attention.open_{str(kind).rpartition('.')[2]}", open_key)
        sizes = [*self.build.sizes(mask)[:3], keys]
        return self.joined(mask, self.build(aten.expand.default, one, sizes), 3)

    def spread(self, mask: fx.Node | None, heads: int) -> fx.Node | None:
        """A mask of all keys with all heads: folded runs lie between heads and keys."""
        per_key = mask is not None and mask.meta["val"].shape[3] != self.text
        if mask is None or not per_key or mask.meta["val"].shape[1] == heads:
            return mask
        return self.build(aten.expand.default, mask, [-1, heads, -1, -1])

    def joined(self, text: fx.Node, image: fx.Node, axis: int) -> fx.Node:
        """Text and image in the order of the sequence."""
        return self.cat([text, image] if self.text_first else [image, text], axis)

    def cut(self, x: fx.Node, axis: int, start: int, length: int) -> fx.Node:
        """A slice; nothing where it would be everything."""
        if start == 0 and x.meta["val"].shape[axis] == length:
            return x
        return self.build.shared(aten.slice.Tensor, x, axis, start, start + length)

    def cat(self, nodes: list[fx.Node], axis: int) -> fx.Node:
        """Concatenation."""
        return nodes[0] if len(nodes) == 1 else self.build(aten.cat.default, nodes, axis)


@dataclass
class _Boxes:
    """Emits the boxes of heads with one window.

    Attributes:
        emit: What the call has in common.
        plan: Runs per axis.
        heads: Heads of the group.
        words: Query, key and value of the text, [B,heads,L,D] each.
        mask: The group's mask.
    """

    emit: _Emitter
    plan: Plan
    heads: int
    words: list[fx.Node]
    mask: fx.Node | None

    def all(self, parts: list[fx.Node]) -> fx.Node:
        """Query, key and value of the image, [B,heads,N,D] -> their attention, [B,heads,N,Dv]."""
        build, canvas = self.emit.build, self.emit.canvas
        tensors = [build.reshape(x, [-1, *canvas, x.meta["val"].shape[3]]) for x in parts]
        if self._per_key():
            assert self.mask is not None
            place = self.emit.text if self.emit.text_first else 0
            image = self.emit.cut(self.mask, 3, place, math.prod(canvas))
            tensors.append(build.reshape(image, [-1, *canvas, 1]))
        result = self._axis(0, tensors, 1)
        width = parts[2].meta["val"].shape[3]
        return build.reshape(result, [-1, self.heads, math.prod(canvas), width])

    def _per_key(self) -> bool:
        return self.mask is not None and self.mask.meta["val"].shape[3] != self.emit.text

    def _axis(self, axis: int, tensors: list[fx.Node], copies: int) -> fx.Node:
        """All runs of one axis and of those after it.

        Args:
            axis: 0, 1 or 2; the ones before are cut already.
            tensors: Query, key, value and perhaps a mask: [B * heads * copies, T, H, W, D].
            copies: Product of the folded runs so far.
        """
        if axis == 3:
            return self._call(tensors, copies)
        results = []
        for run in self.plan.axes[axis]:
            if run.count == 1:
                query = self.emit.cut(tensors[0], axis + 1, run.query.start, run.query.length)
                keys = [
                    self.emit.cut(x, axis + 1, run.key.start, run.key.length) for x in tensors[1:]
                ]
                results.append(self._axis(axis + 1, [query, *keys], copies))
                continue
            inner = [self._fold(tensors[0], axis, run, run.query.start, 1)]
            seen = run.key.length // run.query.length
            inner += [self._fold(x, axis, run, run.key.start, seen) for x in tensors[1:]]
            found = self._axis(axis + 1, inner, copies * run.count)
            results.append(self._unfold(found, axis, run.count))
        return self.emit.cat(results, axis + 1)

    def _fold(self, x: fx.Node, axis: int, run: Run, start: int, seen: int) -> fx.Node:
        """`seen` consecutive tiles at a time along an axis; the run becomes part of the batch."""
        build, tile, count = self.emit.build, run.query.length, run.count
        x = self.emit.cut(x, axis + 1, start, tile * (count + seen - 1))
        sizes = [int(size) for size in x.meta["val"].shape[1:]]
        before, after = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
        tiles = build.reshape(x, [-1, before, count + seen - 1, tile, after])
        shifted = [self.emit.cut(tiles, 2, i, count) for i in range(seen)]
        runs = build(aten.permute.default, self.emit.cat(shifted, 3), [0, 2, 1, 3, 4])
        sizes[axis] = seen * tile
        return build.reshape(runs, [-1, *sizes])

    def _unfold(self, x: fx.Node, axis: int, count: int) -> fx.Node:
        """Put a folded run's results side by side again."""
        build = self.emit.build
        sizes = [int(size) for size in x.meta["val"].shape[1:]]
        before, after = math.prod(sizes[:axis]), math.prod(sizes[axis:])
        runs = build.reshape(x, [-1, count, before, after])
        sizes[axis] *= count
        return build.reshape(build(aten.permute.default, runs, [0, 2, 1, 3]), [-1, *sizes])

    def _call(self, tensors: list[fx.Node], copies: int) -> fx.Node:
        """One attention: [B * heads * copies, t, h, w, D] -> the same with Dv."""
        build, groups = self.emit.build, self.heads * copies
        query, *keys = (
            build.reshape(
                x, [-1, groups, math.prod(x.meta["val"].shape[1:4]), x.meta["val"].shape[4]]
            )
            for x in tensors[:3]
        )
        if self.emit.text:
            keys = [
                self.emit.joined(self._repeated(text, copies), key, 2)
                for text, key in zip(self.words[1:], keys, strict=True)
            ]
        result = self.emit.attend([query, *keys], self._mask(tensors[3:], tensors[1], copies))
        sizes = tensors[0].meta["val"].shape[1:4]
        return build.reshape(result, [-1, *sizes, result.meta["val"].shape[3]])

    def _repeated(self, x: fx.Node, copies: int) -> fx.Node:
        """[B,heads,L,D] -> [B,heads * copies,L,D]."""
        if copies == 1:
            return x
        build, heads, *sizes = self.emit.build, *(int(size) for size in x.meta["val"].shape[1:])
        spread = build.shared(aten.unsqueeze.default, x, 2)
        spread = build.shared(aten.expand.default, spread, [-1, -1, copies, -1, -1])
        return build.shared(aten.reshape.default, spread, [-1, heads * copies, *sizes])

    def _mask(self, image: list[fx.Node], key: fx.Node, copies: int) -> fx.Node | None:
        if self.mask is None:
            return None
        keys, heads = math.prod(key.meta["val"].shape[1:4]), self.mask.meta["val"].shape[1]
        if not image:
            spread = self.mask if heads == 1 else self._repeated(self.mask, copies)
            return self.emit.widened(spread, keys)
        own = self.emit.build.reshape(image[0], [-1, heads * copies, 1, keys])
        if not self.emit.text:
            return own
        start = 0 if self.emit.text_first else math.prod(self.emit.canvas)
        text = self.emit.cut(self.mask, 3, start, self.emit.text)
        return self.emit.joined(self._repeated(text, copies), own, 3)


def _neighbours(group: list[int]) -> list[list[int]]:
    """Runs of consecutive heads."""
    runs: list[list[int]] = []
    for head in group:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return runs
