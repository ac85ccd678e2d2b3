"""The pass `quest`: which weights it packs, which it leaves and why, and how good they stay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resplice import weights
from resplice.capture import capture
from resplice.change import Change
from resplice.compare import sqnr_db
from resplice.context import Context
from resplice.errors import OpError
from resplice.facts import FloatWeights
from resplice.kernels.gaussian_grid import ALPHA, RELATIVE_MSE, expected_sqnr_db
from resplice.kernels.hadamard import hadamard
from resplice.kernels.packing import packed_bytes, unpack
from resplice.kernels.quant_linear import BITS, quant_linear
from resplice.pass_base import Approx, Exact
from resplice.passes.quest import Quest, hadamard_block, quantize_weight
from resplice.pipeline import Pipeline
from resplice.program import Program

FLOAT_FLOOR_DB = -20 * math.log10(128 * torch.finfo(torch.float32).eps)
"""Float32 sums of up to 128 products, rotated or not, agree at least this well."""


class Block(nn.Module):
    """Three projections of one input, a gate, and an output nobody could take for a head."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.v, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """A residual block."""
        return x + self.down(self.q(x) * self.k(x).sigmoid() + self.v(x))


def block(seed: int = 0, **sizes: int) -> Block:
    """A seeded block."""
    torch.manual_seed(seed)
    return Block(**sizes).eval()


def program_of(model: nn.Module, *inputs: Any) -> Program:
    """Capture on given or random inputs."""
    return capture(
        model, inputs or (torch.randn(3, 32, generator=torch.Generator().manual_seed(1)),)
    )


def run(program: Program, item: Quest | None = None) -> tuple[Program, Change]:
    """Quantise with every check on."""
    result, steps = Pipeline((item or Quest(),)).run(program, check=True)
    (change,) = steps[-1].changes
    return result, change


def calls(program: Program, op: Any) -> list[Any]:
    """Calls of one of our ops."""
    return [node for node in program.graph.nodes if node.target is op.overload]


def names(program: Program) -> set[str]:
    """Names of all weights."""
    return {name for name, _ in program.named_weights()}


def reasons(change: Change) -> dict[str, str]:
    """Module -> reason of every refusal."""
    return {refusal.origin.module: refusal.reason for refusal in change.refusals}


# ---- quantize_weight ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 16, 32, 100])
def test_levels_of_a_weight_are_the_nearest_to_it(bits: int, group: int) -> None:
    """Computed anew in float64, group by group; 100 is ragged: 32, 32, 32 and 4."""
    size = 100 if group != 16 else 90
    weight = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = quantize_weight(weight, bits, group=group, hadamard="off")
    rounded = found.dequantize()
    for part, piece in zip(
        weight.split(group or size, -1), rounded.split(group or size, -1), strict=True
    ):
        rms = part.square().mean(-1, keepdim=True).sqrt()
        levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64) * ALPHA[bits]
        nearest = (part[..., None] / rms[..., None] - levels).abs().argmin(-1)
        expected = levels[nearest] * rms
        assert torch.allclose(piece.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_parts_of_a_quantised_weight() -> None:
    found = quantize_weight(torch.randn(10, 96), 3, group=40)
    assert (found.bits, found.group, found.block, found.size) == (3, 40, 32, 96)
    assert (found.codes.shape, found.codes.dtype) == ((10, packed_bytes(96, 3)), torch.uint8)
    assert (found.step.shape, found.step.dtype) == ((10, 3), torch.float32)
    assert found.nbytes == 10 * 36 + 10 * 3 * 4
    assert found.dequantize().shape == (10, 96)
    assert int(unpack(found.codes, 3, 96).max()) <= 7


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are quantised a few rows at a time."""
    weight = torch.randn(50, 64)
    whole = quantize_weight(weight, 4)
    monkeypatch.setattr("resplice.passes.quest.weights._ROWS_AT_ONCE", 7 * 64)
    parts = quantize_weight(weight, 4)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.step, parts.step)


