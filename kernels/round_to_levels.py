"""round_to_levels: `quest_quantize` for other levels, and with half of the weights pruned.

Source: Panferov et al., arXiv 2502.05003: section 4.4 for pruning, appendix for FP4. As there, the
root mean square is that of the row before pruning, pruned values are exactly zero (which is on no
integer grid), and a gradient passes where |Q(v) - v| <= T: a pruned value trains on while it is
small.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels.gaussian_grid import TINY, root_mean_square
from resplice.kernels.grid_lowering import emit_cast, emit_level, emit_rms, emit_step, emit_turned
from resplice.kernels.hadamard import hadamard, largest_block
from resplice.kernels.level_sets import (
    FP4,
    FP4_SCALE,
    LEVEL_SETS,
    bits_of,
    decode,
    encode,
    half_interval,
    outermost,
    step_of,
)
from resplice.kernels.pruning import UNITS, fits, kept_units, kept_values
from resplice.kernels.quest_quantize import Estimator, require_rounding, require_rows
from resplice.ops import OpSample, op

aten = torch.ops.aten


def quest_round(
    x: Tensor,
    levels: str,
    *,
    sparse: Literal["off", "2:4", "4:8"] = "off",
    hadamard: int | Literal["auto", "off"] = 128,
    clip: float | None = None,
    estimator: Estimator = "trust",
    rotate_back: bool = True,
) -> Tensor:
    """Round every row of `x` to a level set, pruned if asked; differentiable.

    Args:
        x: Floating point [..., K]; a row is the last axis.
        levels: "int1" to "int8" (as `quest_quantize`), or "fp4".
        sparse: "2:4" keeps the two largest of four rotated values, "4:8" the two largest of four
            adjacent pairs.
        hadamard: Order of the block transform along K; "auto", or "off", see `quest_quantize`.
        clip: Gradients of values that stay pass where |x_h| <= clip * outermost level.
        estimator: "trust", "clip" or "ste".
        rotate_back: Return to the basis of `x`.

    Returns:
        Same shape and dtype as `x`; computed in float32 (float64 stays).

    Raises:
        OpError: An argument is out of range, or K is no multiple of the block or the group.
    """
    if sparse not in UNITS:
        raise OpError("quest_round", "sparse", f"is {sparse!r}, not one of {', '.join(UNITS)}")
    size = int(x.shape[-1]) if x.dim() else 1
    block = {"auto": largest_block(size), "off": 1}.get(str(hadamard), hadamard)
    found: Tensor = round_to_levels(
        x, levels, UNITS[sparse], block, clip or 0.0, estimator, rotate_back
    )
    return found


def _verify(
    x: Tensor, levels: str, unit: int, block: int, clip: float, estimator: str, rotate_back: bool
) -> None:
    def refuse(argument: str, what: str) -> None:
        raise OpError("round_to_levels", argument, what)

    require_rows("round_to_levels", x)
    if levels not in LEVEL_SETS:
        refuse("levels", f"is {levels!r}, not one of {', '.join(LEVEL_SETS)}")
    if unit not in (0, 1, 2) or not fits(int(x.shape[-1]), unit):
        refuse("unit", f"is {unit}: no pattern of rows of {x.shape[-1]}")
    require_rounding("round_to_levels", x, block, clip, estimator)


def _samples() -> Iterator[OpSample]:
    torch.manual_seed(0)
    for levels in ("int1", "int4", "fp4"):
        yield OpSample(levels, (torch.randn(3, 64), levels, 0, 32, 0.0, "trust", True))
        yield OpSample(f"{levels}, 4:8", (torch.randn(3, 64), levels, 2, 32, 0.0, "trust", False))
    yield OpSample("2:4", (torch.randn(2, 5, 32), "int3", 1, 16, 0.0, "trust", False))
    yield OpSample("plain", (torch.randn(4, 30), "fp4", 0, 1, 1.1, "clip", True))
    wide = torch.randn(4, 16, dtype=torch.float64)
    yield OpSample("float64", (wide, "fp4", 1, 16, 0.0, "ste", True))
    yield OpSample("zeros", (torch.zeros(2, 16), "int4", 2, 16, 0.0, "trust", True))
    x = torch.randn(2, 24)
    yield OpSample("no such set", (x, "fp8", 0, 8, 0.0, "trust", True), refused="not one of")
    yield OpSample(
        "half a group", (x[:, :20], "int4", 2, 4, 0.0, "trust", True), refused="no pattern"
    )
    yield OpSample("ragged", (x, "fp4", 0, 16, 0.0, "trust", True), refused="dividing 24")
    yield OpSample("unknown rule", (x, "fp4", 0, 8, 0.0, "lsq", True), refused="not one of")
    yield OpSample("negative", (x, "fp4", 0, 8, -1.0, "clip", True), refused="must be positive")
    yield OpSample("integers", (x.long(), "fp4", 0, 8, 0.0, "ste", True), refused="not floating")


def _cost(
    x: Tensor, levels: str, unit: int, block: int, clip: float, estimator: str, rotate_back: bool
) -> Cost:
    size = x.numel() * x.element_size()
    turns = 0 if block == 1 else 1 + rotate_back
    return Cost(2 * x.numel() * block * turns + 16 * x.numel(), size, size)


@op(
    "round_to_levels(Tensor x, str levels, int unit, int block, float clip, str estimator,"
    " bool rotate_back) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    samples=_samples,
    autocast=(),
    rounds=True,
)
def round_to_levels(
    x: Tensor, levels: str, unit: int, block: int, clip: float, estimator: str, rotate_back: bool
) -> Tensor:
    """The op behind `quest_round`; block 1 is no transform, unit 0 is dense."""
    values = _turned(x, block)
    step = step_of(values, levels)
    found = decode(encode(values, step, levels), levels, step.dtype) * step
    if unit:
        found = found * kept_values(kept_units(values, unit), unit).to(found.dtype)
    return _turned(found, block if rotate_back else 1).to(x.dtype)


def trusted(values: Tensor, levels: str, unit: int, clip: float, estimator: str) -> Tensor:
    """Where gradients pass, boolean like `values` (rows already rotated)."""
    if estimator == "ste":
        return torch.ones_like(values, dtype=torch.bool)
    rms, half = root_mean_square(values), half_interval(levels)
    bound = clip * outermost(levels) if clip else outermost(levels)
    if estimator == "trust" and not clip:
        bound += half
    inside = values.abs() <= bound * rms
    if unit:
        kept = kept_values(kept_units(values, unit), unit)
        inside = torch.where(kept, inside, values.abs() <= half * rms)
    return inside & (rms > 0) if estimator == "trust" else inside


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.rest = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """HT(M * HT(g)); without the inner transform where the result stayed rotated."""
    (x,) = ctx.saved_tensors
    levels, unit, block, clip, estimator, rotate_back = ctx.rest
    mask = trusted(_turned(x, block), levels, unit, clip, estimator)
    inner = _turned(grad, block if rotate_back else 1)
    return (_turned(inner * mask, block).to(x.dtype), *[None] * 6)


def _turned(x: Tensor, block: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    found: Tensor = wide if block == 1 else hadamard(wide.contiguous(), block)
    return found


round_to_levels.differentiate(_backward, setup=_save)


@round_to_levels.lower("coreml")
@round_to_levels.lower("onnx")
def _by_arithmetic(
    build: Any, x: Any, levels: str, unit: int, block: int, clip: float, estimator: str,
    rotate_back: bool,
) -> Any:  # fmt: skip
    """The same arithmetic in float32, around the transform's own lowering."""
    values = emit_turned(build, emit_cast(build, x, torch.float32), block)
    if levels == "fp4":
        found = _fp4_level(build, values, emit_rms(build, values))
    else:
        bits = bits_of(levels)
        found = emit_level(build, values, emit_step(build, values, bits), bits)
    if unit:
        found = build(aten.mul.Tensor, found, _emit_kept(build, values, unit))
    found = emit_turned(build, found, block) if rotate_back else found
    return emit_cast(build, found, x.meta["val"].dtype)


