"""The two modes: fp16 storage as a device has it, and none of it."""

from __future__ import annotations

from typing import Any

import mil_models
import numpy as np
import pytest
import torch
from mil_models import mb

from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage

W = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def half() -> Any:
    return mil_models.model(
        lambda x: mb.linear(x=mb.exp(x=x), weight=W, name="y"), (3, 16), target="iOS15", half=True
    )


def test_declared_rounds_each_result_as_fp16_storage_does(half: Any) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    (found,) = mil_models.outputs(half, x)
    weight = torch.from_numpy(W).half().float()
    expected = (x.half().float().exp().half().float() @ weight.T).half().float()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_fp32_keeps_stored_weights_and_rounds_nothing_else(half: Any) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    (found,) = mil_models.outputs(half, x, mode="fp32")
    expected = x.exp() @ torch.from_numpy(W).half().float().T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, found.half().float())


def test_declared_overflows_where_fp16_does() -> None:
    built = mil_models.model(lambda x: mb.mul(x=mb.mul(x=x, y=x), y=1e-3), (1,), half=True)
    x = torch.tensor([300.0])
    assert mil_models.outputs(built, x)[0].isinf().all()
    assert mil_models.outputs(built, x, mode="fp32")[0].item() == pytest.approx(90, rel=1e-3)


def test_outputs_come_in_the_declared_dtype() -> None:
    built = mil_models.model(
        lambda x: (mb.mul(x=x, y=np.float16(2)), mb.greater(x=x, y=np.float16(0))),
        (3,), dtype=torch.float16, passes=True,
    )  # fmt: skip
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float16)
    doubled, positive = mil_models.outputs(built, x)
    assert doubled.dtype == torch.float16
    assert torch.equal(doubled, 2 * x)
    assert positive.dtype == torch.int32 or positive.dtype.is_floating_point
    assert positive.tolist() == [0, 1, 1]


def test_observe_sees_every_op_with_its_results(half: Any) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []
    package = MilPackage.open(half.package_path)
    interpreter = Interpreter(package)
    (name,) = (each.name for each in package.inputs())
    found = interpreter.run(
        {name: torch.zeros(3, 16)},
        observe=lambda op, results: seen.append((op.op_type, tuple(results[0].shape))),
    )
    assert [each for each in seen if each[0] != "cast"] == [("exp", (3, 16)), ("linear", (3, 8))]
    assert torch.equal(found["y"], interpreter.run({name: torch.zeros(3, 16)})["y"])
