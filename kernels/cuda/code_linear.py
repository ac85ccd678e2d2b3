"""Triton kernels of products between codes: 1 to 8-bit activations by packed 1 to 8-bit weights.

Both lie on the mid-rise grid, value = (code - 2**(b-1) + 1/2) * step, so that twice a value in steps is an
odd integer and a product of rows is an integer: sums are exact, in any order. `code_linear_tiles` multiplies
8-bit integers on tensor cores. Codes of up to 7 bits are odd integers of 8 bits; one of 8 bits is 2a + 1
with a of 8 bits, which leaves the sum over the other operand to add. `code_linear_bits` is for one bit by
one bit: signs agree where an exclusive or of bits is zero, so a product of rows is K - 2 * popcount.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resplice.kernels.cuda.bit_stream import evens_and_odds, load_words


@triton.jit
def odd(code, bits: tl.constexpr):
    """Twice a level in steps, as int8: 2 * code - 2**bits + 1; for 8 bits the lower half of it."""
    if bits == 8:
        found = code - 128
    else:
        found = 2 * code - (2**bits - 1)
    return found.to(tl.int8)


@triton.jit
def _integer_slices(
    word, part, acc, total, places, k, slot: tl.constexpr, stride: tl.constexpr,
    bits: tl.constexpr, per: tl.constexpr, summed: tl.constexpr,
):  # fmt: skip
    """Add slices slot, slot + stride ... of K; `total` sums the weights where that is wanted."""
    if stride < per:
        even, other = evens_and_odds(part)
        acc, total = _integer_slices(
            word, even, acc, total, places, k, slot, 2 * stride, bits, per, summed
        )
        acc, total = _integer_slices(
            word, other, acc, total, places, k, slot + stride, 2 * stride, bits, per, summed
        )
    else:
        weight = odd((word >> (slot * bits)) & (2**bits - 1), bits)
        if summed:
            total += tl.where(places * per + slot < k, weight, 0).to(tl.int32)
        acc = tl.dot(weight, tl.trans(part), acc, out_dtype=tl.int32)
    return acc, total


@triton.jit
def code_linear_tiles(
    x, x_step, codes, step, bias, y, m, n, k, row_bytes, tiles_each,
    bits: tl.constexpr, act_bits: tl.constexpr, per: tl.constexpr, width: tl.constexpr,
    last: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    """Outputs [block_m tokens, block_n rows] from `tiles_each` tiles of K; see `quant_linear_tiles`.

    Unless this is the `last` step, the integer sums go to y[part of K].
    """
    rows = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    tokens = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)
    third = tl.program_id(2)
    block_k: tl.constexpr = words * per
    some, lane, column = rows[:, None] < n, tl.arange(0, words), tl.arange(0, block_k)
    acc = tl.zeros((block_n, block_m), tl.int32)
    total = tl.zeros((block_n, words if act_bits == 8 else 1), tl.int32)
    x_total = tl.zeros((block_m,), tl.int32)
    first = third * tiles_each
    for tile in range(first, min(first + tiles_each, tl.cdiv(k, block_k))):
        places = (tile * words + lane)[None, :]
        columns = (tile * block_k + column)[None, :]
        word = load_words(codes, rows[:, None], places, some, row_bytes, width)
        here = (tokens[:, None] < m) & (columns < k)
        code = tl.load(x + tokens[:, None] * k + columns, here, other=0)
        part = tl.where(here, odd(code.to(tl.int32), act_bits), 0).to(tl.int8)
        if bits == 8:
            x_total += tl.sum(part.to(tl.int32), 1)
        acc, total = _integer_slices(
            word, part, acc, total, places, k, 0, 1, bits, per, act_bits == 8
        )
    # with a = 2a' + 1 and w = 2w' + 1 where the codes have 8 bits
    if bits == 8 and act_bits == 8:
        count = tl.minimum((first + tiles_each) * block_k, k) - first * block_k
        acc = 4 * acc + 2 * x_total[None, :] + 2 * tl.sum(total, 1)[:, None] + count
    elif bits == 8:
        acc = 2 * acc + x_total[None, :]
    elif act_bits == 8:
        acc = 2 * acc + tl.sum(total, 1)[:, None]
    inside = (tokens[:, None] < m) & (rows[None, :] < n)
    out = y + (third * m + tokens[:, None]) * n + rows[None, :]
    found = tl.trans(acc)
    if last:
        found = _scaled(found, x_step, step, bias, tokens[:, None], rows[None, :], m, n)
    tl.store(out, found.to(y.dtype.element_ty), inside)


@triton.jit
def _scaled(total, x_step, step, bias, tokens, rows, m, n):
    """Integer sums of products of odd numbers -> outputs, float32."""
    scale = tl.load(x_step + tokens, tokens < m, other=0.0) * 0.25
    found = total.to(tl.float32) * (scale * tl.load(step + rows, rows < n, other=0.0))
    if bias is not None:
        found += tl.load(bias + rows, rows < n, other=0.0).to(tl.float32)
    return found


@triton.jit
def code_linear_parts(parts, x_step, step, bias, y, m, n, count, block: tl.constexpr):
    """Sums over parts [count, m, n] of K; then steps and bias."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < m * n
    acc = tl.zeros((block,), tl.int32)
    for part in range(count):
        acc += tl.load(parts + part * m * n + at, inside, other=0)
    found = _scaled(acc, x_step, step, bias, at // n, at % n, m, n)
    tl.store(y + at, found.to(y.dtype.element_ty), inside)


@triton.jit
def ones(word):
    """Bits that are set in uint32 numbers; compilers know the form and emit one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def pack_signs(x, y, m, k, words, block: tl.constexpr):
    """One-bit codes, a byte each, [m, k] -> 32 in a number [m, words], zeros behind the last."""
    word = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    bit = tl.arange(0, 32)[None, :]
    column = (word % words)[:, None] * 32 + bit
    code = tl.load(
        x + (word // words)[:, None] * k + column,
        (column < k) & (word < m * words)[:, None],
        other=0,
    )
    tl.store(y + word, tl.sum(code.to(tl.int32) << bit, 1), word < m * words)


@triton.jit
def code_linear_bits(
    x, x_step, codes, step, bias, y, m, n, k, row_bytes, x_words, per: tl.constexpr,
    width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    """One bit by one bit, all of K: x holds the words of `pack_signs`."""
    rows = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    tokens = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)
    some, lane = rows[:, None] < n, tl.arange(0, words)
    differ = tl.zeros((block_m, block_n, words), tl.int32)
    for first in range(0, x_words, words):
        places = (first + lane)[None, :]
        word = load_words(codes, rows[:, None], places, some, row_bytes, width)
        signs = tl.load(
            x + tokens[:, None] * x_words + places,
            (tokens[:, None] < m) & (places < x_words),
            other=0,
        )
        left = tl.minimum(tl.maximum(k - places * 32, 0), 32)
        kept = tl.where(left == 32, -1, (1 << left) - 1)
        differ += ones(((signs[:, None, :] ^ word[None, :, :]) & kept[:, None, :]).to(tl.uint32))
    total = k - 2 * tl.sum(differ, 2)
    found = _scaled(total, x_step, step, bias, tokens[:, None], rows[None, :], m, n)
    out = y + tokens[:, None] * n + rows[None, :]
    tl.store(out, found.to(y.dtype.element_ty), (tokens[:, None] < m) & (rows[None, :] < n))
