"""Values of constants and of compressed weights.

The decoders follow the definitions of MIL's `constexpr_*` ops (coremltools, opsets iOS 16 and 18).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from resplice.backends.coreml.mil.dtypes import at_rest, type_name
from resplice.backends.coreml.mil.tools import silent

_SHARED_FROM = 1 << 16
"""Bytes from which equal constants of several functions are worth finding."""


def is_constant(var: Any) -> bool:
    """Whether a variable's value is stored in the package, plain or compressed."""
    return var.op is not None and (
        var.op.op_type == "const" or var.op.op_type.startswith("constexpr_")
    )


def stored_value(var: Any) -> Any:
    """The value of a constant as coremltools holds it; compressed weights are decoded."""
    if var.op.op_type == "const":
        return var.val
    decoded = _DECODERS[var.op.op_type](_Inputs(var.op))
    return decoded[var.op.outputs.index(var)] if isinstance(decoded, tuple) else decoded


@dataclass
class Constants:
    """Constants as torch tensors, decoded once; large equal ones share their storage."""

    _by_var: dict[int, torch.Tensor] = field(default_factory=dict)
    _by_content: dict[tuple[str, tuple[int, ...], bytes], torch.Tensor] = field(
        default_factory=dict
    )

    def tensor(self, var: Any) -> torch.Tensor:
        """The value of a constant, in the dtype in which its type rests."""
        if id(var) not in self._by_var:
            self._by_var[id(var)] = self._shared(np.asarray(stored_value(var)), type_name(var))
        return self._by_var[id(var)]

    def _shared(self, array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
        if array.nbytes < _SHARED_FROM:
            return _to_torch(array, name)
        content = np.ascontiguousarray(array).view(np.uint8).data
        key = (array.dtype.str, array.shape, hashlib.blake2b(content).digest())
        if key not in self._by_content:
            self._by_content[key] = _to_torch(array, name)
        return self._by_content[key]


def _to_torch(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    """A tensor over the array's own memory where the type allows it."""
    dtype = at_rest(name)
    if array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    elif array.dtype.kind in "ui" and array.dtype.itemsize > 1:
        array = array.astype(np.int64) if array.dtype != np.int32 else array
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.flags.writeable:
        return torch.from_numpy(array).to(dtype)
    with silent():  # torch warns of read-only memory; nothing here writes into constants
        return torch.from_numpy(array).to(dtype)


class _Inputs:
    """The inputs of a constant expression by name, as arrays; None for those left out."""

    def __init__(self, op: Any) -> None:
        self._vars = op.inputs

    def __contains__(self, name: str) -> bool:
        return name in self._vars

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return np.asarray(stored_value(self._vars[name]))

    def number(self, name: str) -> int | None:
        """An integer."""
        return int(self[name]) if name in self._vars else None

    def optional(self, name: str) -> np.ndarray[Any, Any] | None:
        """An array that may be left out."""
        var = self._vars.get(name)
        return None if var is None else np.asarray(stored_value(var))


Array = np.ndarray[Any, Any]


def _affine(given: _Inputs) -> Array:
    data, axis = given["quantized_data"], int(given["axis"])
    shape = [-1 if at == axis % data.ndim else 1 for at in range(data.ndim)]
    scale, zero = (
        value.reshape(shape) if value.ndim else value
        for value in (given["scale"], given["zero_point"])
    )
    steps = data.astype(np.float32) - zero.astype(np.float32)
    return np.asarray((steps * scale.astype(np.float32)).astype(scale.dtype))


def _cast(given: _Inputs) -> Array:
    return given["source_val"].astype(np.float32)


def _blocks(value: Array, shape: tuple[int, ...]) -> Array:
    """Repeat along every axis until the shape is reached."""
    for axis, size in enumerate(shape):
        value = np.repeat(value, size // value.shape[axis], axis)
    return value


def _shift_scale(data: Array, scale: Array, offset: Array | None) -> Array:
    steps = data.astype(np.float32)
    if offset is not None:
        steps = steps - _blocks(offset, data.shape).astype(np.float32)
    factors = _blocks(scale, data.shape).astype(np.float32)
    return np.asarray((steps * factors).astype(scale.dtype))


def _blockwise(given: _Inputs) -> Array:
    return _shift_scale(given["data"], given["scale"], given.optional("offset"))


def _unpack(packed: Array, bits: int, count: int) -> Array:
    """Numbers of a few bits from bytes, lowest bits first."""
    flags = np.unpackbits(packed.view(np.uint8), bitorder="little")[: bits * count]
    weights = (1 << np.arange(bits)).astype(np.int64)
    return np.asarray(flags.reshape(count, bits).astype(np.int64) @ weights)


def _look_up(indices: Array, lut: Array, vector_axis: int | None) -> Array:
    """Entries of tables: one table per block of indices, each entry a number or a vector."""
    tables = lut.reshape(-1, *lut.shape[-2:])
    picked = tables[_table_numbers(indices.shape, lut.shape[:-2]), indices.astype(np.int64)]
    if picked.shape[-1] == 1:
        return np.asarray(picked[..., 0])
    axis = (vector_axis or 0) % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= picked.shape[-1]
    return np.asarray(np.moveaxis(picked, -1, axis + 1).reshape(shape))


def _table_numbers(shape: tuple[int, ...], groups: tuple[int, ...]) -> Array | int:
    """For each index the number of its table; just 0 if there is one table."""
    numbers: Array | int = 0
    for axis, (size, count) in enumerate(zip(shape, groups, strict=True)):
        if count > 1 or not isinstance(numbers, int):
            own = np.arange(size) // (size // count)
            own = own.reshape([-1 if at == axis else 1 for at in range(len(shape))])
            numbers = numbers * count + own
    return numbers


def _lut_to_dense(given: _Inputs) -> Array:
    lut, indices = given["lut"], given["indices"]
    if "shape" not in given:
        return _look_up(indices, lut, given.number("vector_axis"))
    shape = [int(size) for size in given["shape"]]
    flat = _unpack(indices, int(np.log2(lut.size)), int(np.prod(shape)))
    return np.asarray(lut.reshape(-1)[flat].reshape(shape))


def _spread(values: Array, mask: Array) -> Array:
    """A dense array with the values where the mask is set, else zero."""
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask != 0] = values
    return dense


def _sparse_to_dense(given: _Inputs) -> Array:
    mask = given["mask"]
    if "shape" in given:
        shape = [int(size) for size in given["shape"]]
        count = int(np.prod(shape))
        mask = np.unpackbits(mask.view(np.uint8), bitorder="little")[:count].reshape(shape)
    return _spread(given["nonzero_data"], mask)


def _lut_to_sparse(given: _Inputs) -> tuple[Array, Array]:
    mask, axis = given["indices_mask"], given.number("vector_axis")
    dense = _look_up(_spread(given["indices_nonzero_data"], mask), given["lut"], axis)
    if dense.shape != mask.shape:
        mask = np.repeat(mask, given["lut"].shape[-1], (axis or 0) % mask.ndim)
    return mask, dense[mask != 0]


def _sparse_blockwise(given: _Inputs) -> tuple[Array, Array]:
    mask = given["data_mask"]
    dense = _spread(given["nonzero_data"], mask)
    dense = _shift_scale(dense, given["scale"], given.optional("offset"))
    return mask, dense[mask != 0]


_DECODERS: dict[str, Callable[[_Inputs], Array | tuple[Array, Array]]] = {
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}


def decodable(op_type: str) -> bool:
    """Whether a constant expression of this type can be decoded."""
    return op_type in _DECODERS
