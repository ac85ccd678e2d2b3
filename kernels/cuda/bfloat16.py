"""bfloat16 in Triton's interpreter, which adds the bits as integers, and truncates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_PATCHED = ("binary_op", "ternary_op", "create_dot", "cast_impl")


@contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """Interpret operations on bfloat16 as float32 ones, rounded to nearest where they return it."""
    before = {name: getattr(InterpreterBuilder, name) for name in _PATCHED}
    changed = {
        "binary_op": _elementwise(before["binary_op"], 2),
        "ternary_op": _elementwise(before["ternary_op"], 3),
        "create_dot": _dot(before["create_dot"]),
        "cast_impl": _cast(before["cast_impl"]),
    }
    for name, function in changed.items():
        setattr(InterpreterBuilder, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)


def _elementwise(original: Callable[..., Any], count: int) -> Callable[..., Any]:
    def run(self: Any, *args: Any) -> Any:
        handles = args[:count]
        if not any(_is_bfloat16(handle) for handle in handles):
            return original(self, *args)
        found = original(self, *(widened(handle) for handle in handles), *args[count:])
        return found if found.data.dtype == np.bool_ else _narrowed(found)

    return run


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    return run


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, value: Any, kind: Any) -> Any:
        if kind.scalar != tl.bfloat16:
            return original(self, widened(value), kind)
        return _narrowed(original(self, widened(value), tl.float32))

    return run


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16) and handle.data.dtype == np.uint16


def widened(handle: Any) -> Any:
    """The same numbers as float32, if they are bfloat16."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(handle: Any) -> Any:
    """float32 to bfloat16, ties to even."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(handle.data)
    return TensorHandle(np.where(nan, 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
