"""sta: sites found by dataflow, the dense-mask model as the yardstick, refusals, tables, losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from test_tile_attention import brute_mask
from torch import Tensor, nn
from zoo import ZOO

import resplice
from resplice.compare import difference
from resplice.context import Context
from resplice.errors import PassError, SpecError, UsageError
from resplice.kernels.tile_attention import tile_attention
from resplice.pass_base import Exact, Redefines
from resplice.passes.sta import Sta, WindowTable, find_sites, load_windows, save_windows
from resplice.passes.sta.losses import distillation_losses, flow_target, values_at
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.spec import parse, print_passes

attend = nn.functional.scaled_dot_product_attention
CANVAS, TILE, WINDOW, TEXT = (4, 6, 8), (2, 2, 3), (1, 1, 3), 6
SIZES = {"batch": 2, "frames": 4, "rows": 6, "columns": 8, "text": TEXT}
SPEC = "sta{tile=2,2,3 window=1,1,3}"
EXPECTED = {
    "wan": (2, 0, False),
    "skyreels": (2, 0, False),
    "hunyuanvideo": (2, TEXT, False),
    "ltx": (2, 0, False),
    "cogvideox": (2, TEXT, True),
    "cogvideox_rotary": (2, TEXT, True),
    "mochi": (2, TEXT, False),
    "allegro": (1, 0, False),
    "easyanimate": (1, TEXT, True),
    "cosmos": (2, 0, False),
}
"""Model -> sites, text tokens in the sequence, whether they come first."""
EAGER = 1e-5
"""What rewritten and eager models may differ by, of the output's scale."""


@cache
def captured(name: str, **sizes: int) -> tuple[Program, nn.Module, Any]:
    """A model of the zoo at a fixed size, captured once, and the inputs it was captured with."""
    entry = ZOO[name]
    args, kwargs = entry.inputs(seed=1, **{**SIZES, **sizes})
    model = entry.model()
    program = resplice.capture(model, resplice.Sample(args, kwargs), check=False)
    return program, model, (args, kwargs)


@contextmanager
def dense_masks(canvas: Any, tile: Any, window: Any, text: int, first: bool) -> Iterator[list[int]]:
    """Plain attention with the mask of the paper wherever a whole video attends to itself.

    The models pass text of any length (Mochi: without its padding), so the mask is made to fit.
    """
    image, masked, plain = canvas[0] * canvas[1] * canvas[2], [0], attend

    def patched(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any
    ) -> Tensor:
        words = query.shape[2] - image
        if query.shape[2] != key.shape[2] or not 0 <= words <= text:
            return plain(query, key, value, attn_mask, **rest)
        masked[0] += 1
        allowed = brute_mask(canvas, tile, window, words, first)
        mask = allowed if attn_mask is None else allowed & attn_mask
        return plain(query, key, value, mask, **rest)

    nn.functional.scaled_dot_product_attention = patched
    try:
        yield masked
    finally:
        nn.functional.scaled_dot_product_attention = plain


def results(model: Any, inputs: Any) -> list[Tensor]:
    args, kwargs = inputs
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]


def agree(expected: list[Tensor], found: list[Tensor], bar: float) -> None:
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert difference(a, b).relative <= bar


@cache
def windowed(name: str) -> tuple[Program, Any, list[Tensor]]:
    """A model of the zoo after `sta`, fresh inputs, and what dense masks make of them eagerly."""
    count, text, first = EXPECTED[name]
    program, model, _ = captured(name)
    sparse, steps = Pipeline.of(SPEC).run(program, check=True)
    assert steps[-1].sites == count
    others = ZOO[name].inputs(seed=5, **{s: SIZES[s] for s in ZOO[name].sizes})
    with dense_masks(CANVAS, TILE, WINDOW, text, first) as masked:
        expected = results(model, others)
    assert masked[0] >= count
    assert difference(results(model, others)[0], expected[0]).relative > 1e-2, "nothing to see"
    return sparse, others, expected