def _fp4_level(build: Any, values: Any, rms: Any) -> Any:
    """The magnitude as a sum of the gaps below it."""
    step = build(aten.add.Tensor, build(aten.mul.Tensor, rms, FP4_SCALE), TINY)
    ratio = build(aten.div.Tensor, values, step)
    size, total = build(aten.abs.default, ratio), None
    for low, high in pairwise(FP4):
        above = emit_cast(build, build(aten.gt.Scalar, size, (low + high) / 2), torch.float32)
        part = build(aten.mul.Tensor, above, high - low)
        total = part if total is None else build(aten.add.Tensor, total, part)
    level = build(aten.mul.Tensor, total, build(aten.sign.default, ratio))
    return build(aten.mul.Tensor, level, step)


def _emit_kept(build: Any, values: Any, unit: int) -> Any:
    """One where a value stays, else zero; as `pruning.kept_units`."""
    sizes = build.sizes(values)
    groups = [*sizes[:-1], sizes[-1] // (4 * unit), 4]
    squares = build.reshape(build(aten.mul.Tensor, values, values), [*groups, unit])
    norm = build(aten.sum.dim_IntList, squares, [-1])
    own, other = (build(aten.unsqueeze.default, norm, axis) for axis in (-1, -2))
    first = build.constant("quest.first_of_4", torch.ones(4, 4, dtype=torch.bool).tril(-1))
    tied = build(aten.logical_and.default, build(aten.eq.Tensor, other, own), first)
    ahead = build(aten.logical_or.default, build(aten.gt.Tensor, other, own), tied)
    number = build(aten.sum.dim_IntList, emit_cast(build, ahead, torch.float32), [-1])
    kept = emit_cast(build, build(aten.lt.Scalar, number, 1.5), torch.float32)
    wide = build(aten.expand.default, build(aten.unsqueeze.default, kept, -1), [*groups, unit])
    return build.reshape(wide, sizes)
