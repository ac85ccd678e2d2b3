"""Window search: which window changes each head's attention least, step by step.

Source: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507, algorithm 1. While
the dense model runs, every self-attention over the video is computed once more under each
candidate, the same window on all heads; a head's loss is the mean squared difference from its dense
output over batch, tokens (text included) and channels. The model goes on with the dense output, so
every layer is judged on dense inputs. Losses are means over the prompts, taken and kept in float64;
of candidates with equal loss the first one listed wins. The first steps keep full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from resplice.errors import UsageError
from resplice.kernels.tile_attention import tile_attention
from resplice.kernels.tile_grid import Triple, tile_grid
from resplice.passes.sta.candidates import candidate_windows
from resplice.passes.sta.progress import Losses, Progress, digest_of
from resplice.passes.sta.prompts import Prompt
from resplice.passes.sta.result import SearchResult
from resplice.passes.sta.sites import AttentionSite, find_sites
from resplice.passes.sta.windows import windows_for
from resplice.pattern import argument
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.show import show


def search_windows(
    program: Program,
    prompts: Sequence[Prompt],
    candidates: Sequence[Triple] | float = 0.2,
    *,
    tile: Triple = (6, 8, 8),
    full_steps: int = 0,
    layers: Sequence[int] = (),
    canvas: Sequence[int] = (),
    progress: str | Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Search windows for every step, layer and head.

    Args:
        program: A captured video transformer; it is not changed.
        prompts: What it is run on, see `prompts_from`; all with the same number of steps.
        candidates: Windows in tiles, 0 for a whole axis; or a density, see `candidate_windows`.
        tile: Tokens of a tile.
        full_steps: Leading steps that keep full attention.
        layers: Sites to search, counted from 0; all by default.
        canvas: T, H, W in tokens, only where the graph does not tell.
        progress: A file to which every prompt and step is appended as it is measured; a search
            over the same things goes on from it, to the same result bit by bit.
        on_step: Called with (prompt, step) before each of them.

    Raises:
        UsageError: The program has no video attention, candidates do not fit the grid, or prompts
            have different numbers of steps.
    """
    counts = sorted({prompt.count for prompt in prompts})
    if len(counts) != 1 or counts[0] <= full_steps:
        raise UsageError(
            f"the prompts have {' and '.join(map(str, counts)) or 'no'} steps; all need the same "
            f"number, above full_steps={full_steps}"
        )
    search = WindowSearch(
        program, candidates, tile=tile, full_steps=full_steps, layers=layers, canvas=canvas,
        progress=progress,
    )  # fmt: skip
    for number, prompt in enumerate(prompts):
        _search_one(search, number, prompt, on_step or (lambda *_: None))
    return search.result()


def _search_one(
    search: WindowSearch, number: int, prompt: Prompt, on_step: Callable[[int, int], None]
) -> None:
    """Steps that are known already run only if later ones need their outputs."""
    wanted = [
        step
        for step in range(search.full_steps, prompt.count)
        if not search.recall(number, step, prompt.digest(step))
    ]
    if not wanted:
        return
    steps = prompt.steps()
    inputs = next(steps)
    for step in range(max(wanted) + 1):
        outputs: tuple[Tensor, ...] = ()
        if step in wanted:
            on_step(number, step)
            outputs = search.observe(number, step, inputs, prompt.digest(step))
        elif prompt.chained:
            outputs = search.run(inputs)
        if step < max(wanted):
            inputs = steps.send(outputs)


