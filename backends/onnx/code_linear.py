"""code_linear -> MatMulInteger, a standard operator, with the correction of the mid-rise grid.

sum (a + 1/2)(w + 1/2) = sum a w + 1/2 sum a + (1/2 sum w + K/4): the first is the integer product,
the second one ReduceSum for all layers that read the same activations, the third a constant.
Activations travel as unsigned bytes with the zero point 2**(x_bits-1). Weights are stored packed
and unpacked by standard operators, which onnxruntime folds once when it loads the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.onnx.builder import OnnxBuilder
from resplice.kernels.packing import pack, unpack
from resplice.kernels.quest_codes import float_codes

aten = torch.ops.aten


def lower(
    build: OnnxBuilder, x: fx.Node, x_step: fx.Node, codes: fx.Node, step: fx.Node,
    bias: fx.Node | None, bits: int, group: int, x_bits: int,
) -> fx.Node | None:  # fmt: skip
    """Replace one code_linear; None, which means "decompose", where steps are per group."""
    size = int(x.meta["val"].shape[-1])
    if 0 < group < size:
        return None
    build.path = f"MatMulInteger, {bits} by {x_bits} bits"
    plain = float_codes(build, x)
    zero = 2 ** (x_bits - 1)
    unsigned = build.shared(aten.add.Tensor, plain, zero)
    bytes_ = _cast(build, unsigned, torch.uint8)
    product = build.onnx(
        "MatMulInteger",
        [bytes_, _weight(build, codes, bits, size),
         build.constant(f"quest.zero_{zero}", torch.tensor(zero, dtype=torch.uint8)),
         build.constant(f"quest.zero_of_{bits}", _zero_point(bits))],
        {},
        sizes=[*build.sizes(x)[:-1], int(codes.meta["val"].shape[0])],
        dtype=torch.int32,
        version=10,
    )  # fmt: skip
    whole = build(aten._to_copy.default, product, dtype=torch.float32)
    total = build(aten.mul.Tensor, build.shared(aten.sum.dim_IntList, plain, [-1], True), 0.5)
    weights = unpack(build.program.weight(codes), bits, size).float() - 2 ** (bits - 1)
    rest = build.weight(f"{codes.target}_rest", weights.sum(-1) / 2 + size / 4)
    exact = build(aten.add.Tensor, build(aten.add.Tensor, whole, total), rest)
    scale = build.weight(f"{step.target}_scale", build.program.weight(step).float().reshape(-1))
    y = build(aten.mul.Tensor, build(aten.mul.Tensor, exact, x_step), scale)
    return y if bias is None else build(aten.add.Tensor, y, bias)


def _cast(build: OnnxBuilder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """One cast for all readers."""
    for user in node.users:
        same = user.target is aten._to_copy.default and user.kwargs.get("dtype") == dtype
        if same and user < build.before:
            return user
    return build(aten._to_copy.default, node, dtype=dtype)


def _zero_point(bits: int) -> torch.Tensor:
    """Of the weights as `_weight` leaves them."""
    return torch.tensor(128, dtype=torch.uint8) if bits == 8 else torch.tensor(0, dtype=torch.int8)


def _weight(build: OnnxBuilder, codes: fx.Node, bits: int, size: int) -> fx.Node:
    """[K, N] bytes: unsigned codes of 8 bits, else signed ones, unpacked in the graph."""
    if bits == 8:
        return build(aten.transpose.int, codes, -1, -2)
    field, stored = bits, codes
    if bits == 3:  # no code straddles two bytes
        field, fields = 4, unpack(build.program.weight(codes), 3, size)
        stored = build.weight(f"{codes.target}_fields", pack(fields, 4))
    wide = build(aten._to_copy.default, stored, dtype=torch.int32)
    lanes: list[Any] = []
    for place in range(8 // field):
        shifted = build(
            aten.div.Tensor_mode, wide, 2 ** (field * place), rounding_mode="floor"
        )  # fmt: skip
        lanes.append(build(aten.remainder.Scalar, shifted, 2**field))
    rows, count = wide.meta["val"].shape
    together = build(aten.stack.default, lanes, -1)
    flat = build(aten.reshape.default, together, [int(rows), int(count) * len(lanes)])
    cut = build(aten.slice.Tensor, flat, 1, 0, size)
    signed = build(aten.sub.Tensor, cut, 2 ** (bits - 1))
    small = build(aten._to_copy.default, signed, dtype=torch.int8)
    return build(aten.transpose.int, small, -1, -2)
