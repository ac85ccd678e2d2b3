"""`search-windows`: find each head's window for `sta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resplice.cli.options import AllowPickle, Json, Model, numbers, open_model
from resplice.cli.output import emit, table, working
from resplice.errors import UsageError
from resplice.registry import load


def search_windows(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(help="folder: NAME/*.npz, inputs of every step; or NAME.npz, one call"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the result")],
    candidates: Annotated[
        str | None, typer.Option(help="windows in tiles, 0 a whole axis: '3,3,3 1,0,0'")
    ] = None,
    density: Annotated[
        float, typer.Option(help="without --candidates: all shapes that keep at most this share")
    ] = 0.2,
    tile: Annotated[str, typer.Option(help="tokens of a tile along t, h, w")] = "6,8,8",
    full_steps: Annotated[int, typer.Option(min=0, help="first steps with full attention")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="sample NAME.npz from noise in so many steps")
    ] = None,
    latent: Annotated[str, typer.Option(help="the input that holds the video")] = "hidden_states",
    timestep: Annotated[str, typer.Option(help="the input that holds the step")] = "timestep",
    shift: Annotated[float, typer.Option(help="shift of the sampling schedule")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    over: Annotated[
        str, typer.Option(help="how steps become one window: `loss` (least sum) or `majority`")
    ] = "loss",
    budget: Annotated[
        float | None,
        typer.Option(help="mean density of all heads; spread over them where it saves most loss"),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="sites to search: 0,2; default all")] = None,
    canvas: Annotated[
        str | None, typer.Option(help="T,H,W in tokens, where the graph does not tell")
    ] = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Search the attention window of every step, layer and head; a stopped search goes on.

    Every candidate is compared with the dense attention while the dense model runs. OUTPUT gets
    windows.json (for `sta{windows=...}`), strategy.json, losses.json, search.html and the progress.
    """
    if over not in ("loss", "majority"):
        raise UsageError(f"--over {over!r} is neither loss nor majority")
    windows = [numbers(item, "--candidates", 3) for item in (candidates or "").split()]
    sizes = numbers(tile, "--tile", 3)
    flow = load("resplice.passes.sta.prompts:Flow")(
        steps=steps, latent=latent, timestep=timestep, shift=shift, seed=seed
    )
    data = load("resplice.passes.sta.prompts:prompts_from")(prompts, flow if steps else None)
    with working(f"capturing {model}") as step:
        program = open_model(model, allow_pickle=allow_pickle)
        result = load("resplice.passes.sta.search:search_windows")(
            program, data, windows or density, tile=sizes, full_steps=full_steps,
            layers=numbers(layers or "", "--layers"), canvas=numbers(canvas or "", "--canvas"),
            progress=output / "progress.jsonl",
            on_step=lambda p, s: step(f"prompt {p + 1} of {len(data)}, step {s}"),
        )  # fmt: skip
        found = load("resplice.passes.sta.page:save_search")(result, output, over, budget)
    emit(
        {
            "output": str(output), "grid": result.grid, "candidates": result.candidates,
            "densities": result.densities, "density": result.density_of(found),
            "layers": found.layers,
        },
        lambda: _text(result, found, output),
        as_json=json,
    )  # fmt: skip


def _text(result: Any, found: Any, output: Path) -> str:
    """Heads per window and layer."""
    named, shares = (load(f"resplice.passes.sta.page:{name}") for name in ("named", "shares_of"))
    windows = [*result.candidates, result.grid]
    rows = [
        (str(layer), *(str(count[window] or "") for window in windows))
        for layer, count in shares(found).items()
    ]
    return "\n".join([
        table(rows, ("layer", *map(named, windows))),
        f"{100 * result.density_of(found):.1f} % of the query-key pairs are kept",
        f"use it: sta{{tile={named(result.tile)} windows={output / 'windows.json'}}}",
    ])  # fmt: skip
