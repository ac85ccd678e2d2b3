"""dce: drop nodes and weights that nothing uses."""

from __future__ import annotations

from dataclasses import dataclass

from resplice.change import Change
from resplice.context import Context
from resplice.pass_base import Pass
from resplice.passes.canonicalize import remove_dead
from resplice.program import Program


@dataclass(frozen=True)
class Dce(Pass):
    """Dead code elimination.

    %2 = aten.relu(%1)            (no user)
    %3 = aten.neg(%1)       ->    %2 = aten.neg(%1)
    return %3                     return %2
    """

    name = "dce"

    def run(self, program: Program, context: Context) -> Change:
        """Erase in place; inputs and state writes stay."""
        return Change(notes=[f"{remove_dead(program)} dead nodes dropped"])
