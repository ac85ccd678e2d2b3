"""Arithmetic that coremltools 9.0 translates wrongly or not at all."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import (
    argument,
    aten,
    cast,
    dtype,
    fake,
    is_float,
    rank,
    source,
)
from resplice.backends.coreml.mil_op import mil_like
from resplice.backends.legal import Legalizer

_SMALLEST = float(torch.finfo(torch.float32).tiny)
_BINARY = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default,
    aten.minimum.default, aten.pow.Tensor_Tensor, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor,
    aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.matmul.default, aten.bmm.default,
    aten.where.self, aten.remainder.Tensor, aten.fmod.Tensor,
}  # fmt: skip


def scale_by_alpha(build: Builder, node: fx.Node) -> fx.Node | None:
    """add(x, y, alpha=a) -> add(x, mul(y, a)); sub alike; rsub(x, y, a) -> sub(y, mul(x, a)).

    The converter ignores `alpha` silently.
    """
    plain = {
        aten.add.Tensor: aten.add.Tensor, aten.add.Scalar: aten.add.Tensor,
        aten.sub.Tensor: aten.sub.Tensor, aten.sub.Scalar: aten.sub.Tensor,
        aten.rsub.Tensor: aten.sub.Tensor, aten.rsub.Scalar: aten.sub.Tensor,
    }  # fmt: skip
    if node.target not in plain:
        return None
    alpha: Any = argument(node, "alpha")
    reverse = node.target in (aten.rsub.Tensor, aten.rsub.Scalar)
    if alpha in (1, None) and not reverse:
        return None
    left, right = node.args[:2]
    if reverse:
        left, right = right, left
    if alpha not in (1, None):
        right = (
            build(aten.mul.Tensor, right, alpha) if isinstance(right, fx.Node) else right * alpha
        )
    if isinstance(left, fx.Node):
        return build(plain[node.target], left, right)
    if plain[node.target] == aten.sub.Tensor:
        right = build(aten.mul.Tensor, right, -1)
    return build(aten.add.Tensor, right, left)


def divide_exactly(build: Builder, node: fx.Node) -> fx.Node | None:
    """reciprocal(x) -> real_div(1, x).

    The converter uses MIL `inverse`, which is 1 / (x + 1e-4): in-graph rotary frequencies would be
    off by 1e-4 relative.
    """
    if node.target is not aten.reciprocal.default:
        return None
    x = cast(build, source(node), _result(node))
    return mil_like(build, "real_div", {"y": x}, node, x=1.0)


def root_without_epsilon(build: Builder, node: fx.Node) -> fx.Node | None:
    """rsqrt(x) -> MIL rsqrt with the smallest normal epsilon; MIL adds 1e-12 by default."""
    if node.target is not aten.rsqrt.default:
        return None
    x = cast(build, source(node), _result(node))
    return mil_like(build, "rsqrt", {"x": x}, node, epsilon=_SMALLEST)


def gelu_by_name(build: Builder, node: fx.Node) -> fx.Node | None:
    """gelu(x, approximate="tanh") -> MIL gelu(TANH_APPROXIMATION).

    The converter drops the keyword and computes the exact GELU, off by up to 4.7e-4.
    """
    if node.target is not aten.gelu.default:
        return None
    tanh = argument(node, "approximate") == "tanh"
    return mil_like(
        build, "gelu", {"x": source(node)}, node, mode="TANH_APPROXIMATION" if tanh else "EXACT"
    )


def divide_in_floats(build: Builder, node: fx.Node) -> fx.Node | None:
    """div(i, j) of integers -> div of floats;  div(x, y, rounding) -> floor or trunc of it."""
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        if all(is_float(a) or not isinstance(a, fx.Node) for a in node.args[:2]):
            return None
        left, right = (cast(build, a, _result(node)) for a in node.args[:2])
        return build(aten.div.Tensor, left, right)
    return None


def same_dtypes(build: Builder, node: fx.Node) -> fx.Node | None:
    """add(i, f) -> add(float(i), f): MIL operators want one dtype, and ints stay ints in torch."""
    if node.target not in _BINARY:
        return None
    first = 1 if node.target is aten.where.self else 0
    operands = list(node.args[first : first + 2])
    kinds = {dtype(a) for a in operands if dtype(a) is not None}
    scalars = [a for a in operands if isinstance(a, bool | int | float)]
    wanted = _common(operands)
    wider = any(isinstance(s, float) for s in scalars) and not wanted.is_floating_point
    if len(kinds) <= 1 and not wider and not (kinds == {torch.bool} and _numeric(node)):
        return None
    if kinds == {torch.bool} and _numeric(node):
        wanted = _result(node) if _result(node) is not torch.bool else torch.int32
    if len({wanted, *kinds}) == 1:
        return None
    new = [cast(build, a, wanted) for a in operands]
    return build(
        node.target, *node.args[:first], *new, *node.args[first + 2 :], **dict(node.kwargs)
    )


def _numeric(node: fx.Node) -> bool:
    comparisons = (aten.eq.Tensor, aten.ne.Tensor, aten.where.self)
    return node.target not in comparisons


def _common(operands: list[Any]) -> torch.dtype:
    values = [_stand_in(a) for a in operands]
    return torch.result_type(*values) if len(values) == 2 else torch.float32


def _stand_in(operand: Any) -> Any:
    """What torch's promotion sees: a tensor, or a number (sizes are integers)."""
    found = fake(operand) if isinstance(operand, fx.Node) else operand
    return 1 if found is None else found


