"""The pass `cmoe` on whole models: sites, refusals, exactness, streaming, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from zoo import ZOO

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import FP32_BAR
from resplice.backends.onnx import OnnxBackend
from resplice.compare import difference
from resplice.context import Context
from resplice.errors import SpecError, UsageError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.pass_base import Exact, Redefines
from resplice.passes.cmoe import Cmoe, carve
from resplice.passes.cmoe.sites import find_ffns
from resplice.pipeline import Pipeline
from resplice.program import Program

BAR = 1e-5
ALL_ACTIVE = "cmoe{experts=4 shared=1 active=3 k-act=5}"
SITES = {
    "llama": 2, "qwen3": 2, "gemma2": 2, "gemma3": 2, "gpt2": 2, "bert": 2, "vit": 2, "dinov2": 2,
    "wan": 2, "hunyuanvideo": 4, "ltx": 2, "latte": 2, "mochi": 3, "allegro": 1, "cosmos": 2,
    "phi3": 2,
}  # fmt: skip

QUICK = ("llama", "phi3", "gpt2", "bert", "dinov2", "ltx")


def captured(name: str, *, dynamic: bool = True) -> tuple[Program, Any, Any]:
    """A model of the zoo in normal form, the module and its entry."""
    if name == "phi3":
        return _phi3()
    entry = ZOO[name]
    model, args, kwargs, shapes = entry()
    sample = resplice.Sample(args, kwargs)
    fixed = name == "cosmos" or not dynamic
    program = resplice.capture(model, sample, dynamic_shapes=None if fixed else shapes)
    return program, model, entry


class _Entry:
    """Inputs of Phi-3, which the zoo has not."""

    @staticmethod
    def inputs(seed: int, batch: int = 2, seq: int = 8) -> Any:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 128, (batch, seq), generator=g)
        return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    second = {"batch": 3, "seq": 13}


def _phi3() -> tuple[Program, Any, Any]:
    from transformers import Phi3Config, Phi3ForCausalLM
    from zoo import sharpen

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = sharpen(Phi3ForCausalLM(config).eval())
    args, kwargs = _Entry.inputs(0)
    dims = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
    return (
        resplice.capture(model, resplice.Sample(args, kwargs), dynamic_shapes=dims),
        model,
        _Entry,
    )


def tensors(model: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """All tensors a model returns."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def agree(expected: list[Tensor], found: list[Tensor], bar: float = BAR) -> None:
    """Every output within the bar of its scale."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert difference(a, b).relative <= bar


def layers(program: Program) -> list[Any]:
    """The carved layers."""
    return program.graph.find_nodes(op="call_function", target=moe_ffn.overload)


# ---- every expert active -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SITES]
)
def test_every_expert_active_is_the_dense_model(name: str) -> None:
    program, model, entry = captured(name)
    carved, steps = Pipeline.of(ALL_ACTIVE).run(program, check=True)
    assert len(layers(carved)) == steps[-1].sites == SITES[name]
    assert isinstance(steps[-1].item.meaning, Exact)
    sizes = [{}] if name == "cosmos" else [{}, entry.second]
    for size in sizes:
        args, kwargs = entry.inputs(seed=5, **size)
        agree(tensors(model, args, kwargs), tensors(carved, args, kwargs))


FEW = ("phi3",)
NEEDED = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in ("llama", "qwen3", "gemma2", "phi3", "gpt2", "bert", "vit", "dinov2", "wan",
                 "hunyuanvideo")
]  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_every_expert_active_is_the_dense_model_in_onnx(name: str, tmp_path: Path) -> None:
    program, model, entry = captured(name)
    carved, _ = Pipeline.of(ALL_ACTIVE).run(program)
    artifact = OnnxBackend().lower(carved, tmp_path / "m.onnx")
    args, kwargs = entry.inputs(seed=5, **entry.second)
    found = artifact.run(carved.call.bind(args, kwargs))
    agree(tensors(model, args, kwargs), list(found.values()))


@pytest.mark.parametrize("name", NEEDED)
def test_every_expert_active_is_the_dense_model_in_core_ml(name: str, tmp_path: Path) -> None:
    program, model, entry = captured(name, dynamic=name in ("llama", "wan"))
    carved, _ = Pipeline.of(ALL_ACTIVE).run(program)
    options = CoremlOptions(precision="fp32")
    artifact = CoremlBackend().lower(carved, tmp_path / "m.mlpackage", options)
    args, kwargs = entry.inputs(seed=5)
    found = artifact.run(carved.call.bind(args, kwargs))
    agree(tensors(model, args, kwargs), list(found.values()), FP32_BAR)


# ---- some experts active, in every backend -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "router"),
    [("gpt2", "ridge"), pytest.param("hunyuanvideo", "ridge", marks=pytest.mark.slow)],
)
def test_a_carved_model_is_the_same_in_onnx(name: str, router: str, tmp_path: Path) -> None:
    program, model, entry = captured(name)
    spec = f"cmoe{{experts=8 shared=2 active=2 k-act=5 router={router}}}"
    carved, steps = Pipeline.of(spec).run(program, check=True)
    assert isinstance(steps[-1].item.meaning, Redefines)
    artifact = OnnxBackend().lower(carved, tmp_path / "m.onnx")
    for size in ({}, entry.second):
        args, kwargs = entry.inputs(seed=6, **size)
        expected = tensors(carved, args, kwargs)
        agree(expected, list(artifact.run(carved.call.bind(args, kwargs)).values()), 1e-4)
        assert difference(tensors(model, args, kwargs)[0], expected[0]).relative > 1e-3


@pytest.mark.slow
def test_a_carved_model_is_the_same_in_core_ml(tmp_path: Path) -> None:
    program, _, entry = captured("llama")
    carved, _ = Pipeline.of("cmoe{layout=S2A2E8 k-act=5}").run(program)
    options = CoremlOptions(precision="fp32")
    artifact = CoremlBackend().lower(carved, tmp_path / "m.mlpackage", options)
    args, kwargs = entry.inputs(seed=6, **entry.second)
    found = artifact.run(carved.call.bind(args, kwargs))
    agree(tensors(carved, args, kwargs), list(found.values()), FP32_BAR)


# ---- streaming ---------------------------------------------------------------------------


def test_a_layer_is_profiled_on_what_the_carved_layers_before_it_make(mlp: nn.Module) -> None:
    """Computed again by hand: layer 1 sees x plus the carved layer 0, in two batches."""
    x = torch.randn(200, 32)
    program = resplice.capture(mlp, (x[:4],), dynamic_shapes={"x": {0: "rows"}})
    settings = {"experts": 8, "shared": 2, "active": 2, "k_act": 6}
    batches = [{"x": x[:150], "scale": None}, {"x": x[150:], "scale": None}]
    batches = [{k: v for k, v in b.items() if v is not None} for b in batches]
    carved, _ = Pipeline((Cmoe(**settings),)).run(program, Context(calibration=batches))
    stream = x
    for number, (layer, node) in enumerate(zip(mlp.layers, layers(carved), strict=True)):
        gate, up, down = (layer[name] for name in ("gate", "up", "down"))
        with torch.no_grad():
            found = carve(
                gate.weight, up.weight, down.weight, stream, **settings, gate_bias=gate.bias,
                up_bias=up.bias, down_bias=down.bias,
            )  # fmt: skip
            for own, argument in zip(found.arguments().values(), node.args[1:], strict=True):
                if isinstance(own, Tensor):
                    assert torch.allclose(carved.weight(argument), own, atol=1e-5), number
            stream = stream + found(stream)


def test_only_one_layer_of_activations_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, as many values live when a layer is profiled."""
    from conftest import Mlp

    from resplice.stream import Stream

    held: list[int] = []
    original = Stream.inputs_of

    def counting(self: Stream, site: Any) -> Any:
        found = original(self, site)
        held.append(self.live)
        return found

    monkeypatch.setattr(Stream, "inputs_of", counting)
    program = resplice.capture(Mlp(layers=6).eval(), (torch.randn(40, 32),))
    Pipeline.of("cmoe{k-act=5}").run(program)
    assert len(held) == 6
    assert max(held) - min(held) <= 3


