"""Triton kernels of `code_linear`: 1 to 8-bit codes by packed weights, in integers.

Twice a value in steps is an odd integer: 2a + 1 for a code a of activations, 2w + q for weights,
where w is the packed code and q = 1 - 2**bits, or, for 8 bits, w = code - 128 and q = 1. A product
of rows is then an integer, exact in any order,

    sum (2a + 1) (2w + q) = 4 sum a w + 2 q sum a + 2 sum w + K q.

`code_linear_tiles` takes the sums of products and of weights from tensor cores, the latter as
products with ones. `code_linear_bits` is for one bit by one bit: signs agree where an exclusive or
of bits is zero, so a product of rows is K - 2 * popcount. Weights in groups, whose sums are no
integers, are left to the kernel of `quant_linear`, on float32 values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.code_linear import code_linear as op
from resplice.kernels.cuda.bit_stream import evens_and_odds, load_words, period
from resplice.kernels.cuda.launch import Config, by_reference, configured, current_arch, launch
from resplice.kernels.cuda.pruning import fitting
from resplice.kernels.cuda.quant_linear import multiply, share

FEW = 8
"""Up to so many tokens, one bit by one bit is counted rather than multiplied: a word of 32 weights
takes three instructions a token, where unpacking it for tensor cores takes three a weight."""


@triton.jit
def _integer_slices(
    word: tl.tensor, part: tl.tensor, acc: tl.tensor, total: tl.tensor, ones: tl.tensor,
    slot: tl.constexpr, stride: tl.constexpr, bits: tl.constexpr, per: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add slices slot, slot + stride ... of K; `total` [rows, 16] sums the weights."""
    if stride < per:
        even, odd = evens_and_odds(part)
        acc, total = _integer_slices(word, even, acc, total, ones, slot, 2 * stride, bits, per)
        acc, total = _integer_slices(
            word, odd, acc, total, ones, slot + stride, 2 * stride, bits, per
        )
    else:
        code = (word >> (slot * bits)) & (2**bits - 1)
        weight = (code - 128 if bits == 8 else code).to(tl.int8)
        acc = tl.dot(weight, tl.trans(part), acc, out_dtype=tl.int32)
        total = tl.dot(weight, ones, total, out_dtype=tl.int32)
    return acc, total


