"""Carving one feed-forward layer into a shared expert and routed ones.

Source: CMoE, arXiv 2502.04416. With every expert active the carved layer is the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.moe_routing import chosen_indices, expert_scores, route
from resplice.passes.cmoe.clusters import Groups, group_neurons
from resplice.passes.cmoe.ffn import Ffn
from resplice.passes.cmoe.profile import Markers, profile_markers
from resplice.passes.cmoe.routers import ROUTERS, Router, make_router


@dataclass(frozen=True)
class Carving:
    """A carved layer, callable on tokens like the dense one.

    Attributes:
        ffn: The dense layer it was carved from.
        groups: The partition of its neurons.
        markers: The profile it was made from.
        router: How tokens choose; None where there is nothing to choose.
        active: A, routed experts per token.
        gate_scale: u, float32 [R]; zeros.
        balance: b, float32 [R]; zeros.
    """

    ffn: Ffn
    groups: Groups
    markers: Markers
    router: Router | None
    active: int
    gate_scale: Tensor
    balance: Tensor

    @property
    def shared(self) -> Tensor:
        """Neurons that are always on, int64."""
        return self.groups.shared

    @property
    def experts(self) -> tuple[Tensor, ...]:
        """Neurons of each routed expert, int64, ascending."""
        return self.groups.experts

    @property
    def rates(self) -> Tensor:
        """Share of calibration tokens that mark each neuron, float64 [f]."""
        return self.markers.rates

    @property
    def assignment_cost(self) -> float:
        """Total distance of the routed neurons to their centroids."""
        return self.groups.cost

    @property
    def representatives(self) -> Tensor:
        """Representative neurons of each expert, int64 [R, k]; none for linear routers."""
        if self.router is None:
            return torch.empty(len(self.experts), 0, dtype=torch.int64)
        return self.router.representatives

    @property
    def router_gate(self) -> Tensor | None:
        """Router rows behind the activation [R*k, d], or a linear router's rows [R, d]."""
        if self.router is None:
            return None
        rows = len(self.router.weight)
        halves = self.ffn.gated and self.router.score != "linear"
        return self.router.weight[: rows // 2] if halves else self.router.weight

    @property
    def router_up(self) -> Tensor | None:
        """The router's other rows [R*k, d]; None without gates or with a linear router."""
        if self.router is None or not self.ffn.gated or self.router.score == "linear":
            return None
        return self.router.weight[len(self.router.weight) // 2 :]

    @property
    def cold_seeds(self) -> int:
        """Clusters whose seed no calibration token marked: give more tokens or a larger K."""
        return int((self.markers.counts[self.groups.seeds] == 0).sum())

    def arguments(self) -> dict[str, Any]:
        """The arguments of `moe_ffn` after `x`, by name."""
        ffn, router = self.ffn, self.router
        always: tuple[Tensor | None, ...] = (None, None, None)
        if len(self.shared):
            always = (*ffn.rows(self.shared), ffn.down[:, self.shared].contiguous())
        routed: tuple[Tensor | None, ...] = (None, None, None)
        if self.active:
            routed = _stacked(ffn, self.experts)
        trained = router is not None
        return {
            "shared_in": always[0], "shared_in_bias": always[1], "shared_out": always[2],
            "experts_in": routed[0], "experts_in_bias": routed[1], "experts_out": routed[2],
            "out_bias": ffn.down_bias,
            "router": router.weight if router else None,
            "router_bias": router.bias if router else None,
            "gate_scale": self.gate_scale if trained else None,
            "balance": self.balance if trained else None,
            "active": self.active, "activation": ffn.activation, "gated": ffn.gated,
            "score": router.score if router else "absolute",
        }  # fmt: skip

    def route(self, x: Tensor) -> Tensor:
        """Experts chosen for tokens [..., d], ascending: int64 [tokens, A]."""
        tokens = x.reshape(-1, x.shape[-1])
        if self.router is None:
            return torch.arange(self.active).expand(len(tokens), -1)
        router = self.router
        scores = expert_scores(
            tokens, router.weight, router.bias, len(self.experts), self.ffn.activation,
            self.ffn.gated, router.score,
        )  # fmt: skip
        mask, _ = route(scores, self.gate_scale, self.balance, self.active)
        return chosen_indices(mask, self.active)

    def __call__(self, x: Tensor) -> Tensor:
        """The carved layer: [..., d] -> [..., o]."""
        result: Tensor = moe_ffn(x, *self.arguments().values())
        return result


def _stacked(ffn: Ffn, experts: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Weights of all experts; smaller ones get neurons of zeros, which add nothing."""
    most = max(map(len, experts))
    inputs, biases, outputs = [], [], []
    for members in experts:
        missing = most - len(members)
        weight, bias = ffn.rows(members)
        inputs.append(_padded(weight, missing, 1 + ffn.gated))
        biases.append(None if bias is None else _padded(bias, missing, 1 + ffn.gated))
        outputs.append(torch.nn.functional.pad(ffn.down[:, members], (0, missing)))
    stacked = None if biases[0] is None else torch.stack([b for b in biases if b is not None])
    return torch.stack(inputs), stacked, torch.stack(outputs)


def _padded(rows: Tensor, missing: int, parts: int) -> Tensor:
    """Rows of zeros at the end of each part."""
    if missing == 0:
        return rows
    zeros = rows.new_zeros(missing, *rows.shape[1:])
    return torch.cat([piece for part in rows.chunk(parts) for piece in (part, zeros)])


def validate(experts: int, shared: int, active: int) -> None:
    """Check S, A and E.

    Raises:
        OpError: They do not fit together.
    """
    if experts < 1:
        raise OpError("carve", "experts", f"is {experts}, must be at least 1")
    if not 0 <= shared <= experts:
        raise OpError("carve", "shared", f"is {shared}, must be 0 to {experts}")
    if not 0 <= active <= experts - shared:
        raise OpError(
            "carve", "active", f"is {active}, must be 0 to {experts - shared} "
            f"({experts} experts, {shared} of them shared)",
        )  # fmt: skip
    if shared + active == 0:
        raise OpError("carve", "active", "is 0 and so is shared: nothing would be computed")


def carve(
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor,
    x: Tensor,
    *,
    experts: int,
    shared: int,
    active: int,
    k_act: int = 10,
    profile: str = "code",
    router: str = "analytic",
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Carving:
    """Carve a feed-forward layer into experts, without training.

    Args:
        gate: Rows behind the activation [f, d]; None for a layer without gates.
        up: [f, d]; for a layer without gates its only input projection, behind the activation.
        down: [o, f].
        x: Calibration tokens [..., d], padding left out.
        experts: E, shared ones included.
        shared: S, always on; merged into one of S*m neurons, m = f // E.
        active: A, routed experts per token.
        k_act: Markers per token, below f.
        profile: "code" or "paper", where the two disagree (arXiv 2502.04416 v3, official code).
        router: "analytic", "analytic-multi" (8 representatives), "ridge" or "random".
        activation: A key of `moe_routing.ACTIVATIONS`.
        gate_bias: [f] or None.
        up_bias: [f] or None.
        down_bias: [o] or None.

    Returns:
        The carved layer; in a `torch.distributed` group every process gets the same one, made
        from the tokens of all.

    Raises:
        OpError: An argument is out of range.
    """
    down, x = down.detach(), x.detach()
    gate, up, gate_bias, up_bias, down_bias = (
        value if value is None else value.detach()
        for value in (gate, up, gate_bias, up_bias, down_bias)
    )
    if gate is None and up is not None:
        ffn = Ffn(up, None, down, up_bias, None, down_bias, activation)
    elif gate is not None:
        ffn = Ffn(gate, up, down, gate_bias, up_bias, down_bias, activation)
    else:
        raise OpError("carve", "up", "is missing, and so is gate")
    return carve_ffn(
        ffn, x, experts=experts, shared=shared, active=active, k_act=k_act, profile=profile,
        router=router,
    )  # fmt: skip


def carve_ffn(
    ffn: Ffn, x: Tensor, *, experts: int, shared: int, active: int, k_act: int, profile: str,
    router: str,
) -> Carving:  # fmt: skip
    """`carve` for a layer that is already an `Ffn`; x is [..., d]."""
    validate(experts, shared, active)
    if router not in ROUTERS:
        raise OpError("carve", "router", f"is {router!r}, not one of {', '.join(ROUTERS)}")
    if experts > ffn.size:
        raise OpError("carve", "experts", f"is {experts}, there are {ffn.size} neurons")
    if x.shape[-1] != ffn.first.shape[1]:
        raise OpError("carve", "x", f"has width {x.shape[-1]}, gate has {ffn.first.shape[1]}")
    tokens = x.reshape(-1, x.shape[-1])
    markers = profile_markers(ffn, tokens, k_act, profile)
    groups = group_neurons(markers, experts, shared, euclidean=profile == "paper")
    chooses = 0 < active < experts - shared
    made = make_router(router, ffn, tokens, markers, groups.experts, profile) if chooses else None
    return assemble(ffn, markers, groups, made, active)


def assemble(
    ffn: Ffn, markers: Markers, groups: Groups, router: Router | None, active: int
) -> Carving:
    """A carving from its parts, gate scales and balance at zero."""
    zeros = torch.zeros(len(groups.experts))
    return Carving(ffn, groups, markers, router, active, zeros, zeros.clone())
