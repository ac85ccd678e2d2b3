"""moe_ffn for Core ML: gathered weights for one token, masked or capacity for several.

- gather: the chosen experts' weights are picked out of the stack and multiplied; for one token.
- masked: every expert runs and unchosen ones are multiplied by zero; the reference, exact, any
  number of tokens, saves nothing.
- capacity: each expert takes at most C tokens, C = ceil(factor * T * A / R); exact while no expert
  is sent more. An overflow drops tokens, and the artefact is then held back by its check.

"auto" is gather for a single token and masked otherwise. Core ML has no loop over as many rows as
the data says that would be of use.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder
from resplice.errors import LoweringError
from resplice.kernels.moe_lowering import Choice, Routing, emit_hidden, emit_index

aten = torch.ops.aten


def lower(
    build: CoremlBuilder, x: fx.Node, shared_in: fx.Node | None, shared_in_bias: fx.Node | None,
    shared_out: fx.Node | None, experts_in: fx.Node | None, experts_in_bias: fx.Node | None,
    experts_out: fx.Node | None, out_bias: fx.Node | None, router: fx.Node | None,
    router_bias: fx.Node | None, gate_scale: fx.Node | None, balance: fx.Node | None, active: int,
    activation: str, gated: bool, score: str,
) -> fx.Node | None:  # fmt: skip
    """Replace one moe_ffn, or return None for its masked reference.

    Raises:
        LoweringError: The strategy that was asked for needs another number of tokens.
    """
    count = _tokens(x)
    strategy = build.options.moe_strategy
    if strategy == "auto":
        strategy = "gather" if count == 1 else "masked"
    if experts_in is None or experts_out is None or router is None or strategy == "masked":
        return None
    if count is None or (strategy == "gather" and count != 1):
        wanted = "one token" if strategy == "gather" else "a fixed number of tokens"
        raise LoweringError(
            "coreml", [f"moe_strategy={strategy} needs {wanted}"], hint="moe_strategy=masked"
        )
    tokens = build.reshape(x, [count, x.meta["val"].shape[-1]])
    routing = Routing(router, router_bias, gate_scale, balance, active, activation, gated, score)
    experts = int(experts_out.meta["val"].shape[0])
    choice = routing.choose(build, tokens, experts)
    layer = _Layer(build, experts_in, experts_in_bias, experts_out, activation, gated)
    if strategy == "gather":
        total = layer.gathered(tokens, choice, active)
    else:
        room = math.ceil(build.options.moe_capacity * count * active / experts)
        total = layer.with_capacity(tokens, choice, min(room, count))
    if shared_in is not None:
        z = build(aten.linear.default, tokens, shared_in, shared_in_bias)
        hidden = emit_hidden(build, z, activation, gated)
        always = build(aten.linear.default, hidden, shared_out, out_bias)
        total = build(aten.add.Tensor, total, always)
    elif out_bias is not None:
        total = build(aten.add.Tensor, total, out_bias)
    return build.reshape(total, [*x.meta["val"].shape[:-1], total.meta["val"].shape[-1]])


def _tokens(x: fx.Node) -> int | None:
    sizes = x.meta["val"].shape[:-1]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


class _Layer:
    """The routed experts of one layer."""

    def __init__(
        self, build: CoremlBuilder, weight: fx.Node, bias: fx.Node | None, out: fx.Node,
        activation: str, gated: bool,
    ) -> None:  # fmt: skip
        self.build, self.weight, self.bias, self.out = build, weight, bias, out
        self.activation, self.gated = activation, gated

    def gathered(self, token: fx.Node, choice: Choice, active: int) -> fx.Node:
        """[1, d] -> [1, o], reading A experts."""
        build = self.build
        index = build.reshape(emit_index(build, choice, active), [active])
        weight = build(aten.index_select.default, self.weight, 0, index)
        column = build.reshape(token, [1, token.meta["val"].shape[-1], 1])
        z = build.reshape(build(aten.matmul.default, weight, column), [active, -1])
        if self.bias is not None:
            z = build(aten.add.Tensor, z, build(aten.index_select.default, self.bias, 0, index))
        hidden = emit_hidden(build, z, self.activation, self.gated)
        if choice.gates is not None:
            gates = build.reshape(choice.gates, [self.out.meta["val"].shape[0], 1])
            own = build(aten.index_select.default, gates, 0, index)
            hidden = build(aten.mul.Tensor, hidden, own)
        out = build(aten.index_select.default, self.out, 0, index)
        made = build(aten.matmul.default, out, build(aten.unsqueeze.default, hidden, -1))
        return build.reshape(build(aten.sum.dim_IntList, made, [0]), [1, -1])

    def with_capacity(self, tokens: fx.Node, choice: Choice, room: int) -> fx.Node:
        """[T, d] -> [T, o], each expert on its first `room` tokens."""
        build, experts = self.build, int(self.out.meta["val"].shape[0])
        kind = tokens.meta["val"].dtype
        mask = build(aten.to.dtype, choice.mask, kind)
        place = build(aten.sub.Tensor, build(aten.cumsum.default, mask, 0), 1)
        slots = build.constant(f"moe.slots_{room}", torch.arange(room).to(kind))
        same = build(aten.eq.Tensor, build(aten.unsqueeze.default, place, -1), slots)
        same = build(aten.to.dtype, same, kind)
        send = build(aten.mul.Tensor, same, build(aten.unsqueeze.default, mask, -1))  # [T, R, C]
        gather = build.reshape(build(aten.permute.default, send, [1, 2, 0]), [experts * room, -1])
        rows = build(aten.matmul.default, gather, tokens)
        rows = build.reshape(rows, [experts, room, tokens.meta["val"].shape[-1]])
        weight = build(aten.transpose.int, self.weight, -1, -2)
        z = build(aten.matmul.default, rows, weight)
        if self.bias is not None:
            z = build(aten.add.Tensor, z, build(aten.unsqueeze.default, self.bias, 1))
        hidden = emit_hidden(build, z, self.activation, self.gated)
        made = build(aten.matmul.default, hidden, build(aten.transpose.int, self.out, -1, -2))
        back = build.reshape(made, [experts * room, self.out.meta["val"].shape[1]])
        if choice.gates is not None:
            send = build(aten.mul.Tensor, send, build(aten.unsqueeze.default, choice.gates, -1))
        return build(aten.matmul.default, build.reshape(send, [-1, experts * room]), back)
