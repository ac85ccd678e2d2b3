"""Operators of our own domain that become several ONNX nodes after the export.

Inside them sizes may depend on data, which a traced graph can't say; at their border all shapes
are those of the program.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir import tape

DOMAIN = "resplice"
Expansion = Callable[[tape.Tape, ir.Node], ir.Value]
_EXPANSIONS: dict[str, Expansion] = {}


def expands(name: str) -> Callable[[Expansion], Expansion]:
    """Decorator: declare what an operator becomes."""

    def declare(function: Expansion) -> Expansion:
        _EXPANSIONS[name] = function
        return function

    return declare


def expand_composites(model: ir.Model) -> None:
    """Replace every operator of our domain in place."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type not in _EXPANSIONS:
            continue
        made = tape.Tape()
        result = _EXPANSIONS[node.op_type](made, node)
        old = node.outputs[0]
        for value in made.initializers:
            model.graph.register_initializer(value)
        model.graph.insert_before(node, made.nodes)
        result.shape, result.type, result.name = old.shape, old.type, f"{old.name}_expanded"
        ir.convenience.replace_all_uses_with(old, result)
        for place, value in enumerate(model.graph.outputs):
            if value is old:
                model.graph.outputs[place] = result
        model.graph.remove(node, safe=True)
