"""The engine carries what the techniques need: inputs, axes, weights, data, functions, training."""

from __future__ import annotations

import weakref
from itertools import permutations
from pathlib import Path

import pytest
import torch
from conftest import Mlp
from engine_passes import (
    AddInput,
    AddScale,
    FullRows,
    HalveRows,
    RoundWeights,
    ScaleToUnit,
    Shifted,
    TwoFunctions,
)
from torch import nn

import resplice
from resplice.backends.onnx import OnnxBackend
from resplice.context import Context
from resplice.errors import CompositionError, InputError
from resplice.pass_base import Pass
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.verify import verify


def _run(program: Program, *passes: Pass, **settings: object) -> Program:
    return Pipeline.of(passes).run(program, Context(**settings))[0]  # type: ignore[arg-type]


def test_a_pass_adds_a_model_input(program: Program, mlp: nn.Module) -> None:
    shifted = _run(program, AddInput())
    x, offset = torch.randn(8, 32), torch.randn(8, 32)
    torch.testing.assert_close(shifted(x, offset=offset), mlp(x + offset))
    assert [str(port) for port in shifted.inputs] == [
        "x: f32[2*pairs,32]",
        "offset: f32[2*pairs,32]",
    ]
    assert shifted.facts.get(Shifted).input == "offset"
    with pytest.raises(InputError, match="input offset is missing"):
        shifted(x)
    with pytest.raises(InputError, match=r"size 6 on axis 0, expected 2\*pairs"):
        shifted(x, offset=offset[:6])


def test_an_added_input_survives_saving_and_onnx(
    program: Program, mlp: nn.Module, tmp_path: Path
) -> None:
    shifted = _run(program, AddInput())
    loaded = resplice.load(resplice.save(shifted, tmp_path / "shifted.pt2"))
    x, offset = torch.randn(6, 32), torch.randn(6, 32)
    torch.testing.assert_close(loaded(x, offset=offset), mlp(x + offset))
    artifact = OnnxBackend().lower(shifted, tmp_path / "shifted.onnx")
    outputs = artifact.run({"x": x, "offset": offset})
    torch.testing.assert_close(outputs["output"], mlp(x + offset))


def test_an_axis_changes_length_and_everything_downstream_follows(
    program: Program, mlp: nn.Module
) -> None:
    halved = _run(program, HalveRows())
    verify(halved)
    inner = [
        halved.shape(n)[0] for n in halved.graph.nodes if n.target is torch.ops.aten.silu.default
    ]
    assert inner == ["pairs", "pairs"]
    assert halved.outputs == program.outputs
    x = torch.randn(6, 32)
    expected = x
    for layer in mlp.layers:  # type: ignore[union-attr]
        pairs = expected.view(3, 2, 32).mean(1)
        gated = nn.functional.silu(layer["gate"](pairs)) * layer["up"](pairs)  # type: ignore[index]
        expected = expected + layer["down"](gated).repeat_interleave(2, 0)  # type: ignore[index]
    expected = mlp.head(mlp.norm(expected))  # type: ignore[operator]
    torch.testing.assert_close(halved(x), expected)


def test_weights_are_replaced_without_holding_two_copies(mlp: nn.Module) -> None:
    program = resplice.capture(mlp, (torch.randn(4, 32),))
    storages = [
        weakref.ref(layer.weight) for layer in mlp.modules() if isinstance(layer, nn.Linear)
    ]
    live_at_rewrite: list[int] = []
    original_weight = Program.weight

    def counting(self: Program, name: object) -> torch.Tensor:
        old = sum(
            not n.endswith(("_rounded", "bias")) and "norm" not in n
            for n, _ in self.named_weights()
        )
        live_at_rewrite.append(old)
        return original_weight(self, name)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "weight", counting)
        draft = program.copy()
        del program
        RoundWeights().run(draft, Context())
    assert live_at_rewrite[-1] < live_at_rewrite[0]
    assert sorted(set(live_at_rewrite), reverse=True) == list(range(len(storages), 0, -1))
    assert all(
        name.endswith(("_rounded", "bias")) or "norm" in name for name, _ in draft.named_weights()
    )


@torch.no_grad()
def test_calibration_flows_through_the_already_rewritten_part(
    program: Program, mlp: nn.Module
) -> None:
    batches = [{"x": torch.randn(16, 32)} for _ in range(3)]
    scaled, steps = Pipeline.of([ScaleToUnit()]).run(program, Context(calibration=batches))
    x = torch.cat([batch["x"] for batch in batches])
    gains = [site.metrics["gain"] for site in steps[-1].changes[0].sites]
    for layer, gain in zip(mlp.layers, gains, strict=True):  # type: ignore[arg-type]
        update = layer["down"](nn.functional.silu(layer["gate"](x)) * layer["up"](x)) * gain
        assert float(update.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-4)
        x = x + update
    torch.testing.assert_close(
        scaled(batches[0]["x"]), mlp.head(mlp.norm(x[:16])), rtol=1e-4, atol=1e-4
    )  # type: ignore[operator]


