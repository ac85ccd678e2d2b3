"""Stacked weights: the experts of `moe_ffn`, and products with a constant stack of matrices.

    %9 = resplice.moe_ffn(%3, shared_in, None, shared_out, experts_in, None, experts_out, ...)
      ->
    %7 = (the always-on neurons as two linear layers, which `quest` then finds by itself)
    %8 = resplice.moe_ffn(%3, None, None, None, W1, None, W2, ...)
    %9 = aten.add(%7, %8)

W1 and W2 are `quant_weight` of packed codes, rotated back, so the router reads what it read before.
The router and gates keep their precision, and so do activations inside the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.change import Change
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.moe_lowering import emit_hidden
from resplice.origin import describe_target
from resplice.passes.quest.roles import role_of
from resplice.passes.quest.site import QuestRule, joined
from resplice.pattern import Match, Var, either, resplice, shared
from resplice.pattern import aten as term
from resplice.program import Program

aten = torch.ops.aten
_NAMES = (
    "x", "shared_in", "shared_in_bias", "shared_out", "experts_in", "experts_in_bias",
    "experts_out", "out_bias", "router", "router_bias", "gate_scale", "balance", "active",
    "activation", "gated", "score",
)  # fmt: skip
_MATRICES = ("shared_in", "shared_out", "experts_in", "experts_out")
_KEPT = "its router and the activations of its experts keep their precision"


def _stored(value: Any) -> str | None:
    kept = value is None or (isinstance(value, fx.Node) and value.op == "get_attr")
    return None if kept else "it is computed, not a constant of the program"


class QuantizeExperts(QuestRule):
    """`moe_ffn` whose weights are constants."""

    name = "experts"

    def pattern(self) -> Any:
        """The calls, with their constants."""
        return resplice.moe_ffn(
            *(Var(name, _stored if name in _MATRICES else None) for name in _NAMES)
        )

    def check(self, found: Match) -> None:
        """What is refused, with the reason."""
        narrow = self.options.weight_bits < 16
        found.require(narrow, "activations inside experts keep their precision")
        for name in ("experts_in", "experts_out"):
            weight = found[name]
            if isinstance(weight, fx.Node):
                self.require_weight(found, weight, int(weight.meta["val"].shape[-1]))

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """The same on few bits."""
        given = {name: found[name] for name in _NAMES}
        always = None
        if given["shared_in"] is not None:
            always = self._always_on(given, build)
            given |= dict.fromkeys(("shared_in", "shared_in_bias", "shared_out", "out_bias"))
        if given["experts_in"] is None or given["active"] == 0:
            assert always is not None, "a layer has neurons"
            return always, {}
        parts = []
        for name in ("experts_in", "experts_out"):
            given[name], metrics = self.rewritten(build, given[name])
            parts.append(metrics)
        routed = build(moe_ffn.overload, *given.values())
        new = routed if always is None else build(aten.add.Tensor, always, routed)
        return new, {**joined(parts), "summary": _KEPT}

    def _always_on(self, given: dict[str, Any], build: Builder) -> fx.Node:
        """Its two linear layers, whose weights the other rules then see."""
        x, first, bias = given["x"], given["shared_in"], given["shared_in_bias"]
        z = build(aten.linear.default, x, first, bias)
        hidden = emit_hidden(build, z, given["activation"], given["gated"])
        return build(aten.linear.default, hidden, given["shared_out"], given["out_bias"])


def _constant_stack(value: Any) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return "it is computed, not a constant of the program"
    weight = value.meta["val"]
    return None if weight.dim() > 2 and weight.is_floating_point() else "it is no stack of matrices"


class QuantizeStack(QuestRule):
    """`matmul(x, W)` or `bmm(x, W)` with W [..., K, N], or [..., N, K] transposed on the way."""

    name = "stack"

    def pattern(self) -> Any:
        """The calls, with their constants."""
        x, weight = Var("x"), Var("weight", _constant_stack)
        turned = shared(term.transpose(weight, -2, -1))
        return either(
            term.matmul(x, turned), term.bmm(x, turned), term.matmul(x, weight), term.bmm(x, weight)
        )

    def check(self, found: Match) -> None:
        """What is refused, with the reason."""
        weight = found.node("weight")
        self.require_untouched(found, found.node("x"))
        self.require_weight(found, weight, int(found.root.args[1].meta["val"].shape[-2]))  # type: ignore[union-attr]  # matched
        if not self.options.head:
            role = role_of(found.root)
            found.require(role is None, f"it is {role} (head=true includes it)")

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """The same on few bits."""
        weight, target = found.node("weight"), found.root.target
        straight = found.root.args[1] is weight
        if self.options.weight_bits == 16:
            x = self.input(build, found.node("x"), back=True)
            return build(target, x, found.root.args[1]), {}
        x = self.input(build, found.node("x"))
        held, metrics = self.rewritten(build, weight, transposed=straight, back=False)
        return build(target, x, build(aten.transpose.int, held, -2, -1)), metrics


_VIEWS = (
    aten.transpose.int, aten.permute.default, aten.select.int, aten.index.Tensor,
    aten.index_select.default, aten.slice.Tensor, aten._to_copy.default, aten.squeeze.dim,
)  # fmt: skip
_PRODUCTS = (
    "aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum", "aten._grouped_mm", "aten.mm",
    "aten.linear", "aten.addmm",
)  # fmt: skip


def refuse_stacks(program: Program, change: Change) -> None:
    """Say which products read a constant stack of matrices in a way that no rule takes."""
    known = {item.node for item in change.refusals} | {item.node for item in change.sites}
    for node in list(program.graph.nodes):
        if node.op != "get_attr" or _constant_stack(node):
            continue
        frontier = list(node.users)
        while frontier:
            user = frontier.pop()
            if user.target in _VIEWS:
                frontier += list(user.users)
            elif describe_target(user) in _PRODUCTS and user.name not in known:
                what = describe_target(user)
                change.refuse(user, f"{what} reads a stack of matrices in a way no rule takes")
                known.add(user.name)