def promote_integers(build: Builder, node: fx.Node) -> fx.Node | None:
    """sqrt(i), mean(i), exp(i) ... of integers or booleans -> of floats, as torch computes."""
    if not _floats_from(node):
        return None
    return build(node.target, cast(build, source(node), _result(node)), *node.args[1:])


def _floats_from(node: fx.Node) -> bool:
    unary = {
        aten.sqrt.default, aten.rsqrt.default, aten.exp.default, aten.log.default, aten.sin.default,
        aten.cos.default, aten.tanh.default, aten.sigmoid.default, aten.reciprocal.default,
        aten.erf.default, aten.atan.default,
    }  # fmt: skip
    if node.target not in unary:
        return False
    before = dtype(node.args[0])
    return before is not None and not before.is_floating_point


def sum_as_asked(build: Builder, node: fx.Node) -> fx.Node | None:
    """sum(x, dim, keepdim, dtype=d) -> sum(x.to(d), dim, keepdim); booleans are counted."""
    reductions = (
        aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default,
        aten.cumsum.default, aten.softmax.int, aten.log_softmax.int, aten.prod.dim_int,
        aten.prod.default,
    )  # fmt: skip
    if node.target not in reductions:
        return None
    kept = node.args
    if node.target in (aten.softmax.int, aten.log_softmax.int):
        kept = node.args[:2]
    before, after = dtype(node.args[0]), _result(node)
    if before == after or (before, after) == (torch.int32, torch.int64):
        return None
    wanted = torch.int32 if after is torch.int64 else after
    return build(node.target, cast(build, source(node), wanted), *kept[1:])


def power_of_scalar(build: Builder, node: fx.Node) -> fx.Node | None:
    """pow(2.0, x) -> exp(x * log 2) for a positive base; pow(x, n) keeps its float exponent."""
    if node.target is aten.pow.Scalar:
        base: Any = node.args[0]
        x = cast(build, source(node, 1), _result(node))
        return mil_like(build, "pow", {"y": x}, node, x=float(base)) if base > 0 else None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return build(aten.mul.Tensor, node.args[0], node.args[0])
    return None


def finite_tests(build: Builder, node: fx.Node) -> fx.Node | None:
    """isfinite(x) -> abs(x) <= largest;  isinf(x) -> abs(x) > largest;  isnan(x) -> x != x."""
    largest = float(torch.finfo(torch.float32).max)
    if node.target is aten.isnan.default:
        return build(aten.ne.Tensor, node.args[0], node.args[0])
    if node.target is aten.isinf.default:
        return build(aten.gt.Scalar, build(aten.abs.default, node.args[0]), largest)
    if node.target is aten.isfinite.default:
        return build(aten.le.Scalar, build(aten.abs.default, node.args[0]), largest)
    return None


def round_towards_zero(build: Builder, node: fx.Node) -> fx.Node | None:
    """trunc(x) -> sign(x) * floor(abs(x));  div(x, y, rounding_mode) alike, exact for integers."""
    if node.target is aten.trunc.default:
        down = build(aten.floor.default, build(aten.abs.default, node.args[0]))
        return build(aten.mul.Tensor, build(aten.sign.default, node.args[0]), down)
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default):
        mode = (
            "floor" if node.target is aten.floor_divide.default else argument(node, "rounding_mode")
        )
        return _rounded_division(build, node, str(mode))
    return None


def _rounded_division(build: Builder, node: fx.Node, mode: str) -> fx.Node | None:
    result, operands = _result(node), list(node.args[:2])
    if mode == "floor" and not result.is_floating_point:
        return _integer_op(build, node, "floor_div", operands)
    if mode == "None":
        return build(aten.div.Tensor, *operands)
    wide = [cast(build, a, torch.float32) for a in operands]
    if not isinstance(wide[0], fx.Node):
        wide[0] = build(aten.full_like.default, wide[1], float(wide[0]))
    ratio = build(aten.div.Tensor, *wide)
    whole = build(aten.floor.default if mode == "floor" else aten.trunc.default, ratio)
    rounded: fx.Node = cast(build, whole, result)
    return rounded


