"""Window search: planted windows, losses against a mask by hand, ties, budgets, resuming, files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tile_attention import brute, brute_mask
from torch import Tensor, nn
from zoo import ZOO

import resplice
from resplice.cli.app import run as command
from resplice.errors import UsageError
from resplice.kernels.tile_attention import tile_attention
from resplice.passes.sta import (
    Flow,
    Recorded,
    Sampled,
    SearchResult,
    WindowSearch,
    candidate_windows,
    load_windows,
    prompts_from,
    save_search,
    search_windows,
)
from resplice.passes.sta.budget import allocate
from resplice.passes.sta.candidates import window_density
from resplice.pipeline import Pipeline
from resplice.program import Program

CANVAS, TILE = (5, 10, 5), (1, 2, 1)
GRID = (5, 5, 5)
AXES = ((3, 5, 5), (5, 3, 5), (5, 5, 3))
"""Candidates that slide along one axis each."""


class Planted(nn.Module):
    """Layers of attention in which head i sees little but its neighbours along axis `axes[i]`."""

    def __init__(self, layers: Sequence[Sequence[int]] = ((0, 1, 2), (2, 2, 0)), silent: int = -1):
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList() for _ in range(3))
        for axes in layers:
            q, k, v = (nn.Linear(15 + 4, len(axes) * 5, bias=False) for _ in range(3))
            nn.init.zeros_(q.weight)
            nn.init.zeros_(k.weight)
            near = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
            with torch.no_grad():
                for head, axis in enumerate(axes):
                    q.weight[5 * head : 5 * head + 5, 5 * axis : 5 * axis + 5] = 60 * torch.eye(5)
                    k.weight[5 * head : 5 * head + 5, 5 * axis : 5 * axis + 5] = near.float()
                if silent >= 0:
                    v.weight[5 * silent : 5 * silent + 5] = 0
            self.q.append(q), self.k.append(k), self.v.append(v)

    def forward(self, video: Tensor) -> Tensor:
        """[B,19,T,H,W] -> [B,S,layers * heads * 5]."""
        x = video.flatten(2).transpose(1, 2)
        found = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            heads = [f(x).unflatten(-1, (-1, 5)).transpose(1, 2) for f in (q, k, v)]
            mixed = nn.functional.scaled_dot_product_attention(*heads)
            found.append(mixed.transpose(1, 2).flatten(2))
        return torch.cat(found, -1)


def video(seed: int = 0, batch: int = 1) -> Tensor:
    """Which tile a token lies in, one-hot per axis, and four channels of noise."""
    places = [torch.arange(n) // t for n, t in zip(CANVAS, TILE, strict=True)]
    codes = [torch.eye(5)[p] for p in torch.meshgrid(*places, indexing="ij")]
    noise = torch.randn(batch, *CANVAS, 4, generator=torch.Generator().manual_seed(seed))
    known = torch.cat(codes, -1).expand(batch, -1, -1, -1, -1)
    return torch.cat((known, noise), -1).movedim(-1, 1)


def planted(**options: Any) -> Program:
    torch.manual_seed(0)
    return resplice.capture(Planted(**options).eval(), {"video": video()}, check=False)


def calls(count: int, seed: int = 0) -> Recorded:
    return Recorded([{"video": video(seed + i)} for i in range(count)])


# ---- the algorithm -----------------------------------------------------------------------


def test_planted_windows_are_found() -> None:
    found = search_windows(planted(), [calls(3), calls(3, 50)], AXES, tile=TILE, full_steps=1)
    wanted = {0: AXES, 1: (AXES[2], AXES[2], AXES[0])}
    assert (found.canvas, found.grid, found.steps, found.layers) == (CANVAS, GRID, [1, 2], [0, 1])
    assert found.collapsed().layers == wanted
    assert found.collapsed("majority").layers == wanted
    strategy = found.strategy()
    assert len(strategy) == 3 * 2 * 3
    assert {w for (step, _, _), w in strategy.items() if step < 1} == {GRID}
    for step, layer, head in itertools.product((1, 2), (0, 1), range(3)):
        assert strategy[step, layer, head] == wanted[layer][head]
        losses = found.losses[step, layer][head]
        assert sorted(losses)[1] > 100 * losses.min(), "nothing to tell apart"


def test_losses_are_those_of_a_mask_written_by_hand() -> None:
    """Float64, mean over prompts, batch, tokens and channels; the model goes on densely."""
    torch.manual_seed(1)
    model = Planted(((0, 1, 2),)).double().requires_grad_(False)
    for layer in (*model.q, *model.k, *model.v):
        nn.init.normal_(layer.weight)
    inputs = [torch.randn(2, 19, *CANVAS, dtype=torch.float64) for _ in range(2)]
    program = resplice.capture(model, {"video": inputs[0]}, check=False)
    search = WindowSearch(program, [(1, 3, 5), (3, 1, 5)], tile=TILE)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for prompt, x in enumerate(inputs):
        (dense,) = search.observe(prompt, 0, {"video": x})
        assert torch.equal(dense, program.run({"video": x})[0])
        tokens = x.flatten(2).mT
        q, k, v = ((tokens @ f[0].weight.T).unflatten(-1, (3, 5)).transpose(1, 2)
                   for f in (model.q, model.k, model.v))  # fmt: skip
        whole = brute(q, k, v, torch.ones(250, 250, dtype=torch.bool))
        for place, window in enumerate(search.candidates):
            other = brute(q, k, v, brute_mask(CANVAS, TILE, window))
            expected[:, place] += (whole - other).square().mean((0, 2, 3)) / 2
    losses = search.result().losses[0, 0]
    assert losses.dtype == torch.float64
    assert float((losses - expected).abs().max()) <= 1e-12 * float(expected.max())


def test_text_counts_and_its_mask_is_kept() -> None:
    """HunyuanVideo: joint tokens, padded text; the rewritten program is what was judged."""
    entry = ZOO["hunyuanvideo"]
    args, kwargs = entry.inputs(seed=1, batch=2, frames=4, rows=6, columns=8, text=6)
    program = resplice.capture(entry.model(), resplice.Sample(args, kwargs), check=False)
    tensors, window = program.call.bind(args, kwargs), (1, 1, 3)
    search = WindowSearch(program, [window], tile=(2, 2, 3))
    search.observe(0, 0, tensors)
    first = search.sites[0]
    assert (first.text_length, first.mask is not None) == (6, True)
    sparse, _ = Pipeline.of("sta{tile=2,2,3 window=1,1,3 layers=0}").run(program)
    from resplice.passes.sta.losses import values_at

    a, b = (values_at(p, tensors, [first.name])[1][first.name] for p in (program, sparse))
    expected = (a.double() - b.double()).square().mean((0, 2, 3))
    found = search.result().losses[0, 0][:, 0]
    assert torch.allclose(found, expected, rtol=1e-4)
    assert float(found.min()) > 0


def test_of_equal_losses_the_first_candidate_wins() -> None:
    program = planted(layers=((0, 1, 2),), silent=1)
    for order in (AXES, AXES[::-1]):
        found = search_windows(program, [calls(1)], order, tile=TILE)
        assert found.losses[0, 0][1].tolist() == [0.0] * 3
        assert found.collapsed().layers[0][1] == order[0]
        assert found.strategy()[0, 0, 0] == AXES[0]


def test_steps_are_put_together_by_loss_or_by_majority() -> None:
    rows = [[1.0, 2.0], [1.0, 2.0], [9.0, 2.0]]
    losses = {
        (step + 2, 0): torch.tensor([row], dtype=torch.double) for step, row in enumerate(rows)
    }
    found = SearchResult(CANVAS, TILE, AXES[:2], 2, losses)
    assert found.collapsed("loss").layers == {0: (AXES[1],)}
    assert found.collapsed("majority").layers == {0: (AXES[0],)}
    assert found.collapsed().full_steps == 2


# ---- budgets and candidates --------------------------------------------------------------


def best(losses: Tensor, densities: Sequence[float], budget: float) -> float:
    """The least loss of all choices within a budget."""
    heads, choices = losses.shape
    return min(
        sum(float(losses[head, c]) for head, c in enumerate(choice))
        for choice in itertools.product(range(choices), repeat=heads)
        if sum(densities[c] for c in choice) <= budget * heads + 1e-9
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.1, 0.15, 0.33, 0.7, 1.0])
def test_a_budget_is_spent_where_it_saves_most(seed: int, budget: float) -> None:
    """Within one step of the best of all choices; exactly that where steps are alike."""
    generator = torch.Generator().manual_seed(seed)
    losses, densities = torch.rand(4, 5, generator=generator).double(), [0.1, 0.2, 0.2, 0.5, 1.0]
    losses[:, -1] = 0
    chosen = allocate(losses, densities, budget)
    assert sum(densities[c] for c in chosen) <= 4 * budget + 1e-9
    total = float(losses[torch.arange(4), chosen].sum())
    assert total <= best(losses, densities, budget) + float(losses.max())
    two, even = losses[:, [0, 4]], [0.1, 1.0]
    chosen = allocate(two, even, budget)
    assert float(two[torch.arange(4), chosen].sum()) == pytest.approx(best(two, even, budget))
    assert allocate(losses, densities, 1.0) == [4] * 4


def test_a_budget_below_every_window_is_refused() -> None:
    with pytest.raises(UsageError, match="below the sparsest window, 0.1"):
        allocate(torch.ones(2, 2, dtype=torch.double), [0.1, 0.2], 0.05)


def test_a_budget_gives_the_full_window_to_heads_that_need_it() -> None:
    losses = {(0, 0): torch.tensor([[5.0, 4.9], [0.2, 0.1], [0.1, 0.2]], dtype=torch.double)}
    found = SearchResult(CANVAS, TILE, ((1, 1, 5), (3, 1, 5)), 0, losses)
    table = found.collapsed(budget=0.5)
    assert table.layers[0][0] == GRID
    assert found.density_of(table) <= 0.5
    assert found.density_of(found.collapsed(budget=0.05)) <= 0.05
    assert set(found.strategy(budget=1.0).values()) == {GRID}


@pytest.mark.parametrize(
    ("canvas", "tile"),
    [((18, 48, 80), (6, 8, 8)), ((30, 48, 80), (6, 8, 8)), ((21, 30, 52), (6, 8, 8)),
     ((13, 30, 45), (4, 6, 9)), ((1, 64, 64), (1, 8, 8))],
)  # fmt: skip
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_candidates_of_any_grid_are_as_wide_as_the_density_allows(
    canvas: Any, tile: Any, density: float
) -> None:
    found = candidate_windows(canvas, tile, density, most=6)
    grid = [-(-n // t) for n, t in zip(canvas, tile, strict=True)]
    shares = [window_density(canvas, tile, window) for window in found]
    assert 1 <= len(found) <= 6
    assert len(set(found)) == len(found)
    assert shares == sorted(shares)
    assert max(shares) <= density
    for window in found:
        assert all(w % 2 == 1 or w == n for w, n in zip(window, grid, strict=True))
        for axis in range(3):
            if window[axis] < grid[axis]:
                wider = list(window)
                wider[axis] = min(window[axis] + 2, grid[axis])
                wider[axis] -= wider[axis] % 2 == 0 and wider[axis] < grid[axis]
                assert window_density(canvas, tile, wider) > density
    assert candidate_windows(canvas, tile, density, most=6) == found


def test_the_shapes_of_the_papers_lists_are_among_the_candidates() -> None:
    """Three of the five windows listed for grid 3x6x10 fit in 17 % and can't be widened there."""
    found = candidate_windows((18, 48, 80), (6, 8, 8), 0.17, most=99)
    assert {(3, 1, 10), (1, 3, 10), (3, 3, 3)} <= set(found)


