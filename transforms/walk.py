"""Executing a program node by node on real values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from resplice.program import Program

aten = torch.ops.aten


Change = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]
"""What to call a node with, of what it would be called with."""


def node_values(
    program: Program, inputs: Mapping[str, torch.Tensor], change: Change | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node with its value, in order; the output node comes with the tuple of outputs.

    A value is dropped after its last use. No gradients.

    Args:
        program: What to execute; its state stays as it is.
        inputs: Flat, named.
        change: Replaces positional arguments.
    """
    env: dict[fx.Node, Any] = {}
    last = _last_uses(program.graph)
    for node in program.graph.nodes:
        if node.op == "output":
            yield node, tuple(env[n] for n in program.output_nodes)
            return
        with torch.no_grad():
            env[node] = run_node(program, node, env, inputs, change)
        yield node, env[node]
        for dead in last.get(node, ()):
            env.pop(dead, None)


def run_node(
    program: Program, node: fx.Node, env: Mapping[fx.Node, Any],
    inputs: Mapping[str, torch.Tensor], change: Change | None = None,
) -> Any:  # fmt: skip
    """Execute one node on real values; inputs that the graph writes are cloned."""
    if node.op == "placeholder":
        return inputs[node.name].clone()
    if node.op == "get_attr":
        return program.weight(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    args = change(node, args) if change else args
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


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> values that are used there for the last time."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                result.setdefault(node, []).append(used)
    return result
