"""canonicalize: bring the graph to normal form, so that patterns need one spelling only."""

from __future__ import annotations

from dataclasses import dataclass

from resplice.change import Change
from resplice.context import Context
from resplice.facts import Canonical
from resplice.normal import normalize
from resplice.pass_base import Pass
from resplice.program import Program


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop no-ops and spell equal things equally; see `resplice.normal` for the rules.

    %2 = aten.to(%1, dtype=f32)        (already f32)
    %3 = aten.view(%2, [4, 8])    ->   %2 = aten.reshape(%1, [4, 8])
    """

    name = "canonicalize"
    creates = (Canonical,)
    automatic = True

    def run(self, program: Program, context: Context) -> Change:
        """Normalise in place, then drop what nothing uses."""
        count = normalize(program)
        dead = remove_dead(program)
        return Change(notes=[f"{count} nodes respelled, {dead} dead nodes dropped"])


def remove_dead(program: Program) -> int:
    """Erase nodes without users, keeping inputs and state writes; returns how many."""
    before = len(program.graph.nodes)
    for node in reversed(list(program.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            program.graph.erase_node(node)
    program.drop_unused_weights()
    return before - len(program.graph.nodes)
