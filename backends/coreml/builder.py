"""The builder that Core ML rules and lowerings receive."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from resplice.backends.coreml.options import CoremlOptions
from resplice.build import Builder
from resplice.dims import expression
from resplice.errors import LoweringError
from resplice.origin import where
from resplice.program import Program

_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv,
    Mod: operator.mod,
}  # fmt: skip


class CoremlBuilder(Builder):
    """Inserts ATen nodes, constants and MIL operators (`mil_op.mil`).

    Dynamic sizes are computed from the sizes of inputs, so a size of the node being replaced may
    be asked for as well.

    Attributes:
        options: The conversion's options.
    """

    def __init__(self, program: Program, before: fx.Node, options: CoremlOptions) -> None:
        """Build right before a node."""
        super().__init__(program, before)
        self.options = options

    def size(self, node: fx.Node, axis: int) -> fx.Node | int:
        """A size of a value: an int where static, else a node computed from input sizes."""
        return self.size_of(node.meta["val"].shape[axis])

    def size_of(self, size: Any) -> Any:
        """A size, static or symbolic, as an int or a node computed from input sizes."""
        return size if isinstance(size, int) else self._computed(expression(size))

    def _computed(self, expr: Any) -> Any:
        if expr.is_Integer:
            return int(expr)
        for placeholder in self.program.placeholders:
            for axis, size in enumerate(placeholder.meta["val"].shape):
                found = self._solved(placeholder, axis, expression(size), expr)
                if found is not None:
                    return found
        rule = _ARITHMETIC.get(expr.func)
        if rule is None:
            raise LoweringError(
                "coreml", [f"the size {expr} in {where(self.before)} can't be computed"]
            )
        first, *rest = [self._computed(part) for part in expr.args]
        for part in rest:
            first = self._combined(rule, first, part)
        return first

    def _solved(self, node: fx.Node, axis: int, size: Any, wanted: Any) -> Any:
        """The wanted size, where an input's size is that, or a multiple of that symbol."""
        if size == wanted:
            return super().size(node, axis)
        if wanted.is_Symbol and size.is_Mul and size.free_symbols == {wanted}:
            factor = size / wanted
            if factor.is_Integer:
                return self._combined(operator.floordiv, super().size(node, axis), int(factor))
        return None

    def _combined(self, rule: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return rule(left, right)
        return self(rule, left, right)
