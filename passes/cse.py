"""cse: compute equal things once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from resplice import weights
from resplice.change import Change
from resplice.context import Context
from resplice.pass_base import Pass
from resplice.passes.canonicalize import remove_dead
from resplice.program import Program


@dataclass(frozen=True)
class Cse(Pass):
    """Common subexpression elimination; random ops and state writes are left alone.

    %2 = aten.cos(%1)
    %3 = aten.cos(%1)            ->   %2 = aten.cos(%1)
    %4 = aten.add(%2, %3)             %3 = aten.add(%2, %2)
    """

    name = "cse"

    def run(self, program: Program, context: Context) -> Change:
        """Merge in graph order, so that chains merge in one sweep."""
        merged, known = 0, dict[Hashable, fx.Node]()
        for node in list(program.graph.nodes):
            key = _key(program, node)
            if key is None:
                continue
            first = known.setdefault(key, node)
            if first is not node and context.take(f"cse:{node.name}"):
                node.replace_all_uses_with(first)
                program.graph.erase_node(node)
                merged += 1
        remove_dead(program)
        return Change(notes=[f"{merged} nodes merged"])


def _key(program: Program, node: fx.Node) -> Hashable | None:
    if node.op == "get_attr":
        written = any(user.target is torch.ops.aten.copy_.default for user in node.users)
        return None if written else ("weight", weights.key(program.weight(node)))
    if node.op != "call_function" or not is_pure(node):
        return None
    return (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))


def is_pure(node: fx.Node) -> bool:
    """Whether the same inputs always give the same result and nothing is written."""
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        random = torch.Tag.nondeterministic_seeded in tags
        return not random and not node.target._schema.is_mutable and not node.is_impure()
    return not node.is_impure()


def _frozen(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, bool | int | float):
        return (type(value).__name__, repr(value))  # 0.0 and -0.0 are equal, but not the same
    return value  # type: ignore[no-any-return]  # nodes, dtypes, devices and text hash by themselves
