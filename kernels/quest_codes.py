"""quest_codes: activations as integer codes on QuEST's grid, made once for all their readers.

Source: arXiv 2502.05003, section 3: block Hadamard, root mean square per row, mid-rise grid. The
codes are those of `quest_quantize(x, bits, rotate_back=False)`: value = (code + 1/2) * step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels import quant_fast
from resplice.kernels.gaussian_grid import ALPHA, OUTLIER, TINY, grid_step, to_codes
from resplice.kernels.grid_lowering import emit_cast, emit_number, emit_step, emit_turned
from resplice.kernels.hadamard import hadamard
from resplice.ops import OpSample, op

aten = torch.ops.aten


def _verify(x: Tensor, bits: int, block: int, widen: bool = False) -> None:
    if bits not in ALPHA:
        raise OpError("quest_codes", "bits", f"is {bits}, not 1 to 8")
    if x.dim() < 1:
        raise OpError("quest_codes", "x", "has no axes")
    if not x.is_floating_point():
        raise OpError("quest_codes", "x", f"has dtype {x.dtype}, not floating point")
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise OpError(
            "quest_codes", "block", f"is {block}: not a power of two dividing {x.shape[-1]}"
        )


def _cost(x: Tensor, bits: int, block: int, widen: bool = False) -> Cost:
    turned = 0 if block == 1 else 2 * x.numel() * block
    rows = x.numel() // max(int(x.shape[-1]), 1)
    return Cost(
        turned + (8 if widen else 6) * x.numel(), x.numel() * x.element_size(), x.numel() + 4 * rows
    )


def _fake(x: Tensor, bits: int, block: int, widen: bool = False) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fast(x: Tensor, bits: int, block: int, widen: bool = False) -> tuple[Tensor, Tensor]:
    found = quant_fast.quest_codes(x, bits, block, ALPHA[bits], TINY, OUTLIER if widen else 0.0)
    if found is None:
        found = quest_codes.reference(x, bits, block, widen)
    return found


def _samples() -> Iterator[OpSample]:
    torch.manual_seed(0)
    for bits in (1, 2, 3, 4, 8):
        yield OpSample(f"{bits} bits", (torch.randn(3, 64), bits, 32, False))
    yield OpSample("three axes", (torch.randn(2, 3, 128), 4, 128, False))
    yield OpSample("no transform", (torch.randn(4, 30), 1, 1, False))
    yield OpSample("zeros", (torch.zeros(2, 16), 4, 16, True))
    outliers = torch.randn(4, 96)
    outliers[1:3, 7] = 200
    yield OpSample("outliers", (outliers, 8, 32, True))
    yield OpSample("outliers of few bits", (outliers, 4, 1, True))
    yield OpSample("no rows", (torch.zeros(0, 16), 4, 16, True))
    x = torch.randn(2, 24)
    yield OpSample("no bits", (x, 0, 8, False), refused="not 1 to 8")
    yield OpSample("ragged", (x, 4, 16, False), refused="dividing 24")
    yield OpSample("integers", (x.long(), 4, 8, False), refused="not floating point")


@op(
    "quest_codes(Tensor x, int bits, int block, bool widen=False) -> (Tensor, Tensor)",
    verify=_verify,
    cost=_cost,
    fake=_fake,
    fast=_fast,
    samples=_samples,
    autocast=(),
    rounds=True,
)
def quest_codes(x: Tensor, bits: int, block: int, widen: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate, scale and quantise the rows of `x`.

    Args:
        x: Floating point [..., K]; a row is the last axis.
        bits: 1 to 8.
        block: Order of the Hadamard transform along K, a power of two dividing it; 1 is none.
        widen: Whether the grid of a row with outliers, past 1.25 times the clip, is widened to its
            largest value; the paper clips.

    Returns:
        Codes, int8 [..., K], from -2**(bits-1) to 2**(bits-1) - 1, and steps, float32 [..., 1];
        a code k means (k + 1/2) * step. Computed in float32.

    Raises:
        OpError: Bits or block are out of range.
    """
    wide = x.float()
    values = hadamard.reference(wide, block) if block > 1 else wide
    step = grid_step(values, bits, widen)
    half: int = 2 ** (bits - 1)
    return (to_codes(values, step, bits) - half).to(torch.int8), step


@quest_codes.lower("coreml")
@quest_codes.lower("onnx")
def _by_arithmetic(build: Any, x: Any, bits: int, block: int, widen: bool = False) -> fx.Node:
    """The same arithmetic; the last step is a cast, behind which `code_linear` finds floats."""
    values = emit_turned(build, emit_cast(build, x, torch.float32), block)
    step = emit_step(build, values, bits, widen)
    codes = build(aten.sub.Tensor, emit_number(build, values, step, bits), 1)
    found: fx.Node = build.several((build(aten._to_copy.default, codes, dtype=torch.int8), step))
    return found


def float_codes(build: Any, codes: fx.Node) -> fx.Node:
    """Integer codes as float32, for lowerings: what was cast to integers, or a cast."""
    source = codes.args[0] if codes.target is aten._to_copy.default else None
    if isinstance(source, fx.Node) and source.meta["val"].dtype == torch.float32:
        return source
    found: fx.Node = build(aten._to_copy.default, codes, dtype=torch.float32)
    return found
