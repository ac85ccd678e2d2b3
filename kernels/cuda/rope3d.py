"""rope3d on GPUs: queries and keys in one launch, the angles computed once for all their heads.

A program owns `block_s` tokens of one batch item, computes their cosines and sines and runs over
the heads. No tables go through memory. Angles are reduced in float64, so that positions of long
videos lose nothing, and by polynomials, so that no library call needs local memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.launch import (
    Config,
    by_reference,
    configured,
    constant,
    current_arch,
    launch,
)
from resplice.kernels.rope3d import rope3d as op

PLACES = ("batch", "outer", "token", "inner")


@triton.jit
def cos_sin(angles: tl.tensor) -> Any:
    """Cosines and sines of float32 angles, within 2e-7; valid below 3e9."""
    exact = angles.to(tl.float64)
    turns = tl.floor(exact * 0.6366197723675814 + 0.5)
    rest = (exact - turns * 1.5707963267948966).to(tl.float32)
    quarter = turns.to(tl.int64) & 3
    x = rest * rest
    sine = rest + rest * x * (
        -1.6666667e-1 + x * (8.3333333e-3 + x * (-1.9841270e-4 + x * 2.7557319e-6))
    )
    cosine = 1.0 + x * (
        -0.5 + x * (4.1666667e-2 + x * (-1.3888889e-3 + x * (2.4801587e-5 - x * 2.7557319e-7)))
    )
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return cos, tl.where(quarter >= 2, -sin, sin)


@triton.jit
def rotate_head(
    source: tl.tensor, target: tl.tensor, source_rows: tl.tensor, target_rows: tl.tensor,
    cos: tl.tensor, sin: tl.tensor, valid: tl.tensor, n: tl.constexpr, width: tl.constexpr,
    pairs: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate the [tokens, 2 n] channels of one head; the tables are [tokens, width]."""
    if pairs:
        channels = tl.arange(0, 2 * width)[None, :]
        inside = valid[:, None] & (channels < 2 * n)
        whole = tl.load(source + source_rows[:, None] + channels, mask=inside, other=0.0)
        low, high = tl.split(tl.reshape(whole.to(tl.float32), [size, width, 2]))
        result = tl.join(low * cos - high * sin, high * cos + low * sin)
        result = tl.reshape(result, [size, 2 * width])
        tl.store(
            target + target_rows[:, None] + channels, result.to(target.dtype.element_ty),
            mask=inside,
        )  # fmt: skip
    else:
        channels = tl.arange(0, width)[None, :]
        inside = valid[:, None] & (channels < n)
        places = source + source_rows[:, None] + channels
        low = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(places + n, mask=inside, other=0.0).to(tl.float32)
        places = target + target_rows[:, None] + channels
        kind = target.dtype.element_ty
        tl.store(places, (low * cos - high * sin).to(kind), mask=inside)
        tl.store(places + n, (high * cos + low * sin).to(kind), mask=inside)


