"""quant_linear -> packed Core ML weights: a shared look-up table, or blocks.

Per channel (`group` 0): W[n, k] = level[code[n, k]] * step[n] is one table for the whole matrix,
and the step multiplies the result, `y = linear(x, level[code]) * step`. Tables per channel would
lose most of the speed on the Neural Engine. Levels are scaled to [-1, 1] (exact in float16) and the
step takes the factor, so that sums stay small. Before iOS18 a 3-bit table takes 4-bit fields.

In groups, from iOS18: `constexpr_blockwise_shift_scale` with the integer zero point 2**(b-1); the
half step that the mid-rise grid is shifted by is a sum over x per group. There are no blocks of
1, 2 or 3 bits: 4 bits hold them. Before iOS18 there are no blocks: groups are stored unpacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder
from resplice.backends.coreml.mil_op import BLOCK_WEIGHT, LUT_WEIGHT
from resplice.kernels.packing import unpack
from resplice.kernels.quant_linear import dequantize
from resplice.kernels.quest_codes import float_codes

aten = torch.ops.aten


def lower(
    build: CoremlBuilder, x: fx.Node, codes: fx.Node, step: fx.Node, bias: fx.Node | None,
    bits: int, group: int,
) -> fx.Node:  # fmt: skip
    """Replace one quant_linear; the weights stay packed in the package (see above)."""
    size = int(x.meta["val"].shape[-1])
    if group == 0 or group >= size:
        result = _by_table(build, x, codes, step, bits)
    elif build.options.generation >= 18:
        result = _by_blocks(build, x, codes, step, bits, group)
    else:
        weight = dequantize(
            build.program.weight(codes), build.program.weight(step), bits, group, size
        )
        dense = build.weight(f"{codes.target}_dense", weight)
        result = build(aten.linear.default, x, dense)
    return result if bias is None else build(aten.add.Tensor, result, bias)


def lower_codes(
    build: CoremlBuilder, x: fx.Node, x_step: fx.Node, codes: fx.Node, step: fx.Node,
    bias: fx.Node | None, bits: int, group: int, x_bits: int,
) -> fx.Node:  # fmt: skip
    """Replace one code_linear: there is no integer arithmetic, so codes become their values.

    (a + 1/2) * x_step, once for all readers, and then what quant_linear becomes.
    """
    middle = build.shared(aten.add.Tensor, float_codes(build, x), 0.5)
    value = build.shared(aten.mul.Tensor, middle, x_step)
    return lower(build, value, codes, step, bias, bits, group)


def _by_table(
    build: CoremlBuilder, x: fx.Node, codes: fx.Node, step: fx.Node, bits: int
) -> fx.Node:
    half = 2 ** (bits - 1)
    levels = (torch.arange(2**bits, dtype=torch.float32) - half + 0.5) / half
    field = 4 if bits == 3 and build.options.generation < 18 else bits
    table = build.constant(f"coreml.levels_{bits}_of_{field}", _padded(levels, 2**field))
    weight = build(LUT_WEIGHT, _plain_codes(build, codes, x, bits), table, field)
    scale = build.weight(f"{step.target}_scale", build.program.weight(step).reshape(-1) * half)
    return build(aten.mul.Tensor, build(aten.linear.default, x, weight), scale)


def _padded(levels: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(levels, (0, count - levels.numel()))


def _plain_codes(build: CoremlBuilder, codes: fx.Node, x: fx.Node, bits: int) -> fx.Node:
    """uint8 [N, K], one code an element; coremltools packs them."""
    plain = unpack(build.program.weight(codes), bits, int(x.meta["val"].shape[-1]))
    return build.weight(f"{codes.target}_plain", plain)


def _by_blocks(
    build: CoremlBuilder, x: fx.Node, codes: fx.Node, step: fx.Node, bits: int, group: int
) -> fx.Node:
    size, zero = int(x.meta["val"].shape[-1]), 2 ** (bits - 1)
    scale = build.program.weight(step).float()
    plain = unpack(build.program.weight(codes), bits, size)
    missing = -size % group
    if missing:  # whole blocks: what is added has the value zero and meets zeros in x
        plain = torch.nn.functional.pad(plain, (0, missing), value=zero)
        x = build.shared(aten.constant_pad_nd.default, x, [0, missing])
    packed = build.weight(f"{codes.target}_plain", plain)
    field = 8 if bits == 8 else 4
    blocks = build.weight(f"{step.target}_blocks", scale.contiguous())
    weight = build(BLOCK_WEIGHT, packed, blocks, zero, field)
    half = build.weight(f"{step.target}_half", (scale / 2).t().contiguous())
    sums = _group_sums(build, x, group)
    main = build(aten.linear.default, x, weight)
    return build(aten.add.Tensor, main, build(aten.matmul.default, sums, half))


def _group_sums(build: CoremlBuilder, x: fx.Node, group: int) -> fx.Node:
    sizes: list[Any] = build.sizes(x)
    split = build.shared(aten.reshape.default, x, [*sizes[:-1], sizes[-1] // group, group])
    return build.shared(aten.sum.dim_IntList, split, [-1])
