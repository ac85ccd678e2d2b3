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
    configured,
    current_arch,
    launch,
    shared_limit,
)
from resplice.kernels.cuda.tile_geometry import (
    axis_keys,
    box_tokens,
    key_scores,
    load_rows,
    reciprocal,
    store_rows,
)
from resplice.kernels.cuda.tile_problem import TileProblem, aligned, precision_of, width_of
from resplice.kernels.tile_attention import tile_attention as op


@triton.jit
def online(
    scores: Any, values: Any, total: Any, peak: Any, result: Any, masked: tl.constexpr,
    precision: tl.constexpr,
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
    q: Any, k: Any, v: Any, mask: Any, out: Any, logsum: Any, table: Any,
    q_batch: Any, q_head: Any, q_token: Any, k_batch: Any, k_head: Any, k_token: Any,
    v_batch: Any, v_head: Any, v_token: Any, out_batch: Any, out_head: Any, out_token: Any,
    mask_batch: Any, mask_head: Any, mask_key: Any,
    heads: Any, t: Any, h: Any, w: Any, text: Any, image_start: Any, text_start: Any, scale: Any,
    d: tl.constexpr, dv: tl.constexpr, width: tl.constexpr, width_v: tl.constexpr,
    masking: tl.constexpr, mask_image: tl.constexpr, saves: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Attention of `block_m` queries; see `attend` for the arguments."""
    block, pair = tl.program_id(0), tl.program_id(1)
    entry = table + (pair % heads) * 7
    head, batch = tl.load(entry + 6), (pair // heads).to(tl.int64)

    # Which queries: blocks of text first, for they see everything; then tile by tile.
    text_blocks = tl.cdiv(text, block_m)
    is_text = block < text_blocks
    tile_t, extent_t = tl.where(is_text, t, tl.load(entry)), tl.load(entry + 3)
    tile_h, extent_h = tl.where(is_text, h, tl.load(entry + 1)), tl.load(entry + 4)
    tile_w, extent_w = tl.where(is_text, w, tl.load(entry + 2)), tl.load(entry + 5)
    count_h, count_w = tl.cdiv(h, tile_h), tl.cdiv(w, tile_w)
    per_tile = tl.cdiv(tile_t * tile_h * tile_w, block_m)
    number = tl.where(is_text, 0, block - text_blocks)
    tile, part = number // per_tile, number % per_tile
    plane = tile // (count_h * count_w)
    extent_t = tl.minimum(extent_t, tl.cdiv(t, tile_t))
    extent_h, extent_w = tl.minimum(extent_h, count_h), tl.minimum(extent_w, count_w)
    own_t, size_t, key_t, keys_t = axis_keys(plane, tile_t, extent_t, t)
    own_h, size_h, key_h, keys_h = axis_keys(tile // count_w % count_h, tile_h, extent_h, h)
    own_w, size_w, key_w, keys_w = axis_keys(tile % count_w, tile_w, extent_w, w)
    start = tl.where(is_text, block, part) * block_m
    count = tl.where(is_text, text, size_t * size_h * size_w)
    exists = (plane < tl.cdiv(t, tile_t)) & (start < count)
    rows = start + tl.arange(0, block_m)
    valid = rows < tl.where(exists, count, 0)
    line = rows // size_w
    places = ((own_t + line // size_h) * h + own_h + line % size_h) * w + own_w + rows % size_w
    queries = tl.where(is_text, text_start + rows, image_start + places)

    # Which keys: a box, and the text.
    keys = tl.where(exists, keys_t * keys_h * keys_w, 0)
    full = keys // block_n
    rest = keys - full * block_n
    first = image_start + (key_t * h + key_h) * w + key_w
    per_h, per_w = reciprocal(keys_h), reciprocal(keys_w)

    k += batch * k_batch + head.to(tl.int64) * k_head
    v += batch * v_batch + head.to(tl.int64) * v_head
    if masking:
        mask += batch * mask_batch + head.to(tl.int64) * mask_head
    query = load_rows(
        q + batch * q_batch + head.to(tl.int64) * q_head, queries, q_token, valid, d, width, wide,
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
            scores = key_scores(scores, mask, tokens, mask_key, tokens >= 0, masking)
        value = load_rows(v, tokens, v_token, columns, dv, width_v, wide, False)
        total, peak, result = online(scores, value, total, peak, result, mask_image, precision)
    last = tl.where(exists, rest + text, 0)
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
            scores = key_scores(scores, mask, entries, mask_key, present, masking)
        value = load_rows(v, tokens, v_token, inside, dv, width_v, wide, True)
        total, peak, result = online(
            scores, value, total, peak, result, masking > 0, precision
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    store_rows(
        out + batch * out_batch + head.to(tl.int64) * out_head, queries, out_token, valid,
        result / total[:, None], dv, width_v, wide,
    )  # fmt: skip
    if saves:
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        line_start = logsum + (batch * heads + head) * (t * h * w + text)
        tl.store(line_start + queries, peak + tl.log2(total), mask=valid)


# ---- the host ----------------------------------------------------------------------------

_CANDIDATES = {
    "sm_80": [(128, 64, 8, 2), (128, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
    "sm_90": [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    "sm_100": [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
    "gfx942": [(128, 64, 4, 2), (128, 32, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)],
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
    size = dtype.itemsize

    def fits(config: Config) -> bool:
        m, n = config.constants["block_m"], config.constants["block_n"]
        stages = max(1, config.num_stages - 1) if arch.startswith("gfx") else config.num_stages
        needed = size * (m * width + stages * n * (width + width_v))
        held = 4 * m * (width_v + n) / (64 if arch.startswith("gfx") else 32) / config.num_warps
        return needed <= shared_limit(arch) and held <= 192

    every = [
        Config({"block_m": m, "block_n": n}, warps, stages)
        for m, n, warps, stages in _CANDIDATES.get(arch, _CANDIDATES["sm_80"])
    ]
    small = [Config({"block_m": m, "block_n": 16}, 4, 1) for m in (64, 32, 16)]
    return [config for config in every if fits(config)] or small


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
        return op.fast(*args)
    problem = TileProblem.of(q, canvas, tile, windows, text_length, text_first, scale)
    return attend(*aligned(q, k, v), mask, problem, False)[0]
