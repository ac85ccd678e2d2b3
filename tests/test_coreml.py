"""The Core ML backend: borders, options, state, functions, metadata, refusals, command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import resplice
from resplice.backends.coreml import CoremlArtifact, CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import FP16_BAR, FP32_BAR
from resplice.backends.coreml.compare import compare_values
from resplice.cli.app import run as command
from resplice.compare import difference
from resplice.errors import InputError, LoweringError, NumericsError, ResourceError, UsageError
from resplice.program import Program

FP32 = CoremlOptions(precision="fp32")


def lower(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path,
    options: CoremlOptions = FP32, **capture: Any,
) -> tuple[Program, CoremlArtifact]:  # fmt: skip
    program = resplice.capture(module, inputs, **capture)
    return program, CoremlBackend().lower(program, folder / "m.mlpackage", options)


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return difference(expected, found).relative


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18", "iOS26"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_target_and_precision(
    program: Program, target: Any, precision: Any, tmp_path: Path
) -> None:
    options = CoremlOptions(target=target, precision=precision)
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    x = torch.randn(6, 32)
    found = artifact.run({"x": x})["output"]
    bar = FP32_BAR if precision == "fp32" else FP16_BAR
    assert artifact.bar == bar
    assert 0 <= relative(program.run({"x": x})[0], found) <= bar


def test_borders_of_every_kind_are_kept(tmp_path: Path) -> None:
    class Border(nn.Module):
        def forward(
            self, x: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            y = torch.where(mask, x * scale, x)
            return y, y > 0, ids + 1, y.sum(), x, y

    inputs = (torch.randn(3, 4), torch.rand(3, 4) > 0.5, torch.arange(4), torch.tensor(2.0))
    _, artifact = lower(Border(), inputs, tmp_path)
    fresh = (torch.randn(3, 4), torch.rand(3, 4) > 0.5, torch.arange(4) * 3, torch.tensor(-0.5))
    expected = Border()(*fresh)
    names = ("x", "mask", "ids", "scale")
    found = list(artifact.run(dict(zip(names, fresh, strict=True))).values())
    for reference, value in zip(expected, found, strict=True):
        assert value.dtype == reference.dtype
        assert value.shape == reference.shape
        assert torch.allclose(value.double(), reference.double(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_widths(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).eval().to(dtype)
    program = resplice.capture(model, (torch.randn(2, 16).to(dtype),))
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage", FP32)
    x = torch.randn(2, 16).to(dtype)
    found = artifact.run({"input": x})["output"]
    assert found.dtype == dtype
    wide = model.float()(x.float())
    rounding = 2e-5 if dtype == torch.float64 else 1e-2
    assert relative(wide, found) <= rounding
    assert next(model.parameters()).dtype == torch.float32  # .float() above, not the backend


def test_names_and_dtypes_at_the_border(program: Program, tmp_path: Path) -> None:
    options = CoremlOptions(names={"x": "features", "output": "scores"}, dtypes={"x": "fp16"})
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    (entry,) = artifact.package.inputs()
    assert (entry.name, entry.dtype) == ("features", torch.float16)
    assert [item.name for item in artifact.package.outputs()] == ["scores"]
    assert artifact.run({"x": torch.randn(2, 32)})["output"].shape == (2, 10)


def test_ranges_and_enumerated_shapes(program: Program, tmp_path: Path) -> None:
    ranged = CoremlBackend().lower(program, tmp_path / "ranged.mlpackage", FP32)
    (entry,) = ranged.package.inputs()
    assert entry.ranges[0] == (2, 64)
    with pytest.raises(InputError, match="2..64"):
        ranged.run({"x": torch.randn(66, 32)})
    options = CoremlOptions(precision="fp32", shapes={"x": ((2, 32), (4, 32), (8, 32))})
    listed = CoremlBackend().lower(program, tmp_path / "listed.mlpackage", options)
    assert set(listed.package.inputs()[0].choices) == {(2, 32), (4, 32), (8, 32)}
    x = torch.randn(8, 32)
    assert relative(program.run({"x": x})[0], listed.run({"x": x})["output"]) <= FP32_BAR
    with pytest.raises(InputError, match="declared is"):
        listed.run({"x": torch.randn(6, 32)})
    wrong = CoremlOptions(shapes={"x": ((2, 31),)})
    with pytest.raises(UsageError, match="does not fit input x"):
        CoremlBackend().lower(program, tmp_path / "wrong.mlpackage", wrong)


class Running(nn.Module):
    """A running sum, kept from call to call."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("total", torch.full((2, 3), start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 2