@pytest.mark.parametrize("name", EXPECTED)
def test_the_window_of_the_whole_grid_is_the_identity(name: str) -> None:
    count, text, first = EXPECTED[name]
    program, model, _ = captured(name)
    whole, steps = Pipeline.of("sta{tile=2,2,3 window=2,3,3}").run(program, check=True)
    assert steps[-1].sites == count
    for node in whole.graph.nodes:
        if node.target is tile_attention.overload:
            assert node.args[3:8] == ([4, 6, 8], [2, 2, 3], [2, 3, 3], text, first)
    others = ZOO[name].inputs(seed=5, **{s: SIZES[s] for s in ZOO[name].sizes})
    agree(results(model, others), results(whole, others), 1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_window_is_a_dense_mask_eagerly(name: str) -> None:
    sparse, others, expected = windowed(name)
    agree(expected, results(sparse, others), EAGER)


QUICK = ("wan", "hunyuanvideo", "ltx")
LOWERED = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED]


@pytest.mark.parametrize("name", LOWERED)
def test_a_window_is_a_dense_mask_in_onnxruntime(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    sparse, (args, kwargs), expected = windowed(name)
    artifact = onnx.OnnxBackend().lower(sparse, tmp_path / "m.onnx")
    found = artifact.run(sparse.call.bind(args, kwargs))
    agree(expected, list(found.values()), artifact.bar + EAGER)


@pytest.mark.parametrize("name", LOWERED)
def test_a_window_is_a_dense_mask_in_core_ml(name: str, tmp_path: Path) -> None:
    coreml = pytest.importorskip("resplice.backends.coreml")
    sparse, (args, kwargs), expected = windowed(name)
    options = coreml.CoremlOptions(precision="fp32")
    artifact = coreml.CoremlBackend().lower(sparse, tmp_path / "m.mlpackage", options)
    found = artifact.run(sparse.call.bind(args, kwargs))
    agree(expected, list(found.values()), artifact.bar + EAGER)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_canvases_that_tiles_do_not_divide(name: str) -> None:
    count, text, first = EXPECTED[name]
    program, model, inputs = captured(name, frames=3, rows=5, columns=7)
    sparse, steps = Pipeline.of("sta{tile=2,2,2 window=1,3,1}").run(program)
    assert steps[-1].sites == count
    with dense_masks((3, 5, 7), (2, 2, 2), (1, 3, 1), text, first):
        expected = results(model, inputs)
    agree(expected, results(sparse, inputs), 1e-5)


def test_the_batch_may_stay_dynamic() -> None:
    name, entry = "hunyuanvideo", ZOO["hunyuanvideo"]
    inputs = entry.inputs(seed=1, **SIZES)
    shapes = {key: {0: "batch"} for key, x in inputs[1].items() if isinstance(x, Tensor)}
    program = resplice.capture(
        entry.model(), resplice.Sample(*inputs), dynamic_shapes=shapes, check=False
    )
    sparse, steps = Pipeline.of(SPEC).run(program)
    assert steps[-1].sites == 2
    _, text, first = EXPECTED[name]
    others = entry.inputs(seed=5, **{**SIZES, "batch": 3})
    with dense_masks(CANVAS, TILE, WINDOW, text, first):
        expected = results(entry.model(), others)
    agree(expected, results(sparse, others), 1e-5)


# ---- refusals ----------------------------------------------------------------------------


def refusals(program: Program, spec: str = SPEC) -> list[str]:
    sparse, steps = Pipeline.of(spec).run(program)
    assert steps[-1].sites == 0
    assert not any(n.target is tile_attention.overload for n in sparse.graph.nodes)
    return [refusal.reason for refusal in steps[-1].changes[0].refusals]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("latte", "factorised attention: its tokens are axis 3 of hidden_states (4) and axis 4"),
        ("latte", "factorised attention: its tokens are axis 2 of hidden_states (4), while"),
        ("latte", "cross-attention: 16 queries, 6 keys"),
        ("vit", "its tokens are axis 2 of pixel_values (4) and axis 3 of pixel_values (4), not"),
        ("llama", "its tokens are axis 1 of input_ids (8), not the three axes of a video"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(name: str, reason: str) -> None:
    entry = ZOO[name]
    program = resplice.capture(entry.model(), resplice.Sample(*entry.inputs(seed=1)), check=False)
    assert any(found.startswith(reason) for found in refusals(program))


def test_cross_attention_and_text_encoders_are_left_alone() -> None:
    for name, reason in {
        "wan": "cross-attention: 192 queries, 6 keys",
        "hunyuanvideo": "its tokens are axis 1 of encoder_hidden_states (6), not",
        "mochi": "cross-attention: 1 queries, 7 keys",
    }.items():
        program, _, _ = captured(name)
        _, steps = Pipeline.of(SPEC).run(program)
        assert any(r.reason.startswith(reason) for r in steps[-1].changes[0].refusals), name


def test_a_dynamic_grid_is_refused_with_the_axes_and_what_to_do() -> None:
    shapes = {"video": {0: "batch", 2: "frames", 3: "rows", 4: "columns"}, "other": {0: "batch"}}
    x = torch.randn(2, 8, 4, 6, 5)
    program = resplice.capture(Tokens(raster).eval(), (x, x), dynamic_shapes=shapes, check=False)
    (reason,) = refusals(program)
    assert "its number of tokens is dynamic" in reason
    assert all(name in reason for name in ("frames", "rows", "columns"))
    assert "(axis 2 of video, axis 3 of video, axis 4 of video)" in reason
    assert "capture one program per resolution, with these axes fixed" in reason
    for canvas in ("", " canvas=4,6,5"):
        same, steps = Pipeline.of(f"sta{{tile=1,2,2 window=1,1,1{canvas}}}").run(program)
        assert steps[-1].sites == 0
        for sizes in ((4, 6, 5), (3, 8, 2)):
            inputs = ((torch.randn(3, 8, *sizes), torch.randn(3, *x.shape[1:])), {})
            agree(results(program, inputs), results(same, inputs), 0.0)


@pytest.mark.slow
def test_dynamic_resolutions_keep_full_attention_at_every_size() -> None:
    """A fixed `canvas` does not make it rewrite what is only sometimes that size."""
    entry = ZOO["wan"]
    sample, shapes = resplice.Sample(*entry.inputs(seed=1)), entry.dynamic_shapes
    program = resplice.capture(entry.model(), sample, dynamic_shapes=shapes, check=False)
    t, h, w = (program.samples["hidden_states"].shape[i] // n for i, n in ((2, 1), (3, 2), (4, 2)))
    for spec in (SPEC, f"sta{{tile=2,2,2 window=1,1,1 canvas={t},{h},{w}}}"):
        same, steps = Pipeline.of(spec).run(program)
        assert steps[-1].sites == 0
        reasons = [refusal.reason for refusal in steps[-1].changes[0].refusals]
        assert sum("capture one program per resolution" in reason for reason in reasons) == 2
        for inputs in (entry.inputs(seed=3), entry.second_inputs()):
            agree(results(entry.model(), inputs), results(same, inputs), EAGER)


def test_resolutions_are_functions_over_one_set_of_weights() -> None:
    """Each has its own grid; a window is cut to what it has."""
    model, inputs = ZOO["ltx"].model(), {}
    for name, sizes in (("main", (4, 6, 8)), ("tall", (2, 9, 5))):
        frames, rows, columns = sizes
        inputs[name] = ZOO["ltx"].inputs(seed=1, frames=frames, rows=rows, columns=columns)
    program, other = (
        resplice.capture(model, resplice.Sample(*given), check=False) for given in inputs.values()
    )
    program.functions["tall"] = other
    both, steps = Pipeline.of("sta{tile=2,2,3 window=1,3,1}").run(program)
    assert [change.count for change in steps[-1].changes] == [2, 2]
    for (name, function), canvas in zip(both.all_functions(), ((4, 6, 8), (2, 9, 5)), strict=True):
        with dense_masks(canvas, (2, 2, 3), (1, 3, 1), 0, False):
            expected = results(model, inputs[name])
        agree(expected, results(function, inputs[name]), EAGER)
    weights = [dict(function.named_weights()) for _, function in both.all_functions()]
    shared = [n for n in weights[0] if weights[0][n].data_ptr() == weights[1][n].data_ptr()]
    assert len(shared) > 20


class Tokens(nn.Module):
    """One attention over tokens made from a video [B,C,T,H,W] by a given function."""

    def __init__(
        self, arrange: Callable[[Tensor], Tensor], keys: Any = None, **options: Any
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.arrange, self.keys, self.options = arrange, keys or arrange, options

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        """[B,S,8]."""
        x = self.arrange(video)
        y = self.keys(other) if self.keys is not self.arrange else x
        heads = [
            f.unflatten(-1, (2, 4)).transpose(-2, -3) for f in (self.q(x), self.k(y), self.v(y))
        ]
        return (
            nn.functional.scaled_dot_product_attention(*heads, **self.options)
            .transpose(-2, -3)
            .flatten(-2)
        )


def raster(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def tokens_of(model: nn.Module) -> Program:
    x, y = torch.randn(2, 8, 4, 6, 6), torch.randn(2, 8, 4, 6, 6)
    program = resplice.capture(model.eval(), (x, y), check=False)
    return Pipeline.of("canonicalize").run(program)[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tokens(raster, lambda x: raster(x)), "cross-attention: its keys are other tokens"),
        (Tokens(raster, is_causal=True), "it is causal or drops weights"),
        (Tokens(raster, attn_mask=torch.rand(144, 144) < 0.9), "one per query can't be kept"),
        (Tokens(lambda x: raster(x.permute(0, 1, 4, 3, 2))), "not the three axes of a video"),
        (Tokens(lambda x: raster(x.roll(1, 4))), "the order of its tokens can't be followed"),
        (Tokens(lambda x: raster(x)[:, torch.randperm(144)]), "the order of its tokens can't be"),
        (Tokens(lambda x: torch.cat((raster(x), raster(x)), 1)), "more than one video"),
        (
            Tokens(lambda x: x.unflatten(4, (2, 3)).permute(0, 4, 2, 3, 5, 1).flatten(2, 4)),
            "it has no [batch, heads, tokens, channels] operands",
        ),
        (
            Tokens(
                lambda x: (
                    x.unflatten(4, (2, 3)).permute(0, 4, 2, 3, 5, 1).flatten(2, 4).flatten(0, 1)
                )
            ),
            "it attends within parts of the video: axis 4 of video (2) is in its batch",
        ),
    ],
    ids=["other video", "causal", "mask per query", "other order", "rolled", "shuffled", "two",
         "five axes", "windows"],
)  # fmt: skip
def test_near_misses_are_refused(model: nn.Module, reason: str) -> None:
    found = find_sites(tokens_of(model))
    assert not found.found
    assert [why for _, why in found.refused if reason in why]


def test_other_tokens_beside_a_video_are_seen_like_text() -> None:
    """Their order is not followed, and need not be: all queries see them."""
    model = Tokens(lambda x: torch.cat((raster(x.flip(2)), raster(x)), 1))
    (site,) = find_sites(tokens_of(model)).found
    assert (site.canvas, site.text_length, site.text_first) == ((4, 6, 6), 144, True)


def test_canvas_is_for_what_the_graph_does_not_tell() -> None:
    packed = Tokens(lambda x: x.flatten(1)[:, : 8 * 144].unflatten(1, (144, 8)).roll(0, 1))
    program = tokens_of(packed)
    assert not find_sites(program).found
    (site,) = find_sites(program, (4, 6, 6)).found
    assert (site.canvas, site.text_length, site.heads) == ((4, 6, 6), 0, 2)
    ((_, why),) = find_sites(program, (4, 6, 5)).refused
    assert why == "canvas=4,6,5 is 120 tokens, it has 144"
    ((_, why),) = find_sites(tokens_of(Tokens(raster)), (6, 4, 6)).refused
    assert why == "its canvas is 4,6,6, canvas=6,4,6 is given"
    with pytest.raises(UsageError, match="three positive sizes"):
        find_sites(program, (4, 6))


def test_sites_tell_layer_text_and_mask() -> None:
    program, _, _ = captured("hunyuanvideo")
    program, _ = Pipeline.of("canonicalize").run(program)
    sites = find_sites(program).found
    assert [site.layer for site in sites] == [0, 1]
    assert [site.module for site in sites] == ["transformer_blocks.0.attn",
                                               "single_transformer_blocks.0.attn"]  # fmt: skip
    assert all(site.mask is not None and site.image_open for site in sites)


class Masked(Tokens):
    """The second input is a mask of all keys, which nothing keeps from closing image keys."""

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        self.options["attn_mask"] = other.flatten(1)[:, None, None, :144] > 0
        return super().forward(video, other)


def test_a_mask_that_may_close_image_keys_is_kept_whole() -> None:
    model = Masked(raster)
    program = tokens_of(model)
    (site,) = find_sites(program).found
    assert not site.image_open
    sparse, _ = Pipeline.of("sta{tile=2,3,3 window=1,1,1}").run(program)
    inputs = ((torch.randn(2, 8, 4, 6, 6), torch.randn(2, 8, 4, 6, 6)), {})
    with dense_masks((4, 6, 6), (2, 3, 3), (1, 1, 1), 0, False):
        expected = results(model, inputs)
    agree(expected, results(sparse, inputs), 1e-5)


# ---- options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["sta", "sta{window=full}", "sta{tile=4,8,8 window=1,3,0}", "sta{layers=0,2 canvas=4,6,8}",
     "sta{windows=table.json two-phase=true}"],
)  # fmt: skip
def test_pipeline_text_parses_and_prints_back(text: str) -> None:
    assert print_passes(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sta{tile=0,8,8}", "must be positive"),
        ("sta{window=3,3}", "window"),
        ("sta{window=-1,3,3}", "must not be negative"),
        ("sta{canvas=4,6}", "three positive sizes"),
    ],
)
def test_bad_options_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse(text)


