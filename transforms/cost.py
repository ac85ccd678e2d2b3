"""Cost of a program: FLOPs, bytes read and written, per node and in total.

FLOPs count a multiply-add as two. Dynamic sizes are taken from the sample inputs. The time bound
`ideal_seconds` is a roofline for given peaks; ratios of two bounds need no peaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from resplice import weights
from resplice.ops import find_op
from resplice.program import Program

aten = torch.ops.aten
_VIEWS = frozenset(
    {"view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand",
     "split", "split_with_sizes", "chunk", "unbind", "detach", "alias", "t", "sym_size", "flatten",
     "unflatten"}
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """FLOPs and memory traffic in bytes."""

    flops: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Sum of two costs."""
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def program_cost(program: Program) -> Cost:
    """Cost of one call at the sample sizes."""
    total = Cost()
    for node in program.graph.nodes:
        total = total + node_cost(node)
    return total


def parameter_count(program: Program) -> int:
    """Model parameters: floating-point weights, and what packed integer weights stand for."""
    plain = {weights.key(t): t.numel() for _, t in program.named_weights() if t.is_floating_point()}
    count = sum(plain.values())
    for node in program.graph.nodes:
        op = find_op(node.target)
        if op is not None and op.parameters is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), _meta)
            count += op.parameters(*args, **kwargs)
    return count


def node_cost(node: fx.Node) -> Cost:
    """Cost of one node at the sample sizes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return Cost()
    args, kwargs = fx.map_arg((node.args, node.kwargs), _meta)
    result = _concrete(node.meta.get("val"))
    op = find_op(node.target)
    if op is not None and op.cost_rule is not None:
        return op.cost_rule(*args, **kwargs)
    if node.target._schema.name.split("::")[1] in _VIEWS:
        return Cost()
    read = sum(_bytes(_meta(item)) for item in node.all_input_nodes)
    return Cost(_flops(node, args, kwargs, result), read, _bytes(result))


def _flops(node: fx.Node, args: Any, kwargs: Any, result: Any) -> int:
    if node.target is aten.linear.default:
        return 2 * _count(result) * int(args[1].shape[-1])
    if node.target is aten.matmul.default:
        return 2 * _count(result) * int(args[0].shape[-1])
    if node.target is aten.scaled_dot_product_attention.default:
        shapes: list[torch.Size] = [item.shape for item in args[:3]]
        q, k, v = shapes
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    packet = getattr(node.target, "overloadpacket", None)
    from torch.utils.flop_counter import flop_registry  # imports triton where there is one

    counter: Callable[..., int] | None = flop_registry.get(packet)
    if counter is not None:
        return int(counter(*args, **kwargs, out_val=result))
    return _count(result)


def _count(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _meta(node: fx.Node) -> Any:
    return _concrete(node.meta.get("val"))


def _concrete(value: Any) -> Any:
    """A meta tensor with every symbolic size replaced by its sample value."""
    if isinstance(value, torch.Tensor):
        return torch.empty([_hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return type(value)(map(_concrete, value))
    return _hint(value) if isinstance(value, torch.SymInt) else value


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint if size.node.has_hint() else 1)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
