"""Layers in integer arithmetic: activation codes made once per input, times packed weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.kernels.code_linear import code_linear
from resplice.kernels.quest_codes import quest_codes


def code_product(
    build: Builder, x: fx.Node, block: int, act_bits: int, widen: bool, packed: tuple[Any, ...]
) -> fx.Node:
    """code_linear(quest_codes(x, act_bits, block, widen), packed) in the dtype of `x`.

    Args:
        build: Where to insert.
        x: Not rotated; its codes are shared by all its readers.
        block: Order of the Hadamard transform; 1 is none.
        act_bits: Bits per activation.
        widen: Whether a row with outliers gets a wider grid.
        packed: Codes, step, bias, bits and group of the weight, whose input axis is rotated.
    """
    pair = build.shared(quest_codes.overload, x, act_bits, block, *([True] if widen else []))
    codes, step = (build.shared(operator.getitem, pair, index) for index in (0, 1))
    product = build(code_linear.overload, codes, step, *packed, act_bits)
    kind = x.meta["val"].dtype
    if kind == torch.float32:
        return product
    return build(torch.ops.aten._to_copy.default, product, dtype=kind)