@triton.jit
def code_linear_tiles(
    x: tl.tensor, x_step: tl.tensor, codes: tl.tensor, step: tl.tensor, bias: tl.tensor,
    y: tl.tensor, m: tl.tensor, n: tl.tensor, k: tl.tensor, row_bytes: tl.tensor,
    tiles_each: tl.tensor, bits: tl.constexpr, per: tl.constexpr, width: tl.constexpr,
    last: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs [block_m tokens, block_n rows] from `tiles_each` tiles of K.

    Unless this is the `last` step, the integer sums go to y[part of K].
    """
    rows = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    tokens = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)
    third = tl.program_id(2)
    block_k: tl.constexpr = words * per
    some, lane, column = rows[:, None] < n, tl.arange(0, words), tl.arange(0, block_k)
    acc = tl.zeros((block_n, block_m), tl.int32)
    total = tl.zeros((block_n, 16), tl.int32)
    ones = tl.full((words, 16), 1, tl.int8)
    x_total = tl.zeros((block_m,), tl.int32)
    first = third * tiles_each
    for tile in range(first, min(first + tiles_each, tl.cdiv(k, block_k))):
        places = (tile * words + lane)[None, :]
        columns = (tile * block_k + column)[None, :]
        word = load_words(codes, rows[:, None], places, some, row_bytes, width)
        left = k - places * per  # codes in a word; what lies behind them counts as w = 0
        if bits == 8:
            word = tl.where(left > 0, word, 128)
        else:
            word &= tl.where(left < per, (1 << (bits * tl.maximum(left, 0))) - 1, -1)
        here = (tokens[:, None] < m) & (columns < k)
        part = tl.load(x + tokens[:, None] * k + columns, here, other=0)
        x_total += tl.sum(part.to(tl.int32), 1)
        acc, total = _integer_slices(word, part, acc, total, ones, 0, 1, bits, per)
    q: tl.constexpr = 1 if bits == 8 else 1 - 2**bits
    count = tl.minimum((first + tiles_each) * block_k, k) - first * block_k
    acc = 4 * acc + (2 * q * x_total + q * count)[None, :]
    acc += 2 * tl.max(total, 1)[:, None]  # its columns are all the same
    inside = (tokens[:, None] < m) & (rows[None, :] < n)
    out = y + (third * m + tokens[:, None]) * n + rows[None, :]
    found = tl.trans(acc)
    if last:
        found = _scaled(found, x_step, step, bias, tokens[:, None], rows[None, :], m, n)
    tl.store(out, found.to(y.dtype.element_ty), inside)


@triton.jit
def _scaled(
    total: tl.tensor, x_step: tl.tensor, step: tl.tensor, bias: tl.tensor, tokens: tl.tensor,
    rows: tl.tensor, m: tl.tensor, n: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Integer sums of products of odd numbers -> outputs, float32."""
    scale = tl.load(x_step + tokens, tokens < m, other=0.0) * 0.25
    found = total.to(tl.float32) * (scale * tl.load(step + rows, rows < n, other=0.0))
    if bias is not None:
        found += tl.load(bias + rows, rows < n, other=0.0).to(tl.float32)
    return found


@triton.jit
def code_linear_parts(
    parts: tl.tensor, x_step: tl.tensor, step: tl.tensor, bias: tl.tensor, y: tl.tensor,
    m: tl.tensor, n: tl.tensor, count: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """Sums over parts [count, m, n] of K; then steps and bias."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < m * n
    acc = tl.zeros((block,), tl.int32)
    for part in range(count):
        acc += tl.load(parts + part * m * n + at, inside, other=0)
    found = _scaled(acc, x_step, step, bias, at // n, at % n, m, n)
    tl.store(y + at, found.to(y.dtype.element_ty), inside)


@triton.jit
def counted(word: tl.tensor) -> tl.tensor:
    """Bits that are set in uint32 numbers; compilers know the form and emit one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def pack_signs(
    x: tl.tensor, y: tl.tensor, m: tl.tensor, k: tl.tensor, words: tl.tensor, block: tl.constexpr,
) -> None:  # fmt: skip
    """Signs of codes [m, k], a byte each -> 32 in a number [m, words]; set where positive."""
    word = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    bit = tl.arange(0, 32)[None, :]
    column = (word % words)[:, None] * 32 + bit
    inside = (column < k) & (word < m * words)[:, None]
    code = tl.load(x + (word // words)[:, None] * k + column, inside, other=-1)
    tl.store(y + word, tl.sum((code >= 0).to(tl.int32) << bit, 1), word < m * words)


@triton.jit
def code_linear_bits(
    x: tl.tensor, x_step: tl.tensor, codes: tl.tensor, step: tl.tensor, bias: tl.tensor,
    y: tl.tensor, m: tl.tensor, n: tl.tensor, k: tl.tensor, row_bytes: tl.tensor,
    x_words: tl.tensor, block_m: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
) -> None:  # fmt: skip
    """One bit by one bit, all of K: x holds the words of `pack_signs`."""
    rows = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    tokens = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)
    some, lane = rows[:, None] < n, tl.arange(0, words)
    differ = tl.zeros((block_m, block_n, words), tl.int32)
    for first in range(0, x_words, words):
        places = (first + lane)[None, :]
        word = load_words(codes, rows[:, None], places, some, row_bytes, 4)
        signs = tl.load(
            x + tokens[:, None] * x_words + places,
            (tokens[:, None] < m) & (places < x_words),
            other=0,
        )
        left = tl.minimum(tl.maximum(k - places * 32, 0), 32)
        kept = tl.where(left == 32, -1, (1 << left) - 1)
        differ += counted(((signs[:, None, :] ^ word[None, :, :]) & kept[:, None, :]).to(tl.uint32))
    total = k - 2 * tl.sum(differ, 2)
    found = _scaled(total, x_step, step, bias, tokens[:, None], rows[None, :], m, n)
    out = y + tokens[:, None] * n + rows[None, :]
    tl.store(out, found.to(y.dtype.element_ty), (tokens[:, None] < m) & (rows[None, :] < n))


# ---- configurations ----------------------------------------------------------------------


def configs(arch: str, bits: int, m: int) -> list[Config]:
    """Configurations of `code_linear_tiles`, the default first; `m` may be symbolic."""
    per, width = period(bits)
    stages = 2 if arch.startswith("gfx") else 3

    def loaded(config: Config) -> int:
        sizes = config.constants
        return int(sizes["words"] * (sizes["block_m"] * per + sizes["block_n"] * width))

    def of(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
        words = max(32, block_k // per)
        return Config({"block_m": block_m, "block_n": block_n, "words": words}, warps, stages)

    if statically_known_true(m <= 64):
        rows = next(size for size in (16, 32, 64) if statically_known_true(m <= size))
        every = [of(rows, 64, 128, 4), of(rows, 32, 256, 4)]
    elif arch in ("sm_80", "sm_86", "sm_89"):  # accumulators and unpacked codes share registers
        every = [of(64, 64, 128, 8), of(64, 64, 128, 4)]
    elif per == 8:
        every = [of(64, 128, 256, 8), of(64, 64, 256, 4)]
    else:
        every = [of(128, 128, 128, 8), of(64, 128, 128, 8), of(128, 64, 128, 4)]
    return fitting(every, arch, loaded)


def bit_configs(arch: str, m: int) -> list[Config]:
    """Configurations of `code_linear_bits`, the default first."""
    block_m = next((size for size in (1, 2, 4) if statically_known_true(m <= size)), 8)

    def of(block_n: int, words: int, warps: int) -> Config:
        return Config({"block_m": block_m, "block_n": block_n, "words": words}, warps, 2)

    return [of(16, 32, 4), of(8, 128, 4), of(16, 32, 1)]


# ---- the op ------------------------------------------------------------------------------


def code_linear(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> Tensor:  # fmt: skip
    """See `resplice.kernels.code_linear`; float64 steps are left to the reference."""
    n, k = codes.shape[0], x.shape[-1]
    if x_step.dtype == torch.float64 or codes.numel() == 0:
        why = f"has steps of {x_step.dtype} for {n} rows"
        result: Tensor = by_reference(
            op, why, x, x_step, codes, step, bias, bits, group, x_bits
        )  # fmt: skip
        return result
    y = x_step.new_empty((*x.shape[:-1], n))
    flat = x.reshape(-1, k).contiguous()
    if statically_known_true(flat.shape[0] == 0):
        return y
    tensors = (flat, x_step.contiguous(), codes.contiguous(), step.contiguous(), bias, y)
    exact = (2**x_bits - 1) * (2**bits - 1) * k < 2**31
    if 0 < group < k or not exact:
        multiply(flat, *tensors[2:], bits, group, x_step=tensors[1])
    elif x_bits == bits == 1 and statically_known_true(flat.shape[0] <= FEW):
        _count(*tensors)
    else:
        _multiply(*tensors, bits)
    return y


def _multiply(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, y: Tensor,
    bits: int,
) -> None:  # fmt: skip
    """On tensor cores."""
    m, n, k = x.shape[0], codes.shape[0], x.shape[1]
    arch, (per, width) = current_arch(), period(bits)
    config = configured("code_linear_tiles", configs(arch, bits, m))
    block_n, block_m = config.constants["block_n"], config.constants["block_m"]
    tiles = -(-k // (config.constants["words"] * per))
    blocks = (-(-n // block_n), -(-m // block_m))
    few = statically_known_true(m <= 64)
    each = share(tiles, math.prod(blocks), arch) if few else tiles
    count = -(-tiles // each)
    parts = y if count == 1 else x.new_empty((count, m, n), dtype=torch.int32)
    launch(
        code_linear_tiles, (*blocks, count), x=x, x_step=x_step, codes=codes, step=step, bias=bias,
        y=parts, m=m, n=n, k=k, row_bytes=codes.shape[1], tiles_each=each, bits=bits, per=per,
        width=width, last=count == 1, **config.options,
    )  # fmt: skip
    if count > 1:
        launch(
            code_linear_parts, (-(-m * n // 1024),), parts=parts, x_step=x_step, step=step,
            bias=bias, y=y, m=m, n=n, count=count, block=1024, num_warps=4, num_stages=1,
        )  # fmt: skip


def _count(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """One bit by one bit for a few tokens."""
    m, n, k, row_bytes = x.shape[0], codes.shape[0], x.shape[1], codes.shape[1]
    words = -(-k // 32)
    signs = x.new_empty((m, words), dtype=torch.int32)
    launch(
        pack_signs, (-(-m * words // 64),), x=x, y=signs, m=m, k=k, words=words, block=64,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    config = configured("code_linear_bits", bit_configs(current_arch(), m))
    block_m, block_n = config.constants["block_m"], config.constants["block_n"]
    launch(
        code_linear_bits, (-(-n // block_n), -(-m // block_m)), x=signs, x_step=x_step,
        codes=codes.view(torch.int32) if row_bytes % 4 == 0 else codes, step=step, bias=bias, y=y,
        m=m, n=n, k=k, row_bytes=row_bytes, x_words=words, **config.options,
    )  # fmt: skip
