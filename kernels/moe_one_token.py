"""`moe_ffn` on one token, compiled: the decoding step of a carved model on a CPU.

One token takes as long as its weights take to read, and each operator on the way costs as much as
a tenth of them, so the whole layer is one call (`cpu/moe.c`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resplice.kernels.cpu import kernels
from resplice.kernels.moe_routing import ACTIVATIONS, SCORES

_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}
_RULE = {name: number for number, name in enumerate(SCORES)}


def one_token(
    x: Tensor, shared_in: Tensor | None, shared_in_bias: Tensor | None, shared_out: Tensor | None,
    experts_in: Tensor | None, experts_in_bias: Tensor | None, experts_out: Tensor | None,
    out_bias: Tensor | None, router: Tensor | None, router_bias: Tensor | None,
    gate_scale: Tensor | None, balance: Tensor | None, active: int, activation: str, gated: bool,
    score: str,
) -> Tensor | None:  # fmt: skip
    """The result [..., o] for a single float32 token on a CPU without gradient; None otherwise."""
    x = x.contiguous()
    tensors: tuple[Tensor | None, ...] = (
        x, shared_in, shared_in_bias, shared_out, experts_in, experts_in_bias, experts_out,
        out_bias, router, router_bias, gate_scale, balance,
    )  # fmt: skip
    library = kernels() if x.numel() == x.shape[-1] and all(map(_plain, tensors)) else None
    given = experts_out if shared_out is None else shared_out
    if library is None or given is None:
        return None
    shared = 0 if shared_out is None else shared_out.shape[-1]
    experts, neurons = (0, 0) if experts_out is None else experts_out.shape[::2]
    outputs = given.shape[-2]
    rows = 0 if router is None else router.shape[0]
    out = x.new_empty(*x.shape[:-1], outputs)
    scratch = torch.empty(shared + active * neurons + 3 * experts + rows)
    addresses: list[Any] = [None if t is None else t.data_ptr() for t in tensors]
    library.resplice_moe_one_token(
        *addresses, out.data_ptr(), scratch.data_ptr(), x.shape[-1], outputs, shared, neurons,
        experts, rows, active, _NUMBER[activation], gated, _RULE[score], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _plain(value: Tensor | None) -> bool:
    """Whether the kernel can read it, and no gradient goes through it."""
    if value is None:
        return True
    wanted = value.requires_grad and torch.is_grad_enabled()
    dense = value.dtype == torch.float32 and value.is_contiguous() and value.device.type == "cpu"
    return dense and not wanted
