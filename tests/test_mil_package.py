"""Loading packages, what they declare, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mil_models
import numpy as np
import pytest
import torch
from mil_models import mb

from resplice.backends.coreml.mil import plan
from resplice.backends.coreml.mil.constants import decodable
from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent
from resplice.errors import InputError, LoweringError, UsageError


def _flexible(shape: Any) -> MilPackage:
    body = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    with silent():
        traced = torch.jit.trace(body, torch.zeros(2, 3))
        model = ct.convert(
            traced,
            inputs=[ct.TensorType(name="x", shape=shape)],
            outputs=[ct.TensorType(name="y")],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
    return MilPackage.open(model.package_path)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> MilPackage:
    built = mil_models.model(lambda x: mb.relu(x=x, name="y"), (2, 3))
    built.user_defined_metadata["resplice.pipeline"] = "fold"
    return MilPackage.open(mil_models.saved(built, tmp_path_factory.mktemp("simple")))


def test_what_a_package_declares(simple: MilPackage) -> None:
    assert simple.functions == ("main",)
    assert simple.default == "main"
    assert simple.metadata["resplice.pipeline"] == "fold"
    (given,), (result,) = simple.inputs("main"), simple.outputs("main")
    assert (given.name, given.dtype, given.shape) == ("x0", torch.float32, (2, 3))
    assert (result.name, result.dtype, result.shape) == ("y", torch.float32, (2, 3))
    assert simple.states() == ()


def test_a_range_of_shapes() -> None:
    package = _flexible((ct.RangeDim(1, 4, default=2), 3))
    (given,) = package.inputs()
    assert given.ranges == ((1, 4), (3, 3))
    interpreter = Interpreter(package)
    for rows in (1, 4):
        assert interpreter.run({"x": torch.randn(rows, 3)})["y"].shape == (rows, 2)
    with pytest.raises(InputError, match=r"shape \[5, 3\], declared is \[1\.\.4, 3\]"):
        interpreter.run({"x": torch.randn(5, 3)})


def test_enumerated_shapes() -> None:
    package = _flexible(ct.EnumeratedShapes(shapes=[(2, 3), (5, 3)]))
    interpreter = Interpreter(package)
    assert interpreter.run({"x": torch.randn(5, 3)})["y"].shape == (5, 2)
    with pytest.raises(InputError, match=r"declared is \[2, 3\] or \[5, 3\]"):
        interpreter.run({"x": torch.randn(4, 3)})


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "input x0 is missing"),
        ({"x0": torch.zeros(2, 3), "z": torch.zeros(1)}, "input z is unknown"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, "is int32, declared is float32"),
        ({"x0": torch.zeros(3, 2)}, r"shape \[3, 2\], declared is \[2, 3\]"),
    ],
)
def test_wrong_inputs_are_refused(simple: MilPackage, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Interpreter(simple).run(inputs)


def test_every_core_op_is_known() -> None:
    with silent():
        from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
    pseudo = {"const", "_const_symbolic"}
    known = {name for name in SSAOpRegistry.core_ops if plan.find(name) or decodable(name)}
    assert set(SSAOpRegistry.core_ops) - known == pseudo


def test_a_classifier_returns_probabilities_and_the_position_of_the_label() -> None:
    labels = ct.ClassifierConfig(["a", "b", "c"], predicted_probabilities_output="p")
    built = mil_models.model(
        lambda x: mb.softmax(x=x, axis=-1, name="p"), (1, 3), classifier_config=labels
    )
    package = MilPackage.open(built.package_path)
    found = list(Interpreter(package).run({"x0": torch.tensor([[0.0, 2.0, 1.0]])}).values())
    assert found[0].item() == 1
    torch.testing.assert_close(found[1], torch.softmax(torch.tensor([0.0, 2.0, 1.0]), 0))


def test_an_image_is_a_tensor_of_pixels() -> None:
    with silent():
        traced = torch.jit.trace(torch.nn.Conv2d(3, 2, 3).eval(), torch.zeros(1, 3, 8, 8))
        built = ct.convert(
            traced,
            inputs=[ct.ImageType(name="x", shape=(1, 3, 8, 8), scale=0.5)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            outputs=[ct.TensorType(name="y", dtype=np.float32)],
            skip_model_load=True,
        )
    package = MilPackage.open(built.package_path)
    (given,) = package.inputs()
    assert (given.shape, given.dtype) == ((1, 3, 8, 8), torch.float32)
    x = torch.randint(0, 255, (1, 3, 8, 8)).float()
    with torch.no_grad():
        torch.testing.assert_close(Interpreter(package).run({"x": x})["y"], traced(x * 0.5))


def test_a_wrong_function_is_refused(simple: MilPackage) -> None:
    with pytest.raises(UsageError, match="no function 'other'"):
        Interpreter(simple, "other")


def test_unknown_ops_are_all_named_before_anything_runs(monkeypatch: Any) -> None:
    built = mil_models.model(lambda x: mb.sin(x=mb.cos(x=mb.relu(x=x))), (2,))
    package = MilPackage.open(built.package_path)
    known = plan.find
    monkeypatch.setattr(plan, "find", lambda n: None if n in {"sin", "cos"} else known(n))
    with pytest.raises(LoweringError) as caught:
        Interpreter(package)
    assert [line.split()[1] for line in caught.value.problems] == ["cos", "sin"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        MilPackage.open(tmp_path / "nothing.mlpackage")


def test_an_empty_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(UsageError, match="can't be read"):
        MilPackage.open(tmp_path / "empty.mlpackage")


def test_an_old_model_is_refused(tmp_path: Path) -> None:
    with silent():
        program = mb.program(input_specs=[mb.TensorSpec((2, 3))])(lambda x: mb.relu(x=x))
        old = ct.convert(program, convert_to="neuralnetwork", skip_model_load=True)
        old.save(str(tmp_path / "old.mlmodel"))
    with pytest.raises(UsageError, match="not an mlprogram"):
        MilPackage.open(tmp_path / "old.mlmodel")


def test_memory_of_values_is_freed_after_their_last_use() -> None:
    def build(x: Any) -> Any:
        for _ in range(6):
            x = mb.sin(x=mb.add(x=x, y=1.0))
        return x

    built = mil_models.model(build, (4,))
    package = MilPackage.open(built.package_path)
    planned = plan.plan(package.program.functions["main"], package.constants, "declared")
    freed = [slot for step in planned.body.steps for slot in step.frees]
    assert sorted(freed) == sorted(set(freed))
    assert len(freed) == 12  # the input and eleven results; the last is the output