def test_meaning_and_identity() -> None:
    assert Sta.identity() == Sta(window="full")
    assert isinstance(Sta.identity().meaning, Exact)
    assert isinstance(Sta().meaning, Redefines)
    assert isinstance(Sta(window="full", windows="t.json").meaning, Redefines)


@pytest.fixture(scope="module")
def wan() -> tuple[Program, nn.Module, Any]:
    """A captured Wan."""
    return captured("wan")


def windows_in(program: Program) -> list[list[int]]:
    return [n.args[5] for n in program.graph.nodes if n.target is tile_attention.overload]


def test_layers_limits_and_even_windows(wan: Any) -> None:
    program, _, _ = wan
    sparse, steps = Pipeline.of("sta{tile=2,2,2 window=1,0,3 layers=1}").run(program)
    assert windows_in(sparse) == [[1, 3, 3]]
    assert any("layer 0 is not in layers=1" in r.reason for r in steps[-1].changes[0].refusals)
    _, steps = Pipeline.of(SPEC).run(program, Context(limit=1))
    assert steps[-1].sites == 1
    with pytest.raises(UsageError, match="2 is even, and would cover 3"):
        Pipeline.of("sta{tile=2,2,2 window=1,1,2}").run(program)


def test_both_forms_of_the_table(wan: Any, tmp_path: Path) -> None:
    program, _, inputs = wan
    heads = [[(1, 1, 3), (1, 3, 1)], [(1, 3, 4), (1, 3, 4)]]
    path = save_windows(
        WindowTable({i: tuple(row) for i, row in enumerate(heads)}, (2, 2, 2)), tmp_path / "w.json"
    )
    assert load_windows(path).layers == {0: ((1, 1, 3), (1, 3, 1)), 1: ((1, 3, 4), (1, 3, 4))}
    own, _ = Pipeline.of(f"sta{{tile=2,2,2 windows={path}}}").run(program)
    assert windows_in(own) == [[1, 1, 3, 1, 3, 1], [1, 3, 4]]
    full = [2, 3, 4]
    published = {
        f"{step}_{layer}_{head}": full if step < 2 else list(heads[layer][head])
        for step in range(5)
        for layer in range(2)
        for head in range(2)
    }
    published["3_0_0"] = [1, 3, 1]  # outvoted
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    table = load_windows(path)
    assert (table.layers, table.full_steps) == ({i: tuple(r) for i, r in enumerate(heads)}, 2)
    theirs, steps = Pipeline.of(f"sta{{tile=2,2,2 windows={path}}}").run(program)
    assert windows_in(theirs) == windows_in(own)
    assert "full attention for 2 steps" in steps[-1].changes[0].notes[0]
    agree(results(own, inputs), results(theirs, inputs), 0.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("nonsense", "can't be read"),
        ("{}", "no table of windows"),
        ('{"0_0_0": [3, 3]}', "no window of three"),
        ('{"0_0_1": [3, 3, 3]}', "lacks the window of a head"),
        ('{"layers": {"0": [[1,1,1]]}, "tile": [6,8,8]}', "was made for tile=6,8,8"),
        ('{"layers": {"0": [[1,1,1],[1,1,1],[1,1,1]]}}', "has 3 windows, the site has 2 heads"),
    ],
)
def test_bad_tables_are_refused(content: str, reason: str, wan: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=reason):
        Pipeline.of(f"sta{{tile=2,2,2 windows={path}}}").run(wan[0])


