"""The error ledger: every node of a rewritten program against the captured original.

Both programs run in lockstep on the same inputs; nodes are paired by name (a rewrite gives its
result the name of what it replaced), and values are freed after their last use.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from resplice.compare import Difference, difference, worst
from resplice.origin import origin
from resplice.program import Program

aten = torch.ops.aten


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
    left, right = _Run(original, inputs, common), _Run(rewritten, inputs, common)
    with torch.no_grad():
        pending: dict[str, Any] = {}
        for node, value in right.stream:
            while node.name not in pending:
                other, reference = next(left.stream)
                pending[other.name] = reference
            _add(ledger, node, pending.pop(node.name), value)
        for _ in left.stream:
            pass
    for port, a, b in zip(original.outputs, left.results, right.results, strict=False):
        ledger.outputs[port.name] = difference(a, b)
    return ledger


class _Run:
    """Interprets a program, yielding the values of chosen nodes as they appear."""

    def __init__(
        self, program: Program, inputs: Mapping[str, torch.Tensor], chosen: set[str]
    ) -> None:
        self.program, self.chosen = program, chosen
        self.inputs = inputs
        self.results: tuple[torch.Tensor, ...] = ()
        self.stream = self._values()

    def _values(self) -> Iterator[tuple[fx.Node, Any]]:
        env: dict[fx.Node, Any] = {}
        last = last_uses(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.results = tuple(env[n] for n in self.program.output_nodes)
                return
            env[node] = run_node(self.program, node, env, self.inputs)
            if node.name in self.chosen:
                yield node, env[node]
            for dead in last.get(node, ()):
                env.pop(dead, None)


def run_node(
    program: Program, node: fx.Node, env: Mapping[fx.Node, Any], inputs: Mapping[str, torch.Tensor]
) -> Any:
    """Execute one node on real values; inputs that the graph writes are cloned."""
    if node.op == "placeholder":
        return inputs[node.name].clone()
    if node.op == "get_attr":
        return program.weight(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.target is aten.copy_.default:
        return args[0]  # comparisons do not advance the model's state
    assert callable(node.target), node
    if not _is_random(node):
        return node.target(*args, **kwargs)
    with torch.random.fork_rng():  # the same draw wherever a node of that name runs
        torch.manual_seed(zlib.crc32(node.name.encode()))
        return node.target(*args, **kwargs)


def _is_random(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> values that are used there for the last time."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                result.setdefault(node, []).append(used)
    return result


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
