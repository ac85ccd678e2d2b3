"""Typed reads of fx graphs, whose arguments torch types as a union of everything."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node), node
    return found


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor recorded for a node that computes a tensor."""
    found = node.meta["val"]
    assert isinstance(found, torch.Tensor), node
    return found


def returned(graph: fx.Graph) -> tuple[Argument, ...]:
    """What a graph returns, in order; exported graphs also return constants."""
    found = graph.output_node().args[0]
    assert isinstance(found, tuple | list), found
    return tuple(found)


def returned_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What one of our graphs returns: nodes only, by invariant."""
    found = returned(graph)
    nodes = [item for item in found if isinstance(item, fx.Node)]
    assert len(nodes) == len(found), found
    return nodes
