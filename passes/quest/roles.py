"""Which linear layers must keep their precision, by what their result is for."""

from __future__ import annotations

import torch
from torch import fx

from resplice.kernels.code_linear import code_linear
from resplice.kernels.quant_linear import quant_linear

aten = torch.ops.aten
_PRODUCTS = (
    aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default,
    quant_linear.overload, code_linear.overload,
)  # fmt: skip
_BENDS = (
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.leaky_relu.default, aten.hardswish.default, aten.mish.default,
    aten.exp.default, aten.elu.default, aten.clamp.default, aten.hardtanh.default,
)  # fmt: skip


def role_of(node: fx.Node) -> str | None:
    """What the result is for, if it only passes through one-input ops (casts, views, soft-caps)."""
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if user.op == "output":
                return "the output head"
            if user.target is aten.topk.default:
                return "a router"
            if len([n for n in user.all_input_nodes if _is_tensor(n)]) == 1:
                frontier.append(user)
    return None


def feeds_embedding(weight: fx.Node) -> bool:
    """Whether a weight is also an embedding table."""
    readers = (user for user in weight.users)
    return any(user.target is aten.embedding.default for user in readers)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def follows_activation(x: fx.Node) -> bool:
    """Whether `x` is an activation of one linear layer, element by element, with no gate.

    Such values have a mean, which a Hadamard transform gathers in one coordinate per block.
    """
    frontier, sources, bends = [x], set[fx.Node](), False
    seen: set[fx.Node] = set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        bends |= node.target in _BENDS
        inputs = [n for n in node.all_input_nodes if _is_tensor(n) and n.op != "get_attr"]
        if _is_elementwise(node) and inputs:
            frontier += inputs
        else:
            sources.add(node)
    return bends and len(sources) == 1 and next(iter(sources)).target in _PRODUCTS


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    same = target in (aten.dropout.default, aten._to_copy.default, aten.clone.default)
    return same or (
        isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    )
