"""Normalisation layers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import argument, aten, rank, source
from resplice.backends.legal import Legalizer


def groups_at_rank_three(build: Builder, node: fx.Node) -> fx.Node | None:
    """group_norm(x: [b,c,...], g, w, b) -> statistics over [b,g,rest], then weight and bias."""
    if node.target is not aten.group_norm.default:
        return None
    x, groups = source(node), int(node.args[1])  # type: ignore[arg-type]  # an int by schema
    sizes = build.sizes(x)
    rows = build.reshape(x, [sizes[0], groups, -1])
    result = build.reshape(_standardized(build, rows, [-1], _epsilon(node)), sizes)
    return _affine(build, result, argument(node, "weight"), argument(node, "bias"), 1)


def layers_with_computed_weights(build: Builder, node: fx.Node) -> fx.Node | None:
    """layer_norm(x, s, w, b) with computed w or b -> standardise, multiply, add."""
    if node.target is not aten.layer_norm.default:
        return None
    weight, bias = argument(node, "weight"), argument(node, "bias")
    computed = [w for w in (weight, bias) if isinstance(w, fx.Node) and w.op != "get_attr"]
    if not computed and weight is not None:
        return None
    shape: Any = node.args[1]
    axes = [-i for i in range(len(shape), 0, -1)]
    if not computed and bias is None:
        return None
    result = _standardized(build, source(node), axes, _epsilon(node))
    return _affine(build, result, weight, bias, None)


def root_mean_square(build: Builder, node: fx.Node) -> fx.Node | None:
    """rms_norm(x, s, w, eps) -> x * rsqrt(mean(x * x) + eps) * w.

    The converter divides by the largest value first, which moves `eps`: 1e-5 off.
    """
    if node.target is not aten.rms_norm.default:
        return None
    x, shape = source(node), node.args[1]
    axes = [-i for i in range(len(shape), 0, -1)]  # type: ignore[arg-type]  # a list by schema
    epsilon = argument(node, "eps")
    smallest = torch.finfo(x.meta["val"].dtype).eps if epsilon is None else float(epsilon)
    square = build(aten.mean.dim, build(aten.mul.Tensor, x, x), axes, True)
    root = build(aten.rsqrt.default, build(aten.add.Tensor, square, smallest))
    result = build(aten.mul.Tensor, x, root)
    weight = argument(node, "weight")
    return result if weight is None else build(aten.mul.Tensor, result, weight)


def _standardized(build: Builder, x: fx.Node, axes: list[int], epsilon: float) -> fx.Node:
    centred = build(aten.sub.Tensor, x, build(aten.mean.dim, x, axes, True))
    square = build(aten.mean.dim, build(aten.mul.Tensor, centred, centred), axes, True)
    root = build(aten.rsqrt.default, build(aten.add.Tensor, square, epsilon))
    return build(aten.mul.Tensor, centred, root)


def _affine(build: Builder, x: fx.Node, weight: Any, bias: Any, axis: int | None) -> fx.Node:
    for value, joined in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if value is not None:
            spread = value
            if axis is not None:
                spread = build.reshape(value, [-1, *[1] * (rank(x) - axis - 1)])
            x = build(joined, x, spread)
    return x


def _epsilon(node: fx.Node) -> float:
    found = argument(node, "eps")
    return 1e-5 if found is None else float(found)


def spread_by_moments(build: Builder, node: fx.Node) -> fx.Node | None:
    """var(x, d, correction=c) -> sum of squared deviations / (n - c);  std is its root."""
    roots = (aten.std.correction, aten.std.dim, aten.std.default)
    if node.target not in (aten.var.correction, aten.var.dim, aten.var.default, *roots):
        return None
    x = source(node)
    asked: Any = argument(node, "dim") if "dim" in _names(node) else None
    axes = list(range(rank(x))) if asked in (None, []) else list(asked)
    sizes = [x.meta["val"].shape[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes):
        return None
    count = torch.Size(sizes).numel()
    centred = build(aten.sub.Tensor, x, build(aten.mean.dim, x, axes, True))
    keep = bool(argument(node, "keepdim")) if "keepdim" in _names(node) else False
    square = build(aten.mean.dim, build(aten.mul.Tensor, centred, centred), axes, keep)
    result = build(aten.mul.Tensor, square, count / max(count - _correction(node), 0.0))
    return build(aten.sqrt.default, result) if node.target in roots else result


def moments_apart(build: Builder, node: fx.Node) -> fx.Node | None:
    """getitem(var_mean(x, d), i) -> var(x, d) or mean(x, d);  std_mean alike."""
    pairs: dict[Any, Any] = {
        aten.var_mean.correction: aten.var.correction, aten.var_mean.dim: aten.var.dim,
        aten.std_mean.correction: aten.std.correction, aten.std_mean.dim: aten.std.dim,
    }  # fmt: skip
    if node.target is not operator.getitem or source(node).target not in pairs:
        return None
    pair, index = source(node), node.args[1]
    if index == 0:
        return build(pairs[pair.target], *pair.args, **pair.kwargs)
    axes: Any = argument(pair, "dim") or list(range(rank(source(pair))))
    return build(aten.mean.dim, source(pair), axes, bool(argument(pair, "keepdim")))


def angles_by_norms(build: Builder, node: fx.Node) -> fx.Node | None:
    """cosine_similarity(x, y, d) -> sum(x / max(|x|, eps) * y / max(|y|, eps), d)."""
    if node.target is not aten.cosine_similarity.default:
        return None
    axis, epsilon = int(argument(node, "dim")), float(argument(node, "eps"))
    scaled = []
    for x in node.args[:2]:
        square = build(aten.sum.dim_IntList, build(aten.mul.Tensor, x, x), [axis], True)
        length = build(aten.clamp.default, build(aten.sqrt.default, square), epsilon)
        scaled.append(build(aten.div.Tensor, x, length))
    return build(aten.sum.dim_IntList, build(aten.mul.Tensor, *scaled), [axis])


def _correction(node: fx.Node) -> float:
    names = _names(node)
    found = argument(node, "correction" if "correction" in names else "unbiased")
    return 1.0 if found is None else float(found)


def _names(node: fx.Node) -> list[str]:
    schema: Any = node.target
    return [a.name for a in schema._schema.arguments]


RULES: tuple[Legalizer, ...] = (
    groups_at_rank_three, layers_with_computed_weights, root_mean_square, spread_by_moments,
    moments_apart, angles_by_norms,
)  # fmt: skip