@pytest.mark.parametrize("density", [0.0, 1.0, 0.001])
def test_densities_without_windows_are_refused(density: float) -> None:
    with pytest.raises(UsageError, match="must lie between 0 and 1|one tile keeps 0.0111"):
        candidate_windows((18, 48, 40), (6, 8, 8), density)


# ---- real models, seeds, resuming --------------------------------------------------------

LTX = {"batch": 1, "frames": 4, "rows": 6, "columns": 6, "text": 6}


@cache
def trained(steps: int) -> tuple[Program, dict[str, Tensor]]:
    """A tiny LTX and its inputs, after some steps of training as a denoiser."""
    entry = ZOO["ltx"]
    model, (args, kwargs) = entry.model(), entry.inputs(seed=1, **LTX)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        torch.manual_seed(step)
        noise, clean = (torch.randn_like(kwargs["hidden_states"]) for _ in range(2))
        given = {**kwargs, "hidden_states": (noise + clean) / 2}
        loss = (model(**given)[0] - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    program = resplice.capture(model, resplice.Sample(args, kwargs), check=False)
    return program, program.call.bind(args, kwargs)


@pytest.mark.parametrize("training", [0, 5])
def test_a_real_search_is_reproducible_from_the_seed(training: int, tmp_path: Path) -> None:
    program, inputs = trained(training)
    texts = []
    for number, seed in enumerate((7, 7, 8)):
        prompts = [Sampled(inputs, Flow(3, seed=seed), p) for p in range(2)]
        found = search_windows(program, prompts, 0.4, tile=(1, 2, 2), full_steps=1)
        save_search(found, tmp_path / str(number))
        texts.append([
            (tmp_path / str(number) / name).read_text() for name in ("losses.json", "strategy.json")
        ])  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[2][0]
    assert found.steps == [1, 2]
    assert len(found.candidates) > 2
    again = SearchResult.load(tmp_path / "2" / "losses.json")
    assert all(torch.equal(found.losses[key], again.losses[key]) for key in found.losses)
    assert (again.candidates, again.full_steps) == (found.candidates, 1)


def test_sampling_is_the_euler_method_of_flow_matching() -> None:
    program, inputs = trained(0)
    flow = Flow(3, shift=2.0, seed=4)
    x = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    sigmas = [2 * s / (1 + s) for s in (1.0, 2 / 3, 1 / 3, 0.0)]
    steps = []
    for now, after in itertools.pairwise(sigmas):
        time = torch.full_like(inputs["timestep"], round(1000 * now))
        steps.append({**inputs, "hidden_states": x, "timestep": time})
        x = x + (after - now) * program.run(steps[-1])[0]
    windows = [(1, 3, 3), (3, 1, 3)]
    a = search_windows(program, [Sampled(inputs, flow, 1)], windows, tile=(1, 2, 2))
    b = search_windows(program, [Recorded(steps)], windows, tile=(1, 2, 2))
    for key, losses in b.losses.items():
        assert torch.allclose(a.losses[key], losses, rtol=1e-5)
    with pytest.raises(UsageError, match="no 'sample' to sample with"):
        Sampled(inputs, Flow(2, latent="sample"))
    text = Sampled(inputs, Flow(2, latent="encoder_hidden_states"))
    with pytest.raises(UsageError, match="this model can't be sampled"):
        search_windows(program, [text], windows, tile=(1, 2, 2))


class Killed(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_search_goes_on_to_the_same_table(
    sampled: bool, after: int, tmp_path: Path
) -> None:
    program, inputs = trained(0)
    recorded = [
        {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])} for _ in "abc"
    ]

    def search(on_step: Callable[[int, int], None], file: Path | None = None) -> SearchResult:
        prompts = [
            Sampled(inputs, Flow(3), p) if sampled else Recorded(recorded[p:] + recorded[:p])
            for p in range(2)
        ]
        return search_windows(program, prompts, [(1, 3, 3), (3, 1, 3)], tile=(1, 2, 2),
                              full_steps=1, progress=file, on_step=on_step)  # fmt: skip

    def kill(*_: int) -> None:
        if len(done) == after:
            raise Killed
        done.append(1)

    whole, done, file = search(lambda *_: None), list[int](), tmp_path / "progress.jsonl"
    with pytest.raises(Killed):
        search(kill, file)
    with file.open("a") as stream:
        stream.write('{"at": [1, 2], "inp')  # what a kill in the middle of a line leaves
    rest: list[tuple[int, int]] = []
    again = search(lambda p, s: rest.append((p, s)), file)
    assert rest == [(0, 1), (0, 2), (1, 1), (1, 2)][after:]
    assert whole.losses.keys() == again.losses.keys()
    assert all(torch.equal(whole.losses[key], again.losses[key]) for key in whole.losses)
    nothing: list[tuple[int, int]] = []
    search(lambda p, s: nothing.append((p, s)), file)
    assert nothing == []