def test_quantising_twice_changes_nothing_more() -> None:
    """One bit: levels +-s have root mean square s / alpha * alpha, so s is found again."""
    once = quantize_weight(torch.randn(8, 64), 1, hadamard="off")
    again = quantize_weight(once.dequantize(), 1, hadamard="off")
    assert torch.equal(once.codes, again.codes)


def test_rotation_is_undone() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    found = quantize_weight(weight, 8)
    assert found.block == 128
    assert sqnr_db(weight, found.dequantize()) == pytest.approx(expected_sqnr_db(8), rel=0.03)


def test_rotation_helps_outliers() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 30
    rotated, plain = (
        sqnr_db(weight, quantize_weight(weight, 4, hadamard=choice).dequantize())
        for choice in ("auto", "off")
    )
    assert rotated == pytest.approx(expected_sqnr_db(4), rel=0.03)
    assert plain < 0.9 * rotated


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        (4096, "auto", 128), (192, "auto", 64), (48, "auto", 16), (24, "auto", 1), (33, "auto", 1),
        (4096, "off", 1), (96, 32, 32), (96, 2, 2), (7, 1, 1), (512, 512, 512),
    ],
)  # fmt: skip
def test_the_block_of_a_size(size: int, wanted: Any, expected: int) -> None:
    assert hadamard_block(size, wanted) == expected


@pytest.mark.parametrize(
    ("weight", "bits", "options", "message"),
    [
        (torch.randn(4, 8), 5, {}, "quantize_weight: bits is 5, not one of"),
        (torch.randn(4, 8), 16, {}, "bits is 16"),
        (torch.randn(4, 8), 4, {"group": -1}, "group is -1, must be 0 or positive"),
        (torch.randn(4, 8), 4, {"hadamard": 16}, "hadamard is 16: not a power of two dividing 8"),
        (torch.randn(4, 24), 4, {"hadamard": 12}, "hadamard is 12: not a power of two"),
        (torch.randn(4, 24), 4, {"hadamard": 0}, "hadamard is 0: not a power of two"),
        (torch.randn(8), 4, {}, r"must be a float matrix, is torch.float32 \[8\]"),
        (torch.ones(4, 8, dtype=torch.int8), 4, {}, "must be a float matrix, is torch.int8"),
    ],
)  # fmt: skip
def test_other_weights_and_options_are_refused(
    weight: Tensor, bits: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OpError, match=message):
        quantize_weight(weight, bits, **options)


@pytest.mark.parametrize("bits", BITS)
def test_gaussian_weights_err_as_the_theory_says(bits: int) -> None:
    """The `weight-only` column: X 512x1024, W 1024x1024, relative error of the product."""
    column = {1: 0.602, 2: 0.344, 3: 0.193, 4: 0.107, 8: 0.0093}
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 1024, generator=generator), torch.randn(1024, 1024, generator=generator)
    rounded = quantize_weight(w, bits).dequantize()
    exact, found = x @ w.t(), x @ rounded.t()
    error = float((found - exact).norm() / exact.norm())
    assert error == pytest.approx(column[bits], rel=0.03)
    assert error == pytest.approx(math.sqrt(RELATIVE_MSE[bits]), rel=0.03)
    assert sqnr_db(w, rounded) == pytest.approx(expected_sqnr_db(bits), abs=0.1)


# ---- sites -------------------------------------------------------------------------------


def test_every_linear_layer_is_a_site() -> None:
    program, change = run(program_of(block()))
    assert [site.origin.module for site in change.sites] == ["q", "k", "v", "down"]
    assert change.count == len(calls(program, quant_linear)) == 4
    assert not change.refusals
    assert names(program) == {
        "q.bias", "v.bias", "down.bias",
        *(f"{n}.weight_{part}" for n in ("q", "k", "v", "down") for part in ("codes", "step")),
    }  # fmt: skip
    assert FloatWeights not in program.facts
    assert program.history[-1] == "quest"