def test_padding_is_left_out() -> None:
    program, _, entry = captured("llama")
    _, kwargs = entry.inputs(seed=3)
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    batch = {"input_ids": ids, "attention_mask": mask}
    _, steps = Pipeline.of("cmoe{k-act=5}").run(program, Context(calibration=[batch]))
    assert [s.metrics["tokens"] for s in steps[-1].changes[0].sites] == [int(mask.sum())] * 2
    _, steps = Pipeline.of("cmoe{k-act=5 mask=none_such}").run(
        program, Context(calibration=[batch])
    )
    assert steps[-1].changes[0].sites[0].metrics["tokens"] == ids.numel()


def test_layers_that_share_weights_are_carved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.b(torch.relu(self.a(x)))
            return x

    program = resplice.capture(Tied().eval(), (torch.randn(50, 16),))
    carved, steps = Pipeline.of("cmoe{k-act=5}").run(program)
    assert steps[-1].sites == 3
    assert len({str(node.args[4].target) for node in layers(carved)}) == 1


def test_two_functions_share_their_experts() -> None:
    program, _, _ = captured("llama")
    program.functions["again"] = program.copy()
    carved, _ = Pipeline.of("cmoe{k-act=5}").run(program)
    other = carved.functions["again"]
    for a, b in zip(layers(carved), layers(other), strict=True):
        assert carved.weight(a.args[4]).data_ptr() == other.weight(b.args[4]).data_ptr()


