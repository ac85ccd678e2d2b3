"""tdtm: sites by dataflow, equal to plain PyTorch that merges, refusals, options, backends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from models.stdit3 import XL, Block, Config, STDiT3, inputs
from tdtm_reference import merge, merging, stdit3, unmerge
from torch import Tensor, nn
from zoo import ZOO, sharpen

import resplice
from resplice.compare import difference
from resplice.errors import PassError, SpecError
from resplice.kernels.merge_frames import merge_frames, unmerge_frames
from resplice.pass_base import Exact, Redefines
from resplice.passes.tdtm import Tdtm, find_sites
from resplice.pipeline import Pipeline, Step
from resplice.program import Program
from resplice.sampling import Phased, of_artifact, sample, timesteps
from resplice.spec import parse, print_passes

attend = nn.functional.scaled_dot_product_attention
KINDS = ("spatial", "temporal", "cross")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(KINDS, n)]


def results(model: Any, given: Any) -> list[Tensor]:
    args, kwargs = given
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]


def rewritten(program: Program, spec: str) -> tuple[Program, Step]:
    result, steps = Pipeline.of(spec).run(program)
    return result, steps[-1]


# ---- the subject -------------------------------------------------------------------------


@cache
def subject(depth: int = 1) -> STDiT3:
    """STDiT3 in float64 with attention far from uniform."""
    torch.manual_seed(7)
    model = sharpen(STDiT3(Config(depth=depth)).eval(), 20.0).double()
    for name, parameter in model.named_parameters():
        if "_norm.weight" in name:
            parameter.data.mul_(4)
    return model


@cache
def captured_subject(frames: int, depth: int = 1) -> Program:
    given = inputs(frames=frames, rows=4, columns=6, dtype=torch.float64)
    return resplice.capture(subject(depth), given, check=False)


def test_the_subject_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        pair = [Block(XL, temporal) for temporal in (False, True)]
    assert sum(p.numel() for block in pair for p in block.parameters()) == 42_511_392


def test_given_frames_take_the_modulation_of_time_zero() -> None:
    given = inputs(frames=3, rows=4, columns=6, dtype=torch.float64)
    every = torch.ones(2, 3, dtype=torch.bool)
    plain = subject()(**given)
    assert difference(plain, subject()(**given, x_mask=every)).relative < 1e-12
    still = subject()(**{**given, "timestep": torch.zeros(2).double()})
    assert difference(still, subject()(**given, x_mask=~every)).relative < 1e-12
    assert difference(plain, still).relative > 1e-3


@pytest.mark.parametrize("frames", [2, 3, 5, 10, 15, 20])
def test_it_equals_plain_pytorch_on_the_subject(frames: int) -> None:
    program = captured_subject(frames)
    given = inputs(frames=frames, rows=4, columns=6, dtype=torch.float64)
    plain = subject()(**given)
    for which in SUBSETS:
        result, step = rewritten(program, f"tdtm{{which={','.join(which)}}}")
        assert step.sites == len(which) + ("cross" in which)
        expected = stdit3(subject(), given, set(which))
        found = results(result, ((), given))[0]
        assert float((found - expected).abs().max()) <= 1e-10
        assert difference(plain, expected).relative > 1e-2, "nothing to see"


@pytest.mark.parametrize(("pair", "frames"), [(3, 7), (4, 4), (2, 1), (5, 3)])
def test_other_groups_than_pairs(pair: int, frames: int) -> None:
    program = captured_subject(frames)
    given = inputs(frames=frames, rows=4, columns=6, dtype=torch.float64)
    result, step = rewritten(program, f"tdtm{{pair={pair}}}")
    assert step.sites == (4 if frames > 1 else 0)
    expected = stdit3(subject(), given, set(KINDS), pair)
    assert float((results(result, ((), given))[0] - expected).abs().max()) <= 1e-10


def test_layers_are_counted_within_their_kind() -> None:
    program = captured_subject(4, depth=2)
    given = inputs(frames=4, rows=4, columns=6, dtype=torch.float64)
    result, step = rewritten(program, "tdtm{layers=1}")
    assert [site.metrics["kind"] for site in step.changes[0].sites] == ["cross", "spatial",
                                                                       "temporal"]  # fmt: skip
    expected = stdit3(subject(2), given, set(KINDS), layers={1})
    assert float((results(result, ((), given))[0] - expected).abs().max()) <= 1e-10
    reasons = [refusal.reason for refusal in step.changes[0].refusals]
    assert "layer 0 (spatial) is not in layers=1" in reasons


def test_groups_of_one_are_bit_equal() -> None:
    program = captured_subject(5)
    given = inputs(frames=5, rows=4, columns=6, dtype=torch.float64)
    result, step = rewritten(program, "tdtm{pair=1}")
    assert step.sites == 0
    assert torch.equal(results(result, ((), given))[0], results(program, ((), given))[0])
    assert isinstance(Tdtm(pair=1).meaning, Exact)
    assert isinstance(Tdtm().meaning, Redefines)


def test_the_mlp_the_modulation_and_the_residual_keep_all_frames() -> None:
    result, _ = rewritten(captured_subject(4), "tdtm")
    nodes = [n for n in result.graph.nodes if n.op == "call_function"]
    wide = [n for n in nodes if "linear" in n.name and n.meta["val"].shape[-1] == 96]
    assert [tuple(n.meta["val"].shape[:3]) for n in wide] == [(2, 4, 6)] * 2
    norms = [n for n in nodes if n.target is torch.ops.aten.layer_norm.default]
    assert {tuple(n.meta["val"].shape) for n in norms} == {(2, 4, 6, 24)}
    attentions = [
        n for n in nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    assert [n.args[0].meta["val"].shape[-2] for n in attentions] == [6, 12, 2, 12]


def test_one_frame_has_no_time_axis() -> None:
    _, step = rewritten(captured_subject(1), "tdtm")
    reasons = [refusal.reason for refusal in step.changes[0].refusals]
    assert step.sites == 0
    assert len(reasons) == 4
    starts = ("it has no time axis", "it asks with one token")
    assert all(reason.startswith(starts) for reason in reasons), reasons


# ---- models as their library ships them ---------------------------------------------------

EXPECTED = {
    "latte": {"spatial": 1, "temporal": 1, "cross": 1},
    "wan": {"joint": 2, "cross": 2},
    "skyreels": {"joint": 2, "cross": 2},
    "ltx": {"joint": 2, "cross": 2},
    "hunyuanvideo": {"joint": 2},
    "cogvideox": {"joint": 2},
    "cogvideox_rotary": {"joint": 2},
    "mochi": {"joint": 2},
    "allegro": {"joint": 1, "cross": 1},
    "easyanimate": {"joint": 1},
    "cosmos": {"joint": 2, "cross": 2},
}
QUICK = ("latte", "wan", "hunyuanvideo")
LOWERED = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED]
SIZES = {"batch": 2, "frames": 3, "rows": 2, "columns": 5, "text": 6}


def sizes_of(name: str) -> dict[str, int]:
    sizes = {**SIZES, "frames": 4} if name == "latte" else SIZES
    return {size: sizes[size] for size in ZOO[name].sizes}


@cache
def captured(name: str) -> tuple[Program, nn.Module]:
    entry, model = ZOO[name], ZOO[name].model()
    sample_ = resplice.Sample(*entry.inputs(seed=1, **sizes_of(name)))
    return resplice.capture(model, sample_, check=False), model


def kinds(step: Step) -> dict[str, int]:
    found = [site.metrics["kind"] for site in step.changes[0].sites]
    return {kind: found.count(kind) for kind in found}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_as_its_library_ships_it(name: str) -> None:
    """Sites, and the wrapped eager model."""
    program, model = captured(name)
    result, step = rewritten(program, "tdtm")
    assert kinds(step) == EXPECTED[name]
    given = ZOO[name].inputs(seed=5, **sizes_of(name))
    with merging(model, sizes_of(name)["frames"], 10) as wrapped:
        expected = results(model, given)
    assert [w.calls for w in wrapped] == [1] * step.sites
    found = results(result, given)
    assert [a.shape for a in found] == [a.shape for a in results(program, given)]
    for a, b in zip(expected, found, strict=True):
        assert difference(a, b).relative <= 1e-5
    assert difference(results(model, given)[0], expected[0]).relative > 1e-2, "nothing to see"


@pytest.mark.parametrize("backend", ["onnx", "coreml"])
@pytest.mark.parametrize("name", LOWERED)
def test_a_model_in_onnxruntime_and_the_core_ml_interpreter(
    name: str, backend: str, tmp_path: Path
) -> None:
    program, model = captured(name)
    result, _ = rewritten(program, "tdtm")
    given = ZOO[name].inputs(seed=5, **sizes_of(name))
    with merging(model, sizes_of(name)["frames"], 10):
        expected = results(model, given)[0]
    artifact = lowered(result, backend, tmp_path)
    found = next(iter(artifact.run(result.call.bind(*given)).values()))
    assert difference(expected, found).relative <= artifact.bar


def test_kinds_of_joint_attention() -> None:
    """It is both spatial and temporal."""
    program, model = captured("wan")
    given = ZOO["wan"].inputs(seed=5, **sizes_of("wan"))
    for which, attention in (("spatial", "attn1"), ("temporal", "attn1"), ("cross", "attn2")):
        result, step = rewritten(program, f"tdtm{{which={which}}}")
        assert step.sites == 2
        with merging(model, 3, 10, chosen=lambda n, a=attention: n.endswith(a)):
            expected = results(model, given)
        assert difference(expected[0], results(result, given)[0]).relative <= 1e-5


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo"])
def test_the_batch_may_stay_dynamic(name: str) -> None:
    entry = ZOO[name]
    given = entry.inputs(seed=1, **sizes_of(name))
    shapes = {key: {0: "batch"} for key, x in given[1].items() if isinstance(x, Tensor)}
    program = resplice.capture(
        entry.model(), resplice.Sample(*given), dynamic_shapes=shapes, check=False
    )
    result, step = rewritten(program, "tdtm")
    assert kinds(step) == EXPECTED[name]
    others, model = entry.inputs(seed=5, **{**sizes_of(name), "batch": 3}), entry.model()
    with merging(model, 3, 10):
        expected = results(model, others)
    assert difference(expected[0], results(result, others)[0]).relative <= 1e-5


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit", "it has no time axis: its tokens are"),
        ("llama", "it has no time axis: its tokens are axis 1 of input_ids (8)"),
        ("bert", "it has no time axis: its tokens are axis 1 of input_ids (8)"),
        ("hunyuanvideo", "it has no time axis: its tokens are axis 1 of encoder_hidden_states (6)"),
        ("mochi", "it asks with one token"),
    ],
)
def test_what_has_no_time_axis_is_refused(name: str, reason: str) -> None:
    entry = ZOO[name]
    known = name in EXPECTED
    program = (
        captured(name)[0]
        if known
        else resplice.capture(entry.model(), resplice.Sample(*entry.inputs(seed=1)), check=False)
    )
    _, step = rewritten(program, "tdtm")
    reasons = [refusal.reason for refusal in step.changes[0].refusals]
    assert any(found.startswith(reason) for found in reasons), reasons
    assert known or step.sites == 0


class Video(nn.Module):
    """One attention over a video [B,8,T,H,W], put in tokens by a given function."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.arrange, self.options = arrange, options

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        """[B,S,8]."""
        x = self.arrange(video)
        q, k, v = (
            self.change(f(x)).unflatten(-1, (2, 4)).transpose(-2, -3)
            for f in (self.q, self.k, self.v)
        )
        out = attend(q, k, v, **self.options)
        return self.out(out.transpose(-2, -3).flatten(-2))

    def change(self, x: Tensor) -> Tensor:
        """Something between projection and attention."""
        return x


