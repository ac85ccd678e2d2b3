"""Triton kernel of `quest_quantize` and `quest_codes`: transform, step, rounding in one launch.

The transform keeps the sum of squares, so that the step of a row is known before its values are
transformed. A row of up to 64 blocks is loaded once, a longer one twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.kernels.cuda.hadamard import LARGEST, programs, sign_matrix, transformed
from resplice.kernels.cuda.launch import Config, by_reference, configured, current_arch, launch
from resplice.kernels.gaussian_grid import ALPHA, OUTLIER, TINY
from resplice.kernels.quest_codes import quest_codes as codes_op
from resplice.kernels.quest_quantize import rounded


@triton.jit
def _squares(values: tl.tensor, block_m: tl.constexpr) -> tl.tensor:
    wide = tl.reshape(
        values.to(tl.float32), (block_m, values.shape[0] // block_m * values.shape[1])
    )
    return tl.sum(wide * wide, 1)


@triton.jit
def _turned(values: tl.tensor, signs: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return values.to(tl.float32) if signs is None else transformed(values, signs) * scale


@triton.jit
def _largest(
    values: tl.tensor, signs: tl.tensor, scale: tl.tensor, block_m: tl.constexpr
) -> tl.tensor:
    """Largest magnitude of each row, transformed."""
    size = tl.abs(_turned(values, signs, scale))
    return tl.max(tl.reshape(size, (block_m, size.shape[0] // block_m * size.shape[1])), 1)


@triton.jit
def _levels(
    values: tl.tensor, step: tl.tensor, signs: tl.tensor, scale: tl.tensor, half: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The nearest level of each value, in steps of its row, plus 1/2; ties to even."""
    turned = _turned(values, signs, scale)
    place = tl.clamp(tl.div_rn(turned, step) + 0.5, 1.0 - half, half)
    return (place + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left of the sum is rounded


@triton.jit
def quest_quantize_rows(
    x: tl.tensor, y: tl.tensor, steps: tl.tensor, m: tl.tensor, k: tl.tensor, scale: tl.tensor,
    alpha: tl.tensor, tiny: tl.tensor, bits: tl.constexpr, block: tl.constexpr, order: tl.constexpr,
    result: tl.constexpr, once: tl.constexpr, outlier: tl.constexpr, block_m: tl.constexpr,
    blocks: tl.constexpr,
) -> None:  # fmt: skip
    """Quantise rows, block_m at a time and of them `blocks` runs of `order` values at a time.

    `result`: "codes" (-2**(bits-1) to 2**(bits-1) - 1, and the steps), "values", or "back" (values
    turned back). With an outlier above 0, rows that reach past so many clips get a grid as wide as
    they are.
    """
    half: tl.constexpr = 2 ** (bits - 1)
    signs = sign_matrix(order, block, x.dtype.element_ty) if block > 1 else None
    back = sign_matrix(order, block, tl.bfloat16) if result == "back" else None
    part = tl.arange(0, block_m * blocks)
    column = (part % blocks)[:, None] * order + tl.arange(0, order)[None, :]
    for group in range(tl.program_id(0), tl.cdiv(m, block_m), tl.num_programs(0)):
        row = (group * block_m + part // blocks).to(tl.int64)
        start, some = x + row[:, None] * k, row[:, None] < m
        values = tl.load(start + column, some & (column < k), other=0.0)
        total = _squares(values, block_m)
        if outlier > 0:
            reach = _largest(values, signs, scale, block_m)
        if not once:
            for base in range(blocks * order, k, blocks * order):
                more = tl.load(start + base + column, some & (base + column < k), other=0.0)
                total += _squares(more, block_m)
                if outlier > 0:
                    reach = tl.maximum(reach, _largest(more, signs, scale, block_m))
        step = 2.0 * (alpha * tl.sqrt_rn(total / k) + tiny) / (2 * half - 1)
        if outlier > 0:
            reach = 2.0 * reach / (2 * half - 1)
            step = tl.where(reach > outlier * step, reach, step)
        if result == "codes":
            first = group * block_m + tl.arange(0, block_m)
            tl.store(steps + first, step, first < m)
        each = tl.broadcast_to(step[:, None], (block_m, blocks))
        spread = tl.reshape(each, (block_m * blocks, 1))
        for base in range(0, k, blocks * order):
            if not once:
                values = tl.load(start + base + column, some & (base + column < k), other=0.0)
            place = _levels(values, spread, signs, scale, half)
            if result == "codes":
                found = place - 1.0
            elif result == "back":
                found = transformed((place - 0.5).to(tl.bfloat16), back) * scale * spread
            else:
                found = (place - 0.5) * spread
            inside = some & (base + column < k)
            tl.store(y + row[:, None] * k + base + column, found.to(y.dtype.element_ty), inside)


def configs(
    arch: str, dtype: torch.dtype, order: int, runs: int, widen: bool = False
) -> list[Config]:
    """Configurations of `quest_quantize_rows`, the default first.

    Args:
        arch: "sm_90", "gfx942" ...
        dtype: Of the values.
        order: Values in a run.
        runs: In a row.
        widen: Whether the largest value is looked for, which takes registers.
    """

    def of(total: int, warps: int) -> Config:
        blocks = min(triton.next_power_of_2(runs), total)
        return Config({"block_m": max(total // blocks, 1), "blocks": blocks}, warps, 1)

    amd = arch.startswith("gfx")
    if dtype.itemsize == 4:
        if widen and not amd:
            return [of(16, 8), of(8, 4)]
        small = amd or arch in ("sm_80", "sm_86", "sm_89")
        return [of(16, 4), of(16, 8)] if small else [of(64, 8), of(32, 8), of(16, 4)]
    if amd:
        return [of(32, 4), of(64, 8), of(16, 4)]
    return [of(64, 4), of(64, 8), of(32, 4), of(16, 4), of(128, 8)]


def quest_quantize(
    x: Tensor, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> Tensor:  # fmt: skip
    """See `resplice.kernels.quest_quantize`; float64 is left to the reference."""
    if x.dtype == torch.float64 or block > LARGEST:
        found: Tensor = by_reference(
            rounded, f"is {x.dtype} in blocks of {block}",
            x, bits, block, clip, estimator, rotate_back, widen,
        )  # fmt: skip
        return found
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not statically_known_true(x.numel() == 0):
        result = "back" if rotate_back and block > 1 else "values"
        quantize(x.contiguous(), y, None, bits, block, result, widen)
    return y


def quest_codes(x: Tensor, bits: int, block: int, widen: bool = False) -> tuple[Tensor, Tensor]:
    """See `resplice.kernels.quest_codes`; orders above 128 are left to the reference."""
    if block > LARGEST or x.dtype == torch.float64:
        found: tuple[Tensor, Tensor] = by_reference(
            codes_op, f"is {x.dtype} in blocks of {block}", x, bits, block, widen
        )
        return found
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    steps = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if not statically_known_true(x.numel() == 0):
        quantize(x.contiguous(), codes, steps, bits, block, "codes", widen)
    return codes, steps


def quantize(
    x: Tensor, y: Tensor, steps: Tensor | None, bits: int, block: int, result: str,
    widen: bool = False,
) -> None:  # fmt: skip
    """One launch over rows of x [..., k] into y, and steps [rows, 1] where codes are wanted."""
    k = x.shape[-1]
    m, order = x.numel() // k, max(16, block) if block > 1 else LARGEST
    runs = -(-k // order)
    arch = current_arch()
    config = configured("quest_quantize_rows", configs(arch, x.dtype, order, runs, widen))
    block_m, blocks = config.constants["block_m"], config.constants["blocks"]
    launch(
        quest_quantize_rows, (programs(-(-m // block_m), arch),), x=x, y=y, steps=steps, m=m, k=k,
        scale=1 / math.sqrt(block), alpha=ALPHA[bits], tiny=TINY, bits=bits, block=block,
        order=order, result=result, once=blocks >= runs,
        outlier=OUTLIER if widen else 0.0, **config.options,
    )  # fmt: skip
