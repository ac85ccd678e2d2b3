"""What coremltools' PyTorch frontend learns from us for one conversion, and forgets after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx

from resplice.backends.coreml.mil.tools import coremltools, mil_types, silent

with silent():
    from coremltools.converters.mil import Builder as Emit
    from coremltools.converters.mil.frontend.torch import exir_utils
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.frontend.torch.utils import (
        NUM_TO_DTYPE_STRING,
        sanitize_op_kind,
    )
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with
    from coremltools.optimize._utils import pack_elements_into_bits

Handler = Callable[[Any, Any], None]
_HANDLERS: dict[str, Handler] = {}
_TABLE: dict[str, Handler] = _TORCH_OPS_REGISTRY.name_to_func_mapping
_UNPACKED = {1: "uint1", 2: "uint2", 3: "uint3", 4: "uint4", 6: "uint6", 8: "uint8"}


def handles(*kinds: str) -> Callable[[Handler], Handler]:
    """Register the decorated function for operator kinds, over coremltools' own."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(kinds, handler))
        return handler

    return register


def kind_of(node: fx.Node) -> str:
    """The name under which the frontend looks an operator up."""
    target: Any = node.target
    name = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
    found: str = sanitize_op_kind(name)
    return found


def is_known(node: fx.Node) -> bool:
    """Whether the frontend, with our handlers, translates a node."""
    kind = kind_of(node)
    return kind in _HANDLERS or kind in _TABLE


@contextmanager
def taught() -> Iterator[None]:
    """Our handlers in place of coremltools' for the duration."""
    before = dict(_TABLE)
    _TABLE.update(_HANDLERS)
    try:
        yield
    finally:
        _TABLE.clear()
        _TABLE.update(before)


@contextmanager
def plain_input_shapes() -> Iterator[None]:
    """Leave input shapes to the `inputs=` we give: the frontend refuses sizes such as `2*s0`."""
    original = exir_utils._construct_ct_tensor_type_from_torch

    def described(name: str, tensor: torch.Tensor, symbols: dict[str, Any]) -> Any:
        class Sized:
            dtype = tensor.dtype
            shape = tuple(_known_size(size, symbols) for size in tensor.shape)

        return original(name, Sized, symbols)

    exir_utils._construct_ct_tensor_type_from_torch = described
    try:
        yield
    finally:
        exir_utils._construct_ct_tensor_type_from_torch = original


def _known_size(size: Any, symbols: dict[str, Any]) -> Any:
    if isinstance(size, int) or str(size) in symbols:
        return size
    known = sorted(symbols)
    return known[0] if known else int(size)


def _value(context: Any, item: Any) -> Any:
    return context[item] if isinstance(item, str) else item


@handles("resplice_mil::call", "call", "resplice_mil::call.default")
def _call(context: Any, node: Any) -> None:
    inputs, operator, names, attributes = node.inputs[:4]
    given = {
        name: _value(context, item) for name, item in zip(json.loads(names), inputs, strict=True)
    }
    result = getattr(Emit, operator)(**given, **json.loads(attributes), name=node.name)
    context.add(result)


@handles("resplice_mil::lut_weight", "lut_weight")
def _lut_weight(context: Any, node: Any) -> None:
    codes, levels = (context[name].val for name in node.inputs[:2])
    bits, levels = node.inputs[2], levels.astype(np.float32)
    if is_current_opset_version_compatible_with(coremltools.target.iOS18):
        kind = mil_types.nptype_from_builtin(mil_types.string_to_builtin(_UNPACKED[bits]))
        table = levels.reshape((*[1] * codes.ndim, levels.shape[-1], 1))
        weight = Emit.constexpr_lut_to_dense(indices=codes.astype(kind), lut=table, name=node.name)
    else:  # one flat stream of bits, and a table for the whole tensor
        stream = pack_elements_into_bits(codes.reshape(-1), bits)
        shape = np.array(codes.shape, dtype=np.uint32)
        weight = Emit.constexpr_lut_to_dense(
            indices=stream, lut=levels, shape=shape, name=node.name
        )
    context.add(weight)


@handles("resplice_mil::sparse_weight", "sparse_weight")
def _sparse_weight(context: Any, node: Any) -> None:
    codes, mask, levels = (context[name].val for name in node.inputs[:3])
    kind = mil_types.nptype_from_builtin(mil_types.string_to_builtin(_UNPACKED[node.inputs[3]]))
    flag = mil_types.nptype_from_builtin(mil_types.string_to_builtin("uint1"))
    table = levels.astype(np.float32).reshape((*[1] * mask.ndim, levels.shape[-1], 1))
    kept, values = Emit.constexpr_lut_to_sparse(
        indices_mask=mask.astype(flag), indices_nonzero_data=codes.reshape(-1).astype(kind),
        lut=table, name=f"{node.name}_kept",
    )  # fmt: skip
    context.add(Emit.constexpr_sparse_to_dense(nonzero_data=values, mask=kept, name=node.name))


@handles("resplice_mil::block_weight", "block_weight")
def _block_weight(context: Any, node: Any) -> None:
    codes, scale = (context[name].val for name in node.inputs[:2])
    zero, bits = node.inputs[2:4]
    kind = mil_types.nptype_from_builtin(mil_types.string_to_builtin(_UNPACKED[bits]))
    context.add(
        Emit.constexpr_blockwise_shift_scale(
            data=codes.astype(kind), scale=scale, offset=np.full(scale.shape, zero).astype(kind),
            name=node.name,
        )
    )  # fmt: skip


@handles("_to_copy", "to")
def _to_copy(context: Any, node: Any) -> None:
    x = context[node.inputs[0]]
    number = (node.kwinputs or {}).get("dtype", (None,))[0]
    wanted = NUM_TO_DTYPE_STRING[number] if number is not None else None
    wanted = {"int16": "int32", "uint8": "int32", "int8": "int32"}.get(str(wanted), wanted)
    if wanted is None or wanted == mil_types.builtin_to_string(x.dtype):
        context.add(Emit.identity(x=x, name=node.name))
    else:
        context.add(Emit.cast(x=x, dtype=wanted, name=node.name))


@handles("alias", "clone", "detach", "contiguous")
def _identity(context: Any, node: Any) -> None:
    context.add(Emit.identity(x=context[node.inputs[0]], name=node.name))


def _arithmetic(operator: str) -> Handler:
    def emit(context: Any, node: Any) -> None:
        x, y = (_integer(context, item) for item in node.inputs[:2])
        context.add(getattr(Emit, operator)(x=x, y=y, name=node.name))

    return emit


def _integer(context: Any, item: Any) -> Any:
    return context[item] if isinstance(item, str) else np.int32(item)


_SIZES = {"floordiv": "floor_div", "mod": "mod"}
for _kind, _operator in _SIZES.items():
    _HANDLERS[_kind] = _arithmetic(_operator)
