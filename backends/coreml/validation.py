"""coremltools' own validation of MIL, once per conversion instead of after each of its passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resplice.backends.coreml.mil.tools import silent

with silent():
    from coremltools.converters.mil.mil.program import Program as MilProgram

_validate, _text = MilProgram.validate, MilProgram.__str__


@contextmanager
def validated_once() -> Iterator[None]:
    """Skip validation, and the program's text that is written for debugging, inside the block.

    Both walk the whole program after each of some hundred passes, which is half of the time of a
    conversion. Call `validate` afterwards; what comes out is executed and compared in any case.
    """
    MilProgram.validate = lambda *_, **__: None
    MilProgram.__str__ = lambda _: "(not written)"
    try:
        yield
    finally:
        MilProgram.validate, MilProgram.__str__ = _validate, _text


def validate(model: Any) -> None:
    """Check the structure of a converted model's program.

    Raises:
        ValueError: coremltools left an inconsistent program.
    """
    model._mil_program.validate(check_essential_scope=True)
