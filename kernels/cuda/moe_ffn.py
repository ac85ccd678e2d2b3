"""Triton kernels of `moe_ffn`: grouped products over the tokens sent to each expert.

`moe_in` computes gate, up and activation of one block of rows of one expert; `moe_out` projects
back, weighted by gates. Each chosen expert of a token writes a row of its own, and the last launch
adds those rows, in order, to the always-on neurons and the bias: no atomics, so results do not
change from run to run. Blocks beyond the tokens that are there end at once: the grid needs no
numbers from the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.activations import activated
from resplice.kernels.cuda.launch import Config, by_reference, configured, current_arch, launch
from resplice.kernels.cuda.moe_routing import block_of, sent
from resplice.kernels.cuda.pruning import fitting
from resplice.kernels.moe_ffn import moe_ffn as op


@triton.jit
def _rows(
    slots: tl.tensor, loads: tl.tensor, tokens: tl.tensor, experts: tl.tensor, active: tl.tensor,
    padded: tl.constexpr, block_m: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Expert, slots and tokens of this block of rows, and which of them are there.

    Without `slots` every expert gets every token, in blocks of block_m.
    """
    tile, lane = tl.program_id(0), tl.arange(0, block_m)
    if slots is None:
        blocks = (tokens + block_m - 1) // block_m
        expert, place = tile // blocks, tile % blocks * block_m + lane
        here = place < tokens
        slot = place.to(tl.int64) * experts + expert
        token = place.to(tl.int64)
    else:
        expert, first, load = block_of(loads, tile, experts, padded, block_m)
        place = first * block_m + lane
        here = place < load
        slot = tl.load(slots + expert.to(tl.int64) * tokens + place, here, other=0).to(tl.int64)
        token = slot // active
    return expert.to(tl.int64), slot, token, here