def test_state_lives_from_call_to_call(tmp_path: Path) -> None:
    _, artifact = lower(Running().eval(), (torch.randn(2, 3),), tmp_path)
    model, state = Running().eval(), artifact.make_state()
    assert len(artifact.package.states()) == 1
    for _ in range(4):
        x = torch.randn(2, 3)
        found = artifact.run({"x": x}, state=state)["output"]
        assert relative(model(x), found) <= FP16_BAR
    alone = artifact.run({"x": torch.ones(2, 3)})["output"]
    assert torch.equal(alone, torch.full((2, 3), 2.0))


def test_state_that_core_ml_has_not_is_refused_all_at_once(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
            self.register_buffer("level", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            self.level.add_(x)
            return self.level + self.steps

    program = resplice.capture(Counts().eval(), (torch.randn(3),))
    with pytest.raises(LoweringError) as refused:
        CoremlBackend().lower(program, tmp_path / "m.mlpackage")
    assert len(refused.value.problems) == 2
    assert "does not start at zero" in str(refused.value)
    assert "int64" in str(refused.value)
    running = resplice.capture(Running().eval(), (torch.randn(2, 3),))
    with pytest.raises(LoweringError, match="needs target iOS18"):
        CoremlBackend().lower(running, tmp_path / "m.mlpackage", CoremlOptions(target="iOS17"))
    assert list(tmp_path.iterdir()) == []


def test_functions_share_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    one = resplice.capture(model, (torch.randn(1, 256),))
    single = CoremlBackend().lower(one, tmp_path / "single.mlpackage", FP32)
    one.functions["batch"] = resplice.capture(model, (torch.randn(8, 256),))
    both = CoremlBackend().lower(one, tmp_path / "both.mlpackage", FP32)
    assert both.functions == ("main", "batch")
    assert both.nbytes < 1.1 * single.nbytes
    for name, rows in (("main", 1), ("batch", 8)):
        x = torch.randn(rows, 256)
        found = both.run({"input": x}, function=name)["output"]
        assert relative(model(x), found) <= FP32_BAR
    with pytest.raises(LoweringError, match="several functions"):
        CoremlBackend().lower(one, tmp_path / "old.mlpackage", CoremlOptions(target="iOS17"))


def test_the_package_says_how_it_was_made(program: Program, tmp_path: Path) -> None:
    small = resplice.optimize(program, "quest{weight-bits=2}")
    small.to_coreml(tmp_path / "m.mlpackage")
    reopened = CoremlArtifact.open(tmp_path / "m.mlpackage")
    stored = reopened.metadata["functions"]["main"]
    assert stored["pipeline"] == "canonicalize,quest{weight-bits=2}"
    assert stored["kinds"] == {"output": "float32"}
    assert reopened.bar == FP16_BAR
    x = torch.randn(4, 32)
    assert relative(small(x), reopened.run({"x": x})["output"]) <= FP16_BAR


@pytest.mark.filterwarnings("ignore:.*expect a relative error")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_packed_weights_are_exact_and_small(bits: int, group: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    x = torch.randn(3, 512)
    small = resplice.optimize(
        model, f"quest{{weight-bits={bits} group={group}}}", example_inputs=(x,)
    )
    artifact = small.to_coreml(tmp_path / "m.mlpackage", precision="fp32")
    fresh = torch.randn(3, 512)
    assert relative(small(fresh), artifact.run({"input": fresh})["output"]) <= 5e-6
    field = bits if group == 0 else max(bits, 4)
    weights = sum(f.stat().st_size for f in artifact.path.rglob("weight.bin"))
    steps = 256 * (1 if group == 0 else 2 * 512 // group) * 4
    rotation, head = 128 * 128 * 4, 256 * 8 * 4
    assert weights < 512 * 256 * field / 8 + steps + rotation + head + 8192
    assert artifact.notes["main"]["ops"]["quant_linear: lowered"] == 1


@pytest.mark.filterwarnings("ignore:.*expect a relative error")
@pytest.mark.parametrize("target", ["iOS16", "iOS26"])
def test_packed_weights_on_other_targets(target: Any, program: Program, tmp_path: Path) -> None:
    for spec in ("quest{weight-bits=1}", "quest{weight-bits=3}", "quest{weight-bits=4 group=16}"):
        small = resplice.optimize(program, spec)
        artifact = small.to_coreml(tmp_path / "m.mlpackage", target=target, precision="fp32")
        x = torch.randn(4, 32)
        assert relative(small(x), artifact.run({"x": x})["output"]) <= 5e-6


def test_the_first_value_that_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resplice.backends.coreml.legalize.arithmetic import gelu_by_name

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(nn.functional.gelu(self.first(x) * 3, approximate="tanh"))

    program = resplice.capture(Gated().eval(), (torch.randn(64, 8),))
    backend = CoremlBackend()
    monkeypatch.setattr(backend, "rules", tuple(r for r in backend.rules if r is not gelu_by_name))
    with pytest.raises(NumericsError, match="differs from the program") as refused:
        backend.lower(program, tmp_path / "m.mlpackage", FP32)
    assert "node gelu in " in refused.value.where
    assert "test_coreml.py" in refused.value.where
    assert refused.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage", FP32)
    rows = compare_values(artifact, program, {"x": torch.randn(64, 8)})
    assert {"linear", "gelu", "linear_1"} <= {row.node for row in rows}
    assert all(row.difference.within(FP32_BAR) for row in rows)


def test_a_full_disk_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coremltools.models.MLModel.save", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        CoremlBackend().lower(program, tmp_path / "m.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_and_inputs_are_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose iOS16"):
        CoremlOptions(target="iOS12")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"does not end in \.mlpackage"):
        CoremlBackend().lower(program, tmp_path / "m.onnx")
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage")
    with pytest.raises(InputError, match="input x is missing"):
        artifact.run({})


def test_coremltools_own_translations_are_back_afterwards(program: Program, tmp_path: Path) -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    CoremlBackend().lower(program, tmp_path / "m.mlpackage")
    assert before == _TORCH_OPS_REGISTRY.name_to_func_mapping


def test_the_command_line_converts_runs_and_checks(
    factory_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, program = str(tmp_path / "m.mlpackage"), str(tmp_path / "m.pt2")
    model = f"{factory_module}:mlp"
    assert command(["convert", model, "--to", "coreml", "-o", package, "--precision", "fp32"]) == 0
    assert command(["convert", model, "--to", "pt2", "-o", program]) == 0
    assert command(["check", package, program]) == 0
    assert command(["check", package, program, "--values", "--json"]) == 0
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", input=x)
    capsys.readouterr()
    arguments = ["run", package, "--inputs", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz")]
    assert command(arguments) == 0
    assert "output: float32 [3, 5]" in capsys.readouterr().out
    with np.load(tmp_path / "y.npz") as stored:
        expected = resplice.load(program).run({"input": torch.from_numpy(x)})[0]
        assert relative(expected, torch.from_numpy(stored["output"])) <= FP32_BAR
    assert command(["check", package, program, "--bar", "1e-12"]) in (0, 6)
    half = str(tmp_path / "half.mlpackage")
    assert command(["convert", model, "--to", "coreml", "-o", half]) == 0
    assert command(["check", half, program, "--bar", "1e-9"]) == 6
    assert "node linear" in capsys.readouterr().err
    assert command(["run", str(tmp_path / "missing.mlpackage"), "--inputs", "x.npz"]) == 2
    assert command(["convert", model, "--to", "coreml", "-o", half, "--portable"]) == 2
