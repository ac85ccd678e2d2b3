"""What every backend does with our own ops: its lowering if it has one, else the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import fx

from resplice.build import Builder
from resplice.ops import Op, find_op
from resplice.program import Program
from resplice.registry import load
from resplice.rules import replace_node

B = TypeVar("B", bound=Builder)


@dataclass
class LoweredOps(Generic[B]):
    """What became of the ops of a program.

    Attributes:
        ways: How often each op went which way, `quant_linear: lowered`.
        composite: Ops that stay in the graph and must be decomposed into their references.
        builders: The builder of every lowering, with what it noted.
    """

    ways: Counter[str] = field(default_factory=Counter)
    composite: dict[str, Op] = field(default_factory=dict)
    builders: list[B] = field(default_factory=list)


def lower_ops(draft: Program, backend: str, builder: Callable[[fx.Node], B]) -> LoweredOps[B]:
    """Replace our ops in place by what their lowering to `backend` builds.

    Args:
        draft: The program, edited in place.
        backend: The key of `Op.lowerings`.
        builder: Makes the builder that inserts right before a node.
    """
    found: LoweredOps[B] = LoweredOps()
    for node in list(draft.graph.nodes):
        op = find_op(node.target)
        if op is None:
            continue
        build = builder(node)
        lowered = _lowering(op, backend)(build, *node.args, **node.kwargs)
        if lowered is None:
            found.composite[op.name] = op
        else:
            replace_node(draft, node, lowered)
            found.builders.append(build)
        found.ways[f"{op.name}: {'reference' if lowered is None else 'lowered'}"] += 1
    return found


def _lowering(op: Op, backend: str) -> Callable[..., fx.Node | None]:
    declared = op.lowerings.get(backend)
    if declared is None:
        return lambda *_, **__: None
    return load(declared) if isinstance(declared, str) else declared
