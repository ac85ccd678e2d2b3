"""Value by value: a package against the program it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from resplice.compare import Difference, difference
from resplice.origin import where
from resplice.program import Program
from resplice.walk import node_values

if TYPE_CHECKING:
    from resplice.backends.coreml.artifact import CoremlArtifact


@dataclass(frozen=True)
class ValueDifference:
    """How far one value of a package is from the node it stands for.

    Attributes:
        value: Name in the package.
        operator: MIL operator that computes it.
        node: Node of the program.
        origin: Module and source line of that node.
        difference: Error of the value.
    """

    value: str
    operator: str
    node: str
    origin: str
    difference: Difference

    def __str__(self) -> str:
        """`linear_3 (linear): 12.0 dB ..., node linear_3 in layers.0 (model.py:12)`."""
        return f"{self.value} ({self.operator}): {self.difference}, node {self.origin}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def compare_values(
    artifact: CoremlArtifact,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    function: str = "main",
) -> list[ValueDifference]:
    """Every value that both have, in the package's order.

    Args:
        artifact: A package that resplice made: it stores which node each value stands for.
        program: The program it was made from.
        inputs: Flat, named.
        function: Which function.
    """
    origins = artifact.metadata.get("origins", {}).get(function, {})
    wanted = {node for node, _ in origins.values()}
    reference = {
        node.name: value
        for node, value in node_values(program, inputs)
        if node.name in wanted and isinstance(value, torch.Tensor)
    }
    nodes = {node.name: node for node in program.graph.nodes}
    best: dict[str, ValueDifference] = {}
    order: list[str] = []

    def observe(op: Any, results: Sequence[Any]) -> None:
        for var, value in zip(op.outputs, results, strict=False):
            node, _ = origins.get(var.name, ("", ""))
            expected = reference.get(node)
            if expected is None or not isinstance(value, torch.Tensor):
                continue
            found = _measured(expected, value)
            if found is None:
                continue
            entry = ValueDifference(var.name, op.op_type, node, where(nodes[node]), found)
            if node not in best:
                order.append(node)
            if (
                node not in best
                or var.name.startswith(node)
                or found.relative < best[node].difference.relative
            ):
                best[node] = entry

    _observed(artifact, inputs, function, observe)
    return [best[node] for node in order]


def first_divergence(
    artifact: CoremlArtifact,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    function: str = "main",
) -> str:
    """The first value past the bar, as text; empty if no single one is."""
    for entry in compare_values(artifact, program, inputs, function=function):
        if not entry.difference.within(artifact.bar):
            return str(entry)
    return ""


def _observed(
    artifact: CoremlArtifact, inputs: Mapping[str, torch.Tensor], function: str, observe: Any
) -> None:
    interpreter = artifact.interpreter(function)
    names = artifact._border(function)["inputs"]
    given = {names.get(n, n): artifact._lowered(v) for n, v in inputs.items()}
    interpreter.run(given, artifact._state(function), observe=observe)


def _measured(expected: torch.Tensor, value: torch.Tensor) -> Difference | None:
    """None where the two can't be one value: another number of elements, or no floats."""
    if expected.numel() != value.numel() or not expected.is_floating_point():
        return None
    if not value.is_floating_point() or expected.shape != value.shape:
        return None
    return difference(expected, value)
