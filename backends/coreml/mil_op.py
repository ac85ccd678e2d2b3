"""`resplice_mil::call`: one MIL operator as a node of our graph.

It lets a rule or an op's lowering say exactly which Core ML operator it means, without importing
coremltools: `build.mil("gelu", {"x": x}, mode="TANH_APPROXIMATION")`. The meaning in PyTorch stays
known (`like`), so the graph can still be inferred; `frontend.py` emits the operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from resplice.build import Builder

NAMESPACE = "resplice_mil"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define(
    "call(Tensor[] inputs, str operator, str names, str attributes, SymInt[] sizes,"
    " ScalarType dtype) -> Tensor"
)
_LIBRARY.define("lut_weight(Tensor codes, Tensor levels, int bits) -> Tensor")
_LIBRARY.define("sparse_weight(Tensor codes, Tensor mask, Tensor levels, int bits) -> Tensor")
_LIBRARY.define("block_weight(Tensor codes, Tensor scale, int zero, int bits) -> Tensor")


def _call(
    inputs: Sequence[Tensor],
    operator: str,
    names: str,
    attributes: str,
    sizes: Sequence[Any],
    dtype: torch.dtype,
) -> Tensor:
    device = inputs[0].device if inputs else None
    return torch.empty(tuple(sizes), dtype=dtype, device=device)


def _lut_weight(codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    return levels[codes.long()]


def _sparse_weight(codes: Tensor, mask: Tensor, levels: Tensor, bits: int) -> Tensor:
    dense = levels.new_zeros(mask.shape)
    return dense.masked_scatter(mask.bool(), levels[codes.long()])


def _block_weight(codes: Tensor, scale: Tensor, zero: int, bits: int) -> Tensor:
    spread = scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)
    return (codes.to(scale.dtype) - zero) * spread


torch.library.register_fake(f"{NAMESPACE}::call", _call, lib=_LIBRARY)
_LIBRARY.impl("lut_weight", _lut_weight, "CompositeExplicitAutograd")
_LIBRARY.impl("sparse_weight", _sparse_weight, "CompositeExplicitAutograd")
_LIBRARY.impl("block_weight", _block_weight, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::lut_weight", _lut_weight, lib=_LIBRARY)
torch.library.register_fake(
    f"{NAMESPACE}::sparse_weight",
    lambda codes, mask, levels, bits: levels.new_empty(mask.shape),
    lib=_LIBRARY,
)
torch.library.register_fake(f"{NAMESPACE}::block_weight", _block_weight, lib=_LIBRARY)

CALL = torch.ops.resplice_mil.call.default
LUT_WEIGHT = torch.ops.resplice_mil.lut_weight.default
SPARSE_WEIGHT = torch.ops.resplice_mil.sparse_weight.default
BLOCK_WEIGHT = torch.ops.resplice_mil.block_weight.default


def mil(
    build: Builder,
    operator: str,
    inputs: Mapping[str, fx.Node],
    *,
    sizes: Sequence[Any],
    dtype: torch.dtype,
    **attributes: Any,
) -> fx.Node:
    """Insert one MIL operator with one result.

    Args:
        build: Where to insert.
        operator: Its name in MIL, such as `gelu`.
        inputs: Tensor inputs by MIL parameter name.
        sizes: The result's sizes: ints, or nodes from `Builder.size`.
        dtype: The result's dtype.
        attributes: Constant parameters; None is left out. A list may hold nodes of sizes.
    """
    given = {key: value for key, value in attributes.items() if value is not None}
    return build(
        CALL, list(inputs.values()), operator, json.dumps(list(inputs)), json.dumps(given),
        list(sizes), dtype,
    )  # fmt: skip


def mil_like(
    build: Builder, operator: str, inputs: Mapping[str, fx.Node], like: fx.Node, **attributes: Any
) -> fx.Node:
    """Like `mil`, with the sizes and dtype of a node's value."""
    return mil(
        build, operator, inputs, sizes=build.sizes(like), dtype=like.meta["val"].dtype, **attributes
    )
