"""fold: compute what depends on constants only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from resplice.build import Builder
from resplice.change import Change
from resplice.context import Context
from resplice.ops import find_op
from resplice.pass_base import Pass, option
from resplice.passes.canonicalize import remove_dead
from resplice.passes.cse import is_pure
from resplice.program import Program
from resplice.rules import replace_node


@dataclass(frozen=True)
class Fold(Pass):
    """Constant folding.

        %1 = weight("table"): f32[8]
        %2 = aten.cos(%1): f32[8]     ->   %1 = weight("folded.cos"): f32[8]

    A result is folded only if it is not larger than `max-kib` or than what it replaces (inputs that
    nothing else reads), so that folding never swells the program. Packed weights stay packed.
    """

    name = "fold"

    max_kib: int = option(64, "largest new constant in KiB, unless it replaces a larger one")

    def run(self, program: Program, context: Context) -> Change:
        """Evaluate in graph order; only the last node of a constant chain becomes a weight."""
        values: dict[fx.Node, torch.Tensor] = {}
        reads = Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr")
        for node in list(program.graph.nodes):
            value = self._value(program, node, values, reads)
            if value is not None:
                values[node] = value
        for node in [n for n in values if n.op == "call_function"]:
            needed = any(user not in values for user in node.users)
            if needed and context.take(f"fold:{node.name}"):
                self._replace(program, node, values[node])
        return Change(notes=[f"{remove_dead(program)} constant nodes dropped"])

    def _value(
        self,
        program: Program,
        node: fx.Node,
        values: dict[fx.Node, torch.Tensor],
        reads: Counter[str],
    ) -> torch.Tensor | None:
        if node.op == "get_attr":
            written = any(user.target is torch.ops.aten.copy_.default for user in node.users)
            return None if written else program.weight(node)
        inputs = node.all_input_nodes
        static = isinstance(node.meta.get("val"), torch.Tensor) and all(n in values for n in inputs)
        if node.op != "call_function" or not static or not is_pure(node) or _is_symbolic(node):
            return None
        if _unpacks(node):
            return None
        gone = [n for n in inputs if len(n.users) == 1 and reads[str(n.target)] <= 1]
        if _bytes(node.meta["val"]) > max(
            self.max_kib * 1024, sum(_bytes(values[n]) for n in gone)
        ):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        assert callable(node.target), node
        with torch.no_grad():
            result: torch.Tensor = node.target(*args, **kwargs)
        return result

    def _replace(self, program: Program, node: fx.Node, value: torch.Tensor) -> None:
        name = f"folded.{node.name}"
        new = Builder(program, node, self.name).weight(name, value.detach().clone())
        replace_node(program, node, new, self.name)


def _unpacks(node: fx.Node) -> bool:
    """Whether an op of ours holds a weight as codes, which folding would undo."""
    op = find_op(node.target)
    return op is not None and op.parameters is not None


def _bytes(value: torch.Tensor) -> int:
    return int(value.numel()) * value.element_size()


def _is_symbolic(node: fx.Node) -> bool:
    return any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
