"""Triton kernels of `quant_linear`: packed weights by floating point activations.

`quant_linear_tiles` computes y^T = W x^T on tensor cores: the weights are the left operand, which
may lie in registers, where they are unpacked. A few tokens fill the narrow side of the tile, and K
is divided among programs until the GPU is busy. Sums are float32; parts of K are added in a fixed
order.

One token takes the tensor cores too: what bounds it is unpacking, which costs three to four
instructions a weight for pairs of 16-bit levels, and one more, the product itself, in a form
without tensor cores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.bit_stream import evens_and_odds, level, load_words, period
from resplice.kernels.cuda.launch import Config, by_reference, configured, current_arch, launch
from resplice.kernels.cuda.processors import PROCESSORS
from resplice.kernels.cuda.pruning import fitting
from resplice.kernels.quant_linear import quant_linear as op

# ---- kernels -----------------------------------------------------------------------------


@triton.jit
def _steps(
    step: tl.tensor, rows: tl.tensor, columns: tl.tensor, inside: tl.tensor, groups: tl.tensor,
    group: tl.tensor,
) -> tl.tensor:  # fmt: skip
    which = columns // group
    return tl.load(step + rows * groups + which, inside & (which < groups), other=0.0)


@triton.jit
def _tile_slices(
    word: tl.tensor, part: tl.tensor, scale: tl.tensor, acc: tl.tensor, step: tl.tensor,
    rows: tl.tensor, places: tl.tensor, inside: tl.tensor, groups: tl.tensor, group: tl.tensor,
    slot: tl.constexpr, stride: tl.constexpr, bits: tl.constexpr, per: tl.constexpr,
    grouping: tl.constexpr, precision: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add slices slot, slot + stride ... of K; `part` [tokens, columns] holds their activations."""
    if stride < per:
        even, odd = evens_and_odds(part)
        acc = _tile_slices(
            word, even, scale, acc, step, rows, places, inside, groups, group,
            slot, 2 * stride, bits, per, grouping, precision,
        )  # fmt: skip
        acc = _tile_slices(
            word, odd, scale, acc, step, rows, places, inside, groups, group,
            slot + stride, 2 * stride, bits, per, grouping, precision,
        )  # fmt: skip
    else:
        if grouping == 0:
            weight = level(word, slot * bits, bits, part.dtype)
        else:
            if grouping == 3:
                scale = _steps(step, rows, places * per + slot, inside, groups, group)
            weight = (level(word, slot * bits, bits, tl.float32) * scale).to(part.dtype)
        acc = tl.dot(weight, tl.trans(part), acc, input_precision=precision)
    return acc


