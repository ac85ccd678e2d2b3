"""quest beyond linear layers on the integer grid: FP4, pruning, experts, stacks, convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_quest import Language, block, program_of, reasons, run
from test_quest_training import Mlp
from torch import Tensor, nn

import resplice
from resplice import weights
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.capture import capture
from resplice.compare import difference, sqnr_db
from resplice.errors import SpecError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.quant_linear import quant_linear
from resplice.kernels.quant_weight import quant_weight
from resplice.kernels.quest_quantize import quest_quantize
from resplice.kernels.round_to_levels import quest_round
from resplice.passes.quest import Quest, freeze
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.saving import load, save

FORMS: list[dict[str, Any]] = [
    {"format": "fp4"}, {"sparse": "4:8"}, {"sparse": "2:4", "weight_bits": 1},
    {"format": "fp4", "act_bits": 4}, {"sparse": "4:8", "act_bits": 4},
    {"sparse": "2:4", "format": "fp4", "act_bits": 8}, {"hadamard": "off", "sparse": "2:4"},
]  # fmt: skip


def count(program: Program, op: Any) -> int:
    return len([node for node in program.graph.nodes if node.target is op.overload])


def backends_agree(program: Program, folder: Path, *inputs: Tensor) -> None:
    """onnxruntime and the Core ML interpreter at both ends of the targets, against eager."""
    expected = program(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = dict(zip((p.name for p in program.inputs), inputs, strict=True))
    lowered: list[Any] = [
        OnnxBackend().lower(program, folder / "m.onnx", OnnxOptions(accuracy_level=0)),
        *(
            CoremlBackend().lower(
                program, folder / f"{target}.mlpackage", CoremlOptions(target, "fp32")
            )
            for target in ("iOS16", "iOS18")
        ),
    ]
    for artifact in lowered:
        for a, b in zip(expected, artifact.run(given).values(), strict=True):
            assert difference(a, b).relative < 1e-5


# ---- FP4 and pruning -----------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_trained_and_packed_weights_are_one_meaning(options: dict[str, Any]) -> None:
    model, x = block(seed=2), torch.randn(3, 32)
    packed, change = run(program_of(model), Quest(**options))
    trained, _ = run(program_of(model), Quest(**options, mode="qat"))
    frozen, made = freeze(trained)
    assert change.count == made.count == count(packed, quant_weight) == 4
    assert count(frozen, quant_weight) == 4
    assert torch.equal(packed(x), trained(x))
    assert torch.equal(frozen(x), trained(x))
    bytes_of = {n: v.nbytes for n, v in frozen.named_weights()}
    assert bytes_of == {n: v.nbytes for n, v in packed.named_weights()}
    for site in change.sites if options.get("hadamard") != "off" else ():  # uniform weights
        assert site.metrics["sqnr_db"] > site.metrics["theory_db"] - 1


def test_products_of_fp4_operands() -> None:
    """The block with every operand rounded in its own basis, in float64."""
    model, x = block(seed=3), torch.randn(3, 32)
    program, _ = run(program_of(model), Quest(format="fp4", act_bits=4))

    def linear(layer: nn.Linear, value: Tensor, order: int) -> Tensor:
        weight = quest_round(layer.weight.double(), "fp4", hadamard=order)
        bias = None if layer.bias is None else layer.bias.double()
        return nn.functional.linear(quest_round(value, "fp4", hadamard=order), weight, bias)

    wide = x.double()
    inner = linear(model.q, wide, 32) * linear(model.k, wide, 32).sigmoid() + linear(
        model.v, wide, 32
    )
    expected = wide + linear(model.down, inner, 16)
    # a value at the border of two levels may fall to either side in float32
    assert ((program(x) - expected).abs() > 1e-4 * expected.abs().max()).float().mean() < 0.05


@pytest.mark.parametrize(
    "options",
    [FORMS[0], FORMS[4], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:3]),
     pytest.param({"sparse": "4:8", "group": 16}, marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_forms_on_every_backend(options: dict[str, Any], tmp_path: Path) -> None:
    program, _ = run(program_of(block(seed=4)), Quest(**options))
    backends_agree(program, tmp_path, torch.randn(3, 32))


def test_a_program_in_training_is_exported(tmp_path: Path) -> None:
    program, _ = run(program_of(block()), Quest(sparse="4:8", format="fp4", act_bits=4, mode="qat"))
    backends_agree(program, tmp_path, torch.randn(3, 32))


def test_pruned_weights_are_zero_and_train_on() -> None:
    torch.manual_seed(0)
    trained = resplice.optimize(
        program_of(block(seed=5), torch.randn(64, 32)),
        [Quest(sparse="2:4", mode="qat", hadamard="off")],
    ).trainable()
    (trained(torch.randn(64, 32)).square().mean()).backward()
    weight = weights.get(trained.program.module, "q.weight")
    rounded = quest_round(weight.detach(), "int4", sparse="2:4", hadamard="off")
    gone = rounded == 0
    assert gone.float().mean() == 0.5
    assert weight.grad is not None
    small = (
        weight.detach().abs() <= 2.5139305786 / 15 * weight.detach().square().mean(-1, True).sqrt()
    )
    assert torch.equal(weight.grad[gone & ~small], torch.zeros_like(weight.grad[gone & ~small]))
    assert weight.grad[gone & small].abs().min() > 0


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    _, change = run(program_of(block(width=32, hidden=44)), Quest(sparse="4:8"))
    assert reasons(change) == {"down": "sparse=4:8 takes groups of 8, it has 44 inputs"}
    _, change = run(program_of(block(width=32, hidden=44)), Quest(sparse="2:4"))
    assert not change.refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quest{weight-bits=16 act-bits=4 sparse=2:4}", "prunes weights of few bits"),
        ("quest{weight-bits=8 format=fp4}", "format=fp4 has 4 bits"),
        ("quest{weight-bits=16 act-bits=8 format=fp4}", "format=fp4 has 4 bits"),
        ("quest{sparse=1:2}", "must be one of off, 2:4, 4:8"),
        ("quest{format=nf4}", "must be one of int, fp4"),
    ],
)
def test_options_that_do_not_go_together(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.of(spec)


@pytest.mark.parametrize("spec", ["quest{sparse=4:8}", "quest{act-bits=4 sparse=2:4 format=fp4}"])
def test_the_text_form_comes_back(spec: str) -> None:
    assert str(Pipeline.of(spec).passes[-1]) == spec


def test_folding_leaves_packed_weights_packed() -> None:
    program, _ = Pipeline.of("quest{format=fp4},fold").run(program_of(block()))
    assert count(program, quant_weight) == 4


def test_packed_programs_are_saved_and_come_back(tmp_path: Path) -> None:
    program, _ = run(program_of(block()), Quest(sparse="4:8", format="fp4"))
    x = torch.randn(3, 32)
    again = load(save(program, tmp_path / "m.pt2"))
    assert torch.equal(again(x), program(x))
    assert count(again, quant_weight) == 4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_narrow_models_stay_narrow(kind: torch.dtype) -> None:
    """Steps are float32, what the layers read is of the model's dtype."""
    model, x = block().to(kind), torch.randn(3, 32, dtype=kind)
    packed, _ = run(program_of(model, x), Quest(format="fp4"))
    trained, _ = run(program_of(model, x), Quest(format="fp4", mode="qat"))
    frozen, _ = freeze(trained)
    assert packed(x).dtype == kind
    assert torch.equal(frozen(x), trained(x))
    assert torch.equal(packed(x), trained(x))