def raster(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class Rolled(Video):
    """Tokens moved on behind the projection: nothing says what that does to frames."""

    def change(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1)


class Bare(Video):
    """Queries without a projection."""

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        x = self.arrange(video).unflatten(-1, (2, 4)).transpose(1, 2)
        return attend(x, x, x)


def video_program(model: nn.Module, *shape: int) -> Program:
    x = torch.randn(2, 8, *(shape or (4, 3, 2)))
    return resplice.capture(model.eval(), (x, torch.randn(2, 8)), check=False)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Video(raster, is_causal=True), "it is causal or drops weights"),
        (Video(lambda x: raster(x.roll(1, 4))), "the order of its tokens can't be followed"),
        (Video(lambda x: raster(x.permute(0, 1, 4, 3, 2))), "its tokens are not in the order"),
        (Video(lambda x: x[:, :, 0].flatten(2).transpose(1, 2)), "it has no time axis"),
        (Bare(raster), "its queries come out of no projection"),
        (Rolled(raster), "can't be followed"),
    ],
    ids=["causal", "rolled", "other order", "an image", "no projection", "mixed"],
)
def test_near_misses_are_refused(model: nn.Module, reason: str) -> None:
    program = video_program(model)
    result, step = rewritten(program, "tdtm")
    reasons = [refusal.reason for refusal in step.changes[0].refusals]
    assert step.sites == 0
    assert len(reasons) == 1
    assert reason in reasons[0], reasons
    assert len(result.graph.nodes) <= len(program.graph.nodes), "nothing is left behind"


