"""At its identity setting a pass changes nothing, eagerly and in every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resplice.backends.onnx import OnnxBackend
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.registry import pass_class, pass_table

WITH_IDENTITY = [name for name in sorted(pass_table()) if pass_class(name).identity() is not None]


def test_every_approximating_pass_has_an_identity_setting() -> None:
    from resplice.pass_base import Exact

    for name in pass_table():
        cls = pass_class(name)
        assert isinstance(cls().meaning, Exact) or cls.identity() is not None, name
    assert WITH_IDENTITY == ["cmoe", "quest", "sta", "tdtm", "videorope"]


@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_the_identity_setting_is_bit_equal(name: str, program: Program) -> None:
    item = pass_class(name).identity()
    assert item is not None
    result, steps = Pipeline.of([item]).run(program, check=True)
    x = torch.randn(8, 32)
    assert torch.equal(result(x), program(x))
    assert steps[-1].sites == 0


@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_the_identity_setting_is_exact_in_onnx(name: str, program: Program, tmp_path: Path) -> None:
    item = pass_class(name).identity()
    assert item is not None
    result, _ = Pipeline.of([item]).run(program)
    artifact = OnnxBackend().lower(result, tmp_path / "same.onnx")
    x = torch.randn(8, 32)
    torch.testing.assert_close(artifact.run({"x": x})["output"], program(x), rtol=1e-4, atol=1e-5)