def test_the_result_is_that_of_the_rounded_weights() -> None:
    """The same model with W replaced by what its codes mean; the rest is float arithmetic."""
    model, x = block(), torch.randn(5, 32)
    program, _ = run(program_of(model, torch.randn(5, 32)))
    for layer in (model.q, model.k, model.v, model.down):
        layer.weight.data = quantize_weight(layer.weight, 4).dequantize()
    assert sqnr_db(model(x), program(x)) > FLOAT_FLOOR_DB


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 16, 20])
def test_bits_and_groups_reach_every_site(bits: int, group: int) -> None:
    program, change = run(program_of(block()), Quest(weight_bits=bits, group=group))
    for node in calls(program, quant_linear):
        codes, step = (program.weight(arg) for arg in node.args[1:3])
        size = node.args[0].meta["val"].shape[-1]
        assert node.args[4:] == (bits, group)
        assert codes.shape[1] == packed_bytes(size, bits)
        assert step.shape[1] == (-(-size // group) if group else 1)
    assert change.count == 4


@pytest.mark.parametrize(
    ("choice", "blocks"), [("auto", [32, 32, 32, 16]), ("off", [1] * 4), (8, [8] * 4), (1, [1] * 4)]
)
def test_rotation_follows_the_option(choice: Any, blocks: list[int]) -> None:
    program, change = run(program_of(block()), Quest(hadamard=choice))
    assert [site.metrics["block"] for site in change.sites] == blocks
    rotations = [node.args[1] for node in calls(program, hadamard)]
    assert rotations == ([] if blocks[0] == 1 else [blocks[0], blocks[-1]])


def test_a_rotated_input_is_made_once_for_all_its_readers() -> None:
    program, _ = run(program_of(block()))
    first, second = calls(program, hadamard)
    assert [user.name for user in first.users] == ["linear", "linear_1", "linear_2"]
    assert len(second.users) == 1


def test_inputs_of_different_sizes_are_rotated_apart() -> None:
    program, _ = run(program_of(block()), Quest(hadamard=4))
    assert [node.args[1] for node in calls(program, hadamard)] == [4, 4]


def test_a_block_that_does_not_divide_is_refused_at_its_site() -> None:
    _, change = run(program_of(block()), Quest(hadamard=32))
    assert [site.origin.module for site in change.sites] == ["q", "k", "v"]
    assert reasons(change) == {"down": "hadamard=32 does not divide 48"}


def test_skipped_names_are_refused_with_the_pattern() -> None:
    program, change = run(program_of(block()), Quest(skip=("*down*", "q.*")))
    assert [site.origin.module for site in change.sites] == ["k", "v"]
    assert reasons(change) == {
        "q": "q.weight matches skip=q.*", "down": "down.weight matches skip=*down*",
    }  # fmt: skip
    assert {"q.weight", "down.weight"} <= names(program)


def test_names_of_nodes_stay() -> None:
    program = program_of(block())
    rewritten, _ = run(program)
    old = {n.name for n in program.graph.nodes if n.op == "call_function"}
    new = {n.name for n in rewritten.graph.nodes if n.op == "call_function"}
    assert old <= new


def test_the_limit_leaves_the_rest() -> None:
    program, steps = Pipeline((Quest(),)).run(program_of(block()), Context(limit=2))
    assert steps[-1].sites == len(calls(program, quant_linear)) == 2


# ---- heads, embeddings, shared and odd weights -------------------------------------------


class Language(nn.Module):
    """Embedding, one layer, a head; tied or not."""

    def __init__(self, tied: bool, cap: bool = False) -> None:
        super().__init__()
        self.embed, self.cap = nn.Embedding(64, 32), cap
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, soft-capped if asked."""
        x = self.embed(tokens)
        logits: Tensor = self.head(x + self.layer(x).relu())
        return torch.tanh(logits.float() / 30) * 30 if self.cap else logits


TOKENS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("cap", [False, True])
def test_the_head_is_left_alone(cap: bool) -> None:
    program, change = run(program_of(Language(False, cap).eval(), TOKENS))
    assert [site.origin.module for site in change.sites] == ["layer"]
    assert reasons(change) == {"head": "it is the output head (head=true includes it)"}
    assert {"head.weight", "embed.weight"} <= names(program)


def test_the_head_is_included_if_asked() -> None:
    program, change = run(program_of(Language(False).eval(), TOKENS), Quest(head=True))
    assert [site.origin.module for site in change.sites] == ["layer", "head"]
    assert not change.refusals
    assert "embed.weight" in names(program)
    assert "head.weight" not in names(program)


def test_a_tied_head_is_quantised_beside_its_embedding() -> None:
    model = Language(True).eval()
    program, change = run(program_of(model, TOKENS), Quest(head=True))
    assert change.count == 2
    lookups = [n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert torch.equal(program.weight(lookups[0].args[0]), model.embed.weight)


def test_a_layer_that_reads_an_embedding_table_is_left_alone() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(16, 32), nn.Linear(16, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            scores = nn.functional.linear(self.embed(tokens), self.embed.weight)
            return scores + self.out(scores.relu())

    _, change = run(program_of(Scores().eval(), TOKENS))
    assert change.count == 1
    assert [r.reason for r in change.refusals] == ["its weight is an embedding table"]


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both layers and a residual."""
        return x + self.b(self.a(x).relu())


def test_tied_weights_are_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        "resplice.passes.quest.rewrite.quantize_weight",
        lambda *args, **kwargs: made.append(1) or quantize_weight(*args, **kwargs),
    )
    program, change = run(program_of(Tied().eval()))
    first, second = calls(program, quant_linear)
    assert change.count == 2
    assert made == [1]
    for a, b in zip(first.args[1:3], second.args[1:3], strict=True):
        assert weights.key(program.weight(a)) == weights.key(program.weight(b))


def test_zero_weights_stay_harmless() -> None:
    model = block()
    model.k.weight.data.zero_()
    model.v.weight.data[3].zero_()
    program, change = run(program_of(model))
    site = next(site for site in change.sites if site.origin.module == "k")
    assert "sqnr_db" not in site.metrics, "there is no signal to compare with"
    assert site.metrics["note"] == "the weight is zero"
    x = torch.randn(3, 32)
    assert program(x).isfinite().all()
    largest = quantize_weight(torch.zeros(4, 32), 4, hadamard="off").dequantize().abs().max()
    assert 0 < float(largest) < 1e-8, "the clip of an empty group"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_half_precision(dtype: torch.dtype) -> None:
    model, x = block().to(dtype), torch.randn(3, 32).to(dtype)
    program, change = run(program_of(model, x))
    assert change.count == 4
    assert program(x).dtype == dtype
    exact = quantize_weight(model.q.weight, 4)
    assert torch.equal(program.weight("q.weight_codes"), exact.codes)
    assert program.weight("q.weight_step").dtype == torch.float32


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out], addmm."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, out) / math.sqrt(size))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        """As transformers writes it."""
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Transposed(nn.Module):
    """Layers with weights [in, out], spelled in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(32, 48)
        self.up, self.down = nn.Parameter(torch.randn(48, 20)), nn.Parameter(torch.randn(20, 32))

    def forward(self, x: Tensor) -> Tensor:
        """addmm, matmul, mm."""
        hidden = self.conv(x) @ self.up
        flat = torch.mm(hidden.reshape(-1, 20).tanh(), self.down)
        return x + flat.reshape(x.shape)


