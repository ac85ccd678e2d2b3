"""tile_attention on GPUs, forward: one launch for all heads, whatever their windows, and the text.

A program owns `block_m` queries of one tile (or of the text) and runs one flat loop over blocks of
`block_n` keys of the box they see, softmax online in base two and float32. No block of keys outside
the window is loaded, and no block inside is masked: only the partial block that may end the box is,
and it shares a second, short loop with the text. An axis that a head sees whole is one tile to it.

Source: arXiv 2502.04507, section 3; the box in raster order is ours (see `tile_geometry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resplice.kernels.cuda.launch import (
    Config,
    by_reference,
    configured,
    current_arch,
    launch,
)
from resplice.kernels.cuda.tile_geometry import (
    box_tokens,
    key_bias,
    load_rows,
    own_and_seen,
    reciprocal,
    store_rows,
)
from resplice.kernels.cuda.tile_problem import TileProblem, aligned, fitting, precision_of, width_of
from resplice.kernels.tile_attention import tile_attention as op


@triton.jit
def online(
    scores: tl.tensor, values: tl.tensor, total: tl.tensor, peak: tl.tensor, result: tl.tensor,
    masked: tl.constexpr, precision: tl.constexpr,
) -> Any:  # fmt: skip
    """One step of the online softmax.

    Args:
        scores: float32 [rows, keys], base two.
        values: [keys, channels].
        total: Sum of weights so far, [rows].
        peak: Largest score so far, [rows].
        result: Weighted sum so far, [rows, channels].
        masked: Whether a row may have seen no key yet.
        precision: Of the product.

    Returns:
        `total`, `peak` and `result` with these keys.
    """
    highest = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(highest == -float("inf"), 0.0, highest) if masked else highest
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    result = tl.dot(
        weights.to(values.dtype), values, result * fade[:, None], input_precision=precision
    )
    return total * fade + tl.sum(weights, 1), highest, result


@triton.jit
def tile_attention_forward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, out: tl.tensor, logsum: tl.tensor,
    table: tl.tensor, q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_token: tl.tensor, v_batch: tl.tensor,
    v_head: tl.tensor, v_token: tl.tensor, out_batch: tl.tensor, out_head: tl.tensor,
    out_token: tl.tensor, mask_batch: tl.tensor, mask_head: tl.tensor, mask_key: tl.tensor,
    heads: tl.tensor, t: tl.tensor, h: tl.tensor, w: tl.tensor, text: tl.tensor,
    image_start: tl.tensor, text_start: tl.tensor, scale: tl.tensor, d: tl.constexpr,
    dv: tl.constexpr, width: tl.constexpr, width_v: tl.constexpr, masking: tl.constexpr,
    mask_image: tl.constexpr, saves: tl.constexpr, wide: tl.constexpr, precision: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of `block_m` queries; see `attend` for the arguments."""
    block, pair = tl.program_id(0), tl.program_id(1)
    entry = table + (pair % heads) * 7
    head, batch = tl.load(entry + 6).to(tl.int64), (pair // heads).to(tl.int64)

    queries, valid, first, keys_h, keys_w, keys, words = own_and_seen(
        entry, block, t, h, w, text, image_start, text_start, block_m, False
    )
    full = keys // block_n
    rest = keys - full * block_n
    per_h, per_w = reciprocal(keys_h), reciprocal(keys_w)

    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    if masking:
        mask += batch * mask_batch + head * mask_head
    query = load_rows(
        q + batch * q_batch + head * q_head, queries, q_token, valid, d, width, wide,
        True,
    )  # fmt: skip
    total = tl.zeros([block_m], tl.float32)
    peak = tl.full([block_m], -float("inf"), tl.float32)
    result = tl.zeros([block_m, width_v], tl.float32)
    columns = tl.arange(0, block_n)
    for index in range(0, full):
        tokens = box_tokens(
            index * block_n + columns, first, keys_h, keys_w, per_h, per_w, h, w
        )  # fmt: skip
        key = load_rows(k, tokens, k_token, columns, d, width, wide, False)
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        if mask_image:
            scores += key_bias(mask, tokens, mask_key, tokens >= 0, masking)[None, :]
        value = load_rows(v, tokens, v_token, columns, dv, width_v, wide, False)
        total, peak, result = online(scores, value, total, peak, result, mask_image, precision)
    last = rest + words
    for index in tl.range(0, tl.cdiv(last, block_n), num_stages=1):
        numbers = index * block_n + columns
        inside = numbers < last
        box = box_tokens(full * block_n + numbers, first, keys_h, keys_w, per_h, per_w, h, w)
        tokens = tl.where(numbers < rest, box, text_start + numbers - rest)
        key = load_rows(k, tokens, k_token, inside, d, width, wide, True)
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        if masking:
            entries = tokens if mask_image else numbers - rest
            present = inside if mask_image else inside & (numbers >= rest)
            scores += key_bias(mask, entries, mask_key, present, masking)[None, :]
        value = load_rows(v, tokens, v_token, inside, dv, width_v, wide, True)
        total, peak, result = online(
            scores, value, total, peak, result, masking > 0, precision
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    store_rows(
        out + batch * out_batch + head * out_head, queries, out_token, valid,
        result / total[:, None], dv, width_v, wide,
    )  # fmt: skip
    if saves:
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        line_start = logsum + (batch * heads + head) * (t * h * w + text)
        tl.store(line_start + queries, peak + tl.log2(total), mask=valid)


# ---- the host ----------------------------------------------------------------------------

_CANDIDATES = {
    "sm_80": [(64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    "sm_90": [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
    "sm_100": [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
    "gfx942": [(128, 32, 4, 2), (128, 64, 8, 1), (64, 64, 4, 1)],
}
"""Queries, keys, warps and stages, the default first."""


def configs(arch: str, dtype: torch.dtype, d: int, dv: int) -> list[Config]:
    """Configurations of the forward kernel that fit, the default first.

    Args:
        arch: Such as "sm_90".
        dtype: Of queries, keys and values.
        d: Channels of queries and keys.
        dv: Channels of values.
    """
    width, width_v = width_of(d), width_of(dv)
    return fitting(
        arch, dtype, _CANDIDATES, own=width, seen=width + width_v, held=width_v, blocks="mn"
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, problem: TileProblem, saves: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel.

    Args:
        q: [B,heads,S,D].
        k: [B,heads,S,D].
        v: [B,heads,S,Dv].
        mask: Of keys, see `tile_attention`.
        problem: Canvas, windows, text, scale.
        saves: Whether gradients will be asked for.

    Returns:
        [B,heads,S,Dv], in memory [B,S,heads,Dv], and, if `saves`, the log2 of the sum of each
        query's weights before division, float32 [B,heads,S]; 0 where a query sees no key.
    """
    batch, heads, tokens, d = q.shape
    dv = v.shape[3]
    arch = current_arch()
    chosen = configured("tile_attention_forward", configs(arch, q.dtype, d, dv))
    out = q.new_empty(batch, tokens, heads, dv).transpose(1, 2)
    logsum = q.new_empty(batch, heads, tokens, dtype=torch.float32) if saves else None
    launch(
        tile_attention_forward,
        (problem.blocks(chosen.constants["block_m"]), batch * heads),
        q=q, k=k, v=v, out=out, logsum=logsum,
        **problem.mask_arguments(mask, q),
        **problem.strides(q=q, k=k, v=v, out=out),
        **problem.arguments(q),
        d=d, dv=dv, width=width_of(d), width_v=width_of(dv), saves=saves,
        wide=problem.wide(q, k, v, out), precision=precision_of(q.dtype, arch),
        **chosen.options,
    )  # fmt: skip
    return out, logsum


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The op on a GPU, without gradients; float64 goes the way of the CPU."""
    args = (q, k, v, canvas, tile, windows, text_length, text_first, mask, scale)
    if q.dtype == torch.float64:
        result: Tensor = by_reference(op, "is float64", *args, fast=True)
        return result
    problem = TileProblem.of(q, canvas, tile, windows, text_length, text_first, scale)
    return attend(aligned(q), aligned(k), aligned(v), mask, problem, False)[0]
