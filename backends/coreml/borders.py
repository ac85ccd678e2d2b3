"""Inputs and outputs in the kinds that Core ML has: float and int32 tensors of rank 1 to 5."""

from __future__ import annotations

import torch
from torch import fx

from resplice.build import Builder
from resplice.fxtypes import returned_nodes
from resplice.origin import inherit
from resplice.program import Program

aten = torch.ops.aten


def settle_inputs(draft: Program) -> None:
    """A boolean input becomes int32 and `!= 0`, a scalar one a vector of one element."""
    for node in draft.placeholders:
        value = node.meta["val"]
        if value.dtype == torch.bool or value.dtype in (torch.int8, torch.int16, torch.uint8):
            _retyped(draft, node, value.dtype)
        if value.dim() == 0:
            _as_vector(draft, node)


def _retyped(draft: Program, node: fx.Node, dtype: torch.dtype) -> None:
    with draft.fake_mode:
        node.meta["val"] = node.meta["val"].to(torch.int32)
    users = list(node.users)
    build = Builder(draft, _after_inputs(draft))
    if dtype == torch.bool:
        new = build(aten.ne.Scalar, node, 0)
    else:
        new = build(aten.to.dtype, node, dtype)
    _redirect(node, new, users)


def _as_vector(draft: Program, node: fx.Node) -> None:
    users = list(node.users)
    with draft.fake_mode:
        node.meta["val"] = node.meta["val"].reshape(1)
    build = Builder(draft, _after_inputs(draft))
    _redirect(node, build(aten.reshape.default, node, []), users)


def _redirect(old: fx.Node, new: fx.Node, users: list[fx.Node]) -> None:
    for user in users:
        user.replace_input_with(old, new)
    inherit(new, old)


def _after_inputs(draft: Program) -> fx.Node:
    found: fx.Node = next(node for node in draft.graph.nodes if node.op != "placeholder")
    return found


def settle_outputs(draft: Program) -> None:
    """Booleans leave as int32; scalars as vectors; what is stored or returned twice is copied."""
    seen: set[fx.Node] = set()
    graph = draft.graph
    results = []
    for node in returned_nodes(graph):
        build = Builder(draft, graph.output_node())
        new, value = node, node.meta["val"]
        if value.dtype == torch.bool:
            new = build(aten._to_copy.default, new, dtype=torch.int32)
        if value.dim() == 0:
            new = build(aten.reshape.default, new, [1])
        if new in seen or new.op in ("placeholder", "get_attr"):
            new = build(aten.clone.default, new)
        new.meta["resplice_of"] = node.meta.get("resplice_of", node.name)
        seen.add(new)
        results.append(new)
    graph.output_node().args = (tuple(results),)
