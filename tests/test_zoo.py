"""Every model of the zoo, as its library ships it: captured, cleaned, and in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from zoo import ZOO, ZooEntry

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import FP32_BAR
from resplice.backends.onnx import OnnxBackend
from resplice.backends.onnx.backend import EXACT_BAR
from resplice.compare import difference
from resplice.program import Program

FIXED = ("cosmos",)  # it takes the root of a size with numpy, which has no symbolic form
DYNAMIC_IN_CORE_ML = ("llama", "bert", "vit", "wan", "allegro", "latte", "cogvideox_rotary")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_real_model_is_captured_and_agrees_in_onnxruntime(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, args, kwargs, shapes = entry()
    shapes = None if name in FIXED else shapes
    state = {key: value.clone() for key, value in model.state_dict().items()}
    program = resplice.capture(model, resplice.Sample(args, kwargs), dynamic_shapes=shapes)
    cleaned, _ = resplice.Pipeline.of("canonicalize,cse,fold,dce").run(program, check=True)
    artifact = OnnxBackend().lower(cleaned, tmp_path / "model.onnx")
    for sizes in ({}, entry.second) if shapes else ({},):
        args, kwargs = entry.inputs(seed=7, **sizes)
        expected = _tensors(model, args, kwargs)
        _agree(expected, _eager(cleaned, args, kwargs))
        _agree(expected, list(artifact.run(cleaned.call.bind(args, kwargs)).values()))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_real_model_agrees_in_core_ml(name: str, tmp_path: Path) -> None:
    """Converted, executed by the MIL interpreter, and equal to the eager model on fresh inputs."""
    entry = ZOO[name]
    model, args, kwargs, shapes = entry()
    dynamic = shapes if name in DYNAMIC_IN_CORE_ML else None
    program = resplice.capture(model, resplice.Sample(args, kwargs), dynamic_shapes=dynamic)
    options = CoremlOptions(precision="fp32")
    artifact = CoremlBackend().lower(program, tmp_path / "model.mlpackage", options)
    for sizes in ({}, entry.second) if dynamic else ({},):
        args, kwargs = entry.inputs(seed=11, **sizes)
        found = list(artifact.run(program.call.bind(args, kwargs)).values())
        _agree(_tensors(model, args, kwargs), found, FP32_BAR)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "wan", "qwen3moe"])
def test_quest_rewrites_every_linear_layer_but_the_head(name: str) -> None:
    entry = ZOO[name]
    model, args, kwargs, shapes = entry()
    sample = resplice.Sample(args, kwargs)
    program = resplice.capture(model, sample, dynamic_shapes=shapes)
    small = resplice.optimize(program, "quest{weight-bits=8}")
    (step,) = [s for s in small.report.steps if s["pass"].startswith("quest")]
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    stacks = [name for name, _ in model.named_parameters() if "experts" in name]
    rewritten = len(step["changes"][0]["sites"])
    assert rewritten == len(layers) + len(stacks) - 1  # the head, or BERT's pooler
    reasons = [refusal["reason"] for refusal in step["changes"][0]["refusals"]]
    routers = 2 if name == "qwen3moe" else 0
    assert sum("it is a router" in reason for reason in reasons) == routers
    assert sum("it is the output head" in reason for reason in reasons) == 1
    worst = max(o["relative"] for o in step["ledger"]["outputs"].values())
    assert 0 < worst < 0.2


def _tensors(
    model: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)
        ]


def _eager(
    program: Program, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            t for t in pytree.tree_leaves(program(*args, **kwargs)) if isinstance(t, torch.Tensor)
        ]


def _agree(
    expected: list[torch.Tensor], actual: list[torch.Tensor], bar: float = EXACT_BAR
) -> None:
    assert len(expected) == len(actual)
    for reference, value in zip(expected, actual, strict=True):
        found = difference(reference, value)
        assert found.finite
        assert found.relative <= bar, found


def test_entries_are_sensitive_to_their_inputs() -> None:
    """The zoo's weights make outputs depend on inputs, so agreement means something."""
    entry: ZooEntry = ZOO["llama"]
    model = entry.model()
    first, second = (_tensors(model, *entry.inputs(seed=s)) for s in (1, 2))
    assert difference(first[0], second[0]).relative > 0.1
