"""rope3d: the published rotated vectors, transformers' own arithmetic bit by bit, lowerings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resplice
from resplice.capture import capture
from resplice.compare import difference
from resplice.kernels.rope3d import _LAST, rope3d
from resplice.ops import find_op
from resplice.passes.videorope import lta_map, sectioned_map
from resplice.program import Program

VECTORS = json.loads((Path(__file__).parent / "data/videorope_rotated_qk.json").read_text())


def ladder(angles: int, base: float = 1e4) -> Tensor:
    return 1.0 / base ** (torch.arange(0, 2 * angles, 2, dtype=torch.float32) / (2 * angles))


@pytest.mark.parametrize("number", range(len(VECTORS)))
@pytest.mark.parametrize(("kind", "make"), [("videorope", lta_map), ("m_rope", sectioned_map)])
def test_vectors_reproduce(number: int, kind: str, make: Any) -> None:
    case = VECTORS[number]
    q, k = torch.tensor(case["q"]), torch.tensor(case["k"])
    expected = case[kind]
    positions = torch.tensor(expected["position_ids"], dtype=torch.float32).reshape(3, 1, -1)
    inv_freq, rows = ladder(q.shape[-1] // 2, case["theta"]), make(case["section"])
    turned = [rope3d(x, positions, inv_freq, rows) for x in (q, k)]
    for found, name in zip(turned, ("q_rot", "k_rot"), strict=True):
        assert float((found - torch.tensor(expected[name])).abs().max()) <= 1e-5
    groups = q.shape[1] // k.shape[1]
    logits = turned[0] @ turned[1].repeat_interleave(groups, 1).mT
    theirs = torch.tensor(expected["logits"])
    close = [logits, logits / q.shape[-1] ** 0.5]
    assert min(float((x - theirs).abs().max()) for x in close) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_transformers_arithmetic_bit_by_bit(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 9, 16).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    ids, inv_freq = torch.randint(0, 5000, (2, 9)), ladder(8)
    angles = torch.cat((ids[..., None].float() * inv_freq,) * 2, -1)
    expected = apply_rotary_pos_emb(q, k, angles.cos().to(dtype), angles.sin().to(dtype))
    for rows in (ids[None], ids.expand(3, -1, -1).contiguous(), ids.expand(3, -1, -1).float()):
        for x, wanted in zip((q, k), expected, strict=True):
            axis_map = [0] * 8 if len(rows) == 1 else list(lta_map((2, 3, 3)))
            assert torch.equal(rope3d(x, rows, inv_freq, axis_map), wanted)
            assert torch.equal(rope3d.reference(x, rows, inv_freq, axis_map), wanted)


def test_tables_are_made_once_and_never_stale() -> None:
    x, inv_freq = torch.randn(1, 1, 4, 8), ladder(4)
    positions = torch.arange(12.0).reshape(3, 1, 4)
    args = (inv_freq, [1, 2, 0, 0])
    first = rope3d(x, positions, *args)
    kept = _LAST._value
    assert torch.equal(rope3d(x, positions, *args), first)
    assert _LAST._value is kept, "the same positions: the same tables"
    assert torch.equal(rope3d(x, positions, *args, 2.0), 2 * first)
    positions += 1
    moved = rope3d(x, positions, *args)
    assert not torch.equal(moved, first)
    assert torch.equal(moved, rope3d.reference(x, positions, *args))
    del positions
    assert _LAST._value is None, "nothing is kept for positions that are gone"
    with torch.inference_mode():
        inner = torch.arange(12.0).reshape(3, 1, 4)
        assert torch.equal(rope3d(x, inner, *args), first)


def test_equal_distances_give_equal_scores() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    inv_freq, rows = ladder(8).double(), list(lta_map((2, 3, 3)))

    def score(at: Tensor, to: Tensor) -> float:
        a, b = (rope3d(x, p.reshape(3, 1, 1), inv_freq, rows) for x, p in ((q, at), (k, to)))
        return float((a * b).sum())

    at, to, shift = torch.randn(3, 3, dtype=torch.float64) * 50
    assert score(at, to) == pytest.approx(score(at + shift, to + shift), rel=1e-9)


class Layers(nn.Module):
    """Two layers' queries and keys over one set of positions."""

    def __init__(self, *options: Any) -> None:
        super().__init__()
        self.register_buffer("inv_freq", ladder(8))
        self.options = options

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Rotated."""
        rows = list(lta_map((2, 3, 3)))
        return tuple(
            rope3d(x, positions, self.inv_freq, rows, *self.options) for x in (q, k, q * 2, k * 2)
        )


def layers(*options: Any, whole: bool = False, dynamic: bool = True) -> tuple[Program, Any]:
    def inputs(tokens: int) -> tuple[Tensor, ...]:
        positions = torch.randint(-30, 900, (3, 2, tokens)) / (1 if whole else 2)
        positions = positions.long() if whole else positions
        return torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16), positions

    axes = {"q": {2: "s"}, "k": {2: "s"}, "positions": {2: "s"}} if dynamic else None
    program = capture(Layers(*options), inputs(7), dynamic_shapes=axes)
    return program, inputs(11 if dynamic else 7)


@pytest.mark.parametrize("options", [(), (1.25, True, -2)], ids=["halves", "pairs"])
@pytest.mark.parametrize("whole", [False, True], ids=["fractions", "whole"])
def test_onnx_with_negative_positions(options: Any, whole: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    program, (q, k, positions) = layers(*options, whole=whole)
    assert int(positions.min()) < 0
    artifact = onnx.OnnxBackend().lower(program, tmp_path / "m.onnx")
    assert artifact.notes["main"]["ops"] == {"rope3d: lowered": 4}
    found = artifact.run({"q": q, "k": k, "positions": positions}).values()
    for a, b in zip(program(q, k, positions), found, strict=True):
        assert difference(a, b).relative <= artifact.bar
    nodes = [node.op_type for node in __import__("onnx").load(tmp_path / "m.onnx").graph.node]
    assert (nodes.count("Cos"), nodes.count("Sin")) == (1, 1), "tables are shared by the layers"


@pytest.mark.parametrize("options", [(), (1.25, True, -2)], ids=["halves", "pairs"])
def test_core_ml_with_negative_positions(options: Any, tmp_path: Path) -> None:
    coreml = pytest.importorskip("resplice.backends.coreml")
    program, (q, k, positions) = layers(*options)
    for precision, bar in (("fp32", 2e-5), ("fp16", 5e-3)):
        artifact = coreml.CoremlBackend().lower(
            program, tmp_path / f"{precision}.mlpackage", coreml.CoremlOptions(precision=precision)
        )
        found = artifact.run({"q": q, "k": k, "positions": positions}).values()
        for a, b in zip(program(q, k, positions), found, strict=True):
            assert difference(a, b).relative <= min(bar, artifact.bar)


def test_a_program_with_the_op_is_saved_and_trained(tmp_path: Path) -> None:
    program, (q, k, positions) = layers()
    again = resplice.load(resplice.save(program, tmp_path / "m.pt2"))
    assert sum(find_op(n.target) is rope3d for n in again.graph.nodes) == 4
    for a, b in zip(program(q, k, positions), again(q, k, positions), strict=True):
        assert torch.equal(a, b)
    q.requires_grad_()
    program(q, k, positions)[0].square().sum().backward()
    assert q.grad is not None
    assert torch.allclose(q.grad, 2 * q.detach(), atol=1e-5), "a rotation keeps lengths"