def remainder_by_floor(build: Builder, node: fx.Node) -> fx.Node | None:
    """remainder(i, j) -> i - floor_div(i, j) * j;  fmod(x, y) -> x - trunc(x / y) * y."""
    if node.target in (aten.remainder.Tensor, aten.remainder.Scalar):
        if is_float(node):
            return None
        whole = _integer_op(build, node, "floor_div", list(node.args[:2]))
    elif node.target in (aten.fmod.Tensor, aten.fmod.Scalar):
        whole = build(aten.div.Tensor_mode, *node.args[:2], rounding_mode="trunc")
    else:
        return None
    return build(aten.sub.Tensor, node.args[0], build(aten.mul.Tensor, whole, node.args[1]))


def _integer_op(build: Builder, node: fx.Node, operator: str, operands: list[Any]) -> fx.Node:
    names = dict(zip("xy", operands, strict=True))
    nodes = {k: v for k, v in names.items() if isinstance(v, fx.Node)}
    numbers = {k: v for k, v in names.items() if not isinstance(v, fx.Node)}
    return mil_like(build, operator, nodes, node, **numbers)


def clamp_integers(build: Builder, node: fx.Node) -> fx.Node | None:
    """clamp(i, low, high) of integers -> maximum and minimum; MIL `clip` takes floats only."""
    if node.target is not aten.clamp.default or is_float(node.args[0]):
        return None
    value = source(node)
    for bound, operator in ((argument(node, "min"), "maximum"), (argument(node, "max"), "minimum")):
        if bound is not None:
            value = mil_like(build, operator, {"x": value}, node, y=int(bound))
    return value if value is not node.args[0] else None


def products_by_axis(build: Builder, node: fx.Node) -> fx.Node | None:
    """prod(x), prod(x, d) -> MIL reduce_prod."""
    if node.target not in (aten.prod.default, aten.prod.dim_int):
        return None
    x = source(node)
    if dtype(x) != dtype(node) or not is_float(x):
        return None
    whole = node.target is aten.prod.default
    axes = list(range(rank(x))) if whole else [int(argument(node, "dim")) % rank(x)]
    keep = False if whole else bool(argument(node, "keepdim"))
    return mil_like(build, "reduce_prod", {"x": x}, node, axes=axes, keep_dims=keep)


def sums_from_the_front(build: Builder, node: fx.Node) -> fx.Node | None:
    """cumsum(x, -2) -> cumsum(x, rank - 2): MIL knows -1 only."""
    if node.target is not aten.cumsum.default or int(argument(node, "dim")) >= 0:
        return None
    return build(aten.cumsum.default, source(node), int(argument(node, "dim")) % rank(source(node)))


def differences_of_slices(build: Builder, node: fx.Node) -> fx.Node | None:
    """diff(x, 1, d, prepend=p) -> y[1:] - y[:-1] along d, y = cat([p, x], d); booleans by ne."""
    if node.target is not aten.diff.default or argument(node, "n") not in (1, None):
        return None
    x, axis = source(node), argument(node, "dim")
    axis = (-1 if axis is None else int(axis)) % rank(x)
    ends = (argument(node, "prepend"), x, argument(node, "append"))
    parts = [part for part in ends if part is not None]
    whole = build(aten.cat.default, parts, axis) if len(parts) > 1 else x
    later = build(aten.slice.Tensor, whole, axis, 1, sys.maxsize)
    earlier = build(aten.slice.Tensor, whole, axis, 0, -1)
    apart = aten.ne.Tensor if dtype(x) is torch.bool else aten.sub.Tensor
    return build(apart, later, earlier)


def other_logarithms(build: Builder, node: fx.Node) -> fx.Node | None:
    """log2(x) -> log(x) / log 2;  log10(x) -> log(x) / log 10."""
    factors = {aten.log2.default: 1 / math.log(2), aten.log10.default: 1 / math.log(10)}
    if node.target not in factors:
        return None
    return build(aten.mul.Tensor, build(aten.log.default, node.args[0]), factors[node.target])


def _result(node: fx.Node) -> torch.dtype:
    found = dtype(node)
    assert found is not None, node
    return found


RULES: tuple[Legalizer, ...] = (
    scale_by_alpha, divide_in_floats, promote_integers, divide_exactly, root_without_epsilon,
    gelu_by_name, sum_as_asked, power_of_scalar, finite_tests, round_towards_zero,
    remainder_by_floor, clamp_integers, other_logarithms, products_by_axis, sums_from_the_front,
    differences_of_slices, same_dtypes,
)  # fmt: skip
