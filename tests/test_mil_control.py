"""State, branches, loops and lists."""

from __future__ import annotations

from typing import Any

import mil_models
import numpy as np
import pytest
import torch
from mil_models import mb

from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent
from resplice.errors import InputError


def _accumulator(factor: float = 1.0) -> Any:
    def build(x: Any, s: Any) -> Any:
        total = mb.add(x=mb.read_state(input=s), y=mb.cast(x=x, dtype="fp16"))
        stored = mb.coreml_update_state(state=s, value=total)
        return mb.cast(x=mb.mul(x=stored, y=np.float16(factor)), dtype="fp32", name="y")

    return mil_models.model(build, (2,), states=[(2,)])


@pytest.mark.parametrize("mode", ["declared", "fp32"])
def test_state_lives_from_call_to_call(mode: Any) -> None:
    package = MilPackage.open(_accumulator().package_path)
    interpreter = Interpreter(package, mode=mode)
    (described,) = package.states()
    assert (described.dtype, described.shape) == (torch.float16, (2,))
    state = interpreter.make_state()
    expected = torch.zeros(2)
    for step in (0.1, 0.2, 0.3):
        x = torch.tensor([step, 1.0])
        found = interpreter.run({"x0": x}, state)["y"]
        expected = expected + (x.half().float() if mode == "declared" else x)
        expected = expected.half().float() if mode == "declared" else expected
        assert torch.equal(found, expected)
    assert torch.equal(state.tensors[described.name].float(), expected)
    fresh = interpreter.make_state()
    assert torch.equal(
        fresh.tensors[described.name], torch.zeros_like(fresh.tensors[described.name])
    )


def test_a_copied_state_goes_its_own_way() -> None:
    interpreter = Interpreter(MilPackage.open(_accumulator().package_path))
    one = torch.ones(2)
    state = interpreter.make_state()
    interpreter.run({"x0": one}, state)
    other = state.copy()
    interpreter.run({"x0": one}, other)
    assert interpreter.run({"x0": one}, state)["y"].tolist() == [2, 2]
    assert interpreter.run({"x0": one}, other)["y"].tolist() == [3, 3]


def test_two_functions_share_one_state(tmp_path: Any) -> None:
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("plain", 1.0), ("tenfold", 10.0)):
        (tmp_path / name).mkdir()
        path = mil_models.saved(_accumulator(factor), tmp_path / name)
        descriptor.add_function(str(path), "main", name)
    descriptor.default_function_name = "plain"
    with silent():
        ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))
    package = MilPackage.open(tmp_path / "both.mlpackage")
    plain, tenfold = Interpreter(package), Interpreter(package, "tenfold")
    state, one = plain.make_state(), torch.ones(2)
    assert plain.run({"x0": one}, state)["y"].tolist() == [1, 1]
    assert tenfold.run({"x0": one}, state)["y"].tolist() == [20, 20]
    assert plain.run({"x0": one}, state)["y"].tolist() == [3, 3]


def test_a_missing_state_is_refused() -> None:
    interpreter = Interpreter(MilPackage.open(_accumulator().package_path))
    with pytest.raises(InputError, match="keeps state"):
        interpreter.run({"x0": torch.ones(2)})


def test_cond_takes_one_branch() -> None:
    def build(x: Any) -> Any:
        positive = mb.greater(x=mb.reduce_sum(x=x, keep_dims=False), y=0.0)
        return mb.cond(
            pred=positive,
            _true_fn=lambda: mb.mul(x=x, y=2.0),
            _false_fn=lambda: mb.sub(x=x, y=mb.relu(x=x)),
        )

    built = mil_models.model(build, (2,))
    assert mil_models.outputs(built, torch.tensor([3.0, -1.0]))[0].tolist() == [6, -2]
    assert mil_models.outputs(built, torch.tensor([1.0, -3.0]))[0].tolist() == [0, -3]


def test_while_loop_runs_until_its_condition_fails() -> None:
    def build(x: Any) -> Any:
        return mb.while_loop(
            _cond=lambda i, total: mb.less(x=mb.squeeze(x=i, axes=[0]), y=4.0),
            _body=lambda i, total: (mb.add(x=i, y=1.0), mb.mul(x=mb.add(x=total, y=i), y=x)),
            loop_vars=(np.array([0.0], np.float32), mb.mul(x=x, y=0.0)),
        )

    count, total = mil_models.outputs(mil_models.model(build, (1,)), torch.tensor([2.0]))
    expected = 0.0
    for i in range(4):
        expected = (expected + i) * 2
    assert (count.tolist(), total.tolist()) == ([4], [expected])


def test_a_list_is_written_in_a_loop_and_gathered() -> None:
    def build(x: Any) -> Any:
        rows = mb.make_list(init_length=1, elem_shape=(3,), dtype="fp32")

        def body(i: Any, ls: Any) -> Any:
            value = mb.mul(x=x, y=mb.cast(x=i, dtype="fp32"))
            return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=value)

        _, rows = mb.while_loop(
            _cond=lambda i, ls: mb.less(x=i, y=3), _body=body, loop_vars=(0, rows)
        )
        length = mb.list_length(ls=rows)
        rows = mb.list_scatter(ls=rows, indices=[0], value=np.full((1, 3), 9, np.float32))
        chosen = mb.list_gather(ls=rows, indices=[2, 0])
        return chosen, mb.list_read(ls=rows, index=1), mb.expand_dims(x=length, axes=[0])

    built = mil_models.model(build, (3,), target="iOS15")
    x = torch.tensor([1.0, 2.0, 3.0])
    chosen, second, length = mil_models.outputs(built, x)
    assert torch.equal(chosen, torch.stack((2 * x, torch.full((3,), 9.0))))
    assert torch.equal(second, x)
    assert length.tolist() == [3]
