"""MIL's element types, and how torch holds their values between two ops.

Floats rest in float32 whatever their declared width, so that arithmetic needs no conversion; the
declared width shows in the rounding after each op. torch has little arithmetic on wide unsigned
integers, so these rest in the next wider signed type and are wrapped to their declared range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from resplice.backends.coreml.mil.tools import mil_types

Mode = Literal["declared", "fp32"]
"""`declared` rounds each result to its MIL type; `fp32` keeps every float in float32."""
Settle = Callable[[torch.Tensor], torch.Tensor]

_AT_REST = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float32,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
}
_WRAPPED = {"uint16": 0xFFFF, "uint32": 0xFFFFFFFF}


def type_name(var: Any) -> str:
    """The element type of a variable (of its elements, for lists): `fp16`, `int32`, `string`."""
    kind = var.sym_type
    if mil_types.is_state(kind):
        kind = kind.wrapped_type()
    if mil_types.is_list(kind):
        kind = kind.T[0]
    if mil_types.is_tensor(kind):
        kind = kind.get_primitive()
    return str(mil_types.builtin_to_string(kind))


def at_rest(name: str) -> torch.dtype:
    """The torch dtype that holds values of a MIL type between two ops."""
    return _AT_REST[name]


def settle(name: str, mode: Mode) -> Settle | None:
    """What to do to a result before others see it; None where it is not a tensor of numbers.

    Args:
        name: Declared MIL type of the result.
        mode: Whether fp16 results lose the bits that fp16 can't store.
    """
    if name == "fp16" and mode == "declared":
        return _round_to_half
    if name not in _AT_REST:
        return None
    return _wrapping(_WRAPPED[name]) if name in _WRAPPED else _resting(_AT_REST[name])


def _round_to_half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float16).to(torch.float32)


def _resting(dtype: torch.dtype) -> Settle:
    return lambda value: value if value.dtype is dtype else value.to(dtype)


def _wrapping(mask: int) -> Settle:
    dtype = torch.int32 if mask == 0xFFFF else torch.int64
    return lambda value: value.to(torch.int64).bitwise_and(mask).to(dtype)