def test_a_dynamic_number_of_frames_is_refused_with_the_axis() -> None:
    x = torch.randn(2, 8, 4, 3, 2)
    shapes = {"video": {2: "frames"}, "other": {}}
    program = resplice.capture(
        Video(raster).eval(), (x, torch.randn(2, 8)), dynamic_shapes=shapes, check=False
    )
    _, step = rewritten(program, "tdtm")
    (refusal,) = step.changes[0].refusals
    assert "its number of frames is dynamic (axis 2 of video)" in refusal.reason
    assert "capture one program per length" in refusal.reason


# ---- masks -------------------------------------------------------------------------------


class Masked(Video):
    """The second input is a mask of all keys [B,S], boolean or additive."""

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        self.options["attn_mask"] = other[:, None, None]
        return super().forward(video, other)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("frames", [4, 5])
def test_a_merged_key_is_open_if_one_of_its_frames_was(boolean: bool, frames: int) -> None:
    model = Masked(raster).eval()
    nn.init.normal_(model.q.weight, std=3.0)
    x, open_ = torch.randn(2, 8, frames, 3, 2), torch.rand(2, frames * 6) < 0.4
    mask = open_ if boolean else torch.where(open_, 0.0, -1e9)
    program = resplice.capture(model, (x, mask), check=False)
    result, step = rewritten(program, "tdtm")
    assert step.sites == 1
    h = merge(x.permute(0, 2, 3, 4, 1).flatten(2, 3))
    few = h.shape[1]
    groups = [open_.unflatten(1, (frames, 6))[:, 2 * m : 2 * m + 2].any(1) for m in range(few)]
    q, k, v = (
        f(h.flatten(1, 2)).unflatten(-1, (2, 4)).transpose(1, 2)
        for f in (model.q, model.k, model.v)
    )
    out = attend(q, k, v, torch.cat(groups, 1)[:, None, None])
    out = model.out(out.transpose(1, 2).flatten(2)).unflatten(1, (few, 6))
    expected = unmerge(out, frames).flatten(1, 2)
    assert difference(expected, results(result, ((x, mask), {}))[0]).relative <= 1e-5


