"""How far a program that rounds is from itself, and what a check makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import resplice
from resplice import weights
from resplice.backends.onnx import OnnxBackend
from resplice.backends.onnx.artifact import OnnxArtifact
from resplice.cases import fresh_cases
from resplice.cli.app import run
from resplice.compare import Difference
from resplice.errors import NumericsError
from resplice.passes.quest import Quest
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.saving import save
from resplice.sensitivity import past_bar, rounds, sensitivity


def deep(layers: int = 24, gain: float = 2.0) -> Program:
    """A stack that, with a gain over 1, magnifies what one level of one value makes of it."""
    torch.manual_seed(1)
    blocks = [layer for _ in range(layers) for layer in (nn.Linear(128, 128), nn.Tanh())]
    for layer in blocks[::2]:
        nn.init.orthogonal_(layer.weight, gain=gain)
    model = nn.Sequential(*blocks).eval()
    return resplice.capture(model, resplice.Sample((torch.randn(2048, 128),)))


def quantised(program: Program, bits: int) -> Program:
    item = Quest(weight_bits=bits, act_bits=bits, head=True)
    return Pipeline((item,)).run(program)[0]


def test_only_rounding_is_disturbed() -> None:
    program = deep()
    (case,) = fresh_cases(program)
    assert not rounds(program)
    assert sensitivity(program, case, 1e-3) == {"output": 0.0}
    assert rounds(quantised(program, 8))
    assert not rounds(Pipeline((Quest(weight_bits=4),)).run(program)[0])


def test_a_last_bit_is_carried_on_by_few_levels() -> None:
    """A disturbance far below a level changes results by far more than itself, and never less."""
    program = deep()
    (case,) = fresh_cases(program)
    small, large = (sensitivity(quantised(program, 4), case, n)["output"] for n in (1e-6, 1e-4))
    assert 1e-3 < small < large < 1
    assert sensitivity(quantised(program, 4), case, 0.0)["output"] == 0


def test_a_deep_model_of_rounded_activations_becomes_an_artefact(tmp_path: Path) -> None:
    """Its outputs are further from the program's than 1e-4, as the program's are from its own."""
    program = quantised(deep(), 4)
    artifact = OnnxBackend().lower(program, tmp_path / "m.onnx")
    found = artifact.notes["check"]["main"]["output"]
    assert found.rms > artifact.bar
    assert OnnxArtifact.open(tmp_path / "m.onnx").check(program, fresh_cases(program, seed=9))
    pair = [str(save(program, tmp_path / "m.pt2")), str(tmp_path / "m.onnx")]
    assert run(["check", *pair]) == 0
    assert run(["check", *pair, "--bar", "1e-4"]) == 6


@pytest.mark.parametrize("layer", [3, 11, 23])
def test_a_wrong_scale_is_still_refused(layer: int, tmp_path: Path) -> None:
    program = quantised(deep(gain=1.0), 8)
    artifact = OnnxBackend().lower(program, tmp_path / "m.onnx")
    wrong = program.copy()
    name = f"{2 * layer}.weight_step"
    weights.put(wrong.module, name, wrong.weight(name) * 1.3)
    with pytest.raises(NumericsError, match="differs from the program"):
        artifact.check(wrong, fresh_cases(wrong))


def test_without_rounding_the_bar_stays() -> None:
    program = deep(2)
    found = {"tanh_1": Difference(60.0, 0.002, 0.002)}
    cases = fresh_cases(program)
    assert list(past_bar(found, 1e-4, lambda d: d.relative, program, cases)) == [
        ("tanh_1", 0.002, 1e-4)
    ]
    assert not list(past_bar(found, 1e-2, lambda d: d.relative, None, cases))
    lost = {"tanh_1": Difference(-float("inf"), float("inf"), float("inf"), finite=False)}
    assert list(past_bar(lost, float("inf"), lambda d: d.relative, None, cases))
