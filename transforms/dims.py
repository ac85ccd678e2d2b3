"""Dynamic dimensions by name: what users write, what shapes print.

A user writes `{"input_ids": {0: "batch", 1: "seq=2:2048"}}`; one name is one size everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from resplice.errors import UsageError

Size = int | str
_TEXT = re.compile(
    r"^\s*(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*(?:\*[A-Za-z_]\w*)*)\s*(?:=\s*(\d*)\s*:\s*(\d*)\s*)?$"
)


@dataclass(frozen=True)
class Dim:
    """A named dynamic dimension.

    Attributes:
        name: One name is one size everywhere; a product of names ("frames*rows") is the size
            that those names give.
        min: Inclusive lower bound.
        max: Inclusive upper bound; None: unbounded.
        factor: The axis is always this many times the named size ("2*rows").
    """

    name: str
    min: int = 2
    max: int | None = None
    factor: int = 1

    def __post_init__(self) -> None:
        """Refuse bounds that admit nothing.

        Raises:
            UsageError: The lower bound is above the upper one.
        """
        if self.max is not None and self.min > self.max:
            raise UsageError(f"dimension {self} admits no size", hint="write the lower bound first")

    @classmethod
    def parse(cls, value: object) -> Dim:
        """Read `"seq"`, `"seq=2:2048"`, `"2*rows"`, `"frames*rows"`, torch's `Dim` or ours.

        Raises:
            UsageError: The value names no dimension.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and (found := _TEXT.match(value)):
            factor, name, low, high = found.groups()
            bounds = int(low) if low else 2, int(high) if high else None
            return cls(name, *bounds, factor=int(factor or 1))
        found = _TEXT.match(getattr(value, "__name__", ""))
        if not found:
            raise UsageError(
                f"{value!r} is not a dynamic dimension",
                hint='write a name such as "seq", with bounds "seq=2:2048"',
            )
        root = getattr(value, "root", value)  # torch keeps the bounds of `2 * rows` with `rows`
        low, high = getattr(root, "min", 2), getattr(root, "max", None)
        bounded = isinstance(high, int) and high < torch.iinfo(torch.int64).max
        factor, name = found.groups()[:2]
        top = int(high) if bounded and high is not None else None
        return cls(name, max(int(low), 2), top, factor=int(factor or 1))

    @property
    def label(self) -> str:
        """`rows`, or `2*rows`: how a size that is this dimension prints."""
        return self.name if self.factor == 1 else f"{self.factor}*{self.name}"

    def admits(self, size: int) -> bool:
        """Whether an axis of this dimension may have that size."""
        base, rest = divmod(size, self.factor)
        return rest == 0 and self.min <= base and (self.max is None or base <= self.max)

    def __str__(self) -> str:
        """Print back the text form."""
        if (self.min, self.max) == (2, None):
            return self.label
        return f"{self.label}={self.min}:{'' if self.max is None else self.max}"


DynamicShapes = Mapping[str, Mapping[int, Any] | Sequence[Any] | None]


def per_axis(spec: Mapping[int, Any] | Sequence[Any] | None) -> dict[int, Dim]:
    """Normalise one input's spec, `{1: "seq"}` or `(None, "seq")`, to axis -> Dim."""
    if spec is None:
        return {}
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    return {int(axis): Dim.parse(value) for axis, value in pairs if value is not None}


def size_text(size: Any, names: Mapping[str, str]) -> Size:
    """Print one size: an int stays, a symbol becomes its dimension's name."""
    if isinstance(size, int):
        return size
    whole = size.node.expr
    named = {s: sympy.Symbol(names[str(s)]) for s in whole.free_symbols if str(s) in names}
    return str(whole.xreplace(named)).replace(" ", "")


def shape_text(shape: Sequence[Any], names: Mapping[str, str]) -> tuple[Size, ...]:
    """Print every size of a shape."""
    return tuple(size_text(size, names) for size in shape)


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression behind a size."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def solve(size: int | torch.SymInt, actual: int, bound: dict[sympy.Symbol, int]) -> bool:
    """Whether `actual` fits a declared size; binds a symbol met for the first time."""
    wanted = expression(size).subs(bound)
    if not wanted.free_symbols:
        return int(wanted) == actual
    if len(wanted.free_symbols) > 1:
        return True  # several unknowns: a later size decides
    (symbol,) = wanted.free_symbols
    roots = [root for root in sympy.solve(wanted - actual, symbol) if root.is_Integer and root > 0]
    if roots:
        bound[symbol] = int(roots[0])
    return bool(roots)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors have provably equal sizes; never adds a guard."""
    return len(a.shape) == len(b.shape) and all(
        expression(x) == expression(y) for x, y in zip(a.shape, b.shape, strict=True)
    )
