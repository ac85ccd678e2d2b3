"""Scales of compressed weights behind the product that reads them."""

from __future__ import annotations

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder
from resplice.backends.coreml.mil_op import LUT_WEIGHT, SPARSE_WEIGHT
from resplice.backends.legal import Legalizer

aten = torch.ops.aten


def scale_behind_product(build: CoremlBuilder, node: fx.Node) -> fx.Node | None:
    """linear(x, table[codes] * scale, bias) -> linear(x, table[codes]) * scale + bias.

    The weight then stays a constant expression, which Core ML keeps compressed.
    """
    if node.target is not aten.linear.default:
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(weight, fx.Node) or weight.target is not aten.mul.Tensor:
        return None
    packed, scale = weight.args
    if not isinstance(packed, fx.Node) or packed.target not in (LUT_WEIGHT, SPARSE_WEIGHT):
        return None
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return None
    rows = packed.meta["val"].shape[0]
    if packed.meta["val"].dim() != 2 or tuple(scale.meta["val"].shape) != (rows, 1):
        return None
    row = build.weight(f"{scale.target}_row", build.program.weight(scale).reshape(-1))
    found = build(aten.mul.Tensor, build(aten.linear.default, node.args[0], packed), row)
    return found if bias is None else build(aten.add.Tensor, found, bias)


RULES: tuple[Legalizer, ...] = (scale_behind_product,)
