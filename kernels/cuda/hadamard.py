"""Triton kernel of `hadamard`: block Walsh-Hadamard transforms as products with a matrix of signs.

The matrix is made in registers: entry (i, j) is -1 to the power of the number of ones in i & j.
Signs are exact in 16 bits, so that 16-bit values take one pass of the tensor cores; 32-bit values
are three 16-bit ones, exactly. Sums are float32. Orders below 16 fill the diagonal of a matrix of
order 16; orders above 128 are transforms of order 128 and of the rest, one after the other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.launch import Config, by_reference, configured, current_arch, launch
from resplice.kernels.cuda.processors import PROCESSORS
from resplice.kernels.hadamard import hadamard as op

LARGEST = 128
"""Order of one product with the matrix of signs."""


@triton.jit
def sign_matrix(order: tl.constexpr, block: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """Transforms of order `block` along the diagonal, without their scale: [order, order].

    `kind` is the type of the values; the signs of 32-bit ones are bfloat16.
    """
    row, column = tl.arange(0, order)[:, None], tl.arange(0, order)[None, :]
    common = row & column & (block - 1)
    odd = (0x6996 >> ((common ^ (common >> 4)) & 15)) & 1  # the parity of four bits, by a table
    bits = (odd << 15) | (0x3C00 if kind == tl.float16 else 0x3F80)
    if block < order:
        bits = tl.where(row // block == column // block, bits, 0)
    kept: tl.constexpr = tl.float16 if kind == tl.float16 else tl.bfloat16
    return bits.to(tl.int16).to(kept, bitcast=True)


@triton.jit
def transformed(values: tl.tensor, signs: tl.tensor) -> tl.tensor:
    """Values [rows, order] times `sign_matrix`, float32, without the scale."""
    zero = tl.zeros(values.shape, tl.float32)
    if values.dtype == tl.float32:
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        found = tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs, zero)))
    else:
        found = tl.dot(values, signs, zero)
    return found


@triton.jit
def hadamard_blocks(
    x: tl.tensor, y: tl.tensor, size: tl.tensor, scale: tl.tensor, tiles: tl.tensor,
    order: tl.constexpr, block: tl.constexpr, stride: tl.constexpr, block_rows: tl.constexpr,
) -> None:  # fmt: skip
    """Transform elements i*stride of runs of block*stride elements; `size` elements in all."""
    signs = sign_matrix(order, block, x.dtype.element_ty)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile * block_rows + tl.arange(0, block_rows)).to(tl.int64)
        place = row // stride * order * stride + row % stride
        at = place[:, None] + stride * tl.arange(0, order)[None, :]
        found = transformed(tl.load(x + at, at < size, other=0.0), signs)
        tl.store(y + at, (found * scale).to(y.dtype.element_ty), at < size)


def configs(arch: str, dtype: torch.dtype) -> list[Config]:
    """Configurations of `hadamard_blocks`, the default first."""
    if dtype.itemsize == 4:  # three parts of every value are held at once
        small = arch in ("sm_80", "sm_86", "sm_89") or arch.startswith("gfx")
        sizes = [(16, 4), (16, 8)] if small else [(64, 8), (32, 8), (16, 4)]
    else:
        sizes = [(64, 4), (32, 4), (128, 8), (16, 4)]
    return [Config({"block_rows": rows}, warps, 1) for rows, warps in sizes]


def hadamard(x: Tensor, block: int) -> Tensor:
    """See `resplice.kernels.hadamard`; float64 is left to the reference."""
    if x.dtype == torch.float64 or block == 1 or block > LARGEST**2:
        found: Tensor = by_reference(op, f"is {x.dtype} in blocks of {block}", x, block)
        return found
    flat, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if statically_known_true(x.numel() == 0):
        return y
    if block <= LARGEST:
        transform(flat, y, block, 1)
    else:
        wide = torch.empty_like(y, dtype=torch.float32)
        transform(flat, wide, LARGEST, 1)
        transform(wide, y, block // LARGEST, LARGEST)
    return y


def transform(x: Tensor, y: Tensor, block: int, stride: int) -> None:
    """One launch: transforms of order `block` at most 128 over elements `stride` apart."""
    arch = current_arch()
    config = configured("hadamard_blocks", configs(arch, x.dtype))
    order, size = max(16, block), x.numel()
    rows = -(-size // (order * stride)) * stride
    tiles = -(-rows // config.constants["block_rows"])
    launch(
        hadamard_blocks, (programs(tiles, arch),), x=x, y=y, size=size, scale=1 / math.sqrt(block),
        tiles=tiles, order=order, block=block, stride=stride, **config.options,
    )  # fmt: skip


def programs(tiles: int, arch: str) -> int:
    """Programs that share tiles: as many as work at once, since each makes its own matrix."""
    most = 4 * PROCESSORS.get(arch, 100)
    return tiles if statically_known_true(tiles <= most) else most