def test_the_callers_model_stays_as_it_is() -> None:
    program, model, _ = captured("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Pipeline.of("cmoe{k-act=5}").run(program)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- sites and refusals ------------------------------------------------------------------


def sites(model: nn.Module, *inputs: Tensor) -> Any:
    """What is found in a small model."""
    program = resplice.capture(model.eval(), inputs)
    program, _ = Pipeline.of("canonicalize").run(program)
    return find_ffns(program)


class Layer(nn.Module):
    """A layer whose middle is given."""

    def __init__(self, middle: Any, inner: int = 48, outer: int = 16, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner), nn.Linear(outer, width)
        self.c, self.middle = nn.Linear(width, inner), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self, x))


def quick(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def unfused(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(0.7978845608 * (z + 0.044715 * z**3)))


@pytest.mark.parametrize(
    ("middle", "name", "gated"),
    [
        (lambda m, x: quick(m.a(x)), "gelu_sigmoid", False),
        (lambda m, x: unfused(m.a(x)), "gelu_tanh", False),
        (lambda m, x: (lambda z: z * torch.sigmoid(z))(m.a(x)), "silu", False),
        (lambda m, x: m.a(x).relu().square(), "relu_squared", False),
        (lambda m, x: m.a(x).clamp(min=0), "relu", False),
        (lambda m, x: m.c(x) * nn.functional.gelu(m.a(x)), "gelu", True),
        (lambda m, x: torch.tanh(m.a(x)) * m.c(x), "tanh", True),
        (lambda m, x: nn.functional.silu(m.c(x).double()).float() * m.a(x), "silu", True),
    ],
)
def test_activations_are_told_by_their_values(middle: Any, name: str, gated: bool) -> None:
    found = sites(Layer(middle, outer=48), torch.randn(5, 16))
    (site,) = found.found
    assert (site.activation, site.second is not None) == (name, gated)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "split",
    [
        lambda z: z.chunk(2, -1),
        lambda z: (z[..., :24], z[..., 24:]),
        lambda z: z.split(24, -1),
    ],
)
def test_fused_projections(split: Any, order: tuple[int, int]) -> None:
    def middle(m: Layer, x: Tensor) -> Tensor:
        parts = split(m.a(x))
        return parts[order[0]] * nn.functional.silu(parts[order[1]])

    model = Layer(middle, outer=24)
    found = sites(model, torch.randn(5, 16))
    (site,) = found.found
    assert (site.first.start, site.second.start) == (24 * order[1], 24 * order[0])
    program = resplice.capture(model.eval(), (torch.randn(5, 16),))
    carved, _ = Pipeline.of(ALL_ACTIVE).run(program, check=True)
    x = torch.randn(5, 16)
    agree([model(x)], [carved(x)])


