"""The driver of legalisation: small named rules that make a graph fit for one backend.

A rule is exact in PyTorch, looks at operators, ranks and dtypes only, and returns the node that
takes the place of the one it was given, or None. Rules run last, right before the export, so they
never disturb a pass's patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from resplice.build import Builder
from resplice.errors import PassError
from resplice.program import Program
from resplice.rules import replace_node

Legalizer = Callable[[Any, fx.Node], fx.Node | None]
"""(the backend's builder, a node) -> the node that takes its place, or None."""
_TOO_MANY = 64
"""Rewrites per node of the original graph after which rules are taken to feed each other."""


def legalize(
    program: Program,
    rules: Sequence[Legalizer],
    *,
    again: bool = False,
    builder: Callable[[Program, fx.Node], Builder] = Builder,
) -> dict[str, int]:
    """Apply the first rule that fits to every node, in graph order; rewrites counted per rule.

    Args:
        program: Edited in place.
        rules: In order of precedence.
        again: Also visit the nodes that rules made; rules must then come to an end.
        builder: Makes the builder that inserts right before a node.
    """
    counts = dict.fromkeys((rule.__name__ for rule in rules), 0)
    queue = list(program.graph.nodes)
    limit = _TOO_MANY * len(queue)
    for node in queue:
        if node.op != "call_function" or node._erased:
            continue
        if len(queue) > limit:
            raise PassError("legalize", "its rules never stop matching")
        made = _apply_first(rules, node, lambda at: builder(program, at), counts)
        queue += made if again else []
    return counts


def _apply_first(
    rules: Sequence[Legalizer],
    node: fx.Node,
    builder: Callable[[fx.Node], Builder],
    counts: dict[str, int],
) -> list[fx.Node]:
    for rule in rules:
        build = builder(node)
        new = rule(build, node)
        if new is not None:
            counts[rule.__name__] += 1
            replace_node(build.program, node, new)
            return build.made
    return []
