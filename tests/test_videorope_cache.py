"""videorope with key/value caches, in artefacts, in the report, and trained."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rope_models import LTA, WIDTH, eager_videorope, language_model, run_eager
from test_videorope import GRIDS, LAYOUT, built, captured, inputs_of, rewritten_call
from torch import Tensor

import resplice
from resplice.compare import difference
from resplice.passes.videorope import build_position_ids, decode_positions
from resplice.pipeline import Pipeline
from resplice.program import Program

STEPS = 8


def rewrite(program: Program) -> Program:
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    return result


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_prefill_and_eight_steps_equal_one_forward(family: str) -> None:
    model = language_model(family)
    total = len(LAYOUT[0]) + STEPS
    embeds = torch.randn(2, total, WIDTH)
    prompt, first = built(), len(LAYOUT[0])
    _, delta = build_position_ids(torch.tensor(LAYOUT), GRIDS)
    whole = torch.cat((prompt, decode_positions(delta, first, STEPS)), -1)
    eager = eager_videorope(model, LTA[family])
    ids = {} if family == "llama" else {"position_ids": whole.long()}
    common = {"inputs_embeds": embeds, "use_cache": False, **ids}
    expected = run_eager(eager, whole, **common).last_hidden_state

    def inputs(start: int, stop: int) -> dict[str, Any]:
        own = {} if family == "llama" else {"position_ids": whole[..., start:stop].long()}
        return {"inputs_embeds": embeds[:, start:stop], "use_cache": True, **own}

    def run(program: Program, start: int, stop: int, **more: Any) -> Any:
        given = {**inputs(start, stop), **more}
        given[program.metadata["positions"]["input"]] = whole[..., start:stop].to(
            torch.float32 if family == "llama" else torch.int64
        )
        return program(**given)

    prefill = rewrite(resplice.capture(model, inputs(0, first), check=False))
    out = run(prefill, 0, first)
    cached = [f"past_key_values_{kind}_cache_{i}" for kind in ("key", "value") for i in (0, 1)]
    sample = {**inputs(first, first + 1), "past_key_values": out.past_key_values}
    decode = rewrite(
        resplice.capture(
            model, sample, dynamic_shapes={name: {2: "past"} for name in cached}, check=False
        )
    )
    hidden, past = [out.last_hidden_state], run(prefill, 0, first).past_key_values
    for step in range(first, total):
        out = run(decode, step, step + 1, past_key_values=past)
        hidden.append(out.last_hidden_state)
        past = out.past_key_values
    assert past.layers[0].keys.shape[2] == total
    found = torch.cat(hidden, 1)
    assert difference(expected, found).relative <= 1e-5
    wrong = whole.clone()
    wrong[..., first:] += 1
    shifted = run_eager(eager, wrong, **common).last_hidden_state
    assert difference(expected, shifted).relative > 1e-3, "nothing to see"


# ---- artefacts ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2.5"])
def test_onnx_and_core_ml_with_negative_positions(family: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    coreml = pytest.importorskip("resplice.backends.coreml")
    positions = built()
    assert float(positions.min()) < 0
    inputs = inputs_of(family, torch.tensor(LAYOUT), positions.long())
    shapes = {"inputs_embeds": {0: "b", 1: "s"}, "position_ids": {1: "b", 2: "s"}}
    if family == "llama":  # without a mask, transformers looks for packed sequences
        del inputs["position_ids"], shapes["position_ids"]
        inputs["attention_mask"] = torch.ones(2, len(LAYOUT[0]), dtype=torch.int64)
        shapes["attention_mask"] = {0: "b", 1: "s"}
    program = rewrite(
        resplice.capture(language_model(family), inputs, dynamic_shapes=shapes, check=False)
    )
    expected = rewritten_call(program, inputs, positions)
    feed = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if family == "llama":
        feed["rope_positions"] = positions
    artifact = onnx.OnnxBackend().lower(program, tmp_path / "m.onnx")
    assert artifact.metadata["notes"]["positions"]["semantics"] == "videorope{delta=2}"
    (found,) = artifact.run(feed).values()
    assert difference(expected, found).relative <= artifact.bar
    options = coreml.CoremlOptions(precision="fp32")
    package = coreml.CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    (found,) = package.run(feed).values()
    assert difference(expected, found).relative <= package.bar
    wrong = built(scheme="mrope")
    name = program.metadata["positions"]["input"]
    if family == "llama":
        with pytest.raises(resplice.InputError, match="holds positions of mrope"):
            package.run({**feed, name: wrong})


# ---- explain and report --------------------------------------------------------------------


def test_the_report_shows_axis_maps_and_the_temporal_band(tmp_path: Path) -> None:
    _, program = captured("qwen2.5")
    done = resplice.optimize(program, "videorope")
    done.report.save(tmp_path / "report")
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    metrics = next(
        site["metrics"] for step in data["steps"] for change in step["changes"]
        for site in change["sites"]
    )  # fmt: skip
    assert metrics["axis_map_before"] == [0, 1, 1, 2]
    assert metrics["axis_map_after"] == list(LTA["qwen2.5"])
    before, after = metrics["oscillation"]
    assert before["extrema"] > 100 > after["extrema"]
    assert before["variation"] > 10 * after["variation"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Rotary sites" in page
    assert html.escape(metrics["summary"]) in page
    assert "score of the temporal band" in page


def test_explain_prints_the_axis_maps() -> None:
    from resplice.cli.inspect import _explanation

    _, program = captured("qwen2.5")
    result, steps = Pipeline.of("videorope").run(program)
    text = _explanation(steps, program, result)
    assert "t1 h2 w1 -> h1 w1 h1 t1; temporal band over 1000 frames: extrema" in text
    assert "build_position_ids(token_types, grids, scheme='videorope')" in text


# ---- fine-tuning ---------------------------------------------------------------------------


def test_a_rewritten_program_trains() -> None:
    _, program = captured("qwen2.5")
    tuned = resplice.optimize(program, "videorope").trainable("*q_proj*", "*k_proj*")
    positions = built()
    inputs = inputs_of("qwen2.5", torch.tensor(LAYOUT), positions.long())
    target = torch.randn(2, len(LAYOUT[0]), WIDTH)

    def loss() -> Tensor:
        return torch.nn.functional.mse_loss(tuned(**inputs).last_hidden_state, target)

    before = loss()
    weights = [p for p in tuned.parameters() if p.requires_grad]
    assert weights
    optimiser = torch.optim.SGD(weights, lr=1e-4)
    before.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in weights)
    optimiser.step()
    assert float(loss()) < float(before)
