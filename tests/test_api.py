"""The Python face: optimize, Optimized, checks that hold passes to their word, the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import resplice
from resplice.change import Change
from resplice.context import Context
from resplice.errors import NumericsError, PassError, UsageError
from resplice.pass_base import Approx, Meaning, Pass
from resplice.program import Program
from resplice.rules import replace_node

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Spoil(Pass):
    """Adds an error to the first silu, whatever it declares."""

    name = "spoil"
    amount: float = 0.1
    declared: str = "exact"

    @property
    def meaning(self) -> Meaning:
        return Approx(20.0) if self.declared == "approx" else super().meaning

    def run(self, program: Program, context: Context) -> Change:
        from resplice.build import Builder
        from resplice.change import Site
        from resplice.origin import origin

        node = next(n for n in program.graph.nodes if n.target is ATEN.silu.default)
        build = Builder(program, node.next, self.name)
        if self.declared == "crash":
            raise KeyError("oops")
        wrong = build(ATEN.add.Tensor, node, self.amount)
        node.replace_all_uses_with(wrong, lambda user: user is not wrong)
        if self.declared == "shape":
            program.graph.output_node().args = ((node,),)
        site = Site(wrong.name, origin(wrong), metrics={"sqnr_db": 10.0})
        return Change(sites=[site])


def test_optimize_is_called_like_the_original(mlp: nn.Module) -> None:
    before = {k: v.clone() for k, v in mlp.state_dict().items()}
    small = resplice.optimize(mlp, "quest{weight-bits=8}", example_inputs=(torch.randn(4, 32),))
    x = torch.randn(4, 32)
    assert (small(x) - mlp(x)).abs().max() < 0.02 * mlp(x).abs().max()
    assert (small(x) - mlp(x)).abs().max() > 0
    assert all(torch.equal(before[k], v) for k, v in mlp.state_dict().items())
    assert "resplice.quant_linear" in str(small)


def test_passes_may_be_text_objects_or_a_mix(mlp: nn.Module) -> None:
    from resplice.passes.quest import Quest

    x = (torch.randn(4, 32),)
    results = [
        resplice.optimize(mlp, passes, example_inputs=x)(*x)
        for passes in (
            "cse,quest{weight-bits=4}",
            ["cse", Quest()],
            [*resplice.parse("cse"), Quest()],
        )
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    only_captured = resplice.optimize(mlp, example_inputs=x)
    assert torch.equal(only_captured(*x), mlp(*x))


def test_a_module_needs_inputs(mlp: nn.Module) -> None:
    with pytest.raises(UsageError, match="needs example_inputs"):
        resplice.optimize(mlp, "quest")


def test_an_exact_pass_that_is_not_is_caught_and_located(program: Program) -> None:
    with pytest.raises(
        NumericsError, match="spoil declares itself exact but moved the output"
    ) as caught:
        resplice.optimize(program, [Spoil()])
    assert "first at" in caught.value.where
    assert "conftest.py" in caught.value.where
    assert caught.value.measured > caught.value.bar
    resplice.optimize(program, [Spoil()], check=False)


def test_an_approximate_pass_is_held_to_its_bar(program: Program) -> None:
    with pytest.raises(NumericsError, match="spoil lost too much at one site"):
        resplice.optimize(program, [Spoil(declared="approx")])


def test_infinite_outputs_are_caught(program: Program) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        resplice.optimize(program, [Spoil(amount=float("nan"))])


def test_a_changed_signature_is_refused_unless_declared(program: Program) -> None:
    with pytest.raises(PassError, match="outputs changed from"):
        resplice.optimize(program, [Spoil(declared="shape")])


def test_a_crashing_pass_is_named_with_those_before_it(program: Program) -> None:
    with pytest.raises(PassError, match=r"pass spoil \(after cse\): KeyError: 'oops'") as caught:
        resplice.optimize(program, ["cse", Spoil(declared="crash")])
    assert caught.value.ran == ("cse",)


def test_calibration_is_checked_against_the_signature(program: Program) -> None:
    with pytest.raises(resplice.InputError, match="size 33 on axis 1"):
        resplice.optimize(program, "quest", calibration=[(torch.randn(4, 33),)])


def test_the_mode_is_part_of_the_graph(mlp: nn.Module) -> None:
    small = resplice.optimize(mlp, example_inputs=(torch.randn(4, 32),))
    small.eval()
    with pytest.raises(UsageError, match="captured in eval mode"):
        small.train()


def test_lowering_by_name_and_unknown_options(program: Program, tmp_path: Path) -> None:
    small = resplice.optimize(program, "quest")
    artifact = small.to("onnx", tmp_path / "model.onnx", portable=True)
    assert artifact.path.exists()
    with pytest.raises(UsageError, match="unexpected keyword argument"):
        small.to_onnx(tmp_path / "other.onnx", portabel=True)
    with pytest.raises(UsageError, match="there is no backend 'tflite'"):
        small.lower("tflite", tmp_path / "x")


def test_the_report_tells_everything(program: Program, tmp_path: Path) -> None:
    small = resplice.optimize(program, "quest{weight-bits=4}")
    small.to_onnx(tmp_path / "model.onnx")
    small.report.measure("perplexity", 12.5, model="tiny")
    page = small.report.save(tmp_path / "report")
    assert page.name == "report.html"
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["schema"] == "resplice-report/1"
    assert data["pipeline"] == "canonicalize,quest"
    assert data["after"]["weight_bytes"] < 0.3 * data["before"]["weight_bytes"]
    assert data["after"]["parameters"] == data["before"]["parameters"]
    quest = data["steps"][-1]
    assert len(quest["changes"][0]["sites"]) == 6
    assert "it is the output head" in quest["changes"][0]["refusals"][0]["reason"]
    assert quest["ledger"]["outputs"]["output"]["sqnr_db"] > 10
    rewritten = {n["node"] for n in quest["ledger"]["nodes"] if n["rewritten_by"] == "quest"}
    assert {s["node"] for s in quest["changes"][0]["sites"]} <= rewritten
    (artifact,) = data["artifacts"]
    assert len(artifact["sha256"]) == 64
    assert artifact["notes"]["check"]["main"]["output"]["finite"]
    assert data["measurements"][0]["detail"] == {"model": "tiny"}


def test_replace_node_keeps_the_name(program: Program) -> None:
    from resplice.build import Builder

    draft = program.copy()
    node = next(n for n in draft.graph.nodes if n.target is ATEN.silu.default)
    name = node.name
    new = Builder(draft, node)(ATEN.gelu.default, node.args[0])
    replace_node(draft, node, new)
    assert new.name == name
    assert any(n.target is ATEN.silu.default for n in program.graph.nodes)