class Narrow(nn.Module):
    """One channel, and a mask of every pair of tokens: merging the mask is most of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(1, 1) for _ in range(4))

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        """[B,S,1]."""
        x = raster(video)
        q, k, v = (f(x).unsqueeze(1) for f in (self.q, self.k, self.v))
        return self.out(attend(q, k, v, mask).squeeze(1))


def test_what_would_cost_more_is_refused_with_the_figures_unless_forced() -> None:
    x, mask = torch.randn(2, 1, 3, 2, 2), torch.rand(2, 1, 12, 12) < 0.5
    mask |= torch.eye(12, dtype=torch.bool)
    model = Narrow().eval()
    program = resplice.capture(model, (x, mask), check=False)
    _, step = rewritten(program, "tdtm")
    (refusal,) = step.changes[0].refusals
    assert step.sites == 0
    assert refusal.reason.startswith("merging 3 frames by 2 would take 1,")
    assert "FLOPs in place of 1,344; force=true merges all the same" in refusal.reason
    result, step = rewritten(program, "tdtm{force=true}")
    assert step.sites == 1
    h = merge(x.permute(0, 2, 3, 4, 1).flatten(2, 3)).flatten(1, 2)
    rows = torch.stack((mask[:, :, :4] | mask[:, :, 4:8], mask[:, :, 8:]), 2).flatten(2, 3)
    both = torch.stack((rows[..., :4] | rows[..., 4:8], rows[..., 8:]), -2).flatten(-2)
    out = attend(*(f(h).unsqueeze(1) for f in (model.q, model.k, model.v)), both).squeeze(1)
    expected = unmerge(model.out(out).unflatten(1, (2, 4)), 3).flatten(1, 2)
    assert difference(expected, results(result, ((x, mask), {}))[0]).relative <= 1e-5


# ---- positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [4, 5])
def test_centred_positions_on_the_subject(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions 2m + 1/2 in the temporal blocks."""
    import models.stdit3 as module

    program = captured_subject(frames)
    given = inputs(frames=frames, rows=4, columns=6, dtype=torch.float64)
    result, step = rewritten(program, "tdtm{rope-positions=centred}")
    assert step.sites == 4

    def rotate(x: Tensor) -> Tensor:
        d = x.shape[-1]
        places = 2 * torch.arange(x.shape[-2]).double() + 0.5
        angles = places[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    compact = stdit3(subject(), given, set(KINDS))
    monkeypatch.setattr(module, "rotate", rotate)
    expected = stdit3(subject(), given, set(KINDS))
    assert float((results(result, ((), given))[0] - expected).abs().max()) <= 1e-10
    assert difference(compact, expected).relative > 1e-3, "nothing to see"


class Turning(Video):
    """Queries and keys turned by stored tables, two frequencies that step less than half a turn."""

    def __init__(self, frames: int, rest: int) -> None:
        super().__init__(raster)
        places = torch.arange(frames).repeat_interleave(rest)
        angles = places[:, None] * torch.tensor([0.9, 0.1])
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        x = self.arrange(video)
        return self.out(self.attention(x, self.cos, self.sin))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        turned = []
        for y in (q, k):
            a, b = y.chunk(2, -1)
            turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
        return attend(*turned, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pair", [2, 3])
@pytest.mark.parametrize("frames", [4, 5])
def test_centred_positions_with_stored_tables(frames: int, pair: int) -> None:
    model = Turning(frames, 6).eval()
    for layer in (model.q, model.k):
        nn.init.normal_(layer.weight, std=2.0)
    x, other = torch.randn(2, 8, frames, 3, 2), torch.randn(2, 8)
    program = resplice.capture(model, (x, other), check=False)
    result, step = rewritten(program, f"tdtm{{pair={pair} rope-positions=centred}}")
    assert step.sites == 1, step.changes[0].refusals
    h = merge(x.permute(0, 2, 3, 4, 1).flatten(2, 3), pair=pair)
    places = pair * torch.arange(h.shape[1]) + (pair - 1) / 2
    angles = places.repeat_interleave(6)[:, None] * torch.tensor([0.9, 0.1])
    out = model.out(model.attention(h.flatten(1, 2), angles.cos(), angles.sin()))
    expected = unmerge(out.unflatten(1, (-1, 6)), frames, pair=pair).flatten(1, 2)
    assert difference(expected, results(result, ((x, other), {}))[0]).relative <= 1e-5
    compact, _ = rewritten(program, f"tdtm{{pair={pair}}}")
    assert difference(expected, results(compact, ((x, other), {}))[0]).relative > 1e-3


# ---- options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["tdtm", "tdtm{pair=1}", "tdtm{which=spatial,cross layers=0,2}",
     "tdtm{rope-positions=centred steps=15 force=true}"],
)  # fmt: skip
def test_pipeline_text_parses_and_prints_back(text: str) -> None:
    assert print_passes(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tdtm{which=time}", "which=time is not one or several of spatial, temporal, cross"),
        ("tdtm{pair=0}", "pair=0 must be at least 1"),
        ("tdtm{steps=-1}", "must not be negative"),
        ("tdtm{layers=-1}", "must not be negative"),
        ("tdtm{rope-positions=middle}", "is not one of compact, centred"),
    ],
)
def test_bad_options_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse(text)


