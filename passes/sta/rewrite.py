"""sta: sliding tile attention in place of a video transformer's full self-attention.

Source: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507.

    %9 = aten.scaled_dot_product_attention(%6, %7, %8)                    f32[B,heads,T*H*W,D]
      ->
    %9 = resplice.tile_attention(%6, %7, %8, [T,H,W], [6,8,8], [3,3,3], 0, False, None, None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import fx

from resplice.build import Builder
from resplice.change import Change, Site
from resplice.context import Context
from resplice.errors import SpecError
from resplice.facts import Canonical
from resplice.kernels.tile_attention import tile_attention
from resplice.kernels.tile_grid import Triple, seen_pairs, tile_grid
from resplice.kernels.tile_lowering import lowering_cost
from resplice.origin import origin
from resplice.pass_base import Exact, Meaning, Pass, Redefines, option
from resplice.passes.sta.sites import AttentionSite, find_sites
from resplice.passes.sta.windows import WindowTable, load_windows, windows_for
from resplice.pattern import argument
from resplice.phases import is_full, keep_full
from resplice.program import Program
from resplice.rules import replace_node
from resplice.show import show_nodes


@dataclass(frozen=True)
class Sta(Pass):
    """Let each video token attend to a window of tiles around its own, and to all text.

    Rewrites the self-attentions over all tokens of a video, told by dataflow; T, H and W are
    recovered from the graph. Left alone, with the reason in the report: cross-attention, text
    encoders, attention within frames or across them, images, and grids that are not fixed.
    """

    name = "sta"
    needs = (Canonical,)

    tile: tuple[int, int, int] = option((6, 8, 8), "tokens of a tile along t, h, w")
    window: Literal["full"] | tuple[int, int, int] = option(
        (3, 3, 3), "tiles a query sees along t, h, w, odd; 0: the whole axis; full: everything"
    )
    windows: str = option("", "JSON file with windows per layer and head, in place of `window`")
    layers: tuple[int, ...] = option((), "sites to rewrite, counted from 0; all by default")
    canvas: tuple[int, ...] = option((), "T,H,W in tokens, only where the graph does not tell")
    two_phase: bool = option(False, "keep full attention as a second function, `full`")

    def __post_init__(self) -> None:
        """Validate what needs no model.

        Raises:
            SpecError: A size is not positive, or the canvas has not three.
        """
        super().__post_init__()
        if min(self.tile) < 1:
            raise SpecError(f"sta: tile={_by(self.tile)} must be positive")
        if self.window != "full" and min(self.window) < 0:
            raise SpecError(f"sta: window={_by(self.window)} must not be negative")
        if self.canvas and (len(self.canvas) != 3 or min(self.canvas) < 1):
            raise SpecError(f"sta: canvas={_by(self.canvas)} must be three positive sizes, T,H,W")

    @property
    def meaning(self) -> Meaning:
        """Exact with the full window, else another model."""
        return Exact() if self.window == "full" and not self.windows else Redefines()

    @classmethod
    def identity(cls) -> Self:
        """The window is the whole grid."""
        return cls(window="full")

    def run(self, program: Program, context: Context) -> Change:
        """Rewrite every site.

        Raises:
            UsageError: A window does not fit a site, or the file of windows can't be read.
        """
        if is_full(program, self.name):
            return Change(notes=["full phase: left as it is"])
        table = self._table()
        found, change = find_sites(program, self.canvas), Change()
        for node, reason in found.refused:
            change.refuse(node, reason)
        if self.two_phase and found.found:
            keep_full(program, self.name, "two-phase=true")
        for site in found.found:
            why = self._left_alone(site, table)
            if why:
                change.refuse(site.node, why)
            elif context.take(f"sta:{site.name}"):
                change.sites.append(self._rewrite(program, site, table))
        names = [site.node for site in change.sites]
        program.metadata["sta"] = {"phase": "tiles", "tile": list(self.tile), "sites": names}
        if table is not None and table.full_steps:
            change.notes.append(f"the table keeps full attention for {table.full_steps} steps")
        return change

    def _table(self) -> WindowTable | None:
        table = load_windows(self.windows) if self.windows else None
        if table is not None and table.tile not in (None, self.tile):
            assert table.tile is not None
            raise SpecError(
                f"sta: {self.windows} was made for tile={_by(table.tile)}, not {_by(self.tile)}"
            )
        return table

    def _left_alone(self, site: AttentionSite, table: WindowTable | None) -> str | None:
        if self.layers and site.layer not in self.layers:
            return f"layer {site.layer} is not in layers={_by(self.layers)}"
        if table is not None and site.layer not in table.layers:
            return f"{self.windows} has no windows for layer {site.layer}"
        return None

    def _chosen(self, site: AttentionSite, table: WindowTable | None) -> tuple[Triple, ...]:
        grid = tile_grid(site.canvas, self.tile)
        if table is not None:
            what = f"layer {site.layer} of {self.windows}"
            return windows_for(table.layers[site.layer], grid, site.heads, what)
        window = grid if self.window == "full" else self.window
        return windows_for([window], grid, site.heads, "window")

    def _rewrite(self, program: Program, site: AttentionSite, table: WindowTable | None) -> Site:
        node, windows = site.node, self._chosen(site, table)
        build, made_at = Builder(program, node, self.name), origin(node)
        before = show_nodes(program, [node])
        flat = [size for window in windows for size in window]
        new = build(
            tile_attention.overload, *node.args[:3], list(site.canvas), list(self.tile), flat,
            site.text_length, site.text_first, _mask(build, site), argument(node, "scale"),
        )  # fmt: skip
        name = node.name
        replace_node(program, node, new, self.name)
        return Site(name, made_at, before, show_nodes(program, [new]), self._metrics(site, windows))

    def _metrics(self, site: AttentionSite, windows: tuple[Triple, ...]) -> dict[str, Any]:
        tokens = site.canvas[0] * site.canvas[1] * site.canvas[2]
        seen = sum(seen_pairs(site.canvas, self.tile, window) for window in windows)
        flat = [size for window in windows for size in window]
        lowered = lowering_cost(site.canvas, self.tile, flat, site.heads)
        return {
            "layer": site.layer,
            "canvas": list(site.canvas),
            "text": site.text_length,
            "windows": [list(window) for window in windows],
            "density": seen / len(windows) / tokens**2,
            "lowered_calls": lowered["calls"],
            "lowered_key_copies": lowered["copied"],
        }


def _mask(build: Builder, site: AttentionSite) -> fx.Node | None:
    """The mask of the text keys, where that of the image keys is known to be open."""
    span, mask = site.masked_keys(), site.mask
    if span is None or mask is None or span[1] - span[0] == mask.meta["val"].shape[3]:
        return mask if span else None
    return build.shared(torch.ops.aten.slice.Tensor, mask, -1, *span)


def _by(sizes: Any) -> str:
    return ",".join(map(str, sizes))
