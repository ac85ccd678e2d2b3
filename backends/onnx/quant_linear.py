"""quant_linear -> com.microsoft::MatMulNBits; with `portable` it decomposes into its reference.

MatMulNBits computes x @ ((code - zero) * scale)^T with an integer zero point, so the mid-rise
grid (levels at half integers) is split: level = (code - 2**(b-1)) * step + step / 2, and the second
part is a sum over x per group: one ReduceSum for all layers that read the same x.
One-bit weights become the two-bit codes 1 and 3, 3-bit weights are stored in 4-bit fields.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from resplice.backends.onnx.builder import OnnxBuilder
from resplice.kernels.packing import pack, unpack

aten = torch.ops.aten
_DEFAULT_BLOCK = 128
_BLOCKS = (16, 32, 64, 128, 256)
LEVEL_4_ERROR = 8e-3
"""Error of int8 activations inside MatMulNBits, relative to the largest output (measured)."""


def lower(
    build: OnnxBuilder, x: fx.Node, codes: fx.Node, step: fx.Node, bias: fx.Node | None,
    bits: int, group: int,
) -> fx.Node | None:  # fmt: skip
    """Replace one quant_linear; weights are repacked, so nothing is unpacked at run time.

    Returns None, which means "decompose", where only standard operators may be used or the group
    is no block size of the operator: weights then stay packed in the file and are unpacked by
    standard bit operators.
    """
    if build.options.portable or (group and group not in _BLOCKS):
        return None
    main = _fused(build, x, codes, step, bits, group)
    if bits > 1:
        main = build(aten.add.Tensor, main, _half_step_part(build, x, step, group))
    return main if bias is None else build(aten.add.Tensor, main, bias)


def _fused(
    build: OnnxBuilder, x: fx.Node, codes: fx.Node, step: fx.Node, bits: int, group: int
) -> fx.Node:
    size, rows = int(x.meta["val"].shape[-1]), int(codes.meta["val"].shape[0])
    block = group or _DEFAULT_BLOCK
    field = {1: 2, 3: 4}.get(bits, bits)
    blocks = -(-size // block)
    packed = _blocked(
        _fields(build.program.weight(codes), bits, field, size), blocks * block, field
    )
    scales = build.program.weight(step)
    scales = (
        (scales / 2 if bits == 1 else scales).expand(rows, blocks)
        if group == 0 or bits == 1
        else scales
    )
    name = str(codes.target)
    level = build.options.accuracy_level
    build.path = f"MatMulNBits, {field} bits, accuracy level {level}"
    if level == 4:
        build.error = LEVEL_4_ERROR
    elif field != 4:
        build.path += " (onnxruntime has no fast kernel for it: choose level 4 for speed)"
    return build.onnx(
        "com.microsoft::MatMulNBits",
        [
            x,
            build.weight(f"{name}_blocked", packed.view(rows, blocks, -1)),
            build.weight(f"{name}_scales", scales.contiguous().float()),
        ],
        {"K": size, "N": rows, "bits": field, "block_size": block,
         "accuracy_level": build.options.accuracy_level},
        sizes=[*build.sizes(x)[:-1], rows],
        dtype=x.meta["val"].dtype,
    )  # fmt: skip


def _fields(codes: Tensor, bits: int, field: int, size: int) -> Tensor:
    """Codes as unsigned fields whose zero point is 2**(field-1)."""
    plain = unpack(codes, bits, size)
    if bits == 1:
        return plain * 2 + 1
    offset: int = 2 ** (field - 1) - 2 ** (bits - 1)
    return plain + offset


def _blocked(fields: Tensor, padded: int, field: int) -> Tensor:
    zero = 2 ** (field - 1)
    return pack(torch.nn.functional.pad(fields, (0, padded - fields.shape[1]), value=zero), field)


def _half_step_part(build: OnnxBuilder, x: fx.Node, step: fx.Node, group: int) -> fx.Node:
    """(step / 2) * sum of x, per group: [..., groups] @ [groups, N]."""
    half = build.weight(f"{step.target}_half", (build.program.weight(step) / 2).t().contiguous())
    size = int(x.meta["val"].shape[-1])
    if group == 0:
        total = build.shared(aten.sum.dim_IntList, x, [-1], True)
        return build(aten.mul.Tensor, total, build.reshape(half, [-1]))
    if size % group:
        x = build.shared(aten.constant_pad_nd.default, x, [0, group - size % group])
    groups = -(-size // group)
    split = build.shared(aten.reshape.default, x, [*build.sizes(x)[:-1], groups, group])
    total = build.shared(aten.sum.dim_IntList, split, [-1])
    return build(aten.matmul.default, total, half)
