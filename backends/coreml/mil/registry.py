"""Which torch function executes which MIL op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

FAMILIES = (
    "activation",
    "control",
    "conv",
    "elementwise",
    "fills",
    "image",
    "indexing",
    "linear",
    "lists",
    "nms",
    "normalization",
    "pooling",
    "quantization",
    "random",
    "recurrent",
    "reduction",
    "reorder",
    "shape",
    "slicing",
    "sorting",
    "states",
)


@dataclass(frozen=True)
class Implementation:
    """How one op is executed.

    Attributes:
        function: Called with the op's inputs by their MIL names. Inputs that MIL declares constant
            arrive as Python values unless they are float arrays, tuples as lists of tensors,
            everything else as a tensor. Several outputs come back as a tuple.
        moves: Whether results are taken from inputs unchanged, so that rounding them is no work.
    """

    function: Callable[..., Any]
    moves: bool = False


_IMPLEMENTATIONS: dict[str, Implementation] = {}


def implements(*names: str, moves: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function for MIL ops.

    Args:
        *names: MIL op types, as in `op.op_type`.
        moves: See `Implementation`.
    """

    def register(function: Function) -> Function:
        for name in names:
            _IMPLEMENTATIONS[name] = Implementation(function, moves)
        return function

    return register


def find(name: str) -> Implementation | None:
    """The implementation of an op type, None if there is none."""
    _load_families()
    return _IMPLEMENTATIONS.get(name)


def names() -> tuple[str, ...]:
    """All op types that can be executed, constants and constant expressions aside."""
    _load_families()
    return tuple(sorted(_IMPLEMENTATIONS))


@cache
def _load_families() -> None:
    for family in FAMILIES:
        import_module(f"resplice.backends.coreml.mil.ops.{family}")
