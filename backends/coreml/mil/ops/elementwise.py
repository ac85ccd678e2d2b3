"""Arithmetic, comparison and logic, element by element."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements


@implements("add")
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The sum; booleans count as numbers."""
    return x + y


@implements("sub")
def sub(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The difference."""
    return x - y


@implements("mul")
def mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The product."""
    return x * y


@implements("real_div")
def real_div(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The quotient; integers are divided as floats and cut towards zero."""
    if x.is_floating_point() or y.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


@implements("floor_div")
def floor_div(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The quotient rounded towards minus infinity."""
    return torch.div(x, y, rounding_mode="floor")


@implements("mod")
def mod(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The remainder with the sign of the divisor."""
    return torch.remainder(x, y)


@implements("pow")
def power(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x` to the power `y`; negative integer powers of integers go through floats."""
    if x.is_floating_point() or y.is_floating_point() or not bool((y < 0).any()):
        return torch.pow(x, y)
    return torch.pow(x.double(), y.double())


@implements("maximum", moves=True)
def maximum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The larger element."""
    return torch.maximum(x, y)


@implements("minimum", moves=True)
def minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The smaller element."""
    return torch.minimum(x, y)


@implements("equal")
def equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether elements are equal."""
    return torch.eq(x, y)


@implements("not_equal")
def not_equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether elements differ."""
    return torch.ne(x, y)


@implements("greater")
def greater(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether `x > y`."""
    return torch.gt(x, y)


@implements("greater_equal")
def greater_equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether `x >= y`."""
    return torch.ge(x, y)


@implements("less")
def less(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether `x < y`."""
    return torch.lt(x, y)


@implements("less_equal")
def less_equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether `x <= y`."""
    return torch.le(x, y)


@implements("logical_and")
def logical_and(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether both are true."""
    return torch.logical_and(x, y)


@implements("logical_or")
def logical_or(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether at least one is true."""
    return torch.logical_or(x, y)


@implements("logical_xor")
def logical_xor(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether exactly one is true."""
    return torch.logical_xor(x, y)


@implements("logical_not")
def logical_not(x: torch.Tensor) -> torch.Tensor:
    """Whether `x` is false."""
    return torch.logical_not(x)


@implements("select", moves=True)
def select(cond: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a` where the condition holds, else `b`."""
    return torch.where(cond.bool(), a, b)


@implements("cast")
def cast(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Another element type; floats are cut towards zero when they become integers."""
    if dtype == "bool":
        return x != 0
    return x.trunc().to(torch.int64) if x.is_floating_point() and "int" in dtype else x


_UNARY = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}


def _unary(name: str) -> None:
    function = _UNARY[name]
    implements(name)(lambda x: function(x))


for _name in _UNARY:
    _unary(_name)


@implements("log")
def log(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The natural logarithm of `x + epsilon`."""
    return torch.log(x + epsilon)


@implements("rsqrt")
def rsqrt(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One over the root of `x + epsilon`."""
    return torch.rsqrt(x + epsilon)


@implements("inverse")
def inverse(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One over `x + epsilon`; MIL's default of 1e-4 is anything but negligible."""
    return torch.reciprocal(x + epsilon)


@implements("clip", moves=True)
def clip(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Values limited to `[alpha, beta]`."""
    return torch.clamp(x, alpha, beta)


@implements("threshold", moves=True)
def threshold(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Values limited to at least `alpha`."""
    return torch.clamp(x, min=alpha)


@implements("identity", moves=True)
def identity(x: torch.Tensor) -> torch.Tensor:
    """The input."""
    return x
