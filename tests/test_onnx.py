"""The ONNX backend: numbers, refusals, external data, metadata, nothing half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import resplice
from resplice.artifact import staged
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.backends.onnx import backend as backend_module
from resplice.backends.onnx.artifact import OnnxArtifact
from resplice.compare import difference
from resplice.errors import InputError, LoweringError, NumericsError, ResourceError
from resplice.program import Program


def test_left_padding_gives_zeros_not_the_mean_of_values(tmp_path: Path) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    for mask in (torch.rand(1, 1, 5, 5) > 0.5, torch.zeros(1, 1, 5, 5)):
        closed = mask.clone()
        closed[..., 1, :] = False if mask.dtype == torch.bool else float("-inf")
        program = resplice.capture(Attend(), (torch.randn(1, 2, 5, 8), closed))
        artifact = OnnxBackend().lower(program, tmp_path / "attend.onnx", check=False)
        q = torch.randn(1, 2, 5, 8)
        found = artifact.run({"q": q, "mask": closed})["output"]
        torch.testing.assert_close(found, Attend()(q, closed), rtol=1e-5, atol=1e-5)
        assert found[..., 1, :].abs().max() == 0


@pytest.mark.filterwarnings("ignore:.*expect a relative error")
@pytest.mark.parametrize(
    "options", [OnnxOptions(), OnnxOptions(accuracy_level=0), OnnxOptions(portable=True)]
)
@pytest.mark.parametrize(
    "spec",
    [
        "quest{weight-bits=1}",
        "quest{weight-bits=2 group=32}",
        "quest{weight-bits=3 hadamard=off}",
        "quest",
        "quest{weight-bits=8}",
    ],
)
def test_packed_weights_lower_exactly(
    spec: str, options: OnnxOptions, program: Program, tmp_path: Path
) -> None:
    small = resplice.optimize(program, spec)
    artifact = OnnxBackend().lower(small.program, tmp_path / "small.onnx", options)
    domains = {node.domain for node in onnx.load(artifact.path).graph.node}
    assert ("com.microsoft" in domains) is not options.portable
    x = torch.randn(10, 32)
    error = (artifact.run({"x": x})["output"] - small(x)).abs().max() / small(x).abs().max()
    assert error < (0.05 if options.accuracy_level == 4 and not options.portable else 1e-5)
    assert (
        artifact.bar < 0.1
        if options.accuracy_level == 4
        else artifact.bar == backend_module.EXACT_BAR
    )


def test_packed_weights_are_small_on_disk(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 8)).eval()
    sizes = {}
    for bits in (16, 8, 4, 2):
        small = resplice.optimize(
            model, f"quest{{weight-bits={bits}}}", example_inputs=(torch.randn(2, 512),)
        )
        sizes[bits] = small.to_onnx(tmp_path / f"{bits}.onnx").nbytes
    weights = 512 * 512
    for bits in (8, 4, 2):
        assert sizes[16] - sizes[bits] > weights * (4 - bits / 8) * 0.9


def test_state_updates_are_refused_all_at_once(tmp_path: Path) -> None:
    program = resplice.capture(nn.BatchNorm1d(4).train(), (torch.randn(3, 4),))
    with pytest.raises(LoweringError) as refused:
        OnnxBackend().lower(program, tmp_path / "bn.onnx")
    assert len(refused.value.problems) == 3
    assert "the exporter drops such writes silently" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_operators_without_translation_are_named(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = resplice.capture(Special(), (torch.rand(3),))
    with pytest.raises(LoweringError, match="bessel_j0"):
        OnnxBackend().lower(program, tmp_path / "special.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_go_beside_the_model(program: Program, tmp_path: Path) -> None:
    inside = OnnxBackend().lower(program, tmp_path / "inside.onnx")
    outside = OnnxBackend().lower(program, tmp_path / "outside.onnx", OnnxOptions(external_above=0))
    assert (tmp_path / "outside.onnx.data").exists()
    assert not (tmp_path / "inside.onnx.data").exists()
    x = torch.randn(4, 32)
    torch.testing.assert_close(inside.run({"x": x})["output"], outside.run({"x": x})["output"])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in tmp_path.glob("outside.onnx*"):
        file.rename(moved / file.name)
    reopened = type(outside).open(moved / "outside.onnx")
    torch.testing.assert_close(reopened.run({"x": x})["output"], inside.run({"x": x})["output"])


def test_the_model_says_how_it_was_made(program: Program, tmp_path: Path) -> None:
    small = resplice.optimize(program, "quest{weight-bits=2}")
    artifact = small.to_onnx(tmp_path / "model.onnx")
    metadata = artifact.metadata
    assert metadata["pipeline"] == "canonicalize,quest{weight-bits=2}"
    assert metadata["inputs"] == ["x: f32[2*pairs,32]"]
    assert metadata["bar"] == artifact.bar
    model = onnx.load(artifact.path)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "2*pairs"
    assert json.loads({p.key: p.value for p in model.metadata_props}["resplice.schema"]) == 1
    assert "/" + "tmp" not in str(model)


def test_a_wrong_lowering_is_caught_and_nothing_is_written(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = backend_module.export_model

    def wrong(*args: object) -> object:
        model = export(*args)  # type: ignore[arg-type]
        bias = model.graph.initializers["head.bias"]
        import onnx_ir as ir

        bias.const_value = ir.tensor(bias.const_value.numpy() + 0.01, name="head.bias")  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(backend_module, "export_model", wrong)
    with pytest.raises(NumericsError, match="differs from the program: measured") as refused:
        OnnxBackend().lower(program, tmp_path / "wrong.onnx")
    assert refused.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        OnnxBackend().lower(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_survives_a_failed_conversion(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")

    def fail() -> None:
        with staged(tmp_path / "model.onnx") as stage:
            (stage / "model.onnx").write_text("half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def test_wrong_inputs_are_refused(program: Program, tmp_path: Path) -> None:
    artifact = OnnxBackend().lower(program, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="input x is missing"):
        artifact.run({})
    with pytest.raises(InputError, match="onnxruntime"):
        artifact.run({"x": torch.randn(4, 33)})


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(500, 64)
            self.head = nn.Linear(64, 500, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    program = resplice.capture(Tied().eval(), (torch.randint(0, 500, (2, 3)),))
    artifact = OnnxBackend().lower(program, tmp_path / "tied.onnx")
    assert artifact.nbytes < 1.2 * 500 * 64 * 4


def test_approximating_operators_are_held_to_the_power_of_their_errors(tmp_path: Path) -> None:
    """One value far off, as random tokens make it in a language model, is no wrong artefact."""
    reference = torch.ones(10_000)
    result = reference.clone()
    result[0] = 1.5
    found = difference(reference, result)
    assert math.isclose(found.rms, 0.005, rel_tol=1e-6)
    artifact = OnnxArtifact(tmp_path / "m.onnx", bar=0.2)
    assert artifact.error_of(found) == found.rms
    exact = OnnxArtifact(tmp_path / "m.onnx", bar=1e-4)
    assert exact.error_of(found) == found.relative == 0.5
