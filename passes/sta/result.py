"""What a window search found: losses per step, layer and head, and windows chosen by them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from resplice.errors import UsageError
from resplice.kernels.tile_grid import Triple, tile_grid
from resplice.passes.sta.budget import allocate
from resplice.passes.sta.candidates import window_density
from resplice.passes.sta.windows import WindowTable

Over = Literal["loss", "majority"]


@dataclass(frozen=True)
class SearchResult:
    """The table of a search.

    Attributes:
        canvas: T, H, W in tokens.
        tile: Tokens of a tile.
        candidates: Windows in tiles; of equal losses the first one wins.
        full_steps: Leading steps of full attention.
        losses: (step, layer) -> float64 [heads, candidates], means over the prompts.
    """

    canvas: Triple
    tile: Triple
    candidates: tuple[Triple, ...]
    full_steps: int
    losses: Mapping[tuple[int, int], Tensor]

    @property
    def grid(self) -> Triple:
        """Tiles on the axes: the full window."""
        return tile_grid(self.canvas, self.tile)

    @property
    def densities(self) -> list[float]:
        """Share of pairs that each candidate keeps."""
        return [window_density(self.canvas, self.tile, window) for window in self.candidates]

    @property
    def steps(self) -> list[int]:
        """Steps that were searched."""
        return sorted({step for step, _ in self.losses})

    @property
    def layers(self) -> list[int]:
        """Layers that were searched."""
        return sorted({layer for _, layer in self.losses})

    def strategy(self, budget: float | None = None) -> dict[Triple, Triple]:
        """(step, layer, head) -> window, leading steps with the full one; the published form.

        Args:
            budget: None: each head's best candidate, as in the paper. Else the largest mean density
                over all heads of a step, and the full window is a candidate, too.
        """
        found = {}
        for step in range(self.full_steps):
            for layer in self.layers:
                for head in range(len(self.losses[self.steps[0], layer])):
                    found[step, layer, head] = self.grid
        for step in self.steps:
            rows = {layer: self.losses[step, layer] for layer in self.layers}
            for layer, windows in self._choose(rows, budget).items():
                found.update({(step, layer, head): w for head, w in enumerate(windows)})
        return dict(sorted(found.items()))

    def collapsed(self, over: Over = "loss", budget: float | None = None) -> WindowTable:
        """One window per layer and head for all searched steps: the step is not in a graph.

        Args:
            over: `loss`: the least sum of losses over the steps. `majority`: what most steps chose,
                of equally many the sparsest one; it may go past a budget.
            budget: See `strategy`.
        """
        if over == "loss":
            sums = {
                layer: torch.stack([self.losses[step, layer] for step in self.steps]).sum(0)
                for layer in self.layers
            }
            return WindowTable(self._choose(sums, budget), self.tile, self.full_steps)
        votes: dict[int, dict[int, Counter[Triple]]] = {}
        for (step, layer, head), window in self.strategy(budget).items():
            if step >= self.full_steps:
                votes.setdefault(layer, {}).setdefault(head, Counter())[window] += 1
        chosen = {
            layer: tuple(self._most(heads[head]) for head in sorted(heads))
            for layer, heads in votes.items()
        }
        return WindowTable(chosen, self.tile, self.full_steps)

    def density_of(self, table: WindowTable) -> float:
        """Mean share of pairs that a table keeps, text left out."""
        windows = [window for row in table.layers.values() for window in row]
        return sum(self._density(window) for window in windows) / len(windows)

    def loss_of(self, layer: int, head: int, window: Triple) -> float:
        """Mean loss over the searched steps; 0 for the full window."""
        if window == self.grid:
            return 0.0
        place = self.candidates.index(window)
        rows = [float(self.losses[step, layer][head, place]) for step in self.steps]
        return sum(rows) / len(rows)

    def _density(self, window: Triple) -> float:
        return window_density(self.canvas, self.tile, window)

    def _most(self, votes: Counter[Triple]) -> Triple:
        return min(votes, key=lambda w: (-votes[w], self._density(w), w))

    def _choose(
        self, rows: Mapping[int, Tensor], budget: float | None
    ) -> dict[int, tuple[Triple, ...]]:
        """Windows per layer from losses per layer, [heads, candidates]."""
        choices = (*self.candidates, self.grid)
        if budget is None:
            return {
                layer: tuple(choices[row.index(min(row))] for row in losses.tolist())
                for layer, losses in rows.items()
            }
        whole = torch.cat(list(rows.values()))
        whole = torch.cat((whole, whole.new_zeros(len(whole), 1)), 1)
        picks = iter(allocate(whole, [*self.densities, 1.0], budget))
        return {
            layer: tuple(choices[next(picks)] for _ in range(len(losses)))
            for layer, losses in rows.items()
        }

    # ---- files ---------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; floats read back bit by bit."""
        return {
            "search": "sta-windows/1",
            "canvas": list(self.canvas),
            "tile": list(self.tile),
            "candidates": [list(window) for window in self.candidates],
            "densities": self.densities,
            "full_steps": self.full_steps,
            "losses": {f"{s}_{layer}": x.tolist() for (s, layer), x in self.losses.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `to_json` gave.

        Raises:
            UsageError: The file is missing or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            losses = {}
            for key, rows in data["losses"].items():
                step, layer = map(int, key.split("_"))
                losses[step, layer] = torch.tensor(rows, dtype=torch.float64)
            windows = [data["canvas"], data["tile"], *data["candidates"]]
            canvas, tile, *candidates = [(t, h, w) for t, h, w in windows]
            return cls(canvas, tile, tuple(candidates), int(data["full_steps"]), losses)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no result of a search: {error}") from error


def published(strategy: Mapping[Triple, Triple]) -> dict[str, list[int]]:
    """The flat "step_layer_head" -> window form of the paper's repository."""
    return {"_".join(map(str, key)): list(window) for key, window in strategy.items()}
