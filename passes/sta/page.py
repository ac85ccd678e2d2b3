"""The result of a window search as files: tables for the pass, losses, and a page with plots."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from resplice.artifact import staged
from resplice.kernels.tile_grid import Triple
from resplice.passes.sta.result import Over, SearchResult, published
from resplice.passes.sta.windows import WindowTable, save_windows

TABLE, STRATEGY, LOSSES, PAGE = "windows.json", "strategy.json", "losses.json", "search.html"


def save_search(
    result: SearchResult, folder: str | Path, over: Over = "loss", budget: float | None = None
) -> WindowTable:
    """Write what was found.

    Args:
        result: Of a search.
        folder: Gets `windows.json`, for `sta{windows=...}`; `strategy.json`, the published form,
            step by step; `losses.json`, everything that was measured; and, with the `report` extra
            installed, `search.html` with plots.
        over: How steps are put together, see `SearchResult.collapsed`.
        budget: Largest mean density over the heads, see `SearchResult.strategy`.

    Returns:
        The table in `windows.json`.
    """
    table, strategy = result.collapsed(over, budget), published(result.strategy(budget))
    page = _page(result, table)
    with staged(Path(folder) / TABLE) as stage:
        save_windows(table, stage / TABLE)
        (stage / STRATEGY).write_text(json.dumps(strategy) + "\n", encoding="utf-8")
        (stage / LOSSES).write_text(json.dumps(result.to_json()) + "\n", encoding="utf-8")
        if page is not None:
            (stage / PAGE).write_text(page, encoding="utf-8")
    return table


def shares_of(table: WindowTable) -> dict[int, Counter[Triple]]:
    """How many heads of each layer have which window."""
    return {layer: Counter(windows) for layer, windows in sorted(table.layers.items())}


def named(window: Triple) -> str:
    """`3,1,10`."""
    return ",".join(map(str, window))


def _page(result: SearchResult, table: WindowTable) -> str | None:
    try:
        from resplice.report import html, plots  # needs the `report` extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("jinja2", "markupsafe", "matplotlib"):
            return None
        raise
    order = [*result.candidates, result.grid]
    heads = [
        (layer, head, len(windows), window)
        for layer, windows in sorted(table.layers.items())
        for head, window in enumerate(windows)
    ]
    points = [
        plots.Dot(layer + 0.8 * head / count - 0.4 * (count - 1) / count,
                  result.loss_of(layer, head, window), named(window))
        for layer, head, count, window in sorted(heads, key=lambda item: order.index(item[3]))
    ]  # fmt: skip
    counts = shares_of(table)
    total = sum(counts.values(), Counter[Triple]())
    bars = {
        f"layer {layer}": {named(w): float(found[w]) for w in order if total[w]}
        for layer, found in counts.items()
    }
    rows = [
        (named(w), f"{100 * share:.1f} %", total[w], f"{100 * total[w] / total.total():.1f} %")
        for w, share in zip(order, [*result.densities, 1.0], strict=True)
    ]
    lead = (
        f"Canvas {named(result.canvas)} tokens, tile {named(result.tile)}, grid "
        f"{named(result.grid)} tiles; full attention for {result.full_steps} steps, "
        f"{len(result.steps)} steps searched. All heads together keep "
        f"{100 * result.density_of(table):.1f} % of the query-key pairs."
    )
    loss = "mean squared error"
    loss_note = (
        "Each head's loss under its window, mean over steps and prompts; heads side by side."
    )
    share_note = "How many heads of each layer have which window."
    return html.page("Window search", lead, [
        ("Windows", html.rows_of(("Window", "Density", "Heads", "Share"), rows)),
        ("Loss per head", html.figure(plots.dots(points, "layer", loss), loss_note)),
        ("Windows per layer", html.figure(plots.shares(bars, "heads"), share_note)),
    ])  # fmt: skip
