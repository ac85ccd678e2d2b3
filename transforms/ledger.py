"""The error ledger: every node of a rewritten program against the captured original.

Both programs run in lockstep on the same inputs; nodes are paired by name (a rewrite gives its
result the name of what it replaced), and values are freed after their last use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from resplice.compare import Difference, difference, worst
from resplice.origin import origin
from resplice.program import Program
from resplice.walk import node_values

aten = torch.ops.aten
_OUTPUTS = ""


@dataclass(frozen=True)
class Entry:
    """One compared node."""

    node: str
    module: str
    source: str
    rewritten_by: str
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "node": self.node, "module": self.module, "source": self.source,
            "rewritten_by": self.rewritten_by, **self.difference.to_json(),
        }  # fmt: skip


@dataclass
class Ledger:
    """Errors after one pass, against the captured original.

    Attributes:
        after: Text of the pass.
        outputs: One difference per output.
        entries: Every floating-point node that both programs have, in order.
    """

    after: str
    outputs: dict[str, Difference] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    @property
    def worst_output(self) -> Difference:
        """The output with the largest relative error."""
        return worst(list(self.outputs.values()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "after": self.after,
            "outputs": {name: d.to_json() for name, d in self.outputs.items()},
            "nodes": [entry.to_json() for entry in self.entries],
        }


def compare_programs(
    original: Program,
    rewritten: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    after: str = "",
    nodes: bool = True,
) -> Ledger:
    """Run both programs on `inputs` (flat, named) and compare.

    Args:
        original: The captured program.
        rewritten: The program after some passes; it may take further inputs.
        inputs: All inputs of both.
        after: Label of the ledger.
        nodes: Also compare every common node, not only the outputs.
    """
    ledger = Ledger(after)
    common = _common_nodes(original, rewritten) if nodes else set[str]()
    left, right = (_chosen(program, inputs, common) for program in (original, rewritten))
    pending: dict[str, Any] = {}
    for name, node, value in right:
        while name not in pending:
            other, _, reference = next(left)
            pending[other] = reference
        reference = pending.pop(name)
        if name != _OUTPUTS:
            _add(ledger, node, reference, value)
            continue
        for port, a, b in zip(original.outputs, reference, value, strict=False):
            ledger.outputs[port.name] = difference(a, b)
    return ledger


def _chosen(
    program: Program, inputs: Mapping[str, torch.Tensor], names: set[str]
) -> Iterator[tuple[str, fx.Node, Any]]:
    """The values of some nodes, and last the outputs."""
    for node, value in node_values(program, inputs):
        name = _OUTPUTS if node.op == "output" else node.name
        if name in names or name == _OUTPUTS:
            yield name, node, value


def _common_nodes(a: Program, b: Program) -> set[str]:
    names = {node.name for node in a.graph.nodes if _comparable(node)}
    return names & {node.name for node in b.graph.nodes if _comparable(node)}


def _comparable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and node.target is not aten.copy_.default
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
    )


def _add(ledger: Ledger, node: fx.Node, reference: Any, value: Any) -> None:
    if reference.shape != value.shape:
        return  # a pass that changes an axis in the middle: compared where it is restored
    place = origin(node)
    ledger.entries.append(
        Entry(node.name, place.module, place.source, place.made_by, difference(reference, value))
    )
