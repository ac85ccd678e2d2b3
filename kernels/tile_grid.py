"""The geometry of tile windows: which keys a run of queries sees, axis by axis.

An axis of `size` tokens is cut into `ceil(size / tile)` tiles, the last one possibly short. Query
tile i sees `extent` consecutive key tiles around it; at a border the window moves inwards instead
of being cut (arXiv 2502.04507, section 3, "Sliding Tile Attention"; short last tiles are ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Triple = tuple[int, int, int]


def tile_count(size: int, tile: int) -> int:
    """Tiles on an axis."""
    return -(-size // tile)


def tile_grid(canvas: Sequence[int], tile: Sequence[int]) -> Triple:
    """Tiles on the three axes of a canvas."""
    t, h, w = (tile_count(size, length) for size, length in zip(canvas, tile, strict=True))
    return t, h, w


def extent(window: int, count: int) -> int:
    """Key tiles that every query tile sees on an axis of `count` tiles.

    The published kernels take w // 2 tiles on either side, so an even window sees w + 1 tiles.
    """
    return min(2 * (window // 2) + 1, count)


def is_meant(window: int, count: int) -> bool:
    """Whether a window covers exactly the tiles that it says, or the whole axis."""
    return window >= count or (window >= 1 and window % 2 == 1)


def first_tile(index: int, extent: int, count: int) -> int:
    """The first key tile that query tile `index` sees."""
    return min(max(index - extent // 2, 0), count - extent)


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `start + length` of one axis."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Run:
    """`count` query spans of equal length whose key spans are of equal length too.

    Span number i starts `i * query_step` (`i * key_step`) tokens after the first one.
    """

    query: Span
    key: Span
    count: int = 1
    query_step: int = 1
    key_step: int = 1

    def members(self, first: int, count: int) -> Run:
        """Up to `count` members from number `first` on."""
        query = Span(self.query.start + first * self.query_step, self.query.length)
        key = Span(self.key.start + first * self.key_step, self.key.length)
        return Run(query, key, min(count, self.count - first), self.query_step, self.key_step)


def axis_spans(size: int, tile: int, window: int) -> list[tuple[Span, Span]]:
    """Query spans that see one and the same key span, and that span, in order."""
    count = tile_count(size, tile)
    seen = extent(window, count)
    firsts = [first_tile(i, seen, count) for i in range(count)]
    spans = []
    for first in dict.fromkeys(firsts):
        tiles = [i for i in range(count) if firsts[i] == first]
        spans.append((_tokens(tiles[0], len(tiles), size, tile), _tokens(first, seen, size, tile)))
    return spans


def axis_runs(size: int, tile: int, window: int) -> list[Run]:
    """The same, with neighbours of equal shape and spacing put together."""
    runs: list[Run] = []
    for query, key in axis_spans(size, tile, window):
        joined = _joined(runs[-1], query, key) if runs else None
        runs[-1:] = [joined] if joined else [*runs[-1:], Run(query, key)]
    return runs


def _tokens(first: int, tiles: int, size: int, tile: int) -> Span:
    return Span(first * tile, min((first + tiles) * tile, size) - first * tile)


def _joined(run: Run, query: Span, key: Span) -> Run | None:
    """A run with one more member, if it goes on evenly."""
    if (query.length, key.length) != (run.query.length, run.key.length):
        return None
    last = run.count - 1
    steps = (
        query.start - run.query.start - last * run.query_step,
        key.start - run.key.start - last * run.key_step,
    )
    if run.count > 1 and steps != (run.query_step, run.key_step):
        return None
    return Run(run.query, run.key, run.count + 1, *steps)


def triples(values: Sequence[int]) -> list[Triple]:
    """Flat integers as triples."""
    return [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values), 3)]


def window_groups(windows: Iterable[Triple], grid: Triple, heads: int) -> dict[Triple, list[int]]:
    """Heads that see the same number of tiles on every axis, by that number.

    Args:
        windows: One triple for all heads, or one per head.
        grid: Tiles on the three axes.
        heads: Number of heads.
    """
    given = list(windows)
    groups: dict[Triple, list[int]] = {}
    for head in range(heads):
        t, h, w = given[head if len(given) > 1 else 0]
        seen = (extent(t, grid[0]), extent(h, grid[1]), extent(w, grid[2]))
        groups.setdefault(seen, []).append(head)
    return groups


def seen_pairs(canvas: Sequence[int], tile: Sequence[int], window: Sequence[int]) -> int:
    """Query-key pairs of one head, text left out."""
    pairs = 1
    for size, length, seen in zip(canvas, tile, window, strict=True):
        pairs *= sum(q.length * k.length for q, k in axis_spans(size, length, seen))
    return pairs