def test_the_limit_counts_rewrites() -> None:
    from resplice.context import Context

    for limit in (0, 1, 3):
        _, steps = Pipeline.of("tdtm").run(captured_subject(4), Context(limit=limit))
        assert steps[-1].sites == limit


def test_the_report_tells_the_ceiling() -> None:
    result, step = rewritten(captured_subject(4), "tdtm{steps=15}")
    (note,) = step.changes[0].notes
    before, after = result.metadata["tdtm"]["flops"]
    assert f"so at most x{before / after:.3f} in the first 15 steps" in note
    assert 1 < before / after < 2
    assert all(s.metrics["flops_before"] > s.metrics["flops_after"] for s in step.changes[0].sites)


def test_sites_tell_kind_layer_and_frames() -> None:
    program, _ = Pipeline.of("canonicalize").run(captured_subject(4))
    sites = find_sites(program).found
    assert [(s.kind, s.layer, s.frames) for s in sites] == [
        ("spatial", 0, 4), ("cross", 0, 4), ("temporal", 0, 4), ("cross", 1, 4)
    ]  # fmt: skip
    assert [s.module for s in sites] == [
        f"{kind}_blocks.0.{part}" for kind in KINDS[:2] for part in ("attn", "cross_attn")
    ]


# ---- with other passes --------------------------------------------------------------------