def test_transposed_weights_are_found_and_quantised_along_their_input() -> None:
    torch.manual_seed(0)
    model, x = Transposed().eval(), torch.randn(2, 3, 32)
    program, change = run(program_of(model, x))
    assert change.count == 3
    assert change.rules["matmul"].hits == 3
    for name in ("conv.weight", "up", "down"):
        weight = dict(model.named_parameters())[name]
        expected = quantize_weight(weight.t(), 4)
        assert torch.equal(program.weight(f"{name}_codes"), expected.codes)
        weight.data = expected.dequantize().t()
    assert sqnr_db(model(x), program(x)) > FLOAT_FLOOR_DB


def test_adding_more_than_a_bias_is_refused() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.addmm(x, x, self.w)

    _, change = run(program_of(Fused().eval()))
    assert change.count == 0
    assert [r.reason for r in change.refusals] == [
        "what it adds is no bias of one value per output"
    ]


def test_scaled_addmm_is_not_a_linear_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.addmm(self.b, x, self.w, alpha=2)

    _, change = run(program_of(Scaled().eval()))
    assert change.count == 0
    assert "aten.addmm has an extra argument 2" in change.rules["matmul"].near_miss


def test_computed_weights_are_a_near_miss() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x * nn.functional.linear(x, self.w * 2)

    _, change = run(program_of(Computed().eval()))
    assert change.count == 0
    (miss,) = change.near_misses()
    assert miss.startswith("linear: weight: it is computed, not a constant of the program (at mul")