@pytest.mark.parametrize(
    ("middle", "outer", "words"),
    [
        (lambda m, x: nn.functional.softplus(m.a(x)), 48, "none of those"),
        (lambda m, x: torch.sigmoid(m.a(x)) * m.c(x).relu(), 48, "gate is"),
        (lambda m, x: nn.functional.silu(m.a(x)) * m.c(x.flip(-1)), 48, "read different values"),
    ],
)
def test_what_is_like_a_layer_is_refused_with_the_reason(
    middle: Any, outer: int, words: str
) -> None:
    found = sites(Layer(middle, outer=outer), torch.randn(5, 16))
    assert found.found == []
    assert [reason for _, reason in found.refused if words in reason]


def test_a_value_that_something_else_reads_is_refused() -> None:
    class Leaky(Layer):
        def forward(self, x: Tensor) -> Any:
            z = torch.relu(self.a(x))
            return self.b(z), z.sum()

    found = sites(Leaky(None, outer=48), torch.randn(5, 16))
    assert [reason for _, reason in found.refused] == ["relu is also read by sum_1"]


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x: m.a(x),
        lambda m, x: nn.functional.layer_norm(m.a(x), (48,)),
        lambda m, x: m.a(x).softmax(-1),
        lambda m, x: m.a(x).flip(-1).relu(),
    ],
)
def test_what_is_no_layer_is_not_mentioned(middle: Any) -> None:
    found = sites(Layer(middle, outer=48), torch.randn(5, 16))
    assert (found.found, found.refused) == ([], [])


def test_embedders_are_refused() -> None:
    found = sites(
        nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 24)), torch.randn(5, 16)
    )
    assert ["maps 16 values to 24" in reason for _, reason in found.refused] == [True]


def test_existing_experts_are_left_alone() -> None:
    program, _, _ = captured("mixtral")
    carved, steps = Pipeline.of("cmoe{k-act=5}").run(program)
    assert steps[-1].sites == 0
    assert layers(carved) == []


