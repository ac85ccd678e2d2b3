"""Two phases of one sampler: the rewritten program, and beside it the program as it was."""

from __future__ import annotations

from dataclasses import replace

from resplice.errors import SpecError
from resplice.program import Program

FULL = "full"
"""Name of the function that holds the unrewritten program."""


def is_full(program: Program, owner: str) -> bool:
    """Whether a function is the unrewritten one that the pass `owner` has kept."""
    return bool(program.metadata.get(owner, {}).get("phase") == FULL)


def keep_full(program: Program, owner: str, option: str) -> None:
    """Add the program as it is under the name `full`; the weights are shared.

    Args:
        program: Gets the function; to be rewritten afterwards.
        owner: Name of the pass.
        option: What asks for it, for the message: "steps is given".

    Raises:
        SpecError: There is a function of that name.
    """
    if FULL in program.functions:
        raise SpecError(f"{owner}: {option}, but there is a function {FULL!r} already")
    full = replace(program.copy(), functions={})
    full.metadata[owner] = {"phase": FULL}
    program.functions[FULL] = full