@triton.jit
def quant_linear_tiles(
    x: tl.tensor, x_step: tl.tensor, codes: tl.tensor, step: tl.tensor, bias: tl.tensor,
    y: tl.tensor, m: tl.tensor, n: tl.tensor, k: tl.tensor, row_bytes: tl.tensor, groups: tl.tensor,
    group: tl.tensor, tiles_each: tl.tensor, bits: tl.constexpr, per: tl.constexpr,
    width: tl.constexpr, grouping: tl.constexpr, precision: tl.constexpr, last: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, words: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs [block_m tokens, block_n rows] from `tiles_each` tiles of K.

    With `x_step`, x holds integer codes of activations, worth (x + 1/2) * x_step.
    `grouping`: one step per row (0), or groups of whole tiles (1), of whole words (2), of any size
    (3). `last`: the whole of K is in this program, so step and bias are applied; otherwise the
    float32 sums go to y[part of K].
    """
    rows = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    tokens = (tl.program_id(1) * block_m + tl.arange(0, block_m)).to(tl.int64)
    third = tl.program_id(2)
    block_k: tl.constexpr = words * per
    some, lane, column = rows[:, None] < n, tl.arange(0, words), tl.arange(0, block_k)
    acc = tl.zeros((block_n, block_m), tl.float32)
    first = third * tiles_each
    for tile in range(first, min(first + tiles_each, tl.cdiv(k, block_k))):
        places = (tile * words + lane)[None, :]
        columns = (tile * block_k + column)[None, :]
        word = load_words(codes, rows[:, None], places, some, row_bytes, width)
        here = (tokens[:, None] < m) & (columns < k)
        part = tl.load(x + tokens[:, None] * k + columns, here, other=0)
        if x_step is not None:
            part = tl.where(here, part.to(tl.float32) + 0.5, 0.0)
        scale = 1.0
        if grouping == 1:
            scale = tl.load(step + rows[:, None] * groups + tile * block_k // group, some)
        if grouping == 2:
            scale = _steps(step, rows[:, None], places * per, some, groups, group)
        acc = _tile_slices(
            word, part, scale, acc, step, rows[:, None], places, some, groups, group,
            0, 1, bits, per, grouping, precision,
        )  # fmt: skip
    if last:
        if x_step is not None:
            acc *= tl.load(x_step + tokens, tokens < m, other=0.0)[None, :]
        if grouping == 0:
            acc *= tl.load(step + rows, rows < n, other=0.0)[:, None]
        if bias is not None:
            acc += tl.load(bias + rows, rows < n, other=0.0).to(tl.float32)[:, None]
    out = y + (third * m + tokens[:, None]) * n + rows[None, :]
    inside = (tokens[:, None] < m) & (rows[None, :] < n)
    tl.store(out, tl.trans(acc).to(y.dtype.element_ty), inside)


@triton.jit
def quant_linear_parts(
    parts: tl.tensor, x_step: tl.tensor, step: tl.tensor, bias: tl.tensor, y: tl.tensor,
    size: tl.tensor, n: tl.tensor, count: tl.tensor, grouping: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Sums over parts [count, size] of K, in order; then step and bias."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    acc = tl.zeros((block,), tl.float32)
    for part in range(count):
        acc += tl.load(parts + part * size + at, at < size, other=0.0)
    row = at % n
    if x_step is not None:
        acc *= tl.load(x_step + at // n, at < size, other=0.0)
    if grouping == 0:
        acc *= tl.load(step + row, at < size, other=0.0)
    if bias is not None:
        acc += tl.load(bias + row, at < size, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), at < size)


# ---- configurations ----------------------------------------------------------------------


def configs(arch: str, dtype: torch.dtype, bits: int, m: int) -> list[Config]:
    """Configurations of `quant_linear_tiles`, the default first.

    The defaults spill no register on sm_80, sm_90, sm_100 and gfx942.

    Args:
        arch: "sm_90", "gfx942" ...
        dtype: Of the activations.
        bits: Per weight.
        m: Tokens; may be symbolic.
    """
    per, width = period(bits)
    stages = 2 if arch.startswith("gfx") else 3
    narrow = statically_known_true(m <= 64)
    wide = dtype.itemsize == 4

    def loaded(config: Config) -> int:
        sizes = config.constants
        row = sizes["words"] * per * dtype.itemsize
        return int(sizes["block_m"] * row + sizes["block_n"] * sizes["words"] * width)

    def of(block_m: int, block_n: int, block_k: int, warps: int) -> Config:
        words = max(16, block_k // per)
        return Config({"block_m": block_m, "block_n": block_n, "words": words}, warps, stages)

    if wide and per == 8 and arch.startswith("sm_"):  # three products of slices fill registers
        every = [of(16, 128 if arch == "sm_100" else 32, 128, 8)]
    elif wide:
        rows, warps = (16, 4) if bits == 8 or statically_known_true(m <= 16) else (32, 8)
        every = [of(rows, 64, 64, warps), of(rows, 32, 64, warps)]
    elif statically_known_true(m <= 16):
        long = 256 if per > 2 and bits != 3 else 128
        every = [of(16, 64, long, 4), of(16, 32, long, 4), of(16, 64, 64, 4)]
    elif narrow:
        rows = 32 if statically_known_true(m <= 32) else 64
        warps = 8 if bits == 3 or (rows == 32 and bits > 1) else 4
        every = [of(rows, 64, 64, warps), of(rows, 128, 64, 8)]
    elif bits == 3:
        every = [of(64, 64, 128, 8)]
    elif per == 8:
        every = [of(64, 128, 128, 8), of(64, 64, 128, 4)]
    else:
        long = 64 if arch in ("sm_90", "sm_100") else 32
        every = [of(128, 128, long, 8), of(64, 128, 64, 4), of(128, 64, 64, 4)]
    return fitting(every, arch, loaded)


# ---- the op ------------------------------------------------------------------------------


def quant_linear(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """See `resplice.kernels.quant_linear`; float64 is left to the reference."""
    n, k = codes.shape[0], x.shape[-1]
    if x.dtype == torch.float64 or codes.numel() == 0:
        found: Tensor = by_reference(
            op, f"is {x.dtype} [..., {k}] for {n} rows", x, codes, step, bias, bits, group
        )
        return found
    tokens = x.reshape(-1, k).contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if statically_known_true(tokens.shape[0] == 0):
        return y
    multiply(tokens, codes.contiguous(), step.contiguous(), bias, y, bits, group)
    return y


def multiply(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, y: Tensor, bits: int, group: int,
    x_step: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch x [m, k] times the weight into y [..., n].

    Integers x are codes of activations, worth (x + 1/2) * x_step, with a step per token.
    """
    m, n, k = x.shape[0], codes.shape[0], x.shape[1]
    arch, (per, width) = current_arch(), period(bits)
    kind = x.dtype if x_step is None else torch.float32
    config = configured("quant_linear_tiles", configs(arch, kind, bits, m))
    block_n, block_m = config.constants["block_n"], config.constants["block_m"]
    block_k = config.constants["words"] * per
    tiles = -(-k // block_k)
    blocks = (-(-n // block_n), -(-m // block_m))
    each = tiles if not statically_known_true(m <= 64) else share(tiles, math.prod(blocks), arch)
    count = -(-tiles // each)
    parts = y if count == 1 else x.new_empty((count, m, n), dtype=torch.float32)
    launch(
        quant_linear_tiles, (*blocks, count), x=x, x_step=x_step, codes=codes, step=step, bias=bias,
        y=parts, m=m, n=n, k=k, row_bytes=codes.shape[1], groups=step.shape[1], group=group,
        tiles_each=each, bits=bits, per=per, width=width, grouping=_grouping(group, per, block_k),
        precision="ieee" if arch.startswith("gfx") or kind != torch.float32 else "tf32x3",
        last=count == 1, **config.options,
    )  # fmt: skip
    if count > 1:
        launch(
            quant_linear_parts, (-(-m * n // 1024),), parts=parts, x_step=x_step, step=step,
            bias=bias, y=y, size=m * n, n=n, count=count, grouping=_grouping(group, per, block_k),
            block=1024, num_warps=4, num_stages=1,
        )  # fmt: skip


def _grouping(group: int, per: int, block_k: int) -> int:
    """How groups lie: one a row, whole tiles, whole words, or any way; see `quant_linear_tiles`."""
    if group == 0:
        return 0
    return 1 if group % block_k == 0 else 2 if group % per == 0 else 3


def share(tiles: int, programs: int | torch.SymInt, arch: str) -> int:
    """Tiles of K per program: two programs per processor, of four tiles or more each.

    A dynamic number of programs leaves K whole.
    """
    if not isinstance(programs, int):
        return tiles
    wanted = max(1, 2 * PROCESSORS.get(arch, 100) // programs)
    return max(-(-tiles // wanted), min(4, tiles))