def test_tiles_after_merging_see_the_merged_grid() -> None:
    from resplice.kernels.tile_attention import tile_attention

    program, _ = captured("wan")
    result, steps = Pipeline.of("tdtm,sta{tile=2,2,2 window=full}").run(program)
    assert steps[-1].sites == 2
    grids = [n.args[3] for n in result.graph.nodes if n.target is tile_attention.overload]
    assert grids == [[2, 2, 5]] * 2
    given = ZOO["wan"].inputs(seed=5, **sizes_of("wan"))
    expected, _ = rewritten(program, "tdtm")
    assert difference(results(expected, given)[0], results(result, given)[0]).relative <= 1e-5


def test_quantised_projections_are_merged_too() -> None:
    program, _ = captured("latte")
    result, step = rewritten(program, "quest{weight-bits=8},tdtm")
    assert kinds(step) == EXPECTED["latte"]
    merged = [n for n in result.graph.nodes if n.target is merge_frames.overload]
    assert merged
    assert all(u.target is torch.ops.resplice.quant_linear.default for n in merged for u in n.users)


# ---- in the first steps only --------------------------------------------------------------


def lowered(program: Program, backend: str, folder: Path) -> Any:
    if backend == "onnx":
        return (
            pytest.importorskip("resplice.backends.onnx")
            .OnnxBackend()
            .lower(program, folder / "both.onnx")
        )
    coreml = pytest.importorskip("resplice.backends.coreml")
    options = coreml.CoremlOptions(precision="fp32")
    return coreml.CoremlBackend().lower(program, folder / "both.mlpackage", options)


@pytest.mark.parametrize("backend", ["onnx", "coreml"])
def test_two_phases_share_weights_and_drive_the_sampler(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sharpen(STDiT3().eval(), 5.0)
    given = inputs(frames=3, rows=4, columns=4)
    program = resplice.capture(model, given, check=False)
    both, step = rewritten(program, "tdtm{steps=2}")
    assert step.sites == 4
    full = both.functions["full"]
    assert torch.equal(results(full, ((), given))[0], results(program, ((), given))[0])
    own, shared = dict(both.named_weights()), dict(full.named_weights())
    assert all(shared[name].data_ptr() == own[name].data_ptr() for name in own if name in shared)
    assert any(n.target is unmerge_frames.overload for n in both.graph.nodes)
    assert both.metadata["tdtm"]["steps"] == 2
    artifact = lowered(both, backend, tmp_path)
    rest = {k: v for k, v in given.items() if k not in ("x", "timestep")}
    times = timesteps(4)
    found = sample(
        Phased(of_artifact(artifact), of_artifact(artifact, "full"), 2), given["x"], times, rest
    )

    def eager(step_: int) -> Callable[..., Tensor]:
        merged = set(KINDS) if step_ < 2 else set[str]()
        return lambda **named: stdit3(model, named, merged)

    z = given["x"]
    for i, t in enumerate(times):
        clock = torch.full((2,), t)
        v = eager(i)(**{**given, "x": z, "timestep": clock})[:, :4]
        z = z + v * (t - (times[i + 1] if i < 3 else 0.0)) / 1000
    assert difference(z, found.latents).relative <= 1e-4
    with pytest.raises((PassError, SpecError), match="a function 'full' already"):
        Pipeline.of("tdtm{steps=1 layers=0},tdtm{steps=1}").run(program)
