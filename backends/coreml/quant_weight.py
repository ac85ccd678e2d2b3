"""quant_weight -> constant expressions of Core ML, times the steps.

Dense: one look-up table of levels for all codes, FP4's sixteen included. Pruned, from iOS18: a mask
of one bit a weight and the codes of what stayed (`constexpr_lut_to_sparse`, then
`constexpr_sparse_to_dense`); before it a table with a level more, zero. Tables are scaled to
[-1, 1] and the steps take the factor; a linear layer gets them behind its product
(`legalize/scales.py`).
What has no such form (steps that do not divide a row, pruned 8 bits before iOS18) is stored dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from resplice.backends.coreml.builder import CoremlBuilder
from resplice.backends.coreml.mil_op import LUT_WEIGHT, SPARSE_WEIGHT
from resplice.kernels.level_sets import bits_of, level_values
from resplice.kernels.packing import unpack
from resplice.kernels.pruning import expand
from resplice.kernels.quant_weight import PLACE_BITS, quant_weight, stored_codes

aten = torch.ops.aten
_FIELDS = (1, 2, 3, 4, 6, 8)


def lower(
    build: CoremlBuilder, step: fx.Node, codes: fx.Node, places: fx.Node | None, levels: str,
    unit: int, group: int, size: int,
) -> fx.Node | None:  # fmt: skip
    """Replace one quant_weight of constants; None, its reference, where they are computed."""
    given = [step, codes] if places is None else [step, codes, places]
    if any(node.op != "get_attr" for node in given):
        return None
    values = [build.program.weight(node) for node in given]
    bits, name = bits_of(levels), str(codes.target)
    kept = None if places is None else _kept(values[2], unit, size)
    plain = unpack(values[1], bits, stored_codes(size, unit))
    table, modern = level_values(levels), build.options.generation >= 18
    peak = 2.0 ** float(table.abs().max().log2().ceil())
    if group and size % group:
        found = None
    elif kept is None:
        found = _looked_up(build, name, plain, table / peak)
    elif modern:
        mask = build.weight(f"{name}_mask", kept.to(torch.uint8))
        tables = build.constant(f"coreml.table_{levels}", table / peak)
        found = build(SPARSE_WEIGHT, build.weight(f"{name}_plain", plain), mask, tables, bits)
    else:
        spread = expand(plain + 1, unpack(values[2], PLACE_BITS, size // (2 * unit)), unit)
        zero = torch.zeros(1)
        found = _looked_up(build, name, spread, torch.cat((zero, table / peak)))
    if found is None:
        third = values[2] if places is not None else None
        dense = quant_weight(values[0], values[1], third, levels, unit, group, size)
        return build.weight(f"{name}_dense", dense)
    scale = build.weight(f"{step.target}_scale", values[0].float() * peak)
    return _scaled(build, found, scale, group)


def _kept(places: Tensor, unit: int, size: int) -> Tensor:
    """Which weights stayed: bool [..., K]."""
    ones = torch.ones(*places.shape[:-1], size // 2)
    return expand(ones, unpack(places, PLACE_BITS, size // (2 * unit)), unit) > 0


def _looked_up(build: CoremlBuilder, name: str, codes: Tensor, table: Tensor) -> fx.Node | None:
    """A table of all levels; None for more than 8 bits hold."""
    modern, count = build.options.generation >= 18, table.numel()
    fields = [f for f in _FIELDS if count <= 2**f and (modern or f != 3)]
    if not fields:
        return None
    padded = torch.nn.functional.pad(table, (0, 2 ** fields[0] - count))
    levels = build.constant(f"coreml.table_{count}_of_{fields[0]}", padded)
    return build(
        LUT_WEIGHT, build.weight(f"{name}_plain", codes.to(torch.uint8)), levels, fields[0]
    )


def _scaled(build: CoremlBuilder, weight: fx.Node, scale: fx.Node, group: int) -> fx.Node:
    if group == 0 or scale.meta["val"].shape[-1] == 1:
        return build(aten.mul.Tensor, weight, scale)
    sizes = list(weight.meta["val"].shape)
    split = build.reshape(weight, [*sizes[:-1], sizes[-1] // group, group])
    wide = build(aten.unsqueeze.default, scale, -1)
    return build.reshape(build(aten.mul.Tensor, split, wide), sizes)