def test_progress_of_another_search_is_refused(tmp_path: Path) -> None:
    program, file = planted(), tmp_path / "p.jsonl"
    search_windows(program, [calls(1)], AXES, tile=TILE, progress=file)
    with pytest.raises(UsageError, match="belongs to another search: candidates differ"):
        search_windows(program, [calls(1)], AXES[:2], tile=TILE, progress=file)
    with pytest.raises(UsageError, match="prompt 0, step 0 was measured on other inputs"):
        search_windows(program, [calls(1, seed=3)], AXES, tile=TILE, progress=file)
    changed = planted(silent=0)
    with pytest.raises(UsageError, match="belongs to another search: model differ"):
        search_windows(changed, [calls(1)], AXES, tile=TILE, progress=file)
    more = search_windows(program, [calls(2)], AXES, tile=TILE, progress=file)
    assert more.steps == [0, 1]
    file.write_text("nonsense\n")
    with pytest.raises(UsageError, match="holds no progress of a search"):
        search_windows(program, [calls(1)], AXES, tile=TILE, progress=file)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"candidates": [(3, 5, 5), (3, 0, 0)]}, "is there twice on the grid"),
        ({"candidates": [(0, 0, 0)]}, "is the whole grid"),
        ({"candidates": [(2, 5, 5)]}, "2 is even, and would cover 3"),
        ({"candidates": []}, "no candidates"),
        ({"full_steps": 1}, "the prompts have 1 steps"),
        ({"layers": [7]}, "no attention over a whole video"),
        ({"prompts": [calls(1), calls(2)]}, "the prompts have 1 and 2 steps"),
        ({"prompts": []}, "the prompts have no steps"),
    ],
)
def test_searches_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    given = {"prompts": [calls(1)], "candidates": AXES, "tile": TILE, **options}
    with pytest.raises(UsageError, match=reason):
        search_windows(planted(), **given)


