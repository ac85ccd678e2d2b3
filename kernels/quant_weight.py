"""quant_weight: a weight of any rank out of packed codes, dense or half pruned.

W[..., k] = level(code[..., k]) * step[..., k // group], and zero where the weight was pruned.

It serves where no fused form does: FP4 and sparse linear layers, stacked experts, convolutions.
Source: the level sets of arXiv 2502.05003 (see `level_sets.py` and `pruning.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels.level_sets import LEVEL_SETS, bits_of, decode, level_values
from resplice.kernels.packing import pack, packed_bytes, unpack
from resplice.kernels.pruning import expand, fits
from resplice.kernels.quant_linear import group_count
from resplice.ops import OpSample, op

PLACE_BITS = 2
"""Bits of the place of a unit in its group of four."""


def stored_codes(size: int, unit: int) -> int:
    """Codes of a row of `size` weights; half of them where it is pruned."""
    return size // 2 if unit else size


def _verify(
    step: Tensor, codes: Tensor, places: Tensor | None, levels: str, unit: int, group: int,
    size: int,
) -> None:  # fmt: skip
    def require(condition: bool, argument: str, what: str) -> None:
        if not condition:
            raise OpError("quant_weight", argument, what)

    require(step.dim() > 0, "step", "has no axes")
    require(step.is_floating_point(), "step", f"has dtype {step.dtype}, not floating point")
    require(levels in LEVEL_SETS, "levels", f"is {levels!r}, not one of {', '.join(LEVEL_SETS)}")
    require(unit in (0, 1, 2), "unit", f"is {unit}, not 0, 1 or 2")
    require(group >= 0, "group", f"is {group}, must be 0 or positive")
    require(fits(size, unit), "size", f"is {size}, no multiple of {4 * unit}")
    rows = tuple(step.shape[:-1])
    expected: dict[str, tuple[Tensor | None, int]] = {
        "codes": (codes, packed_bytes(stored_codes(size, unit), bits_of(levels))),
        "places": (places, packed_bytes(size // (2 * unit), PLACE_BITS) if unit else 0),
    }
    require(
        (places is None) == (unit == 0), "places", "belong to pruned weights, and to those only"
    )
    for name, (value, count) in expected.items():
        if value is None:
            continue
        fitting = value.dtype == torch.uint8 and tuple(value.shape) == (*rows, count)
        found = f"{value.dtype} {list(value.shape)}"
        require(fitting, name, f"must be torch.uint8 {[*rows, count]}, is {found}")
    groups = group_count(size, group)
    require(step.shape[-1] == groups, "step", f"has {step.shape[-1]} steps a row, not {groups}")


def _cost(
    step: Tensor, codes: Tensor, places: Tensor | None, levels: str, unit: int, group: int,
    size: int,
) -> Cost:  # fmt: skip
    made = math.prod(step.shape[:-1]) * size
    read = sum(t.numel() * t.element_size() for t in (step, codes, places) if t is not None)
    return Cost(2 * made, read, made * step.element_size())


def _samples() -> Iterator[OpSample]:
    generator = torch.Generator().manual_seed(0)

    def call(
        rows: tuple[int, ...], size: int, levels: str, unit: int = 0, group: int = 0
    ) -> tuple[Any, ...]:
        bits = bits_of(levels)
        codes = torch.randint(
            0, 2**bits, (*rows, stored_codes(size, unit)), generator=generator, dtype=torch.uint8
        )
        places = None
        if unit:
            order = torch.rand(*rows, size // (4 * unit), 4, generator=generator).argsort(dim=-1)
            places = pack(order[..., :2].sort(-1).values.flatten(-2), PLACE_BITS)
        step = torch.rand(*rows, group_count(size, group), generator=generator) + 0.1
        return step, pack(codes, bits), places, levels, unit, group, size

    for levels in ("int1", "int2", "int3", "int4", "int8", "fp4"):
        yield OpSample(levels, call((5,), 32, levels))
        yield OpSample(f"{levels}, 4:8", call((3,), 32, levels, 2))
    yield OpSample("2:4", call((4,), 20, "int4", 1))
    yield OpSample("stacked", call((2, 3), 24, "fp4", 2))
    yield OpSample("ragged groups", call((4,), 40, "int3", 0, 16))
    yield OpSample("pruned in groups", call((4,), 32, "int2", 1, 16))
    step, codes, places, *rest = call((4,), 32, "int4", 2)
    yield OpSample("unknown levels", (step, codes, places, "fp8", 2, 0, 32), refused="not one of")
    yield OpSample("no places", (step, codes, None, *rest), refused="belong to pruned weights")
    yield OpSample(
        "short codes", (step, codes[:, 1:], places, *rest), refused="must be torch.uint8"
    )
    yield OpSample("half a group", (step, codes, places, "int4", 2, 0, 36), refused="multiple of 8")
    yield OpSample(
        "steps", (step, codes, places, "int4", 2, 16, 32), refused="1 steps a row, not 2"
    )
    yield OpSample("whole steps", (step.long(), codes, places, *rest), refused="not floating point")


def _made(
    levels_of_codes: Tensor, step: Tensor, places: Tensor | None, unit: int, group: int, size: int
) -> Tensor:
    values = levels_of_codes
    if places is not None:
        values = expand(values, unpack(places, PLACE_BITS, size // (2 * unit)), unit)
    spread = step if group == 0 else step.repeat_interleave(group, -1)[..., :size]
    return values * spread


def _fast(
    step: Tensor, codes: Tensor, places: Tensor | None, levels: str, unit: int, group: int,
    size: int,
) -> Tensor:  # fmt: skip
    """One look-up per byte where codes do not straddle bytes."""
    bits, count = bits_of(levels), stored_codes(size, unit)
    if 8 % bits:
        return quant_weight.reference(  # type: ignore[no-any-return]  # a tensor, as declared
            step, codes, places, levels, unit, group, size
        )
    table = _byte_table(levels).to(step.device, step.dtype)
    values = table[codes.long()].flatten(-2)[..., :count]
    return _made(values, step, places, unit, group, size)


@cache
def _byte_table(levels: str) -> Tensor:
    """The levels of the codes of every byte: float32 [256, 8 / bits]."""
    bits = bits_of(levels)
    byte = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
    return level_values(levels)[unpack(byte, bits, 8 // bits).long()]


@op(
    "quant_weight(Tensor step, Tensor codes, Tensor? places, str levels, int unit, int group,"
    " int size) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda step, codes, places, levels, unit, group, size: step.new_empty(
        (*step.shape[:-1], size)
    ),
    fast=_fast,
    parameters=lambda step, codes, places, levels, unit, group, size: (
        math.prod(step.shape[:-1]) * size - step.numel()
    ),
    samples=_samples,
)
def quant_weight(
    step: Tensor, codes: Tensor, places: Tensor | None, levels: str, unit: int, group: int,
    size: int,
) -> Tensor:  # fmt: skip
    """A weight out of packed codes.

    Args:
        step: Floating point [..., groups].
        codes: uint8 [..., ceil(count*bits/8)], packed along the last axis: K codes, or K/2 of the
            weights that stayed.
        places: None, or of the units that stayed their places in their group of four: 2-bit codes,
            uint8 [..., ceil(K/(2*unit)*2/8)].
        levels: A key of `level_sets.LEVEL_SETS`.
        unit: 0 is dense, 1 is 2:4, 2 is 4:8 (`pruning.py`).
        group: Weights per step along K; 0 means the whole row.
        size: K.

    Returns:
        [..., K] in the dtype of `step`.

    Raises:
        OpError: Shapes, dtypes or options do not fit together.
    """
    plain = unpack(codes, bits_of(levels), stored_codes(size, unit))
    return _made(decode(plain, levels, step.dtype), step, places, unit, group, size)


quant_weight.lowerings["coreml"] = "resplice.backends.coreml.quant_weight:lower"
