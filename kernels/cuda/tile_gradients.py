"""Gradients of tile_attention on GPUs: queries in one launch, keys and values in another.

Weights are computed again from the saved log-sums (arXiv 2307.08691). For keys, a program owns a
block of one key tile and runs over the queries that see it: windows are intervals that never move
backwards, so their inverse is a box as well. Every gradient is written once, by one program, in one
order: results do not vary from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resplice.kernels.cuda.launch import Config, configured, current_arch, launch
from resplice.kernels.cuda.tile_geometry import (
    box_tokens,
    key_bias,
    load_rows,
    own_and_seen,
    reciprocal,
    store_rows,
)
from resplice.kernels.cuda.tile_problem import TileProblem, fitting, precision_of, width_of


@triton.jit
def tile_attention_delta(
    out: tl.tensor, grad: tl.tensor, delta: tl.tensor,
    out_batch: tl.tensor, out_head: tl.tensor, out_token: tl.tensor,
    grad_batch: tl.tensor, grad_head: tl.tensor, grad_token: tl.tensor,
    heads: tl.tensor, tokens: tl.tensor,
    dv: tl.constexpr, width_v: tl.constexpr, wide: tl.constexpr, block_m: tl.constexpr,
) -> None:  # fmt: skip
    """Delta = sum over channels of out * grad, float32 [B,heads,S]."""
    pair = tl.program_id(1)
    head, batch = (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    valid = rows < tokens
    result = load_rows(
        out + batch * out_batch + head * out_head, rows, out_token, valid, dv, width_v, wide, True
    )
    change = load_rows(
        grad + batch * grad_batch + head * grad_head, rows, grad_token, valid, dv, width_v, wide,
        True,
    )  # fmt: skip
    product = tl.sum(result.to(tl.float32) * change.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * tokens + rows, product, mask=valid)


@triton.jit
def tile_attention_query_gradient(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, grad: tl.tensor,
    logsum: tl.tensor, delta: tl.tensor, gq: tl.tensor, table: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_token: tl.tensor,
    v_batch: tl.tensor, v_head: tl.tensor, v_token: tl.tensor,
    grad_batch: tl.tensor, grad_head: tl.tensor, grad_token: tl.tensor,
    gq_batch: tl.tensor, gq_head: tl.tensor, gq_token: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_key: tl.tensor,
    heads: tl.tensor, t: tl.tensor, h: tl.tensor, w: tl.tensor, text: tl.tensor,
    image_start: tl.tensor, text_start: tl.tensor, scale: tl.tensor,
    d: tl.constexpr, dv: tl.constexpr, width: tl.constexpr, width_v: tl.constexpr,
    masking: tl.constexpr, mask_image: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of `block_m` queries; the loops are those of the forward kernel."""
    block, pair = tl.program_id(0), tl.program_id(1)
    entry = table + (pair % heads) * 7
    head, batch = tl.load(entry + 6).to(tl.int64), (pair // heads).to(tl.int64)
    queries, valid, first, keys_h, keys_w, keys, words = own_and_seen(
        entry, block, t, h, w, text, image_start, text_start, block_m, False
    )
    full = keys // block_n
    rest = keys - full * block_n
    per_h, per_w = reciprocal(keys_h), reciprocal(keys_w)

    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    grad += batch * grad_batch + head * grad_head
    if masking:
        mask += batch * mask_batch + head * mask_head
    line = (batch * heads + head) * (t * h * w + text)
    query = load_rows(q, queries, q_token, valid, d, width, wide, True)
    change = load_rows(grad, queries, grad_token, valid, dv, width_v, wide, True)
    total = tl.load(logsum + line + queries, mask=valid, other=0.0)
    mean = tl.load(delta + line + queries, mask=valid, other=0.0)
    result = tl.zeros([block_m, width], tl.float32)
    columns = tl.arange(0, block_n)
    for index in range(0, full):
        tokens = box_tokens(
            index * block_n + columns, first, keys_h, keys_w, per_h, per_w, h, w
        )  # fmt: skip
        key = load_rows(k, tokens, k_token, columns, d, width, wide, False)
        value = load_rows(v, tokens, v_token, columns, dv, width_v, wide, False)
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        if mask_image:
            scores += key_bias(mask, tokens, mask_key, tokens >= 0, masking)[None, :]
        weights = tl.exp2(scores - total[:, None])
        change_w = tl.dot(change, tl.trans(value), input_precision=precision)
        slope = (weights * (change_w - mean[:, None])).to(key.dtype)
        result = tl.dot(slope, key, result, input_precision=precision)
    last = rest + words
    for index in tl.range(0, tl.cdiv(last, block_n), num_stages=1):
        numbers = index * block_n + columns
        inside = numbers < last
        box = box_tokens(full * block_n + numbers, first, keys_h, keys_w, per_h, per_w, h, w)
        tokens = tl.where(numbers < rest, box, text_start + numbers - rest)
        key = load_rows(k, tokens, k_token, inside, d, width, wide, True)
        value = load_rows(v, tokens, v_token, inside, dv, width_v, wide, True)
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        if masking:
            entries = tokens if mask_image else numbers - rest
            present = inside if mask_image else inside & (numbers >= rest)
            scores += key_bias(mask, entries, mask_key, present, masking)[None, :]
        weights = tl.exp2(scores - total[:, None])
        change_w = tl.dot(change, tl.trans(value), input_precision=precision)
        slope = (weights * (change_w - mean[:, None])).to(key.dtype)
        result = tl.dot(slope, key, result, input_precision=precision)
    result *= scale * 0.6931471805599453
    store_rows(
        gq + batch * gq_batch + head * gq_head, queries, gq_token, valid, result, d, width, wide
    )


@triton.jit
def tile_attention_key_gradient(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mask: tl.tensor, grad: tl.tensor,
    logsum: tl.tensor, delta: tl.tensor, gk: tl.tensor, gv: tl.tensor, table: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_token: tl.tensor,
    v_batch: tl.tensor, v_head: tl.tensor, v_token: tl.tensor,
    grad_batch: tl.tensor, grad_head: tl.tensor, grad_token: tl.tensor,
    gk_batch: tl.tensor, gk_head: tl.tensor, gk_token: tl.tensor,
    gv_batch: tl.tensor, gv_head: tl.tensor, gv_token: tl.tensor,
    mask_batch: tl.tensor, mask_head: tl.tensor, mask_key: tl.tensor,
    heads: tl.tensor, t: tl.tensor, h: tl.tensor, w: tl.tensor, text: tl.tensor,
    image_start: tl.tensor, text_start: tl.tensor, scale: tl.tensor,
    d: tl.constexpr, dv: tl.constexpr, width: tl.constexpr, width_v: tl.constexpr,
    masking: tl.constexpr, mask_image: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of `block_n` keys and values, from blocks of `block_m` queries that see them."""
    block, pair = tl.program_id(0), tl.program_id(1)
    entry = table + (pair % heads) * 7
    head, batch = tl.load(entry + 6).to(tl.int64), (pair // heads).to(tl.int64)
    keys, valid, first, seen_h, seen_w, seen, words = own_and_seen(
        entry, block, t, h, w, text, image_start, text_start, block_n, True
    )
    full = seen // block_m
    rest = seen - full * block_m
    per_h, per_w = reciprocal(seen_h), reciprocal(seen_w)

    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    grad += batch * grad_batch + head * grad_head
    line = (batch * heads + head) * (t * h * w + text)
    logsum += line
    delta += line
    key = load_rows(k, keys, k_token, valid, d, width, wide, True)
    value = load_rows(v, keys, v_token, valid, dv, width_v, wide, True)
    bias = tl.zeros([block_n], tl.float32)
    if masking:
        mask += batch * mask_batch + head * mask_head
        entries = keys if mask_image else keys - text_start
        present = valid if mask_image else valid & (entries >= 0) & (entries < text)
        bias = key_bias(mask, entries, mask_key, present, masking)
    result = tl.zeros([block_n, width], tl.float32)
    result_v = tl.zeros([block_n, width_v], tl.float32)
    rows = tl.arange(0, block_m)
    for index in range(0, full):
        tokens = box_tokens(index * block_m + rows, first, seen_h, seen_w, per_h, per_w, h, w)
        query = load_rows(q, tokens, q_token, rows, d, width, wide, False)
        change = load_rows(grad, tokens, grad_token, rows, dv, width_v, wide, False)
        total, mean = tl.load(logsum + tokens), tl.load(delta + tokens)
        scores = tl.dot(key, tl.trans(query), input_precision=precision) * scale
        if masking:
            scores += bias[:, None]
        weights = tl.exp2(scores - total[None, :])
        result_v = tl.dot(
            weights.to(change.dtype), change, result_v, input_precision=precision
        )  # fmt: skip
        change_w = tl.dot(value, tl.trans(change), input_precision=precision)
        slope = (weights * (change_w - mean[None, :])).to(query.dtype)
        result = tl.dot(slope, query, result, input_precision=precision)
    last = rest + words
    for index in tl.range(0, tl.cdiv(last, block_m), num_stages=1):
        numbers = index * block_m + rows
        inside = numbers < last
        box = box_tokens(full * block_m + numbers, first, seen_h, seen_w, per_h, per_w, h, w)
        tokens = tl.where(numbers < rest, box, text_start + numbers - rest)
        query = load_rows(q, tokens, q_token, inside, d, width, wide, True)
        change = load_rows(grad, tokens, grad_token, inside, dv, width_v, wide, True)
        total = tl.load(logsum + tokens, mask=inside, other=float("inf"))
        mean = tl.load(delta + tokens, mask=inside, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=precision) * scale
        if masking:
            scores += bias[:, None]
        weights = tl.exp2(scores - total[None, :])
        result_v = tl.dot(
            weights.to(change.dtype), change, result_v, input_precision=precision
        )  # fmt: skip
        change_w = tl.dot(value, tl.trans(change), input_precision=precision)
        slope = (weights * (change_w - mean[None, :])).to(query.dtype)
        result = tl.dot(slope, query, result, input_precision=precision)
    result *= scale * 0.6931471805599453
    store_rows(
        gk + batch * gk_batch + head * gk_head, keys, gk_token, valid, result, d, width, wide
    )
    store_rows(
        gv + batch * gv_batch + head * gv_head, keys, gv_token, valid, result_v, dv, width_v,
        wide,
    )  # fmt: skip


# ---- the host ----------------------------------------------------------------------------

_QUERY = {
    "sm_80": [(64, 32, 4, 1), (64, 32, 8, 1)],
    "sm_90": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    "sm_100": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    "gfx942": [(64, 32, 4, 1)],
}
_KEY = {
    "sm_80": [(32, 32, 4, 1), (32, 64, 4, 1)],
    "sm_90": [(32, 128, 8, 2), (64, 128, 8, 1)],
    "sm_100": [(64, 128, 8, 2), (32, 128, 8, 2)],
    "gfx942": [(32, 64, 4, 1), (16, 64, 4, 1)],
}
"""Queries, keys, warps and stages, the default first."""


def query_configs(
    arch: str, dtype: torch.dtype, d: int, dv: int, masked: bool = False
) -> list[Config]:
    """Configurations of the gradient of queries that fit; see `tile_attention.configs`.

    Where image keys are `masked`, the mask takes registers: the smallest blocks come first.
    """
    width, width_v = width_of(d), width_of(dv)
    found = fitting(
        arch, dtype, _QUERY, own=width + width_v, seen=width + width_v, held=width, blocks="mn"
    )
    return found[::-1] if masked and dtype != torch.float32 else found


def key_configs(arch: str, dtype: torch.dtype, d: int, dv: int) -> list[Config]:
    """Configurations of the gradient of keys that fit; see `tile_attention.configs`."""
    width, width_v = width_of(d), width_of(dv)
    return fitting(
        arch, dtype, _KEY, own=width + width_v, seen=width + width_v, held=width + width_v,
        blocks="nm",
    )  # fmt: skip


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor,
    logsum: Tensor, problem: TileProblem,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values.

    Args:
        grad: Of the result, [B,heads,S,Dv].
        q: [B,heads,S,D].
        k: [B,heads,S,D].
        v: [B,heads,S,Dv].
        mask: Of keys; it gets no gradient.
        out: The result.
        logsum: Saved by `tile_attention.attend`.
        problem: Canvas, windows, text, scale.

    Returns:
        In the shapes and dtypes of `q`, `k` and `v`, in memory [B,S,heads,D].
    """
    batch, heads, tokens, d = q.shape
    dv, arch = v.shape[3], current_arch()
    wide = problem.wide(q, k, v, grad, out)
    precision = precision_of(q.dtype, arch)
    delta = logsum.new_empty(batch, heads, tokens)
    launch(
        tile_attention_delta, (triton.cdiv(tokens, 16), batch * heads),
        out=out, grad=grad, delta=delta, **problem.strides(out=out, grad=grad),
        heads=heads, tokens=tokens, dv=dv, width_v=width_of(dv), wide=wide, block_m=16,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    common: dict[str, Any] = {
        "q": q, "k": k, "v": v, "grad": grad, "logsum": logsum, "delta": delta,
        **problem.mask_arguments(mask, q), **problem.arguments(q),
        **problem.strides(q=q, k=k, v=v, grad=grad),
        "d": d, "dv": dv, "width": width_of(d), "width_v": width_of(dv),
        "wide": wide, "precision": precision,
    }  # fmt: skip
    dq, dk, dvalue = (
        x.new_empty(batch, tokens, heads, x.shape[3]).transpose(1, 2) for x in (q, k, v)
    )
    candidates = query_configs(arch, q.dtype, d, dv, bool(common["mask_image"]))
    chosen = configured("tile_attention_query_gradient", candidates)
    launch(
        tile_attention_query_gradient,
        (problem.blocks(chosen.constants["block_m"]), batch * heads),
        gq=dq, **problem.strides(gq=dq), **common, **chosen.options,
    )  # fmt: skip
    chosen = configured("tile_attention_key_gradient", key_configs(arch, q.dtype, d, dv))
    launch(
        tile_attention_key_gradient,
        (problem.blocks(chosen.constants["block_n"]), batch * heads),
        gk=dk, gv=dvalue, **problem.strides(gk=dk, gv=dvalue), **common, **chosen.options,
    )  # fmt: skip
    return dq, dk, dvalue