def test_vectors_and_integers_are_no_weights() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(32))
            self.register_buffer("n", torch.ones(32, 32, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x @ self.v)[:, None] + x * (x.long() @ self.n)

    _, change = run(program_of(Vector().eval()))
    assert change.count == 0
    assert "it is no float matrix" in change.rules["matmul"].near_miss


# ---- meaning -----------------------------------------------------------------------------


def test_the_identity_setting_changes_nothing() -> None:
    program, x = program_of(block()), torch.randn(3, 32)
    item = Quest.identity()
    rewritten, change = run(program, item)
    assert (item.weight_bits, item.meaning, change.count) == (16, Exact(), 0)
    assert torch.equal(program(x), rewritten(x))
    assert names(rewritten) == names(program)


def test_the_callers_model_and_program_are_untouched() -> None:
    model, x = block(), torch.randn(3, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = program_of(model)
    expected = program(x)
    run(program, Quest(weight_bits=1))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(program(x), expected)


def test_equal_settings_give_equal_bits() -> None:
    first, second = (run(program_of(block()))[0] for _ in range(2))
    for (name, a), (other, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", BITS)
def test_sites_report_what_they_lost_and_saved(bits: int) -> None:
    model = block(width=256, hidden=512)
    _, change = run(program_of(model, torch.randn(3, 256)), Quest(weight_bits=bits))
    for site in change.sites:
        layer = getattr(model, site.origin.module).weight
        quantized = quantize_weight(layer, bits)
        assert site.metrics["sqnr_db"] == sqnr_db(layer, quantized.dequantize())
        assert site.metrics["theory_db"] == expected_sqnr_db(bits)
        assert site.metrics["bytes_before"] == layer.nbytes
        assert site.metrics["bytes_after"] == quantized.nbytes
        # uniform weights, made Gaussian by 128 summands: their kurtosis differs by 1.2 / 128
        assert site.metrics["sqnr_db"] == pytest.approx(expected_sqnr_db(bits), rel=0.03)
    saved = sum(s.metrics["bytes_before"] - s.metrics["bytes_after"] for s in change.sites)
    assert change.notes[-1] == f"4 weights, {saved / 2**20:.1f} MiB saved"


def test_the_declared_bar_is_below_theory_and_rises_with_bits() -> None:
    bars = []
    for bits in BITS:
        meaning = Quest(weight_bits=bits).meaning
        assert isinstance(meaning, Approx)
        assert meaning.sqnr_db < expected_sqnr_db(bits)
        bars.append(meaning.sqnr_db)
    assert bars == sorted(bars)


# ---- real models -------------------------------------------------------------------------


def test_a_tiny_llama() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    program, change = run(capture(model, {"input_ids": TOKENS}))
    kinds = [site.origin.module.rpartition(".")[2] for site in change.sites]
    layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(kinds) == sorted(layer * 2)
    assert reasons(change) == {"lm_head": "it is the output head (head=true includes it)"}
    assert len(calls(program, hadamard)) == 2 * 4, "q k v, o, gate up, down: four inputs a layer"
    assert program(input_ids=TOKENS).logits.shape == (2, 6, 64)


def test_a_tiny_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    program, change = run(capture(model, {"input_ids": TOKENS}))
    assert change.count == change.rules["matmul"].hits == 2 * 4
    (reason,) = {refusal.reason for refusal in change.refusals}
    assert reason == "it is the output head (head=true includes it)"
    assert program(input_ids=TOKENS).logits.shape == (2, 6, 64)
    whole, change = run(capture(model, {"input_ids": TOKENS}), Quest(head=True))
    assert change.count == 9
    lookup = next(n for n in whole.graph.nodes if n.target is torch.ops.aten.embedding.default)
    assert torch.equal(whole.weight(lookup.args[0]), model.transformer.wte.weight)
