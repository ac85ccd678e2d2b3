"""The grid of `gaussian_grid` as every lowering emits it, in float32."""

from __future__ import annotations

from typing import Any

import torch

from resplice.kernels.gaussian_grid import ALPHA, OUTLIER, TINY
from resplice.kernels.hadamard import transform_by_product

aten = torch.ops.aten


def emit_cast(build: Any, x: Any, kind: torch.dtype) -> Any:
    """The value in that dtype."""
    return x if x.meta["val"].dtype == kind else build(aten._to_copy.default, x, dtype=kind)


def emit_turned(build: Any, x: Any, block: int) -> Any:
    """Blocks of the last axis transformed; 1 leaves them."""
    return x if block == 1 else transform_by_product(build, x, block)


def emit_rms(build: Any, values: Any) -> Any:
    """Root mean square over the last axis, which stays with size 1."""
    power = build(aten.mean.dim, build(aten.mul.Tensor, values, values), [-1], True)
    return build(aten.sqrt.default, power)


def emit_step(build: Any, values: Any, bits: int, widen: bool = False) -> Any:
    """Distance between levels; see `grid_step`."""
    intervals = 2**bits - 1
    bound = build(aten.mul.Tensor, emit_rms(build, values), ALPHA[bits])
    step = build(aten.mul.Tensor, build(aten.add.Tensor, bound, TINY), 2 / intervals)
    if not widen:
        return step
    largest = build(aten.amax.default, build(aten.abs.default, values), [-1], True)
    reach = build(aten.mul.Tensor, largest, 2 / intervals)
    far = build(aten.gt.Tensor, reach, build(aten.mul.Tensor, step, OUTLIER))
    return build(aten.where.self, far, reach, step)


def emit_number(build: Any, values: Any, step: Any, bits: int) -> Any:
    """Number of each value's level, counted from the first positive one, which is 1; as floats."""
    half = 2 ** (bits - 1)
    place = build(aten.add.Tensor, build(aten.div.Tensor, values, step), 0.5)
    return build(aten.clamp.default, build(aten.round.default, place), 1 - half, half)


def emit_level(build: Any, values: Any, step: Any, bits: int) -> Any:
    """Each value's level; see `to_grid`."""
    number = emit_number(build, values, step, bits)
    return build(aten.mul.Tensor, build(aten.sub.Tensor, number, 0.5), step)
