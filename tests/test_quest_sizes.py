"""What quantised weights take on disk, in every format, at the widths of SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.capture import capture
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.saving import save

ROTATIONS = 64**2 + 128**2
"""Entries of the two Hadamard matrices, which a model holds once for all layers."""


class FeedForward(nn.Module):
    """One layer up and one down."""

    def __init__(self, width: int = 576, hidden: int = 1536) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(width, hidden, bias=False),
            nn.Linear(hidden, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """A residual layer."""
        return x + self.down(self.up(x))


@pytest.fixture(scope="module")
def model() -> FeedForward:
    torch.manual_seed(0)
    return FeedForward().eval()


def halves(model: nn.Module) -> int:
    """Bytes of its weights in float16."""
    return sum(2 * weight.numel() for weight in model.parameters())


def quantised(model: nn.Module, spec: str) -> Program:
    program, _ = Pipeline.of(spec).run(capture(model, (torch.randn(1, 576),)))
    return program


def initializers(path: Path) -> int:
    """Bytes of a model's weights without the rotations."""
    stored = onnx.load(str(path)).graph.initializer
    return sum(len(item.raw_data) for item in stored if not item.name.startswith("hadamard."))


def weight_file(package: Path, item_bytes: int) -> int:
    """Bytes of a package's weights without the rotations."""
    (file,) = package.rglob("weight.bin")
    return file.stat().st_size - ROTATIONS * item_bytes


def test_one_bit_weights_take_a_fourteenth_of_float16(model: FeedForward, tmp_path: Path) -> None:
    program = quantised(model, "quest{weight-bits=1}")
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in program.named_weights()}, file)
    assert file.stat().st_size <= halves(model) / 14
    pt2 = save(program, tmp_path / "model.pt2")
    assert pt2.stat().st_size <= halves(model) / 12  # the graph and its metadata weigh 30 KB
    options = OnnxOptions(portable=True)
    OnnxBackend().lower(program, tmp_path / "portable.onnx", options, check=False)
    assert initializers(tmp_path / "portable.onnx") <= halves(model) / 14


def test_one_bit_weights_in_core_ml(model: FeedForward, tmp_path: Path) -> None:
    program = quantised(model, "quest{weight-bits=1}")
    path = tmp_path / "m.mlpackage"
    CoremlBackend().lower(program, path, CoremlOptions(), check=False)
    assert weight_file(path, 2) <= halves(model) / 14


def test_the_fast_onnx_form_holds_one_bit_in_two(model: FeedForward, tmp_path: Path) -> None:
    """MatMulNBits has no 1-bit weights: fields of two, rows padded to blocks, a scale per block."""
    program = quantised(model, "quest{weight-bits=1}")
    OnnxBackend().lower(program, tmp_path / "fast.onnx", check=False)
    assert halves(model) / 14 < initializers(tmp_path / "fast.onnx") <= halves(model) / 6


@pytest.mark.parametrize(
    ("spec", "bits", "coreml_bits"),
    [
        ("format=fp4", 4, 4),
        ("sparse=4:8", 2.5, 3),
        ("sparse=2:4", 3, 3),
        ("sparse=4:8 weight-bits=2", 1.5, 2),
    ],
)
def test_other_forms_take_their_bits(
    model: FeedForward, spec: str, bits: float, coreml_bits: float, tmp_path: Path
) -> None:
    """Steps and headers add less than 0.1 bits a weight; Core ML's masks have a bit per weight."""
    program, count = quantised(model, f"quest{{{spec}}}"), 2 * 576 * 1536
    stored = sum(value.nbytes for _, value in program.named_weights())
    OnnxBackend().lower(program, tmp_path / "m.onnx", check=False)
    CoremlBackend().lower(program, tmp_path / "m.mlpackage", CoremlOptions(), check=False)
    for found, expected in (
        (stored, bits),
        (initializers(tmp_path / "m.onnx"), bits),
        (weight_file(tmp_path / "m.mlpackage", 2), coreml_bits),
    ):
        assert expected < 8 * found / count < expected + 0.1