class WindowSearch:
    """Runs the dense model and judges candidates on the way; see the top of this file.

    For a pipeline of your own: call `observe` wherever it calls the model, then `result`.

    Attributes:
        sites: The attentions that are searched.
        candidates: Their windows, made concrete on the grid.
        full_steps: Leading steps that are not searched.
    """

    def __init__(
        self,
        program: Program,
        candidates: Sequence[Triple] | float = 0.2,
        *,
        tile: Triple = (6, 8, 8),
        full_steps: int = 0,
        layers: Sequence[int] = (),
        canvas: Sequence[int] = (),
        progress: str | Path | None = None,
    ) -> None:
        """Find the sites; the arguments are those of `search_windows`."""
        self._program, _ = Pipeline.of("canonicalize").run(program)
        self._program.module.recompile()
        self.sites = _sites(self._program, layers, canvas)
        self.tile, self.full_steps = tile, full_steps
        self.canvas = self.sites[0].canvas
        if isinstance(candidates, float):
            candidates = candidate_windows(self.canvas, tile, candidates)
        self.candidates = _fitted(candidates, tile_grid(self.canvas, tile))
        self._progress = Progress(progress, self._header())
        self._measured: dict[tuple[int, int], Losses] = {}

    def _header(self) -> dict[str, Any]:
        model = digest_of(dict(self._program.named_weights()), show(self._program))
        return {
            "search": "sta-windows/1", "model": model, "tile": list(self.tile),
            "canvas": list(self.canvas), "candidates": [list(w) for w in self.candidates],
            "sites": [site.name for site in self.sites],
        }  # fmt: skip

    def recall(self, prompt: int, step: int, digest: str) -> bool:
        """Whether a prompt and step were measured by an earlier run; they count if so."""
        found = self._progress.get(prompt, step, digest)
        if found is not None:
            self._measured[prompt, step] = found
        return found is not None

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The dense outputs alone."""
        with torch.no_grad():
            return tuple(self._program.run(inputs))

    def observe(
        self, prompt: int, step: int, inputs: Mapping[str, Tensor], digest: str = ""
    ) -> tuple[Tensor, ...]:
        """Judge all candidates at one step of one prompt.

        Args:
            prompt: Number of the prompt.
            step: Number of the step, at least `full_steps`.
            inputs: Flat named inputs, as `Program.call.bind` gives them.
            digest: Identifies the inputs when a search is taken up again; made from them if empty.

        Returns:
            The dense outputs, flat.

        Raises:
            InputError: The inputs do not fit the program.
        """
        self._program.check_inputs(inputs)
        judge = _Judge(self._program, self.sites, self.candidates, self.tile)
        with torch.no_grad():
            tensors = [inputs[node.name] for node in self._program.placeholders]
            outputs = judge.run(*tensors)
        losses = [judge.losses[site.name] for site in self.sites]
        self._progress.put(prompt, step, digest or digest_of(inputs), losses)
        self._measured[prompt, step] = losses
        return tuple(outputs)

    def result(self) -> SearchResult:
        """Means over the prompts.

        Raises:
            UsageError: Nothing was observed, or a prompt lacks a step that another one has.
        """
        known = self._measured
        prompts, steps = (sorted({key[axis] for key in known}) for axis in (0, 1))
        missing = [(p, s) for p in prompts for s in steps if (p, s) not in known]
        if not known or missing:
            lack = f"prompt {missing[0][0]} lacks step {missing[0][1]}" if missing else "no steps"
            raise UsageError(f"the search is not complete: {lack}")
        losses = {
            (step, site.layer): _mean([known[prompt, step][place] for prompt in prompts])
            for step in steps
            for place, site in enumerate(self.sites)
        }
        return SearchResult(self.canvas, self.tile, self.candidates, self.full_steps, losses)


def _mean(each: Sequence[list[list[float]]]) -> Tensor:
    """Over prompts, in float64: [heads, candidates]."""
    return torch.tensor(each, dtype=torch.float64).mean(0)


class _Judge(fx.Interpreter):
    """Computes every site once more under each candidate; results stay dense."""

    def __init__(
        self, program: Program, sites: Sequence[AttentionSite], candidates: Sequence[Triple],
        tile: Triple,
    ) -> None:  # fmt: skip
        super().__init__(program.module)
        self._sites = {site.node: site for site in sites}
        self._candidates, self._tile = candidates, tile
        self.losses: dict[str, list[list[float]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        dense = super().run_node(n)
        site = self._sites.get(n)
        if site is not None:
            columns = [self._loss(site, dense, window) for window in self._candidates]
            self.losses[site.name] = torch.stack(columns, 1).tolist()
        return dense

    def _loss(self, site: AttentionSite, dense: Tensor, window: Triple) -> Tensor:
        """Float64 [heads]."""
        q, k, v = (self.env[x] for x in site.node.args[:3] if isinstance(x, fx.Node))
        span = site.masked_keys()
        mask = self.env[site.mask][..., slice(*span)] if span and site.mask else None
        found = tile_attention(
            q, k, v, site.canvas, self._tile, window, site.text_length, site.text_first, mask,
            argument(site.node, "scale"),
        )  # fmt: skip
        error: Tensor = found.double() - dense.double()
        return error.square().mean((0, 2, 3))


def _sites(program: Program, layers: Sequence[int], canvas: Sequence[int]) -> list[AttentionSite]:
    found = find_sites(program, canvas)
    chosen = [site for site in found.found if not layers or site.layer in layers]
    if not chosen:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in found.refused)) or "there is none"
        raise UsageError(f"no attention over a whole video to search windows for: {reasons}")
    canvases = sorted({site.canvas for site in chosen})
    if len(canvases) > 1:
        raise UsageError(
            f"layers have different canvases: {', '.join(map(str, canvases))}",
            hint="search them one by one, with layers=",
        )
    return chosen


def _fitted(candidates: Sequence[Triple], grid: Triple) -> tuple[Triple, ...]:
    """Candidates on a grid; refuses what no search can tell apart."""
    if not candidates:
        raise UsageError("there are no candidates to search among")
    fitted = [windows_for([window], grid, 1, "candidate")[0] for window in candidates]
    for place, window in enumerate(fitted):
        if window == grid:
            raise UsageError(
                f"candidate {candidates[place]} is the whole grid {grid}: it always wins"
            )
        if window in fitted[:place]:
            raise UsageError(f"candidate {candidates[place]} is there twice on the grid {grid}")
    return tuple(fitted)