@triton.jit
def rope3d_rotate(
    q: tl.tensor, q_out: tl.tensor, k: tl.tensor, k_out: tl.tensor,
    positions: tl.tensor, inv_freq: tl.tensor, axis_map: tl.tensor,
    q_batch: tl.tensor, q_outer: tl.tensor, q_token: tl.tensor, q_inner: tl.tensor,
    q_out_batch: tl.tensor, q_out_outer: tl.tensor, q_out_token: tl.tensor, q_out_inner: tl.tensor,
    k_batch: tl.tensor, k_outer: tl.tensor, k_token: tl.tensor, k_inner: tl.tensor,
    k_out_batch: tl.tensor, k_out_outer: tl.tensor, k_out_token: tl.tensor, k_out_inner: tl.tensor,
    row: tl.tensor, row_batch: tl.tensor, row_token: tl.tensor,
    tokens: tl.tensor, q_heads: tl.tensor, q_inside: tl.tensor, k_heads: tl.tensor,
    k_inside: tl.tensor, scaling: tl.tensor,
    n: tl.constexpr, width: tl.constexpr, pairs: tl.constexpr, both: tl.constexpr,
    block_s: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate `block_s` tokens of all heads; see `rotate` for the arguments."""
    batch = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * block_s + tl.arange(0, block_s)
    valid = places < tokens
    token = places.to(tl.int64)
    angle = tl.arange(0, width)
    inside = valid[:, None] & (angle < n)[None, :]
    rows = tl.load(axis_map + angle, mask=angle < n, other=0).to(tl.int64)
    where = batch * row_batch + token[:, None] * row_token + rows[None, :] * row
    angles = tl.load(positions + where, mask=inside, other=0).to(tl.float32)
    angles *= tl.load(inv_freq + angle, mask=angle < n, other=0.0)[None, :]
    cos, sin = cos_sin(angles)
    kind = q.dtype.element_ty
    cos, sin = (cos * scaling).to(kind).to(tl.float32), (sin * scaling).to(kind).to(tl.float32)
    for head in range(0, q_heads):
        outer, inner = (head // q_inside).to(tl.int64), (head % q_inside).to(tl.int64)
        rotate_head(
            q + batch * q_batch + outer * q_outer + inner * q_inner,
            q_out + batch * q_out_batch + outer * q_out_outer + inner * q_out_inner,
            token * q_token, token * q_out_token, cos, sin, valid, n, width, pairs, block_s,
        )  # fmt: skip
    if both:
        for head in range(0, k_heads):
            outer, inner = (head // k_inside).to(tl.int64), (head % k_inside).to(tl.int64)
            rotate_head(
                k + batch * k_batch + outer * k_outer + inner * k_inner,
                k_out + batch * k_out_batch + outer * k_out_outer + inner * k_out_inner,
                token * k_token, token * k_out_token, cos, sin, valid, n, width, pairs, block_s,
            )  # fmt: skip


# ---- the host ----------------------------------------------------------------------------


def configs(arch: str, n: int) -> list[Config]:
    """Configurations, the default first: tokens so that a program holds 2048 or 4096 angles."""
    width = triton.next_power_of_2(n)
    sizes = [max(1, min(128, angles // width)) for angles in (2048, 4096, 1024)]
    return [Config({"block_s": size}, 4, 1) for size in dict.fromkeys(sizes)]


def rotate(
    q: Tensor, k: Tensor | None, positions: Tensor, inv_freq: Tensor, axis_map: Sequence[int],
    scaling: float, pairs: bool, token_axis: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Launch the kernel for queries, or for queries and keys at once.

    Args:
        q: [B, .., S, .., 2N], float16, bfloat16 or float32.
        k: Like `q`, with any number of heads; or None.
        positions: [R, B or 1, S].
        inv_freq: float32 [N].
        axis_map: N rows of `positions`.
        scaling: Factor of cosines and sines.
        pairs: Channels (2n, 2n + 1) instead of (n, n + N).
        token_axis: Axis of the tokens, from the end.

    Returns:
        Both rotated, in the layouts that `torch.empty_like` gives.
    """
    n, tokens = len(axis_map), q.shape[token_axis]
    chosen = configured("rope3d_rotate", configs(current_arch(), n))
    results = [None if x is None else torch.empty_like(x) for x in (q, k)]
    arguments: dict[str, Any] = {}
    for name, x, result in (("q", q, results[0]), ("k", k, results[1])):
        arguments |= _strides(name, x, token_axis) | _strides(f"{name}_out", result, token_axis)
        arguments |= _heads(name, x, token_axis)
    one = statically_known_true(positions.shape[1] == 1)
    blocks = triton.cdiv(tokens, chosen.constants["block_s"])
    launch(
        rope3d_rotate, (blocks, q.shape[0]),
        **arguments, positions=positions, inv_freq=inv_freq.contiguous(),
        axis_map=constant(axis_map, q),
        row=positions.stride(0), row_batch=0 if one else positions.stride(1),
        row_token=positions.stride(2), tokens=tokens,
        scaling=float(scaling), n=n, width=triton.next_power_of_2(n), pairs=pairs,
        both=k is not None, **chosen.options,
    )  # fmt: skip
    assert results[0] is not None
    return results[0], results[1]


def _strides(name: str, x: Tensor | None, token_axis: int) -> dict[str, Any]:
    """A tensor, and its strides as [B, outer, S, inner, 2N]."""
    if x is None:
        return {name: None, **{f"{name}_{place}": 0 for place in PLACES}}
    axis = x.dim() + token_axis
    strides = [x.stride(0), _step(x, 1, axis), x.stride(axis), _step(x, axis + 1, x.dim() - 1)]
    named = {f"{name}_{place}": step for place, step in zip(PLACES, strides, strict=True)}
    return {name: x, **named}


def _heads(name: str, x: Tensor | None, token_axis: int) -> dict[str, Any]:
    """Heads in all, and those inside the tokens."""
    if x is None:
        return {f"{name}_heads": 0, f"{name}_inside": 0}
    axis = x.dim() + token_axis
    inside = math.prod(x.shape[axis + 1 : -1])
    return {f"{name}_heads": math.prod(x.shape[1:axis]) * inside, f"{name}_inside": inside}


def _step(x: Tensor, first: int, stop: int) -> int:
    """Stride of axes `first` to `stop` taken as one."""
    return x.stride(stop - 1) if stop > first else 0


def _flat(x: Tensor, token_axis: int) -> Tensor:
    """The tensor, copied unless its heads are evenly spaced and its channels neighbours."""
    axis = x.dim() + token_axis
    even = x.stride(-1) == 1
    for first, stop in ((1, axis), (axis + 1, x.dim() - 1)):
        for place in range(first, stop - 1):
            step = x.stride(place + 1) * x.shape[place + 1]
            even = even and statically_known_true(x.stride(place) == step)
    return x if even else x.contiguous()


def rope3d(
    x: Tensor, positions: Tensor, inv_freq: Tensor, axis_map: Sequence[int], scaling: float = 1.0,
    pairs: bool = False, token_axis: int = -2,
) -> Tensor:  # fmt: skip
    """The op on a GPU."""
    args = (positions, inv_freq, axis_map, scaling, pairs, token_axis)
    if torch.float64 in (x.dtype, inv_freq.dtype):
        result: Tensor = by_reference(op, "is float64", x, *args)
        return result
    return rotate(_flat(x, token_axis), None, *args)[0]


def rope3d_both(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, axis_map: Sequence[int],
    scaling: float = 1.0, pairs: bool = False, token_axis: int = -2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on queries and keys of one attention in one launch: the angles are shared.

    Args:
        q: See `rope3d`.
        k: Tokens, batch and channels as `q`; any number of heads.
        positions: See `rope3d`.
        inv_freq: float32 [N].
        axis_map: See `rope3d`.
        scaling: See `rope3d`.
        pairs: See `rope3d`.
        token_axis: See `rope3d`.
    """
    args = (positions, inv_freq, axis_map, scaling, pairs, token_axis)
    query, key = rotate(_flat(q, token_axis), _flat(k, token_axis), *args)
    assert key is not None
    return query, key