def test_incomplete_searches_have_no_result() -> None:
    search = WindowSearch(planted(), AXES, tile=TILE)
    with pytest.raises(UsageError, match="not complete: no steps"):
        search.result()
    for prompt, step in ((0, 0), (0, 1), (1, 0)):
        search.observe(prompt, step, {"video": video(step)})
    with pytest.raises(UsageError, match="prompt 1 lacks step 1"):
        search.result()


# ---- files and the command line ----------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two prompts of two recorded steps."""
    for name, seed in (("cat", 0), ("dog", 9)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for step in range(2):
            np.savez(tmp_path / "data" / name / f"{step:03}.npz", video=video(seed + step).numpy())
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The planted model as a saved program."""
    return resplice.optimize(planted(), check=False).save(tmp_path / "planted.pt2")


def test_the_command_writes_tables_plots_and_progress(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = [
        "search-windows", str(model), "--prompts", str(data), "-o", str(out), "--tile", "1,2,1",
        "--candidates", "3,0,0 0,3,0 0,0,3", "--full-steps", "1",
    ]  # fmt: skip
    assert command(arguments) == 0
    text = capsys.readouterr().out
    assert "sta{tile=1,2,1 windows=" in text
    assert "60.0 % of the query-key pairs are kept" in text
    wanted = {0: AXES, 1: (AXES[2], AXES[2], AXES[0])}
    table = load_windows(out / "windows.json")
    assert (table.layers, table.tile, table.full_steps) == (wanted, TILE, 1)
    assert load_windows(out / "strategy.json").layers == wanted
    page = (out / "search.html").read_text()
    assert page.count("<svg") == 2
    assert all(word in page for word in ("Loss per head", "Windows per layer", "3,5,5", "60.0 %"))
    assert "http" not in page.replace("http://www.w3.org", "")
    losses = (out / "losses.json").read_bytes()
    assert command([*arguments, "--json"]) == 0  # everything is known already
    assert json.loads(capsys.readouterr().out)["layers"]["0"] == [list(w) for w in AXES]
    assert (out / "losses.json").read_bytes() == losses
    spec = f"sta{{tile=1,2,1 windows={out / 'windows.json'}}}"
    sparse = resplice.optimize(str(model), spec, check=False).program
    assert [n.args[5] for n in sparse.graph.nodes if n.target is tile_attention.overload] == [
        [size for window in row for size in window] for row in wanted.values()
    ]


def test_the_command_samples_and_spends_a_budget(data: Path, tmp_path: Path, capsys: Any) -> None:
    program, inputs = trained(0)
    saved = resplice.optimize(program, check=False).save(tmp_path / "ltx.pt2")
    (tmp_path / "prompts").mkdir()
    np.savez(tmp_path / "prompts" / "fox.npz", **{n: x.numpy() for n, x in inputs.items()})
    arguments = [
        "search-windows", str(saved), "--prompts", str(tmp_path / "prompts"), "--tile", "1,2,2",
        "--density", "0.3", "--steps", "2", "--seed", "5", "--budget", "0.25", "--json",
    ]  # fmt: skip
    found = []
    for name in ("a", "b"):
        assert command([*arguments, "-o", str(tmp_path / name)]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1]["density"] <= 0.25
        assert max(found[-1]["densities"]) <= 0.3
    a, b = ((tmp_path / name / "losses.json").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--candidates", "3,3"), 2, "is not 3 whole numbers"),
        (("--candidates", "2,5,5"), 2, "would cover 3"),
        (("--density", "2"), 2, "must lie between 0 and 1"),
        (("--tile", "x"), 2, "--tile 'x' is not 3 whole numbers"),
        (("--over", "vote"), 2, "neither loss nor majority"),
        (("--full-steps", "2"), 2, "above full_steps=2"),
        (("--prompts", "nowhere"), 2, "there are no prompts in nowhere"),
        (("--budget", "0.01"), 2, "below the sparsest window"),
        (("--layers", "9"), 2, "no attention over a whole video"),
    ],
)
def test_errors_of_the_command(
    more: tuple[str, ...], code: int, message: str, model: Path, data: Path, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    arguments = ["search-windows", str(model), "--prompts", str(data), "-o", str(tmp_path / "o"),
                 "--tile", "1,2,1", *more]  # fmt: skip
    assert command(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "o" / "windows.json").exists()


def test_the_command_refuses_models_without_video(
    data: Path, factory_module: str, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["search-windows", f"{factory_module}:mlp", "--prompts", str(data), "-o", "o"]
    assert command(arguments) == 2
    assert "no attention over a whole video" in capsys.readouterr().err
    assert command([*arguments[:1], "missing.pt2", *arguments[2:]]) == 3


def test_prompts_are_read_from_a_folder(data: Path, tmp_path: Path) -> None:
    assert [prompt.count for prompt in prompts_from(data)] == [2, 2]
    np.savez(data / "fox.npz", video=video().numpy(), timestep=np.array([1.0]))
    flow = Flow(4, latent="video")
    assert [(p.count, p.chained) for p in prompts_from(data, flow)] == [
        (2, False), (2, False), (4, True)
    ]  # fmt: skip
    (data / "bad.npz").write_text("nonsense")
    with pytest.raises(UsageError, match="can't read inputs"):
        [list(prompt.steps()) for prompt in prompts_from(data)]