# ---- several options at once -----------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [{"sparse": "4:8"}, *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[:2])],
    ids=str,
)  # fmt: skip
def test_signs_activations_groups_and_head_together(form: dict[str, Any], tmp_path: Path) -> None:
    """Every product reads rounded values; only the un-gated one has signs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = Mlp(), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mlp(x))  # type: ignore[no-any-return]

    torch.manual_seed(1)
    model, x = Model().eval(), torch.randn(16, 64)
    item = Quest(act_bits=4, signs=True, group=32, head=True, **form)
    program, change = run(capture(model, (x,)), item)
    assert change.count == 3
    assert not change.refusals
    flips = [n for n in program.graph.nodes if any("signs" in i.name for i in n.all_input_nodes)]
    assert len(flips) == 1
    for node in program.graph.nodes:
        if node.target is quant_linear.overload:
            assert node.args[4:] == (4, 32)
        if node.target is quant_weight.overload:
            assert node.args[5] == 32
    expected = {"sparse": 3.0}.get(next(iter(form), ""), 9.0)
    assert sqnr_db(model.mlp(x) - x, program_without_head(model, item, x)) > expected
    backends_agree(program, tmp_path, x)


def program_without_head(model: Any, item: Quest, x: Tensor) -> Tensor:
    """What the quantised MLP adds to its input."""
    program, _ = run(capture(model.mlp, (x,)), item)
    return program(x) - x  # type: ignore[no-any-return]


def test_a_wide_block_where_it_does_not_divide() -> None:
    """`hadamard=128` is refused at the site with the reason; `auto` takes what divides."""
    model = Language(False).eval()
    tokens = torch.arange(12).reshape(2, 6)
    _, change = run(program_of(model, tokens), Quest(hadamard=128))
    assert reasons(change) == {
        "layer": "hadamard=128 does not divide 32",
        "head": reasons(change)["head"],
    }
    _, change = run(program_of(model, tokens), Quest(hadamard="auto"))
    assert [site.metrics["block"] for site in change.sites] == [32]


# ---- experts ---------------------------------------------------------------------------------


class Experts(nn.Module):
    """A residual layer of always-on neurons and routed experts, with biases and gates."""

    def __init__(self, active: int = 2, shared: bool = True) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)

        def matrix(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes, generator=draw) / sizes[-1] ** 0.5)

        self.active = active
        self.first = matrix(48, 32) if shared else None
        self.second = matrix(32, 24) if shared else None
        self.inner, self.outer, self.router = matrix(4, 32, 32), matrix(4, 32, 16), matrix(8, 32)
        self.bias, self.out = matrix(4, 32), matrix(1, 32)
        self.scale = nn.Parameter(torch.rand(4, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, beside its input."""
        return x + moe_ffn(
            x, self.first, None, self.second, self.inner, self.bias, self.outer, self.out[0],
            self.router, None, self.scale, None, self.active, "silu", True, "absolute",
        )  # fmt: skip


