"""Triton kernels that send tokens to experts: choice and gates, and a list of tokens per expert.

Nothing waits for the host and nothing is added atomically: the place of a token in its expert's
list is the number of earlier tokens in it. A choice is named by its slot, token * A + rank, where
the chosen experts of a token are ranked by their number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resplice.kernels.cuda.activations import activated
from resplice.kernels.cuda.launch import Config, configured, current_arch, launch


@triton.jit
def _projected(
    tokens: tl.tensor, router: tl.tensor, bias: tl.tensor, rows: tl.tensor, valid: tl.tensor,
    part: tl.tensor, inside: tl.tensor, d: tl.tensor, columns: tl.constexpr,
    precision: tl.constexpr, block_k: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tokens [block, d] times rows of the router, plus bias: float32 [block, columns]."""
    acc = tl.zeros((part.shape[0], columns), tl.float32)
    lane = tl.arange(0, block_k)
    for base in range(0, d, block_k):
        k = base + lane
        x = tl.load(tokens + part * d + k[None, :], inside & (k[None, :] < d), other=0.0)
        w = tl.load(
            router + rows[:, None] * d + k[None, :], valid[:, None] & (k[None, :] < d), other=0.0
        )
        acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision=precision)
    if bias is not None:
        acc += tl.load(bias + rows, valid, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _largest(
    wanted: tl.tensor, scores: tl.tensor, number: tl.tensor, count: tl.tensor, active: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Which `active` of the first `count` columns are largest; see `moe_routing.route` for ties."""
    lowest = float("-inf")
    wanted = tl.where(wanted == wanted, wanted, lowest)
    scores = tl.where(scores == scores, scores, lowest)
    left = number[None, :] < count
    chosen = (number[None, :] < 0) & (wanted == wanted)
    for _ in range(active):
        free = left & (chosen == 0)
        best = tl.max(tl.where(free, wanted, lowest), 1)
        tied = free & (wanted == best[:, None])
        top = tl.max(tl.where(tied, scores, lowest), 1)
        tied = tied & (scores == top[:, None])
        first = tl.min(tl.where(tied, number[None, :], wanted.shape[1]), 1)
        chosen = chosen | (number[None, :] == first[:, None])
    return chosen


@triton.jit
def moe_route(
    x: tl.tensor, router: tl.tensor, bias: tl.tensor, gate_scale: tl.tensor, balance: tl.tensor,
    choice: tl.tensor, gates: tl.tensor, tokens: tl.tensor, d: tl.tensor, experts: tl.tensor,
    each: tl.tensor, active: tl.constexpr, activation: tl.constexpr, gated: tl.constexpr,
    score: tl.constexpr, precision: tl.constexpr, padded: tl.constexpr, share: tl.constexpr,
    block_t: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Choose experts for block_t tokens.

    `each` representatives per expert (1 for a linear router) lie in a table of `padded` experts by
    `share` columns. Writes choice[expert, token], the rank or -1, and gates[slot].
    """
    place = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    here, column = place < tokens, tl.arange(0, padded * share)
    rows = column // share * each + column % share
    valid = (column // share < experts) & (column % share < each)
    part, inside = place[:, None], here[:, None]
    neurons = _projected(
        x, router, bias, rows, valid, part, inside, d, padded * share, precision, block_k
    )
    if score != "linear":
        neurons = activated(neurons, activation)
        if gated:
            neurons *= _projected(
                x, router, bias, rows + experts * each, valid, part, inside, d, padded * share,
                precision, block_k,
            )  # fmt: skip
        if score == "absolute":
            neurons = tl.abs(neurons)
    number = tl.arange(0, padded)
    scores = tl.sum(tl.reshape(tl.where(valid[None, :], neurons, 0.0), (block_t, padded, share)), 2)
    wanted = scores
    if gate_scale is not None or balance is not None:
        known = tl.where(number[None, :] < experts, scores, float("-inf"))
        powers = tl.exp(known - tl.max(known, 1)[:, None])
        p = powers / tl.sum(powers, 1)[:, None]
        if balance is not None:
            wanted = (
                p + tl.load(balance + number, number < experts, other=0.0).to(tl.float32)[None, :]
            )
    chosen = _largest(wanted, scores, number, experts, active).to(tl.int32)
    rank = tl.cumsum(chosen, 1) - chosen
    spot = choice + number[None, :].to(tl.int64) * tokens + part
    tl.store(spot, tl.where(chosen != 0, rank, -1), inside & (number[None, :] < experts))
    if gate_scale is not None:
        scale = tl.load(gate_scale + number, number < experts, other=0.0).to(tl.float32)
        tl.store(gates + part * active + rank, 1.0 + p * scale[None, :], inside & (chosen != 0))


@triton.jit
def moe_dispatch(
    choice: tl.tensor, slots: tl.tensor, loads: tl.tensor, tokens: tl.tensor, active: tl.tensor,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """List the slots of one expert in the order of tokens: slots[expert, place], loads[expert]."""
    expert = tl.program_id(0)
    start, count = expert.to(tl.int64) * tokens, 0
    for base in range(0, tokens, block):
        token = base + tl.arange(0, block)
        rank = tl.load(choice + start + token, token < tokens, other=-1)
        sent = (rank >= 0).to(tl.int32)
        before = tl.cumsum(sent, 0) - sent
        tl.store(slots + start + count + before, token * active + rank, sent != 0)
        count += tl.sum(sent, 0)
    tl.store(loads + expert, count)


@triton.jit
def block_of(
    loads: tl.tensor, tile: tl.tensor, experts: tl.tensor, padded: tl.constexpr,
    block_m: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Expert of a block of rows, its number among that expert's, and the expert's load.

    Blocks are numbered by expert; past the last one the expert is `experts`.
    """
    number = tl.arange(0, padded)
    load = tl.load(loads + number, number < experts, other=0)
    blocks = (load + block_m - 1) // block_m
    expert = tl.sum((tl.cumsum(blocks, 0) <= tile).to(tl.int32), 0)
    first = tile - tl.sum(tl.where(number < expert, blocks, 0), 0)
    own = tl.sum(tl.where(number == expert, load, 0), 0)
    return tl.minimum(expert, experts), first, own


# ---- launches ----------------------------------------------------------------------------


def configs(arch: str, columns: int) -> list[Config]:
    """Configurations of `moe_route`, the default first; `columns` of its table of neurons."""
    block_k = 64 if columns <= 128 else 32
    return [Config({"block_t": rows, "block_k": block_k}, 4, 2) for rows in (16, 32, 64)]


def sent(
    x: Tensor, router: Tensor, bias: Tensor | None, gate_scale: Tensor | None,
    balance: Tensor | None, experts: int, active: int, activation: str, gated: bool, score: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Slots int32 [experts, tokens], loads int32 [experts], and gates float32 [tokens, active].

    The arguments are those of `moe_ffn`; x is [tokens, d]. Gates are None where all are 1.
    """
    tokens, d = x.shape
    each = 1 if score == "linear" else router.shape[0] // ((1 + gated) * experts)
    share, padded = triton.next_power_of_2(each), triton.next_power_of_2(experts)
    padded = max(padded, 16 // share, 2)
    choice = x.new_empty((experts, tokens), dtype=torch.int32)
    gates = None if gate_scale is None else x.new_empty((tokens, active), dtype=torch.float32)
    arch = current_arch()
    config = configured("moe_route", configs(arch, padded * share))
    exact = "tf32x3" if arch.startswith("sm") and router.dtype == torch.float32 else "ieee"
    launch(
        moe_route, (-(-tokens // config.constants["block_t"]),), x=x, router=router.contiguous(),
        bias=bias, gate_scale=gate_scale, balance=balance, choice=choice, gates=gates,
        tokens=tokens, d=d, experts=experts, each=each, active=active, activation=activation,
        gated=gated, score=score, precision=exact, padded=padded, share=share, **config.options,
    )  # fmt: skip
    slots, loads = torch.empty_like(choice), x.new_empty((experts,), dtype=torch.int32)
    launch(
        moe_dispatch, (experts,), choice=choice, slots=slots, loads=loads, tokens=tokens,
        active=active, block=1024, num_warps=4, num_stages=1,
    )  # fmt: skip
    return slots, loads, gates