def test_other_columns_of_a_joint_projection_stay() -> None:
    """As in the single-stream blocks of HunyuanVideo and Flux, with values on both sides."""

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(16 + 64 + 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            parts = (x.sin(), nn.functional.gelu(self.a(x)), x.cos())
            return x + self.b(torch.cat(parts, -1))

    model = Joint().eval()
    program = resplice.capture(model, (torch.randn(50, 16),))
    carved, steps = Pipeline.of(ALL_ACTIVE).run(program, check=True)
    assert steps[-1].sites == 1
    x = torch.randn(50, 16)
    agree([model(x)], [carved(x)])


# ---- options and reports -----------------------------------------------------------------


def test_text_forms() -> None:
    (item,) = Pipeline.of("cmoe{layout=S2A2E8}").passes
    assert item == Cmoe(experts=8, shared=2, active=2)
    assert str(item) == "cmoe{shared=2 active=2}"
    assert str(Cmoe()) == "cmoe"
    assert Pipeline.of(str(item)).passes == (item,)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cmoe{layout=3-3-8}", "not of the form S3A3E8"),
        ("cmoe{layout=S6A3E8}", "must be 0 to 2"),
        ("cmoe{active=9}", "must be 0 to 5"),
        ("cmoe{router=oracle}", "not one of"),
        ("cmoe{profile=v1}", "not one of"),
        ("cmoe{k-act=0}", "must be positive"),
    ],
)
def test_wrong_options(spec: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Pipeline.of(spec)


def test_layers_and_small_layers_are_left_alone_with_the_reason() -> None:
    program, _, _ = captured("llama")
    carved, steps = Pipeline.of("cmoe{k-act=5 layers=1}").run(program)
    assert len(layers(carved)) == 1
    assert [r.reason for r in steps[-1].changes[0].refusals] == ["layer 0 is not in layers=1"]
    _, steps = Pipeline.of("cmoe{k-act=64}").run(program)
    reasons = {r.reason for r in steps[-1].changes[0].refusals}
    assert reasons == {"it has 64 neurons, k-act=64 would mark them all"}
    _, steps = Pipeline.of("cmoe{k-act=5 experts=70}").run(program)
    assert {r.reason for r in steps[-1].changes[0].refusals} == {"it has 64 neurons for 70 experts"}


def test_the_rewrite_limit_holds() -> None:
    program, _, _ = captured("llama")
    carved, _ = Pipeline.of("cmoe{k-act=5}").run(program, Context(limit=1))
    assert len(layers(carved)) == 1


def test_reports_say_what_was_measured() -> None:
    program, _, _ = captured("llama")
    _, steps = Pipeline.of("cmoe{layout=S2A2E8 k-act=5}").run(program)
    change = steps[-1].changes[0]
    for site in change.sites:
        found = site.metrics
        assert sum(found["load"]) == pytest.approx(2, abs=1e-3)
        assert 0 <= found["hit_rate"] <= 1
        assert found["chance"] == pytest.approx(2 / 6)
        assert 0 < found["loss"] < 1
        assert found["loss"] == pytest.approx(10 ** (-found["sqnr_db"] / 10), rel=1e-6)
        assert found["flops_after"] / found["flops_before"] == pytest.approx(
            0.5 + 12 / 192, abs=0.01
        )
        assert found["summary"].startswith("64 neurons as S2A2E8")
    notes = " ".join(change.notes)
    assert "warning: 50% of the neurons" in notes
    assert "sample inputs only" in notes
    _, steps = Pipeline.of("cmoe{k-act=5}").run(
        program, Context(calibration=[program.sample_tensors()])
    )
    notes = " ".join(steps[-1].changes[0].notes)
    assert "of the neurons are active" not in notes
    assert "sample inputs" not in notes


def test_calibration_from_a_folder(tmp_path: Path) -> None:
    program, _, entry = captured("llama")
    for number in range(2):
        _, kwargs = entry.inputs(seed=number, batch=3, seq=20)
        np.savez(
            tmp_path / f"{number}.npz", input_ids=kwargs["input_ids"].numpy(),
            attention_mask=torch.ones_like(kwargs["input_ids"]).numpy(),
        )  # fmt: skip
    _, steps = Pipeline.of(f"cmoe{{k-act=5 calibration={tmp_path}}}").run(program)
    assert steps[-1].changes[0].sites[0].metrics["tokens"] == 120
    with pytest.raises(UsageError, match="no .npz file"):
        Pipeline.of(f"cmoe{{calibration={tmp_path / 'empty'}}}").run(program)


def test_half_precision_models() -> None:
    entry = ZOO["llama"]
    args, kwargs = entry.inputs(seed=0)
    half = entry.model().bfloat16()
    program = resplice.capture(half, resplice.Sample(args, kwargs))
    carved, _ = Pipeline.of("cmoe{k-act=5}").run(program)
    (node, *_) = layers(carved)
    assert carved.weight(node.args[1]).dtype == torch.bfloat16
    assert carved.weight(node.args[8]).dtype == torch.float32
    found = tensors(carved, args, kwargs)[0]
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


def test_saving(tmp_path: Path) -> None:
    program, _, entry = captured("llama")
    small = resplice.optimize(program, "cmoe{k-act=5}")
    small.save(tmp_path / "m.pt2")
    args, kwargs = entry.inputs(seed=9)
    again = resplice.load(tmp_path / "m.pt2")
    agree(tensors(small, args, kwargs), tensors(again, args, kwargs), 0.0)


def test_explain_says_what_would_be_carved_and_saved(
    factory_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from resplice.cli.app import run

    assert run(["explain", f"{factory_module}:mlp", "-p", "cmoe{layout=S2A2E8 k-act=5}"]) == 0
    out = capsys.readouterr().out
    assert "64 neurons as S2A2E8" in out
    assert "hit rate" in out
    assert "of its FLOPs saved" in out
    assert "warning: 50% of the neurons are active" in out
    assert "maps 64 values to 5" in out