def rounded_experts(model: Experts, bits: int) -> Experts:
    """The same layer with matrices rounded in their own basis."""
    for name in ("first", "second", "inner", "outer"):
        weight = getattr(model, name)
        if weight is not None:
            order = min(128, weight.shape[-1] & -weight.shape[-1])
            order = order if order >= 16 else 1
            weight.data = quest_quantize(weight.data, bits, hadamard=order)
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_experts_are_rounded_and_the_router_is_not(shared: bool, bits: int) -> None:
    x = torch.randn(5, 32)
    program, change = run(capture(Experts(shared=shared).eval(), (x,)), Quest(weight_bits=bits))
    assert change.count == (3 if shared else 1)
    assert not change.refusals
    names = {name for name, _ in program.named_weights()}
    assert {"router", "scale", "bias", "inner_codes", "outer_step"} <= names
    assert not {"inner", "outer", "first", "second"} & names
    fresh = torch.randn(7, 32)
    expected = rounded_experts(Experts(shared=shared).eval(), bits)(fresh)
    assert difference(expected, capture_free(program, fresh)).relative < 1e-5


def capture_free(program: Program, x: Tensor) -> Tensor:
    """Row by row in pieces of the captured size, as the program is static."""
    rows = torch.cat((x, x))[:10]
    return torch.cat([program(part) for part in rows.split(5)])[: len(x)]


