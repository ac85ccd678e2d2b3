"""Which operators float16 would break, found by running the program once.

Kept in float32: values past what float16 can hold, with those who read them; angles and what they
are computed from (positions count in whole numbers, float16 does so only to 2048); the mean of
squares under a reciprocal root, whose epsilon float16 can't store.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from resplice.program import Program
from resplice.walk import node_values

aten = torch.ops.aten
LARGEST = 3e4
_ANGLES = (aten.sin.default, aten.cos.default)
_ROOTS = (aten.rsqrt.default, aten.rms_norm.default, aten.reciprocal.default, aten.log.default)
_HEAVY = (
    aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.scaled_dot_product_attention.default, aten.embedding.default, aten.layer_norm.default,
)  # fmt: skip
_ROOT_DEPTH = 4


def fragile_nodes(program: Program) -> set[str]:
    """Names of the nodes that must stay in float32."""
    nodes = list(program.graph.nodes)
    wide = _past_range(program)
    wide |= angle_nodes(program.graph)
    wide |= _before((n for n in nodes if n.target in _ROOTS), depth=_ROOT_DEPTH)
    return {node.name for node in wide if node.op == "call_function"}


def angle_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Cosines and sines of a graph and what leads to them; our ops hide theirs until lowered."""
    nodes = list(graph.nodes)
    return _before((n for n in nodes if n.target in _ANGLES), depth=len(nodes))


def _past_range(program: Program) -> set[fx.Node]:
    """Nodes that compute, or read, a value beyond `LARGEST` on the sample inputs."""
    large: set[fx.Node] = set()
    for node, value in node_values(program, program.sample_tensors()):
        if node.op != "output" and _is_large(value):
            large.add(node)
    return large | {user for node in large for user in node.users}


def _is_large(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return False
    finite = value[value.isfinite()]  # masks hold infinities on purpose
    masks = finite[finite > -1e30]
    return bool(masks.numel()) and float(masks.abs().max()) > LARGEST


def _before(ends: Iterable[fx.Node], depth: int) -> set[fx.Node]:
    """What leads to some nodes through light operators, at most `depth` steps back."""
    found, frontier = set[fx.Node](), set(ends)
    for _ in range(depth + 1):
        frontier = {node for node in frontier if node not in found}
        if not frontier:
            break
        found |= frontier
        frontier = {
            source for node in frontier for source in node.all_input_nodes
            if source.op == "call_function" and source.target not in _HEAVY
        }  # fmt: skip
    return found
