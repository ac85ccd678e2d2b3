"""Which window each head of each layer has: options, files, and the published form.

Our file holds one entry per layer, a window for all heads or one per head, in tiles:

    {"tile": [6, 8, 8], "layers": {"0": [3, 3, 3], "1": [[3, 3, 3], [1, 6, 10]]}}

The published form ("mask strategy" of arXiv 2502.04507) is one flat dictionary "step_layer_head" ->
window. A graph does not know the step, so it is collapsed: per layer and head the window that most
steps use, the earliest one of a tie. Leading steps at which all heads have one and the same window
that is the largest of the table are the full phase and do not count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resplice.errors import UsageError
from resplice.kernels.tile_grid import Triple, extent, is_meant

_KEY = re.compile(r"(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True)
class WindowTable:
    """Windows in tiles.

    Attributes:
        layers: Layer -> one window for all heads, or one per head.
        tile: The tile they were chosen for, if that is known.
        full_steps: Leading steps of full attention, if that is known.
    """

    layers: Mapping[int, tuple[Triple, ...]] = field(default_factory=dict)
    tile: Triple | None = None
    full_steps: int | None = None


def load_windows(path: str | Path) -> WindowTable:
    """Read a table in our form or in the published one.

    Raises:
        UsageError: The file is missing or neither of the two.
    """
    source = Path(path)
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"windows={source} can't be read: {error}") from error
    try:
        if isinstance(data, dict) and "layers" in data:
            return _own(data)
        if isinstance(data, dict) and data and all(map(_KEY.fullmatch, data)):
            return collapse({_step(key): _triple(value) for key, value in data.items()})
    except (TypeError, ValueError) as error:
        raise UsageError(f"windows={source}: {error}") from error
    raise UsageError(
        f"windows={source} is no table of windows",
        hint='it holds {"layers": {"0": [3,3,3]}}, or {"step_layer_head": [3,3,3]}',
    )


def save_windows(table: WindowTable, path: str | Path) -> Path:
    """Write a table in our form."""
    data: dict[str, Any] = {"layers": {}}
    for layer, windows in sorted(table.layers.items()):
        listed = [list(window) for window in windows]
        data["layers"][str(layer)] = listed[0] if len(listed) == 1 else listed
    data.update({"tile": list(table.tile)} if table.tile else {})
    data.update({"full_steps": table.full_steps} if table.full_steps is not None else {})
    target = Path(path)
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return target


def collapse(entries: Mapping[Triple, Triple]) -> WindowTable:
    """(step, layer, head) -> window, put together over the steps; see the top of this file.

    Raises:
        ValueError: Some head of a layer has no entry.
    """
    steps = sorted({step for step, _, _ in entries})
    widest = max(entries.values())
    first = 0
    while first < len(steps) - 1 and all(
        window == widest for (step, _, _), window in entries.items() if step == steps[first]
    ):
        first += 1
    votes: dict[int, dict[int, Counter[Triple]]] = {}
    for (step, layer, head), window in sorted(entries.items()):
        if step >= steps[first]:
            votes.setdefault(layer, {}).setdefault(head, Counter())[window] += 1
    layers = {}
    for layer, heads in votes.items():
        if sorted(heads) != list(range(len(heads))):
            raise ValueError(f"layer {layer} lacks the window of a head")
        layers[layer] = tuple(heads[head].most_common(1)[0][0] for head in range(len(heads)))
    return WindowTable(layers, full_steps=first)


def windows_for(
    windows: Sequence[Triple], grid: Triple, heads: int, what: str
) -> tuple[Triple, ...]:
    """Windows made concrete on a grid: 0 and what exceeds an axis become the axis.

    Args:
        windows: One, or one per head.
        grid: Tiles on the axes.
        heads: Heads of the site.
        what: Where they come from, for messages.

    Raises:
        UsageError: There are windows for other heads, or one is even and covers less than an axis.
    """
    if len(windows) not in (1, heads):
        raise UsageError(f"sta: {what} has {len(windows)} windows, the site has {heads} heads")
    fitted = []
    for window in windows:
        for size, count in zip(window, grid, strict=True):
            if size and not is_meant(size, count):
                near = extent(size, count)
                raise UsageError(
                    f"sta: {what} has the window {_by(window)} on a grid of {_by(grid)} tiles: "
                    f"{size} is even, and would cover {near}",
                    hint=f"give {size - 1} or {near}, or {count} for the whole axis",
                )
        t, h, w = (min(s or n, n) for s, n in zip(window, grid, strict=True))
        fitted.append((t, h, w))
    return (fitted[0],) if len(set(fitted)) == 1 else tuple(fitted)


def _own(data: dict[str, Any]) -> WindowTable:
    layers = {}
    for layer, windows in data["layers"].items():
        per_head = bool(windows) and isinstance(windows[0], list)
        layers[int(layer)] = tuple(map(_triple, windows if per_head else [windows]))
    tile = _triple(data["tile"]) if "tile" in data else None
    return WindowTable(layers, tile, data.get("full_steps"))


def _step(key: str) -> Triple:
    found = _KEY.fullmatch(key)
    assert found, key
    return int(found[1]), int(found[2]), int(found[3])


def _triple(value: Any) -> Triple:
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    if not whole or len(value) != 3:
        raise ValueError(f"{value!r} is no window of three whole numbers")
    return value[0], value[1], value[2]


def _by(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