def test_layers_without_windows_keep_full_attention(wan: Any, tmp_path: Path) -> None:
    path = save_windows(WindowTable({1: ((1, 1, 1),)}), tmp_path / "t.json")
    _, steps = Pipeline.of(f"sta{{tile=2,2,2 windows={path}}}").run(wan[0])
    assert steps[-1].sites == 1
    assert any("has no windows for layer 0" in r.reason for r in steps[-1].changes[0].refusals)


# ---- two phases --------------------------------------------------------------------------


def test_two_phases_are_two_functions_over_one_set_of_weights(wan: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    program, model, (args, kwargs) = wan
    both, _ = Pipeline.of("sta{tile=2,2,3 window=1,1,3 two-phase=true}").run(program)
    assert list(both.functions) == ["full"]
    full = both.functions["full"]
    agree(results(model, (args, kwargs)), results(full, (args, kwargs)), 1e-6)
    own, shared = dict(both.named_weights()), dict(full.named_weights())
    assert own.keys() == shared.keys()
    assert all(own[name].data_ptr() == shared[name].data_ptr() for name in own)
    again = resplice.load(resplice.optimize(both).save(tmp_path / "both.pt2"))
    agree(results(full, (args, kwargs)), results(again.functions["full"], (args, kwargs)), 0.0)
    artifact = onnx.OnnxBackend().lower(
        both, tmp_path / "both.onnx", onnx.OnnxOptions(external_above=0)
    )
    assert_runs_both_phases(both, artifact, (args, kwargs))
    alone = onnx.OnnxBackend().lower(
        full, tmp_path / "alone.onnx", onnx.OnnxOptions(external_above=0)
    )
    stored = [(a.path.parent / f"{a.path.name}.data").stat().st_size for a in (artifact, alone)]
    assert stored[0] < 1.05 * stored[1], "the second function brings its own weights"
    with pytest.raises((PassError, SpecError), match="a function 'full' already"):
        Pipeline.of("sta{two-phase=true layers=0},sta{two-phase=true}").run(program)


def assert_runs_both_phases(both: Program, artifact: Any, inputs: Any) -> None:
    """Each function of an artefact is the function of the program, and they differ."""
    tensors, found = both.call.bind(*inputs), {}
    for name, function in both.all_functions():
        found[name] = list(artifact.run(tensors, function=name).values())
        agree(results(function, inputs), found[name], artifact.bar)
    assert difference(found["full"][0], found["main"][0]).relative > 1e-2


def test_two_phases_are_one_core_ml_package(wan: Any, tmp_path: Path) -> None:
    coreml = pytest.importorskip("resplice.backends.coreml")
    program, _, inputs = wan
    both, _ = Pipeline.of("sta{tile=2,2,3 window=1,1,3 two-phase=true}").run(program)
    options, backend = coreml.CoremlOptions(precision="fp32"), coreml.CoremlBackend()
    artifact = backend.lower(both, tmp_path / "both.mlpackage", options)
    assert set(artifact.functions) == {"main", "full"}
    assert_runs_both_phases(both, artifact, inputs)
    alone = backend.lower(
        both.functions["full"], tmp_path / "alone.mlpackage", options, check=False
    )
    stored = [
        sum(file.stat().st_size for file in a.path.rglob("weight.bin")) for a in (artifact, alone)
    ]
    assert stored[0] < 1.05 * stored[1], "the second function brings its own weights"


# ---- losses ------------------------------------------------------------------------------


def test_losses_are_those_of_the_paper_and_reach_the_student_only() -> None:
    torch.manual_seed(3)
    model = Tokens(raster)
    teacher = tokens_of(model)
    sparse = resplice.optimize(teacher, "sta{tile=2,3,3 window=1,1,1}").trainable()
    student = sparse.program
    inputs = {"video": torch.randn(2, 8, 4, 6, 6), "other": torch.randn(2, 8, 4, 6, 6)}
    noise, clean = torch.randn(2, 144, 8), torch.randn(2, 144, 8)
    losses = distillation_losses(student, teacher, inputs, flow_target(noise, clean))
    mine, theirs = student(*inputs.values()), teacher(*inputs.values())
    name = next(n.name for n in student.graph.nodes if n.target is tile_attention.overload)
    a, b = (values_at(p, inputs, [name])[1][name] for p in (student, teacher))
    assert torch.allclose(losses.data, ((noise - clean) - mine).pow(2).mean())
    assert torch.allclose(losses.final, (mine - theirs).pow(2).mean())
    assert torch.allclose(losses.attention, (a - b).pow(2).mean())
    total = losses.data + 0.5 * losses.final + 0.5 * losses.attention
    assert torch.allclose(losses.total, total)
    losses.total.backward()
    trained = [p.grad for _, p in student.named_weights()]
    assert all(grad is not None for grad in trained)
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in trained[:2])
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for _, p in teacher.named_weights())
    same = distillation_losses(teacher=teacher, student=student, inputs=inputs, beta=2.0, gamma=0.0)
    assert torch.allclose(same.total, 2 * losses.final)


def test_losses_refuse_programs_that_do_not_belong_together(wan: Any) -> None:
    teacher = tokens_of(Tokens(raster))
    with pytest.raises(UsageError, match="is no original of a rewritten program"):
        distillation_losses(teacher, teacher, {})
    student = resplice.optimize(teacher, "sta{tile=2,3,3 window=1,1,1}").program
    bare = resplice.capture(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(UsageError, match="has no scaled_dot_product_attention"):
        distillation_losses(student, bare, {})