@triton.jit
def moe_in(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, slots: tl.tensor, loads: tl.tensor,
    h: tl.tensor, tokens: tl.tensor, d: tl.tensor, m: tl.tensor, experts: tl.tensor,
    active: tl.tensor, activation: tl.constexpr, gated: tl.constexpr, precision: tl.constexpr,
    padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Neurons h[slot, block_n of m]."""
    expert, slot, token, here = _rows(slots, loads, tokens, experts, active, padded, block_m)
    if expert == experts:
        return
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    some, double = column < m, 2 * m if gated else m
    own, lane = weight + expert * double * d, tl.arange(0, block_k)
    row, line = x + token[:, None] * d, own + column[:, None].to(tl.int64) * d
    z = tl.zeros((block_m, block_n), tl.float32)
    up = tl.zeros((block_m, block_n), tl.float32)
    for base in range(0, d, block_k):
        k = (base + lane)[None, :]
        a = tl.load(row + k, here[:, None] & (k < d), other=0.0)
        b = tl.load(line + k, some[:, None] & (k < d), other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision=precision)
        if gated:
            c = tl.load(line + m * d + k, some[:, None] & (k < d), other=0.0)
            up = tl.dot(a, tl.trans(c), up, input_precision=precision)
    if bias is not None:
        z += tl.load(bias + expert * double + column, some, other=0.0).to(tl.float32)[None, :]
        if gated:
            up += tl.load(bias + expert * double + m + column, some, other=0.0).to(tl.float32)[
                None, :
            ]
    neurons = activated(z, activation)
    if gated:
        neurons *= up
    out = h + slot[:, None] * m + column[None, :]
    tl.store(out, neurons.to(h.dtype.element_ty), here[:, None] & some[None, :])


@triton.jit
def moe_out(
    h: tl.tensor, weight: tl.tensor, bias: tl.tensor, gates: tl.tensor, parts: tl.tensor,
    slots: tl.tensor, loads: tl.tensor, y: tl.tensor, tokens: tl.tensor, m: tl.tensor, n: tl.tensor,
    experts: tl.tensor, active: tl.tensor, count: tl.tensor, precision: tl.constexpr,
    padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs y[slot, block_n of n], by gates[slot]; plus parts[slot * count + ...] and bias."""
    expert, slot, _, here = _rows(slots, loads, tokens, experts, active, padded, block_m)
    if expert == experts:
        return
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    some = column < n
    row, line = h + slot[:, None] * m, weight + (expert * n + column[:, None]) * m
    acc = tl.zeros((block_m, block_n), tl.float32)
    lane = tl.arange(0, block_k)
    for base in range(0, m, block_k):
        k = (base + lane)[None, :]
        a = tl.load(row + k, here[:, None] & (k < m), other=0.0)
        b = tl.load(line + k, some[:, None] & (k < m), other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=precision)
    if gates is not None:
        acc *= tl.load(gates + slot, here, other=0.0)[:, None]
    inside = here[:, None] & some[None, :]
    if parts is not None:
        for part in range(count):
            at = (slot[:, None] * count + part) * n + column[None, :]
            acc += tl.load(parts + at, inside, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + column, some, other=0.0).to(tl.float32)[None, :]
    tl.store(y + slot[:, None] * n + column[None, :], acc.to(y.dtype.element_ty), inside)


@triton.jit
def moe_sum(
    parts: tl.tensor, bias: tl.tensor, y: tl.tensor, size: tl.tensor, n: tl.tensor,
    count: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """y[token, n] = the sum of parts[token, count, n], in order, and bias."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    token, column = at // n, at % n
    acc = tl.zeros((block,), tl.float32)
    for part in range(count):
        acc += tl.load(parts + (token * count + part) * n + column, at < size, other=0.0).to(
            tl.float32
        )
    if bias is not None:
        acc += tl.load(bias + column, at < size, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), at < size)


# ---- configurations ----------------------------------------------------------------------


def configs(arch: str, dtype: torch.dtype, rows: int, accumulators: int) -> list[Config]:
    """Configurations of `moe_in` (two accumulators if gated) and `moe_out`, the default first.

    Args:
        arch: "sm_90", "gfx942" ...
        dtype: Of tokens and weights.
        rows: Expected of an expert; may be symbolic.
        accumulators: 1 or 2.
    """
    stages = 2 if arch.startswith("gfx") else 3

    def of(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
        sizes = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
        return Config(sizes, warps, stages)

    def loaded(config: Config) -> int:
        sizes = config.constants
        lines = sizes["block_m"] + accumulators * sizes["block_n"]
        return int(lines * sizes["block_k"] * dtype.itemsize)

    wide = 128 // accumulators
    if statically_known_true(rows <= 16):
        block_k = 128 if dtype.itemsize == 2 else 32
        every = [of(16, 32, block_k, 4), of(16, 64, 64, 4), of(16, 16, 128, 2)]
    elif dtype.itemsize == 4:
        every = [of(64, wide // 2, 32, 4), of(32, 32, 32, 4)]
    elif statically_known_true(rows <= 64):
        every = [of(64, 64, 64, 4), of(32, 64, 64, 4)]
    else:
        every = [of(128, wide, 64, 8), of(64, wide, 64, 4), of(128, 2 * wide, 64, 8)]
    return fitting(every, arch, loaded, accumulators)


# ---- the op ------------------------------------------------------------------------------


def moe_ffn(
    x: Tensor, shared_in: Tensor | None, shared_in_bias: Tensor | None, shared_out: Tensor | None,
    experts_in: Tensor | None, experts_in_bias: Tensor | None, experts_out: Tensor | None,
    out_bias: Tensor | None, router: Tensor | None, router_bias: Tensor | None,
    gate_scale: Tensor | None, balance: Tensor | None, active: int, activation: str, gated: bool,
    score: str,
) -> Tensor:  # fmt: skip
    """See `resplice.kernels.moe_ffn`; float64 is left to the reference."""
    if x.dtype == torch.float64:
        found: Tensor = by_reference(
            op, "is float64",
            x, shared_in, shared_in_bias, shared_out, experts_in, experts_in_bias, experts_out,
            out_bias, router, router_bias, gate_scale, balance, active, activation, gated, score,
        )  # fmt: skip
        return found
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    width = (experts_out if shared_out is None else shared_out).shape[-2]  # type: ignore[union-attr]
    y = x.new_empty((*x.shape[:-1], width))
    if statically_known_true(y.numel() == 0):
        return y
    parts = None
    if experts_in is not None and experts_out is not None and active > 0:
        slots = loads = gates = None
        count = experts_in.shape[0]
        if router is not None:
            slots, loads, gates = sent(
                tokens, router, router_bias, gate_scale, balance, count, active, activation,
                gated, score,
            )  # fmt: skip
        parts = x.new_empty((tokens.shape[0], active, width))
        _layer(
            tokens, experts_in, experts_in_bias, experts_out, parts, activation, gated,
            slots=slots, loads=loads, gates=gates, active=active,
        )  # fmt: skip
    if shared_in is None or shared_out is None:
        assert parts is not None, "verified before"
        launch(
            moe_sum, (-(-y.numel() // 1024),), parts=parts, bias=out_bias, y=y, size=y.numel(),
            n=width, count=parts.shape[1], block=1024, num_warps=4, num_stages=1,
        )  # fmt: skip
        return y
    _layer(
        tokens, shared_in[None], shared_in_bias, shared_out[None], y, activation, gated,
        parts=parts, bias=out_bias,
    )  # fmt: skip
    return y


def _layer(
    x: Tensor, weight: Tensor, in_bias: Tensor | None, out: Tensor, y: Tensor, activation: str,
    gated: bool, *, slots: Tensor | None = None, loads: Tensor | None = None,
    gates: Tensor | None = None, parts: Tensor | None = None, bias: Tensor | None = None,
    active: int = 1,
) -> None:  # fmt: skip
    """Both products of stacked experts; y gets one row per slot."""
    tokens, d = x.shape
    experts, n, m = out.shape
    h = x.new_empty((tokens, active, m))
    rows = tokens * active // experts
    arch = current_arch()
    exact = "tf32x3" if arch.startswith("sm") and x.dtype == torch.float32 else "ieee"
    common: dict[str, Any] = {
        "slots": slots, "loads": loads, "tokens": tokens, "experts": experts, "active": active,
        "precision": exact, "padded": max(2, triton.next_power_of_2(experts)),
    }  # fmt: skip
    config = configured("moe_in", configs(arch, x.dtype, rows, 1 + gated))
    launch(
        moe_in, (_blocks(common, config), -(-m // config.constants["block_n"])), x=x,
        weight=weight.contiguous(), bias=in_bias, h=h, d=d, m=m, activation=activation,
        gated=gated, **common, **config.options,
    )  # fmt: skip
    config = configured("moe_out", configs(arch, x.dtype, rows, 1))
    launch(
        moe_out, (_blocks(common, config), -(-n // config.constants["block_n"])), h=h,
        weight=out.contiguous(), bias=bias, gates=gates, parts=parts, y=y, m=m, n=n,
        count=0 if parts is None else parts.shape[1], **common, **config.options,
    )  # fmt: skip


def _blocks(common: dict[str, Any], config: Config) -> Any:
    """Blocks of rows there may be at most: every expert's last one may be partly filled."""
    block_m: int = config.constants["block_m"]
    tokens, experts = common["tokens"], common["experts"]
    if common["slots"] is None:
        return experts * -(-tokens // block_m)
    total = tokens * common["active"]
    most = total // block_m + experts
    return total if statically_known_true(total < most) else most
