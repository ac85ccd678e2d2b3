"""What the experts of `moe_ffn` compute, and which of them a token is sent to.

Source: CMoE, arXiv 2502.04416, sections on the analytical router and the expert forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x) * functional.relu(x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
SCORES = ("absolute", "signed", "linear")


def hidden(z: Tensor, activation: str, gated: bool) -> Tensor:
    """Neurons from their projections.

    Args:
        z: [..., 2m] with the gates first if `gated`, else [..., m].
        activation: A key of `ACTIVATIONS`.
        gated: Whether the activated half multiplies the other one.

    Returns:
        [..., m].
    """
    act = ACTIVATIONS[activation]
    if not gated:
        return act(z)
    gate, up = z.chunk(2, -1)
    return act(gate) * up


def expert_scores(
    x: Tensor, router: Tensor, router_bias: Tensor | None, experts: int, activation: str,
    gated: bool, score: str,
) -> Tensor:  # fmt: skip
    """How much each expert wants each token, in float32 (float64 for float64 tokens).

    Args:
        x: Tokens [T, d].
        router: [R, d] for "linear"; otherwise the input rows of k representative neurons per
            expert, [R*k, d], gates first and as many rows again for "up" if `gated`.
        router_bias: One value per row, or None.
        experts: R.
        activation: Of the representative neurons.
        gated: Whether they are gated.
        score: "absolute" (sum of |h| over the representatives), "signed" (sum of h), "linear".

    Returns:
        [T, R].
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    bias = None if router_bias is None else router_bias.to(kind)
    z = functional.linear(x.to(kind), router.to(kind), bias)
    if score == "linear":
        return z
    neurons = hidden(z, activation, gated)
    neurons = neurons.abs() if score == "absolute" else neurons
    return neurons if neurons.shape[-1] == experts else neurons.unflatten(-1, (experts, -1)).sum(-1)


def route(
    scores: Tensor, gate_scale: Tensor | None, balance: Tensor | None, active: int
) -> tuple[Tensor, Tensor]:
    """Choose experts and their gates: the A largest of softmax(s) + b, g = 1 + p*u.

    Equal values go to the higher score, then to the lower index, so that every backend chooses
    alike (ReLU layers score many experts zero).

    Args:
        scores: s, [T, R].
        gate_scale: u, [R], or None for zeros.
        balance: b, [R], or None for zeros; it decides who is chosen, not the gate.
        active: A, experts per token.

    Returns:
        Which experts are chosen, boolean [T, R], and gates [T, R] in the dtype of the scores.
    """
    p = scores.softmax(-1)
    wanted = p if balance is None else p + balance.to(p.dtype)
    gates = torch.ones_like(p) if gate_scale is None else 1 + p * gate_scale.to(p.dtype)
    return largest(wanted, scores, active), gates


def largest(wanted: Tensor, scores: Tensor, active: int) -> Tensor:
    """The `active` largest of each row, boolean [T, R]; see `route` for equal values."""
    before = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).tril(-1)
    own, other = wanted.unsqueeze(-1), wanted.unsqueeze(-2)
    score, rival = scores.unsqueeze(-1), scores.unsqueeze(-2)
    tied = (rival > score) | ((rival == score) & before.to(scores.device))
    ahead = (other > own) | ((other == own) & tied)
    return ahead.sum(-1) < active


def chosen_indices(mask: Tensor, active: int) -> Tensor:
    """The chosen experts of each token, ascending: boolean [T, R] -> int64 [T, A]."""
    return mask.nonzero()[:, 1].reshape(-1, active)
