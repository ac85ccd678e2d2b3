"""The parts of `moe_ffn` that every backend emits alike: neurons, scores and the choice."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from resplice.build import Builder

aten = torch.ops.aten

_EMIT: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "silu": lambda build, x: build(aten.silu.default, x),
    "gelu": lambda build, x: build(aten.gelu.default, x),
    "gelu_tanh": lambda build, x: build(aten.gelu.default, x, approximate="tanh"),
    "gelu_sigmoid": lambda build, x: build(
        aten.mul.Tensor, x, build(aten.sigmoid.default, build(aten.mul.Tensor, x, 1.702))
    ),
    "relu": lambda build, x: build(aten.relu.default, x),
    "relu_squared": lambda build, x: _square(build, build(aten.relu.default, x)),
    "sigmoid": lambda build, x: build(aten.sigmoid.default, x),
    "tanh": lambda build, x: build(aten.tanh.default, x),
}


def _square(build: Builder, x: fx.Node) -> fx.Node:
    return build(aten.mul.Tensor, x, x)


def emit_hidden(build: Builder, z: fx.Node, activation: str, gated: bool) -> fx.Node:
    """Neurons from their projections; see `moe_routing.hidden`."""
    if not gated:
        return _EMIT[activation](build, z)
    half = int(z.meta["val"].shape[-1]) // 2
    gate = build(aten.slice.Tensor, z, -1, 0, half)
    up = build(aten.slice.Tensor, z, -1, half, 2 * half)
    return build(aten.mul.Tensor, _EMIT[activation](build, gate), up)


@dataclass(frozen=True)
class Choice:
    """What a router decided.

    Attributes:
        mask: Chosen experts, boolean [T, R].
        gates: Gates of all experts [T, R] in the dtype of the tokens; None if all are 1.
    """

    mask: fx.Node
    gates: fx.Node | None


@dataclass(frozen=True)
class Routing:
    """A router's arguments, as in `moe_ffn`."""

    router: fx.Node
    bias: fx.Node | None
    gate_scale: fx.Node | None
    balance: fx.Node | None
    active: int
    activation: str
    gated: bool
    score: str

    def choose(self, build: Builder, tokens: fx.Node, experts: int) -> Choice:
        """Emit the choice for tokens [T, d].

        Without trained gates and balance the softmax, which keeps the order, is left out.
        """
        scores = self._scores(build, tokens, experts)
        scale, balance = (_unless_zero(build, n) for n in (self.gate_scale, self.balance))
        wanted, gates = scores, None
        if scale is not None or balance is not None:
            p = build(aten.softmax.int, scores, -1)
            wanted = p if balance is None else build(aten.add.Tensor, p, balance)
            if scale is not None:
                gates = build(aten.add.Scalar, build(aten.mul.Tensor, p, scale), 1)
                kind = tokens.meta["val"].dtype
                if gates.meta["val"].dtype != kind:
                    gates = build(aten.to.dtype, gates, kind)
        return Choice(_largest(build, wanted, scores, self.active), gates)

    def _scores(self, build: Builder, tokens: fx.Node, experts: int) -> fx.Node:
        kind = torch.promote_types(tokens.meta["val"].dtype, torch.float32)
        x, weight, bias = (
            n if n is None or n.meta["val"].dtype == kind else build(aten.to.dtype, n, kind)
            for n in (tokens, self.router, self.bias)
        )
        z = build(aten.linear.default, x, weight, bias)
        if self.score == "linear":
            return z
        neurons = emit_hidden(build, z, self.activation, self.gated)
        if self.score == "absolute":
            neurons = build(aten.abs.default, neurons)
        rows = int(neurons.meta["val"].shape[-1])
        if rows == experts:
            return neurons
        sizes = [build.size(tokens, 0), experts, rows // experts]
        return build(aten.sum.dim_IntList, build.reshape(neurons, sizes), [-1])


def emit_index(build: Builder, choice: Choice, active: int) -> fx.Node:
    """The chosen experts as int64 [T, A]."""
    chosen = build(aten.to.dtype, choice.mask, torch.float32)
    best = build(aten.topk.default, chosen, active, -1)
    return build(operator.getitem, best, 1)


def _largest(build: Builder, wanted: fx.Node, scores: fx.Node, active: int) -> fx.Node:
    """`moe_routing.largest`; one comparison where both values are the same node."""
    count = int(scores.meta["val"].shape[-1])
    lower = torch.ones(count, count, dtype=torch.bool).tril(-1)
    before = build.constant(f"moe.before_{count}", lower)
    ahead = _ahead(build, scores, before)
    if wanted is not scores:
        ahead = _ahead(build, wanted, ahead)
    number = build(aten.sum.dim_IntList, build(aten.to.dtype, ahead, torch.float32), [-1])
    return build(aten.lt.Scalar, number, active - 0.5)


def _ahead(build: Builder, value: fx.Node, tied: fx.Node) -> fx.Node:
    """Which experts (last axis) stand before each (axis -2); `tied` decides equal ones."""
    own = build(aten.unsqueeze.default, value, -1)
    other = build(aten.unsqueeze.default, value, -2)
    same = build(aten.logical_and.default, build(aten.eq.Tensor, other, own), tied)
    return build(aten.logical_or.default, build(aten.gt.Tensor, other, own), same)


def _unless_zero(build: Builder, node: fx.Node | None) -> fx.Node | None:
    """None for a constant of zeros."""
    if node is None or (node.op == "get_attr" and not bool(build.program.weight(node).any())):
        return None
    return node
