"""The fast path of `moe_ffn` and its gradient: only chosen experts run.

One token (where `moe_one_token.py` doesn't serve it) reads views of its experts' weights. Several
tokens are sorted by expert, so that each expert multiplies one dense block of rows: the layout a
grouped GEMM kernel takes (`Dispatch`).
Nothing here writes in place, so the gradient is autograd's over the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from resplice.kernels.moe_routing import chosen_indices, expert_scores, hidden, route


@dataclass(frozen=True)
class Dispatch:
    """Tokens sorted by expert.

    Attributes:
        order: int64 [T*A], places in the flattened choice, grouped by expert.
        ends: Rows of expert e are `ends[e-1]` to `ends[e]`; one number per expert.
    """

    order: Tensor
    ends: list[int]

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Dispatch:
        """Sort chosen experts [T, A]."""
        flat = chosen.flatten()
        loads = torch.bincount(flat, minlength=experts)
        return cls(flat.argsort(stable=True), loads.cumsum(0).tolist())


def fast(
    x: Tensor, shared_in: Tensor | None, shared_in_bias: Tensor | None, shared_out: Tensor | None,
    experts_in: Tensor | None, experts_in_bias: Tensor | None, experts_out: Tensor | None,
    out_bias: Tensor | None, router: Tensor | None, router_bias: Tensor | None,
    gate_scale: Tensor | None, balance: Tensor | None, active: int, activation: str, gated: bool,
    score: str,
) -> Tensor:  # fmt: skip
    """`moe_ffn` without the experts that were not chosen."""
    tokens = x.reshape(-1, x.shape[-1])
    result: Tensor | None = None
    if shared_in is not None and shared_out is not None:
        z = linear(tokens, shared_in, shared_in_bias)
        result = linear(hidden(z, activation, gated), shared_out, out_bias)
    if experts_in is not None and experts_out is not None and active > 0:
        one = _Experts(experts_in, experts_in_bias, experts_out, activation, gated)
        if router is None:
            routed = one.all(tokens)
        else:
            scores = expert_scores(
                tokens, router, router_bias, experts_in.shape[0], activation, gated, score
            )
            scale = gate_scale if gate_scale is not None and _counts(gate_scale) else None
            send = one.of_one_token if tokens.shape[0] == 1 else one.of_tokens
            routed = send(tokens, scores, scale, balance, active)
        if result is None and out_bias is not None:
            routed = routed + out_bias
        result = routed if result is None else result + routed
    assert result is not None, "verified before"
    return result.reshape(*x.shape[:-1], result.shape[-1])


@dataclass(frozen=True)
class _Experts:
    """The stacked weights of the routed experts."""

    weight: Tensor
    bias: Tensor | None
    out: Tensor
    activation: str
    gated: bool

    def one(self, tokens: Tensor, number: int) -> Tensor:
        bias = None if self.bias is None else self.bias[number]
        z = linear(tokens, self.weight[number], bias)
        return linear(hidden(z, self.activation, self.gated), self.out[number])

    def all(self, tokens: Tensor) -> Tensor:
        return torch.stack([self.one(tokens, e) for e in range(len(self.weight))]).sum(0)

    def of_tokens(
        self, tokens: Tensor, scores: Tensor, scale: Tensor | None, balance: Tensor | None,
        active: int,
    ) -> Tensor:  # fmt: skip
        """Sorted by expert: one block of rows each."""
        mask, gates = route(scores, scale, balance, active)
        chosen = chosen_indices(mask, active)
        sent = Dispatch.of(chosen, len(self.weight))
        rows, starts = tokens[sent.order // active], [0, *sent.ends[:-1]]
        blocks = [
            self.one(rows[start:end], number)
            for number, (start, end) in enumerate(zip(starts, sent.ends, strict=True))
            if end > start
        ]
        made = torch.cat(blocks) if blocks else rows.new_empty(0, self.out.shape[1])
        back = torch.empty_like(sent.order)
        back[sent.order] = torch.arange(len(back), device=back.device)
        parts = made[back].unflatten(0, (-1, active))
        if scale is not None:
            parts = parts * gates.gather(1, chosen).to(parts.dtype).unsqueeze(-1)
        total: Tensor = parts.sum(1)
        return total

    def of_one_token(
        self, token: Tensor, scores: Tensor, scale: Tensor | None, balance: Tensor | None,
        active: int,
    ) -> Tensor:  # fmt: skip
        """Views of the chosen experts' weights, chosen on the host as `moe_routing.route` does."""
        values = scores[0].tolist()
        p = scores if scale is None and balance is None else scores.softmax(-1)
        wanted = values if balance is None else (p + balance.to(p.dtype))[0].tolist()
        order = sorted(range(len(values)), key=lambda j: (-wanted[j], -values[j], j))[:active]
        parts = [self.one(token, number) for number in order]
        if scale is not None:
            gates = (1 + p * scale.to(p.dtype)).to(token.dtype)
            parts = [part * gates[:, j] for j, part in zip(order, parts, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _counts(scale: Tensor) -> bool:
    """Whether gates may differ from one, or their gradient is wanted."""
    return scale.requires_grad or bool(scale.any())


def gradients(grad: Tensor, wanted: list[bool], *args: Any) -> list[Tensor]:
    """Gradients of the wanted tensor arguments; the forward pass is computed once more.

    Returns:
        One tensor per argument, empty where it is not wanted.
    """
    with torch.enable_grad():
        inputs = [
            value.detach().requires_grad_(want) if isinstance(value, Tensor) else value
            for value, want in zip(args[: len(wanted)], wanted, strict=True)
        ]
        values: list[Any] = [*inputs, *args[len(wanted) :]]
        result = fast(*values)
        chosen = [value for value, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(result, chosen, grad, allow_unused=True))
    return [
        _or_zeros(next(found), value) if want else grad.new_empty(0)
        for value, want in zip(inputs, wanted, strict=True)
    ]


def _or_zeros(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found
