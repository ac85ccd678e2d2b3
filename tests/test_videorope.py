"""videorope on language models: sites, bit-equality with an eager model, masks, refusals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rope_models import LTA, SECTIONS, WIDTH, eager_videorope, language_model, run_eager
from torch import Tensor, nn

import resplice
from resplice.errors import InputError, SpecError, UsageError
from resplice.kernels.rope3d import rope3d
from resplice.passes.videorope import build_position_ids
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.spec import parse, print_passes

FAMILIES = list(SECTIONS)
LAYOUT = [[0] * 3 + [2] * 12 + [0] * 4, [0] * 1 + [1] * 6 + [0] * 12]
GRIDS = [[(2, 2, 3)], [(1, 1, 6)]]


def inputs_of(family: str, types: Tensor, positions: Tensor | None = None) -> dict[str, Any]:
    """What the captured models take; plain RoPE counts its own positions for the mask."""
    batch, length = types.shape
    embeds = torch.randn(batch, length, WIDTH)
    ids = torch.arange(length).expand(batch, -1)
    if family != "llama":
        ids = ids.expand(3, -1, -1).contiguous() if positions is None else positions
    return {"inputs_embeds": embeds, "position_ids": ids, "use_cache": False}


def shapes_of(family: str) -> dict[str, Any]:
    rows = {0: "b", 1: "s"} if family == "llama" else {1: "b", 2: "s"}
    return {"inputs_embeds": {0: "b", 1: "s"}, "position_ids": rows}


def built(**options: Any) -> Tensor:
    found, _ = build_position_ids(torch.tensor(LAYOUT), GRIDS, **options)
    return found


@cache
def captured(family: str) -> tuple[nn.Module, Program]:
    model = language_model(family)
    types = torch.zeros(2, 11, dtype=torch.int64)
    program = resplice.capture(
        model, inputs_of(family, types), dynamic_shapes=shapes_of(family), check=False
    )
    return model, program


@cache
def rewritten(family: str, spec: str = "videorope") -> Program:
    result, steps = Pipeline.of(spec).run(captured(family)[1], check=True)
    assert steps[-1].sites == 1
    return result


def rewritten_call(program: Program, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Call a rewritten program with VideoRoPE positions, wherever it takes them."""
    name = program.metadata["positions"]["input"]
    kind = next(port.dtype for port in program.inputs if port.name == name)
    if name == "rope_positions":
        inputs = {**inputs, name: positions}
    else:
        inputs = {**inputs, name: positions.to(kind)}
    return program(**inputs).last_hidden_state


def rotations(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is rope3d.overload]


