"""Routers of a carved layer: from representative neurons, by ridge regression, or random.

Source: CMoE, arXiv 2502.04416 (analytic). Several representatives per expert, the ridge router and
routers of ungated or biased layers are our extension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.passes.cmoe.clusters import representatives
from resplice.passes.cmoe.ffn import Ffn
from resplice.passes.cmoe.profile import Markers, all_reduced, chunks

ROUTERS = ("analytic", "analytic-multi", "ridge", "random")
MULTI = 8
"""Representatives per expert of `analytic-multi`."""
_RIDGE = 1e-3


@dataclass(frozen=True)
class Router:
    """Weights of a router as `moe_ffn` takes them.

    Attributes:
        weight: [rows, d].
        bias: [rows] or None.
        score: "absolute", "signed" or "linear".
        representatives: int64 [R, k]; empty for linear routers.
    """

    weight: Tensor
    bias: Tensor | None
    score: str
    representatives: Tensor


def make_router(
    kind: str, ffn: Ffn, x: Tensor, markers: Markers, experts: tuple[Tensor, ...], profile: str
) -> Router:
    """Build a router.

    Args:
        kind: One of `ROUTERS`.
        ffn: The dense layer.
        x: Calibration tokens [q, d] of this process.
        markers: Their profile.
        experts: Neurons of each expert.
        profile: "code" scales router rows to length one and takes |score|; "paper" does neither.

    Raises:
        OpError: There is no such router.
    """
    if kind == "ridge":
        return _linear(*ridge(ffn, x, experts), ffn.first.dtype)
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        return _linear(
            torch.randn(len(experts), ffn.first.shape[1], generator=generator), None,
            ffn.first.dtype,
        )  # fmt: skip
    if kind not in ROUTERS:
        raise OpError("carve", "router", f"is {kind!r}, not one of {', '.join(ROUTERS)}")
    count = MULTI if kind == "analytic-multi" else 1
    chosen = representatives(markers, experts, count, euclidean=profile == "paper")
    return neuron_router(ffn, chosen, profile)


def neuron_router(ffn: Ffn, chosen: Tensor, profile: str) -> Router:
    """The analytic router of given representative neurons [R, k]."""
    weight, bias = ffn.rows(chosen.flatten())
    if profile == "paper":
        return Router(weight, bias, "signed", chosen)
    length = weight.norm(dim=-1).clamp_min(1e-12)
    bias = None if bias is None else bias / length
    return Router(weight / length.unsqueeze(-1), bias, "absolute", chosen)


def _linear(weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> Router:
    none = torch.empty(len(weight), 0, dtype=torch.int64)
    return Router(weight.to(kind), None if bias is None else bias.to(kind), "linear", none)


def expert_mass(ffn: Ffn, x: Tensor, experts: tuple[Tensor, ...]) -> Tensor:
    """Sum of |h| over each expert's neurons: [q, d] -> [q, R], what the L1 oracle ranks by."""
    return torch.stack([ffn.hidden(x, members).abs().sum(-1) for members in experts], -1)


def ridge(ffn: Ffn, x: Tensor, experts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Regress each expert's mass on the token: W = (X^T X + lambda)^-1 X^T mass, X = [x, 1].

    lambda is 1e-3 per token; the sums run over all processes in float64.

    Returns:
        Weight [R, d] and bias [R], float64.
    """
    width = int(x.shape[1]) + 1
    normal = torch.zeros(width, width + len(experts), dtype=torch.float64)
    with torch.no_grad():
        for part in chunks(x, sum(map(len, experts)) + width):
            inputs = torch.nn.functional.pad(part.double(), (0, 1), value=1.0)
            mass = expert_mass(ffn, part, experts).double()
            normal += inputs.T @ torch.cat((inputs, mass), 1)
    count = all_reduced(torch.tensor([float(len(x))], dtype=torch.float64))
    normal = all_reduced(normal)
    system = normal[:, :width] + _RIDGE * float(count) * torch.eye(width, dtype=torch.float64)
    solved = torch.linalg.solve(system, normal[:, width:])
    return solved[:-1].T.contiguous(), solved[-1].contiguous()
