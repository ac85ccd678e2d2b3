"""quest_quantize: values rounded to QuEST's grid, with the trust gradient.

Source: Panferov et al., arXiv 2502.05003, section 3 and algorithm 1. Forward: block Hadamard, root
mean square per row, clip at the Gaussian optimum, mid-rise grid. Backward: straight through where
the quantiser can be trusted, zero elsewhere, the mask applied in the rotated domain; no gradient
through root mean square, scale or clip bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels.gaussian_grid import ALPHA, OUTLIER, grid_step, root_mean_square, to_grid
from resplice.kernels.grid_lowering import emit_cast, emit_level, emit_step, emit_turned
from resplice.kernels.hadamard import hadamard, largest_block
from resplice.ops import OpSample, op

aten = torch.ops.aten
Estimator = Literal["trust", "clip", "ste"]
ESTIMATORS = ("trust", "clip", "ste")


def quest_quantize(
    x: Tensor,
    bits: int,
    *,
    hadamard: int | Literal["auto", "off"] = 128,
    clip: float | None = None,
    estimator: Estimator = "trust",
    rotate_back: bool = True,
    widen: bool = False,
) -> Tensor:
    """Round every row of `x` to QuEST's grid; differentiable.

    Args:
        x: Floating point [..., K]; a row is the last axis.
        bits: 1 to 8.
        hadamard: Order of the block transform along K, a power of two dividing it; "auto" is the
            largest one up to 128, "off" (or 1) is none.
        clip: Gradients pass where |x_h| <= clip * alpha * rms. None means the estimator's own
            bound: 2**bits / (2**bits - 1) for "trust" (half a step beyond the outermost level),
            1 for "clip". The paper's 1-bit runs use 1.30, or 1.25 without the transform.
        estimator: "trust", "clip", or "ste" (all gradients pass).
        rotate_back: Return to the basis of `x`; False leaves the result in the Hadamard domain,
            for products whose other operand is rotated too.
        widen: Whether the grid of a row with outliers, past 1.25 times the clip, is widened to its
            largest value, and passes all its gradients; the paper clips.

    Returns:
        Same shape and dtype as `x`; computed in float32 (float64 stays).

    Raises:
        OpError: An argument is out of range or the block does not divide K.
    """
    size = int(x.shape[-1]) if x.dim() else 1
    block = {"auto": largest_block(size), "off": 1}.get(str(hadamard), hadamard)
    found: Tensor = rounded(x, bits, block, clip or 0.0, estimator, rotate_back, widen)
    return found


def _verify(
    x: Tensor, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> None:  # fmt: skip
    if bits not in ALPHA:
        raise OpError("quest_quantize", "bits", f"is {bits}, not 1 to 8")
    require_rows("quest_quantize", x)
    require_rounding("quest_quantize", x, block, clip, estimator)


def require_rows(name: str, x: Tensor) -> None:
    """Refuse, in the name of an op, what has no floating point rows."""
    if x.dim() < 1:
        raise OpError(name, "x", "has no axes")
    if not x.is_floating_point():
        raise OpError(name, "x", f"has dtype {x.dtype}, not floating point")


def require_rounding(name: str, x: Tensor, block: int, clip: float, estimator: str) -> None:
    """Refuse a block that does not divide the rows, and what is no rule for gradients."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        what = f"is {block}: not a power of two dividing {x.shape[-1]}"
        raise OpError(name, "hadamard", what)
    if estimator not in ESTIMATORS:
        what = f"is {estimator!r}, not one of {', '.join(ESTIMATORS)}"
        raise OpError(name, "estimator", what)
    if clip < 0:
        raise OpError(name, "clip", f"is {clip}, must be positive")


def _samples() -> Iterator[OpSample]:
    torch.manual_seed(0)
    for bits in (1, 2, 3, 4, 8):
        yield OpSample(f"{bits} bits", (torch.randn(3, 64), bits, 32, 0.0, "trust", True))
    yield OpSample("rotated", (torch.randn(2, 3, 128), 4, 128, 0.0, "trust", False))
    yield OpSample("plain", (torch.randn(4, 30), 1, 1, 1.25, "clip", True))
    yield OpSample("float64", (torch.randn(4, 16, dtype=torch.float64), 2, 16, 0.0, "ste", True))
    yield OpSample("zeros", (torch.zeros(2, 16), 4, 16, 0.0, "trust", True))
    outliers = torch.randn(4, 96)
    outliers[1:3, 7] = 200
    yield OpSample("outliers", (outliers, 8, 32, 0.0, "trust", True, True))
    x = torch.randn(2, 24)
    yield OpSample("no bits", (x, 0, 8, 0.0, "trust", True), refused="not 1 to 8")
    yield OpSample("ragged", (x, 4, 16, 0.0, "trust", True), refused="dividing 24")
    yield OpSample("unknown rule", (x, 4, 8, 0.0, "lsq", True), refused="not one of")
    yield OpSample("integers", (x.long(), 4, 8, 0.0, "ste", True), refused="not floating point")


