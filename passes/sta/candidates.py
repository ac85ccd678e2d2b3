"""Windows to choose from: all shapes of about one density, for any grid.

The candidate lists published with "Fast Video Generation with Sliding Tile Attention", arXiv
2502.04507, were picked by hand for two grids (five windows of 10 to 20 %). The rule here is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from resplice.errors import UsageError
from resplice.kernels.tile_grid import Triple, seen_pairs, tile_grid


def window_density(canvas: Sequence[int], tile: Sequence[int], window: Sequence[int]) -> float:
    """Share of all query-key pairs of a video that a window keeps, text left out."""
    return seen_pairs(canvas, tile, window) / math.prod(canvas) ** 2


def candidate_windows(
    canvas: Sequence[int], tile: Sequence[int], density: float, most: int = 6
) -> list[Triple]:
    """Windows that keep at most `density` of the pairs, and that no axis can widen within that.

    Where there are more than `most`, those are kept that differ most in shape: the densest one,
    then always the one farthest (in the logarithms of its sizes) from those kept.

    Args:
        canvas: T, H, W in tokens.
        tile: Tokens of a tile.
        density: Largest share of pairs, between 0 and 1.
        most: Largest number of windows.

    Returns:
        Windows in tiles, each odd or the whole axis, sparsest first: of two windows with equal
        loss a search takes the earlier one.

    Raises:
        UsageError: The density is not between 0 and 1, or even one tile is denser.
    """
    if not 0 < density < 1 or most < 1:
        raise UsageError(f"density={density:g} must lie between 0 and 1, most={most} above 0")
    grid = tile_grid(canvas, tile)
    sizes = [[*range(1, count, 2), count] for count in grid]
    known = {w: window_density(canvas, tile, w) for w in itertools.product(*sizes)}
    fitting = [w for w, share in known.items() if share <= density and w != grid]
    if not fitting:
        least = min(known.values())
        raise UsageError(
            f"no window keeps at most {density:.3g} of the pairs: one tile keeps {least:.3g}",
            hint="give a larger density or a smaller tile",
        )
    chosen = [w for w in fitting if not any(n in fitting for n in _wider(w, sizes))]
    kept = _spread(sorted(chosen, key=lambda w: (-known[w], w)), most)
    return sorted(kept, key=lambda w: (known[w], w))


def _wider(window: Triple, sizes: Sequence[Sequence[int]]) -> list[Triple]:
    """The window with one axis one step wider."""
    found = []
    for axis, size in enumerate(window):
        place = sizes[axis].index(size) + 1
        if place < len(sizes[axis]):
            wide = list(window)
            wide[axis] = sizes[axis][place]
            found.append((wide[0], wide[1], wide[2]))
    return found


def _spread(windows: list[Triple], most: int) -> list[Triple]:
    kept = windows[:1]
    while len(kept) < min(most, len(windows)):
        rest = [w for w in windows if w not in kept]
        kept.append(max(rest, key=lambda w: min(_distance(w, other) for other in kept)))
    return kept


def _distance(a: Triple, b: Triple) -> float:
    """Between shapes, in the logarithms of their sizes."""
    return math.dist([math.log(x) for x in a], [math.log(x) for x in b])
