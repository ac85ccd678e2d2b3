"""quest on video transformers, GPT-2 and mixtures of experts, as their libraries ship them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor
from zoo import ZOO

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.change import Change
from resplice.compare import sqnr_db
from resplice.passes.quest import Quest
from resplice.pipeline import Pipeline
from resplice.program import Program

SITES = {"ltx": 26, "wan": 25, "gpt2": 8, "mixtral": 12, "qwen3moe": 12}
"""Every constant matrix or stack of the captured model, less heads and routers."""


@cache
def captured(name: str, dynamic: bool = True) -> Program:
    """The model, captured once."""
    model, args, kwargs, shapes = ZOO[name]()
    sample = resplice.Sample(args, kwargs)
    return resplice.capture(model, sample, dynamic_shapes=shapes if dynamic else None)


def quantised(name: str, item: Quest, dynamic: bool = True) -> tuple[Program, Change]:
    program, steps = Pipeline((item,)).run(captured(name, dynamic), check=True)
    (change,) = steps[-1].changes
    return program, change


def outputs(program: Program) -> list[Tensor]:
    return list(program.run_fresh(program.sample_tensors()).values())


@pytest.mark.parametrize(
    "name",
    [
        "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3moe")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ltx", "wan", "hunyuanvideo")),
    ],
)  # fmt: skip
def test_sites_and_their_errors(name: str, tmp_path: Path) -> None:
    """4 bits, 8 bits, and 8 bits of both operands with signs; per weight against theory."""
    quality = []
    for item in (
        Quest(weight_bits=4), Quest(weight_bits=8), Quest(weight_bits=8, act_bits=8, signs=True)
    ):  # fmt: skip
        program, change = quantised(name, item)
        assert change.count == SITES.get(name, change.count) > 0
        kept = {refusal.reason for refusal in change.refusals}
        assert kept <= {
            f"it is {role} (head=true includes it)" for role in ("a router", "the output head")
        }
        far = [
            s.origin.module
            for s in change.sites
            if s.metrics["theory_db"] - s.metrics["sqnr_db"] > 2
        ]
        assert len(far) <= 2
        assert all(module in " ".join(change.notes) for module in far)
        quality.append(min(map(sqnr_db, outputs(captured(name)), outputs(program))))
    assert quality[1] > quality[0] + 10
    assert quality[1] > 20
    assert quality[2] > 15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ltx", "wan", "hunyuanvideo", "gpt2", "mixtral"])
def test_both_backends(name: str, tmp_path: Path) -> None:
    """Lowering checks itself on fresh inputs, at two sizes but for Mixtral in Core ML."""
    program, _ = quantised(name, Quest(weight_bits=8, act_bits=8, signs=True))
    OnnxBackend().lower(program, tmp_path / "m.onnx", OnnxOptions(accuracy_level=0))
    packed, _ = quantised(name, Quest(weight_bits=4), dynamic=name != "mixtral")
    CoremlBackend().lower(packed, tmp_path / "m.mlpackage", CoremlOptions(precision="fp32"))