def _cost(
    x: Tensor, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> Cost:  # fmt: skip
    size = x.numel() * x.element_size()
    turns = 0 if block == 1 else 1 + rotate_back
    return Cost(2 * x.numel() * block * turns + (10 if widen else 8) * x.numel(), size, size)


def _in_place(
    x: Tensor, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> Tensor:  # fmt: skip
    """The same arithmetic as the reference without its temporaries: what training spends on."""
    values = _rotated(x, block)
    step, half = grid_step(values, bits, widen), 2 ** (bits - 1)
    levels = values.div_(step) if block > 1 else values / step  # a rotated value is our own
    levels.add_(0.5).round_().clamp_(1 - half, half).sub_(0.5).mul_(step)
    return _turned(levels, block if rotate_back else 1).to(x.dtype)


@op(
    "quest_quantize(Tensor x, int bits, int block, float clip, str estimator, bool rotate_back,"
    " bool widen=False) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    fast=_in_place,
    samples=_samples,
    autocast=(),
    rounds=True,
)
def rounded(
    x: Tensor, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> Tensor:  # fmt: skip
    """The op behind `quest_quantize`; block 1 is no transform, clip 0 the estimator's own bound."""
    values = _rotated(x, block)
    found = to_grid(values, grid_step(values, bits, widen), bits)
    return _turned(found, block if rotate_back else 1).to(x.dtype)


def trusted(values: Tensor, bits: int, clip: float, estimator: str, widen: bool = False) -> Tensor:
    """Where gradients pass, boolean like `values` (rows already rotated).

    The trust rule |Q(v) - v| <= T with T = half a step is |v| <= alpha * rms * 2**b / (2**b - 1);
    a row of zeros has T = 0 and passes nothing. A widened row clips nothing and passes all.
    """
    if estimator == "ste":
        return torch.ones_like(values, dtype=torch.bool)
    levels: int = 2**bits
    own = levels / (levels - 1) if estimator == "trust" else 1.0
    rms = root_mean_square(values)
    size, bound = values.abs(), ALPHA[bits] * rms
    inside = size <= (clip or own) * bound
    if widen:
        inside = inside.logical_or_(size.amax(-1, keepdim=True) > OUTLIER * bound)
    return inside.logical_and_(rms > 0) if estimator == "trust" else inside


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.bits, ctx.block, ctx.clip, ctx.estimator, ctx.rotate_back, ctx.widen = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """HT(M * HT(g)); without the inner transform where the result stayed rotated."""
    (x,) = ctx.saved_tensors
    mask = trusted(_rotated(x, ctx.block), ctx.bits, ctx.clip, ctx.estimator, ctx.widen)
    inner = _turned(_wide(grad), ctx.block if ctx.rotate_back else 1)
    return _turned(inner * mask, ctx.block).to(x.dtype), None, None, None, None, None, None


def _rotated(x: Tensor, block: int) -> Tensor:
    return _turned(_wide(x), block)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _turned(x: Tensor, block: int) -> Tensor:
    found: Tensor = x if block == 1 else hadamard(x.contiguous(), block)
    return found


rounded.differentiate(_backward, setup=_save)


@rounded.lower("coreml")
@rounded.lower("onnx")
def _by_arithmetic(
    build: Any, x: Any, bits: int, block: int, clip: float, estimator: str, rotate_back: bool,
    widen: bool = False,
) -> Any:  # fmt: skip
    """The same arithmetic in float32, around the transform's own lowering."""
    values = emit_turned(build, emit_cast(build, x, torch.float32), block)
    found = emit_level(build, values, emit_step(build, values, bits, widen), bits)
    found = emit_turned(build, found, block) if rotate_back else found
    return emit_cast(build, found, x.meta["val"].dtype)