# ---- the rewrite -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_to_an_eager_model_at_another_size(family: str) -> None:
    model, program = captured(family)
    result = rewritten(family)
    assert [list(node.args[3]) for node in rotations(result)] == [list(LTA[family])] * 4
    assert not any(node.target is torch.ops.aten.cos.default for node in result.graph.nodes)
    positions = built()
    inputs = inputs_of(family, torch.tensor(LAYOUT), positions)
    expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
    found = rewritten_call(result, inputs, positions)
    assert torch.equal(found, expected.last_hidden_state)
    if family != "llama":
        before = program(**{**inputs, "position_ids": positions.long()}).last_hidden_state
        assert float((before - found).abs().max()) > 1e-2, "nothing to see"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_bit_equal_to_the_original(family: str) -> None:
    model, _ = captured(family)
    types = torch.zeros(3, 17, dtype=torch.int64)
    inputs = inputs_of(family, types)
    positions, _ = build_position_ids(types, [])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert torch.equal(rewritten_call(rewritten(family), inputs, positions), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_bit_equal_too(family: str) -> None:
    model = language_model(family)
    rotary = next(m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb"))
    kept = rotary.inv_freq.clone()
    model = model.to(torch.bfloat16)
    rotary.inv_freq = kept  # as from_pretrained(dtype=bfloat16) leaves it
    positions = built()
    inputs = inputs_of(family, torch.tensor(LAYOUT), positions.long())
    inputs["inputs_embeds"] = inputs["inputs_embeds"].bfloat16()
    program = resplice.capture(model, inputs, check=False)
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
    found = rewritten_call(result, inputs, positions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.last_hidden_state)
    assert not [n for n in steps[-1].changes[0].notes if "off by up to" in n]
    rotary.inv_freq = kept.bfloat16()
    program = resplice.capture(model, inputs, check=False)
    result, steps = Pipeline.of("videorope").run(program)
    assert [n for n in steps[-1].changes[0].notes if "stored in torch.bfloat16, off by up" in n]
    expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
    assert torch.equal(rewritten_call(result, inputs, positions), expected.last_hidden_state)


class Wrapped(nn.Module):
    """Flat inputs and output, for torch.export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states."""
        return self.model(
            inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False
        ).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["wrapped", "decomposed"])
def test_programs_exported_by_others(family: str, decomposed: bool, tmp_path: Path) -> None:
    """With gradients on, the rotary module hides in a higher-order operator."""
    model = language_model(family)
    positions = built()
    inputs = inputs_of(family, torch.tensor(LAYOUT), positions.long())
    args = inputs["inputs_embeds"], inputs["position_ids"]
    with torch.enable_grad():
        exported = torch.export.export(Wrapped(model), args)
    assert any("set_grad" in str(node.target) for node in exported.graph.nodes)
    if decomposed:
        exported = exported.run_decompositions()
    torch.export.save(exported, tmp_path / "m.pt2")
    program = resplice.load(tmp_path / "m.pt2", allow_pickle=True)
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    extra = {"rope_positions": positions} if family == "llama" else {}
    (found,) = result(*args, **extra)
    expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
    error = float((found - expected.last_hidden_state).abs().max())
    assert error <= (1e-5 if decomposed else 0), "the default decomposition reorders attention"


def test_masks_keep_the_original_positions() -> None:
    """Without a mask, transformers reads jumps of the ids as borders of packed sequences."""
    model, _ = captured("llama")
    result = rewritten("llama")
    positions = built()
    inputs = inputs_of("llama", torch.tensor(LAYOUT))
    jumps = {**inputs, "position_ids": positions[0].long()}
    through_the_mask = rewritten_call(result, jumps, positions)
    found = rewritten_call(result, inputs, positions)
    assert float((through_the_mask - found).abs().max()) > 1e-2
    expected = run_eager(eager_videorope(model, LTA["llama"]), positions, **inputs)
    assert torch.equal(found, expected.last_hidden_state)
    assert [port.name for port in result.inputs][-1] == "rope_positions"
    assert str(result.inputs[-1]) == "rope_positions: f32[3,b,s]"


def test_four_rows_of_ids_and_ids_of_two_axes() -> None:
    model = language_model("qwen2")
    positions = built()
    plain = torch.arange(19).expand(1, 2, -1)
    inputs = inputs_of("qwen2", torch.tensor(LAYOUT))
    four = {**inputs, "position_ids": torch.cat((plain, positions.long()))}
    program = resplice.capture(model, four, check=False)
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    assert [list(n.args[3]) for n in rotations(result)] == [[2, 3, 1, 1]] * 4
    eager = eager_videorope(model, LTA["qwen2"])
    expected = run_eager(eager, positions, **four).last_hidden_state
    assert torch.equal(result(**four).last_hidden_state, expected)
    halved, _ = Pipeline.of("videorope{delta=0.5}").run(program)
    mixed = {**four, "position_ids": torch.cat((plain.float(), built(delta=0.5)))}
    expected = run_eager(eager, built(delta=0.5), **four).last_hidden_state
    assert torch.equal(halved(**mixed).last_hidden_state, expected)

    two = {**inputs, "position_ids": plain[0].contiguous()}
    program = resplice.capture(model, two, check=False)
    result, steps = Pipeline.of("videorope").run(program)
    assert "t2 h1 w1 -> " in steps[-1].changes[0].sites[0].metrics["summary"]
    expected = run_eager(eager, positions, **two).last_hidden_state
    assert torch.equal(result(**two, rope_positions=positions).last_hidden_state, expected)


def test_ids_that_are_no_input() -> None:
    for family in ("llama", "qwen2"):
        model = language_model(family)
        embeds = torch.randn(2, 19, WIDTH)
        shapes = {"inputs_embeds": {0: "b", 1: "s"}}
        inputs = {"inputs_embeds": embeds, "use_cache": False}
        program = resplice.capture(model, inputs, dynamic_shapes=shapes, check=False)
        result, steps = Pipeline.of("videorope").run(program)
        assert steps[-1].sites == 1
        positions = built()
        expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
        found = result(**inputs, rope_positions=positions).last_hidden_state
        assert torch.equal(found, expected.last_hidden_state)


class Legacy(nn.Module):
    """transformers 4.x: angles by a matrix product, sections picked in every layer."""

    def __init__(self, section: tuple[int, ...] = (2, 3, 3), layers: int = 2) -> None:
        super().__init__()
        self.section = section
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(8) / 8))
        self.q = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.k = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq[None, None, :, None].expand(3, positions.shape[1], -1, 1)
        angles = (inv_freq @ positions[:, :, None, :].float()).transpose(2, 3)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def pick(self, table: Tensor) -> Tensor:
        parts = table.split(self.section * 2, -1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], -1).unsqueeze(1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Some attention."""
        cos, sin = self.tables(positions)
        for q_proj, k_proj in zip(self.q, self.k, strict=True):
            heads = [f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (q_proj, k_proj)]
            c, s = self.pick(cos), self.pick(sin)
            turned = [h * c + torch.cat((-h[..., 8:], h[..., :8]), -1) * s for h in heads]
            found = nn.functional.scaled_dot_product_attention(*turned, heads[1])
            x = x + found.transpose(1, 2).flatten(2)
        return x


class LegacyLta(Legacy):
    """The published code's literal form of the allocation: one channel after the other."""

    def pick(self, table: Tensor) -> Tensor:
        rows = [*[1, 2, 1, 2, 1, 2], 0, 0] * 2
        return torch.stack([table[row, ..., n] for n, row in enumerate(rows)], -1).unsqueeze(1)


@pytest.mark.parametrize("whole", [True, False], ids=["ids", "fractions"])
def test_the_form_of_transformers_4(whole: bool) -> None:
    model = Legacy().eval()
    x, positions = torch.randn(2, 19, 32), built(delta=2.0 if whole else 0.5)
    sample = positions.long() if whole else positions
    program = resplice.capture(model, (x, sample), check=False)
    result, steps = Pipeline.of(f"videorope{{delta={2 if whole else 0.5}}}").run(program)
    assert steps[-1].sites == 2, "sections are picked in every layer"
    other = LegacyLta().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(result(x, sample), other(x, sample))


# ---- options -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2.5"])
def test_fractions_need_float_positions(family: str) -> None:
    result = rewritten(family, "videorope{delta=0.5}")
    name = result.metadata["positions"]["input"]
    assert next(port.dtype for port in result.inputs if port.name == name) == torch.float32
    positions = built(delta=0.5)
    assert bool((positions != positions.trunc()).any())
    inputs = inputs_of(family, torch.tensor(LAYOUT), positions)
    model, _ = captured(family)
    expected = run_eager(eager_videorope(model, LTA[family]), positions, **inputs)
    assert torch.equal(rewritten_call(result, inputs, positions), expected.last_hidden_state)


def test_sections_and_switches() -> None:
    plain = rewritten("llama", "videorope{lta=false section=2,1,1}")
    assert [list(n.args[3]) for n in rotations(plain)] == [[0, 0, 1, 2]] * 4
    chosen = rewritten("qwen2.5", "videorope{section=3,1,0}")
    assert [list(n.args[3]) for n in rotations(chosen)] == [[1, 0, 0, 0]] * 4
    kept, steps = Pipeline.of("videorope{lta=false}").run(captured("qwen2")[1])
    assert steps[-1].sites == 0
    assert not rotations(kept)
    assert kept.metadata["positions"]["semantics"] == "videorope{delta=2}"
    with pytest.raises(UsageError, match="section=2,1,2 does not divide 4 rotary angles"):
        Pipeline.of("videorope{section=2,1,2}").run(captured("llama")[1])


@pytest.mark.parametrize(
    ("spec", "semantics"),
    [
        ("videorope{delta=3}", "videorope{delta=3}"),
        ("videorope{ats=false}", "videorope{delta=1}"),
        ("videorope{dl=false}", "videorope{delta=2 dl=false}"),
        ("videorope{dl=false ats=false}", "mrope"),
        ("videorope{centre=paper convention=unpadded}",
         "videorope{delta=2 centre=paper convention=unpadded}"),
    ],
)  # fmt: skip
def test_the_program_says_which_positions_it_wants(spec: str, semantics: str) -> None:
    result, _ = Pipeline.of(spec).run(captured("qwen2")[1])
    note = result.metadata["positions"]
    assert (note["input"], note["semantics"]) == ("position_ids", semantics)
    namespace = {
        "resplice": resplice, "token_types": torch.tensor(LAYOUT), "grids": GRIDS,
    }  # fmt: skip
    made, _ = eval(note["build"], namespace)  # what the message tells the user to run
    assert made.resplice_positions == semantics


def test_pipeline_text_and_options() -> None:
    for text in ("videorope", "videorope{delta=0.5 lta=false section=2,1,1 centre=paper}"):
        assert print_passes(parse(text)) == text
    for text, reason in (
        ("videorope{delta=0}", "must be positive"),
        ("videorope{section=1,2}", "three counts"),
        ("videorope{centre=middle}", "centre"),
    ):
        with pytest.raises(SpecError, match=reason):
            parse(text)


def test_the_second_time_nothing_happens() -> None:
    once = rewritten("qwen2.5")
    again, steps = Pipeline.of("videorope{delta=3}").run(once)
    assert steps[-1].sites == 0
    assert steps[-1].changes[0].notes == ["already rewritten by videorope: left as it is"]
    assert again.metadata["positions"] == once.metadata["positions"]
    assert resplice.show(again) == resplice.show(once)


# ---- semantics of positions ----------------------------------------------------------------


def test_positions_of_another_scheme_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    result = rewritten("llama")
    inputs = inputs_of("llama", torch.tensor(LAYOUT))
    expected = result(**inputs, rope_positions=built()).last_hidden_state
    artifact = onnx.OnnxBackend().lower(result, tmp_path / "m.onnx")
    feed = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    again = resplice.load(resplice.save(result, tmp_path / "m.pt2"))
    for options, given in (
        ({"scheme": "mrope"}, "mrope"),
        ({"delta": 1.0}, "videorope{delta=1}"),
        ({"centre": "paper"}, "videorope{delta=2 centre=paper}"),
    ):
        for call in (
            lambda p: result(**inputs, rope_positions=p),
            lambda p: again(**inputs, rope_positions=p),
            lambda p: artifact.run({**feed, "rope_positions": p}),
        ):
            with pytest.raises(InputError) as caught:
                call(built(**options))
            text = f"holds positions of {given}, this program requires videorope{{delta=2}}"
            assert text in str(caught.value)
            assert "build_position_ids(token_types, grids, scheme='videorope')" in str(caught.value)
    (found,) = artifact.run({**feed, "rope_positions": built()}).values()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    text_only, _ = build_position_ids(torch.zeros(2, 19, dtype=torch.int64), [], scheme="mrope")
    result(**inputs, rope_positions=text_only)


# ---- refusals ----------------------------------------------------------------------------


def refusals(model: nn.Module, *inputs: Tensor, sites: int = 0) -> list[str]:
    program = resplice.capture(model.eval(), inputs, check=False)
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == sites
    if not sites:
        assert not rotations(result)
        with torch.no_grad():
            assert torch.equal(result(*inputs), model(*inputs))
    return [refusal.reason for refusal in steps[-1].changes[0].refusals]


def vision_tower() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Qwen2-VL's own vision rotary module over two rows of positions."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VLVisionRotaryEmbedding,
        apply_rotary_pos_emb_vision,
    )

    config = Qwen2VLVisionConfig(embed_dim=32, num_heads=2)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = Qwen2VLVisionRotaryEmbedding(config)

        def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> Tensor:
            cos, sin = self.rotary(q, position_ids)
            return sum(apply_rotary_pos_emb_vision(q, k, cos, sin))

    ids = torch.stack((torch.arange(12) // 4, torch.arange(12) % 4), -1)
    return Tower(), (torch.randn(12, 2, 16), torch.randn(12, 2, 16), ids)


def test_vision_towers_are_refused_with_the_reason() -> None:
    tower, inputs = vision_tower()
    reasons = refusals(tower, *inputs)
    assert len(reasons) == 1
    assert "two rows, the height and width of an image (a vision tower)" in reasons[0]


class Rotary(Legacy):
    """Variations of one rotation that are no sites."""

    def __init__(self, make: Any) -> None:
        super().__init__(layers=1)
        self.make = make

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """One rotation."""
        cos, sin = self.make(self, positions)
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin


def _angles(m: Rotary, p: Tensor) -> Tensor:
    return torch.cat((p[0, :, :, None] * m.inv_freq,) * 2, -1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m, p: (_angles(m, p).cos(), _angles(m, p + 1).sin()), "of different angles"),
        (lambda m, p: (_angles(m, p).cos(), _angles(m, p[1:]).sin()), "of different angles"),
        (lambda m, p: (_angles(m, p).cos() * 2, _angles(m, p).sin()), "scaled differently"),
        (lambda m, p: (p[0, :, :, None] * torch.ones(16), p[1, :, :, None] * torch.ones(16)),
         "computed by mul, mul_1, not from angles"),
        (lambda m, p: ((a := (p[0, :, :, None] * (m.inv_freq * p.amax())).repeat(1, 1, 2)).cos(),
                       a.sin()), "constant frequencies"),
        (lambda m, p: ((a := _angles(m, p.flip(2))).cos(), a.sin()), "one per row, batch item"),
        (lambda m, p: ((a := torch.einsum("abs,n->sn", p, m.inv_freq).repeat(1, 2)).cos(), a.sin()),
         "mixes several axes"),
    ],
)  # fmt: skip
def test_near_misses_are_refused_with_the_reason(make: Any, reason: str) -> None:
    model = Rotary(make)
    reasons = refusals(model, torch.randn(2, 19, 16), built())
    assert any(reason in found for found in reasons), reasons


def test_tables_with_other_readers_are_refused() -> None:
    def tables(m: Any, p: Tensor) -> tuple[Tensor, Tensor]:
        angles = _angles(m, p)
        return angles.cos(), angles.sin()

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rotary(tables)

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            cos, sin = tables(self.inner, positions)
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin + cos.exp()

    (reason,) = refusals(Shared(), torch.randn(2, 19, 16), built())
    assert "also read by exp, which is no rotation" in reason


def test_models_without_rotations_are_left_alone(program: Program) -> None:
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 0
    assert resplice.show(result) == resplice.show(Pipeline.of("canonicalize").run(program)[0])
    assert "positions" not in result.metadata
