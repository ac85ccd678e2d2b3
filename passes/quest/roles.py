"""Which linear layers must keep their precision, by what their result is for."""

from __future__ import annotations

import torch
from torch import fx


def role_of(node: fx.Node) -> str | None:
    """What the result is for, if it only passes through one-input ops (casts, views, soft-caps)."""
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if user.op == "output":
                return "the output head"
            if user.target is torch.ops.aten.topk.default:
                return "a router"
            if len([n for n in user.all_input_nodes if _is_tensor(n)]) == 1:
                frontier.append(user)
    return None


def feeds_embedding(weight: fx.Node) -> bool:
    """Whether a weight is also an embedding table."""
    readers = (user for user in weight.users)
    return any(user.target is torch.ops.aten.embedding.default for user in readers)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