def test_calibration_holds_one_layer_however_deep_the_model() -> None:
    program = resplice.capture(Mlp(layers=6).eval(), (torch.randn(4, 32),))
    context = Context(calibration=[{"x": torch.randn(4, 32)}])
    _, steps = Pipeline.of([ScaleToUnit()]).run(program, context)
    held = [site.metrics["live"] for site in steps[-1].changes[0].sites]
    assert len(held) == 6
    assert len(set(held[1:])) == 1, held


def test_two_functions_share_one_set_of_weights(
    program: Program, mlp: nn.Module, tmp_path: Path
) -> None:
    both = _run(program, TwoFunctions(), RoundWeights())
    negated = both.functions["negated"]
    for name, value in both.named_weights():
        assert value.data_ptr() == negated.weight(name).data_ptr()
    x = torch.randn(6, 32)
    torch.testing.assert_close(negated(x), -both(x))
    one = resplice.save(_run(program, RoundWeights()), tmp_path / "one.pt2").stat().st_size
    path = resplice.save(both, tmp_path / "both.pt2")
    weight_bytes = sum(t.numel() * t.element_size() for _, t in both.named_weights())
    assert path.stat().st_size - one < weight_bytes, "the second function stored the weights again"
    loaded = resplice.load(path)
    torch.testing.assert_close(loaded.functions["negated"](x), -both(x))
    assert loaded.weight("head.weight_rounded") is not None


def test_two_functions_become_one_onnx_artefact(program: Program, tmp_path: Path) -> None:
    from resplice.backends.onnx import OnnxOptions

    both = _run(program, TwoFunctions())
    artifact = OnnxBackend().lower(both, tmp_path / "both.onnx", OnnxOptions(external_above=1024))
    x = torch.randn(6, 32)
    torch.testing.assert_close(artifact.run({"x": x}, function="negated")["output"], -both(x))
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(files) == {"both.onnx", "both.onnx.data", "both.negated.onnx"}
    assert files["both.negated.onnx"] < files["both.onnx.data"]


def test_a_rewritten_program_trains_and_the_callers_model_does_not(mlp: nn.Module) -> None:
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    tuned = resplice.optimize(mlp, [AddScale()], example_inputs=(torch.randn(8, 32),))
    assert not any(p.requires_grad for n, p in tuned.named_parameters() if "scale" not in n)
    tuned.trainable("scale.*", "*head*")
    x, target = torch.randn(8, 32), torch.randn(8, 10)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(tuned(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert float(tuned.program.weight("scale.0").detach()) != 1.0
    assert all(torch.equal(before[name], value) for name, value in mlp.state_dict().items())
    assert all(p.requires_grad for p in mlp.parameters())


PASSES: dict[str, Pass] = {
    "input": AddInput(),
    "axis": HalveRows(),
    "weights": RoundWeights(),
    "data": ScaleToUnit(),
    "functions": TwoFunctions(),
    "training": AddScale(),
}


@pytest.mark.parametrize(("first", "second"), list(permutations(PASSES, 2)))
def test_any_two_compose_or_are_refused_with_the_broken_fact(
    first: str, second: str, program: Program
) -> None:
    batch = {"x": torch.randn(4, 32), "offset": torch.zeros(4, 32)}
    pipeline = Pipeline.of([PASSES[first], PASSES[second]])
    if (first, second) == ("weights", "data"):
        with pytest.raises(CompositionError) as refused:
            pipeline.run(program)
        assert (
            'scale-to-unit needs "weights are float constants", which round-weights broke'
            in str(refused.value)
        )
        assert "a legal order is canonicalize,scale-to-unit,round-weights" in str(refused.value)
        return
    result, _ = pipeline.run(program, Context(calibration=[batch]))
    for name, function in result.all_functions():
        inputs = {n.name: batch[n.name] for n in function.placeholders}
        (output,) = function.run(inputs)
        assert output.shape == (4, 10), name
        assert output.isfinite().all()


def test_a_needed_fact_that_never_held_is_named(program: Program) -> None:
    class NeedsRows(HalveRows):
        name = "needs-rows"
        needs = (FullRows,)
        destroys = ()

    with pytest.raises(CompositionError, match="which does not hold for this model"):
        Pipeline.of([NeedsRows()]).run(program)
