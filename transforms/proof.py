"""Proof of a capture: the program against the eager model, at the captured size and another one.

Export can fix a dynamic size silently (a Python int taken from a shape) and leaves only a guard
that exporters drop; running both at a second size is the test that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from resplice.calling import describe
from resplice.cases import fresh_inputs
from resplice.compare import EXACT_BARS, Difference, difference, worst
from resplice.errors import CaptureError
from resplice.program import Program

Eager = Callable[[Mapping[str, torch.Tensor]], Any]


def prove(program: Program, eager: Eager) -> None:
    """Run both and compare; what can't be compared is noted in `program.metadata["notes"]`.

    Args:
        program: The captured program.
        eager: The model as a function of flat named tensors.

    Raises:
        CaptureError: The program computes something else than the model.
    """
    _compare(program, eager, program.sample_tensors(), "at the captured size")
    if program.dims:
        inputs = fresh_inputs(program, seed=1, second_size=True)
        sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        _compare(program, eager, inputs, f"at {sizes}")


def _compare(program: Program, eager: Eager, inputs: dict[str, torch.Tensor], at: str) -> None:
    copies = {name: value.clone() for name, value in inputs.items()}
    try:
        with torch.no_grad():
            expected = describe(eager(copies))[1]
    except Exception as error:
        note = f"the model itself fails {at}: {str(error).splitlines()[0][:200]}"
        program.metadata.setdefault("notes", []).append(note)
        return
    found = _difference(expected, program, inputs)
    if found is None or not found.within(EXACT_BARS.get(expected[0].dtype, 0.0)):
        _blame(program, eager, inputs, expected, found, at)


def _difference(
    expected: list[torch.Tensor], program: Program, inputs: dict[str, torch.Tensor]
) -> Difference | None:
    """The worst output's difference; None if the program fails or its outputs have other shapes."""
    try:
        with torch.no_grad():
            actual = program.copy().run({name: value.clone() for name, value in inputs.items()})
    except Exception:  # any failure of the graph means the capture is wrong for this size
        return None
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return None
    return worst([difference(e, a) for e, a in zip(expected, actual, strict=True)])


def _blame(
    program: Program, eager: Eager, inputs: dict[str, torch.Tensor],
    expected: list[torch.Tensor], found: Difference | None, at: str,
) -> None:  # fmt: skip
    with torch.no_grad():
        again = describe(eager({name: value.clone() for name, value in inputs.items()}))[1]
    if any(difference(e, a).sqnr_db is not None for e, a in zip(expected, again, strict=True)):
        program.metadata.setdefault("notes", []).append("the model is random: capture not compared")
        return
    what = "fails" if found is None else f"differs ({found})"
    raise CaptureError(
        f"the captured program {what} {at}, where the model works",
        hint="a size was fixed while tracing: leave that dimension out of dynamic_shapes, or pass "
        "check=False and use the captured size only",
    )