@pytest.mark.parametrize("mode", ["ptq", "qat"])
def test_experts_on_every_backend(mode: Any, tmp_path: Path) -> None:
    x = torch.randn(5, 32)
    program, _ = run(capture(Experts().eval(), (x,)), Quest(weight_bits=4, mode=mode))
    if mode == "qat":
        trained = program
        program, change = freeze(program)
        assert change.count == 4
        assert torch.equal(program(x), trained(x))
    backends_agree(program, tmp_path, torch.randn(5, 32))


def test_carved_layers_in_few_bits(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(32, 128, bias=False), nn.Linear(32, 128, bias=False)
            self.down = nn.Linear(128, 32, bias=False)
            nn.init.normal_(self.gate.weight, std=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    program = capture(Gated().eval(), (torch.randn(64, 32),))
    carved, _ = Pipeline.of("cmoe{experts=8 shared=3 active=3}").run(program)
    both, steps = Pipeline.of("cmoe{experts=8 shared=3 active=3},quest{weight-bits=8}").run(program)
    change = steps[-1].changes[0]
    assert change.count == 3  # the experts, and the shared ones as two linear layers
    assert count(both, quant_weight) == count(both, quant_linear) == 2
    assert "router" in " ".join(name for name, _ in both.named_weights())
    x = torch.randn(64, 32)
    assert sqnr_db(carved(x) - x, both(x) - x) > 35  # theory: 40.6 dB a weight
    OnnxBackend().lower(both, tmp_path / "m.onnx", OnnxOptions(portable=True))
    CoremlBackend().lower(both, tmp_path / "m.mlpackage", CoremlOptions(precision="fp32"))


def test_experts_are_refused_with_reasons() -> None:
    program = capture(Experts().eval(), (torch.randn(5, 32),))
    for item, reason in (
        (Quest(skip=("inner",)), "inner matches skip=inner"),
        (Quest(hadamard=32), "hadamard=32 does not divide 16"),
        (Quest(weight_bits=16, act_bits=8), "activations inside experts keep their precision"),
    ):
        _, change = run(program, item)
        assert [refusal.reason for refusal in change.refusals] == [reason]


class Stacks(nn.Module):
    """Mixtral's captured form, its transposed one, and one that no rule takes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 24, 32) / 6)
        self.columns = nn.Parameter(torch.randn(3, 24, 16) / 5)
        self.odd = nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 32] -> [3, T, 16]."""
        inner = torch.matmul(x, self.rows.transpose(1, 2))
        outer = torch.bmm(inner.relu(), self.columns)
        return outer + torch.einsum("etk,ekn->etn", outer, self.odd).repeat(1, 1, 2)


@pytest.mark.parametrize("bits", [2, 8])
def test_stacks_of_matrices(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, x = Stacks().eval(), torch.randn(4, 32)
    program, change = run(capture(model, (x,)), Quest(weight_bits=bits))
    assert change.count == 2
    assert all("a stack of matrices in a way no rule takes" in r.reason for r in change.refusals)
    assert change.refusals
    model.rows.data = quest_quantize(model.rows.data, bits, hadamard=32)
    columns = quest_quantize(model.columns.data.transpose(1, 2).contiguous(), bits, hadamard="off")
    model.columns.data = columns.transpose(1, 2)
    assert difference(model(x), program(x)).relative < 1e-5
    if bits == 2:
        backends_agree(program, tmp_path, torch.randn(4, 32))


def test_stacks_take_rounded_activations_and_train() -> None:
    torch.manual_seed(2)
    model, x = Stacks().eval(), torch.randn(4, 32)
    packed, _ = run(capture(model, (x,)), Quest(weight_bits=8, act_bits=8))
    trained, _ = run(capture(model, (x,)), Quest(weight_bits=8, act_bits=8, mode="qat"))
    frozen, _ = freeze(trained)
    assert torch.equal(frozen(x), trained(x))
    assert sqnr_db(trained(x), packed(x)) > 30  # rows of another layout sum in another order
    assert 30 < sqnr_db(model(x), packed(x)) < 60


# ---- convolutions ------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Patches in two and three dimensions, overlapping, pointwise, dilated and grouped kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 32, (4, 2), stride=(4, 2))
        self.video = nn.Conv3d(4, 32, (1, 2, 2), stride=(1, 2, 2), bias=False)
        self.same = nn.Conv2d(32, 24, 3, padding=1)
        self.point, self.wide = nn.Conv2d(24, 16, 1, bias=False), nn.Conv2d(16, 8, 3, dilation=2)
        self.pairs, self.line = (
            nn.Conv1d(8, 8, 5, padding=2, groups=2),
            nn.Conv1d(8, 8, 4, stride=4),
        )
        self.each, self.back = nn.Conv1d(8, 8, 3, groups=8), nn.ConvTranspose1d(8, 8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches."""
        y = self.wide(self.point(self.same(self.patch(x)).relu())).flatten(2)
        line = self.back(self.each(self.line(self.pairs(y))))
        return line + 1, self.video(x.unsqueeze(2)) + 1


def test_convolutions_in_few_bits(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, x = Convolutions().eval(), torch.randn(2, 4, 40, 20)
    program, change = run(capture(model, (x,)), Quest(weight_bits=4, convs=True))
    assert [site.origin.module for site in change.sites] == [
        "patch", "same", "point", "wide", "pairs", "line", "video",
    ]  # fmt: skip
    assert reasons(change) == {
        "each": "its rows have 3 weights: a step for each saves little",
        "back": "a transposed convolution has no row per output",
    }
    assert count(program, quant_linear) == 4  # patches in one, two and three dimensions, and 1x1
    for site in change.sites:
        layer = model.get_submodule(site.origin.module)
        rows = layer.weight.data.flatten(1)  # type: ignore[union-attr, operator]
        order = rows.shape[1] & -rows.shape[1]
        rounded = quest_quantize(rows, 4, hadamard=min(128, order) if order >= 16 else 1)
        layer.weight.data = rounded.reshape(layer.weight.shape)  # type: ignore[union-attr, operator, arg-type]
    for expected, found in zip(model(x), program(x), strict=True):
        assert difference(expected, found).relative < 1e-5
    backends_agree(program, tmp_path, torch.randn(2, 4, 40, 20))


@pytest.mark.parametrize("form", [{}, {"format": "fp4", "act_bits": 4}, {"act_bits": 8}], ids=str)
def test_convolutions_train_as_they_are_packed(form: dict[str, Any]) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 4, 40, 20)
    program = capture(Convolutions().eval(), (x,))
    packed, _ = run(program, Quest(convs=True, **form))
    trained, _ = run(program, Quest(convs=True, mode="qat", **form))
    frozen, _ = freeze(trained)
    for a, b, c in zip(packed(x), trained(x), frozen(x), strict=True):
        assert torch.equal(b, c)
        assert sqnr_db(b, a) > 30  # a value at the border of two levels may fall to either side


def test_convolutions_stay_unless_asked_for() -> None:
    _, change = run(capture(Convolutions().eval(), (torch.randn(2, 4, 40, 20),)))
    assert change.count == 0


def test_patches_of_a_free_number(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 4, stride=4), nn.ReLU()).eval()
    shapes = {"input": {0: "batch", 2: "4*rows"}}
    program = capture(model, (torch.randn(2, 4, 8, 8),), dynamic_shapes=shapes)
    program, _ = Pipeline((Quest(weight_bits=8, convs=True),)).run(program)
    assert count(program, quant_linear) == 1
    x = torch.randn(3, 4, 20, 8)
    assert sqnr_db(model(x), program(x)) > 35
    artifact = OnnxBackend().lower(program, tmp_path / "m.onnx", OnnxOptions(accuracy_level=0))
    assert difference(program(x), artifact.run({"input": x})["output"]).relative < 1e-5


def test_only_patches_have_activations_to_round() -> None:
    item = Quest(weight_bits=16, act_bits=8, convs=True)
    _, change = run(capture(Convolutions().eval(), (torch.randn(2, 4, 40, 20),)), item)
    assert [site.origin.module for site in change.sites] == ["patch", "point", "line", "video"]
    assert reasons(change)["same"] == "activations of overlapping patches keep their precision"
