"""scaled_dot_product_attention with what MIL's operator lacks: scale, causal, groups, ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import argument, aten, cast, is_bool, rank
from resplice.backends.legal import Legalizer
from resplice.backends.legal_rules import zero_closed_rows

_SDPA = aten.scaled_dot_product_attention.default


def scale_the_query(build: Builder, node: fx.Node) -> fx.Node | None:
    """sdpa(q, k, v, scale=s) -> sdpa(q * (s * sqrt(d)), k, v): MIL's scale is always d**-0.5."""
    if node.target is not _SDPA or argument(node, "scale") is None:
        return None
    q, scale = _operand(node, 0), float(argument(node, "scale"))
    factor = scale * math.sqrt(q.meta["val"].shape[-1])
    scaled = q if math.isclose(factor, 1, rel_tol=1e-9) else build(aten.mul.Tensor, q, factor)
    return _attention(build, node, query=scaled, scale=None)


def repeat_shared_heads(build: Builder, node: fx.Node) -> fx.Node | None:
    """sdpa(..., enable_gqa=True) -> keys and values repeated per group of query heads."""
    if node.target is not _SDPA or not argument(node, "enable_gqa"):
        return None
    q, k, v = (_operand(node, i) for i in range(3))
    times = q.meta["val"].shape[-3] // k.meta["val"].shape[-3]
    key, value = (build(aten.repeat_interleave.self_int, x, times, -3) for x in (k, v))
    return _attention(build, node, key=key, value=value, enable_gqa=False)


def causal_by_position(build: Builder, node: fx.Node) -> fx.Node | None:
    """sdpa(..., is_causal=True) -> sdpa with the mask row >= column, dynamic sizes included."""
    if node.target is not _SDPA or not argument(node, "is_causal"):
        return None
    rows, columns = build.size(_operand(node, 0), -2), build.size(_operand(node, 1), -2)
    row = build(aten.unsqueeze.default, build(aten.arange.default, rows), 1)
    column = build(aten.unsqueeze.default, build(aten.arange.default, columns), 0)
    mask = build(aten.ge.Tensor, row, column)
    return _opened(build, node, mask, is_causal=False)


def additive_masks(build: Builder, node: fx.Node) -> fx.Node | None:
    """sdpa(q, k, v, mask) -> a finite added mask, and zeros where a row may attend to nothing.

    PyTorch defines attention over keys at -inf only as zero, over keys at the lowest float only as
    their plain mean; a softmax over -inf is NaN, and the lowest float32 is -inf in float16.
    """
    mask = argument(node, "attn_mask") if node.target is _SDPA else None
    if not isinstance(mask, fx.Node) or "resplice_open" in node.meta:
        return None
    if is_bool(mask):
        attention = _opened(build, node, mask)
        return _zero_where_closed(build, attention, mask, mask)
    if _always_open(build, mask):
        return _opened(build, node, mask)
    row = build.shared(aten.any.dim, build.shared(aten.gt.Scalar, mask, _LOWEST), -1, True)
    row = cast(build, row, node.meta["val"].dtype)
    query = build(aten.mul.Tensor, _operand(node, 0), row)
    attention = _opened(build, node, mask, query=query)
    some = build.shared(aten.ne.Scalar, mask, -math.inf)
    return _zero_where_closed(build, attention, mask, some)


def _opened(build: Builder, node: fx.Node, mask: fx.Node, **changes: Any) -> fx.Node:
    """The attention with a finite added mask, marked as such."""
    new = _attention(build, node, attn_mask=_additive(build, node, mask), **changes)
    new.meta["resplice_open"] = True
    return new


def _zero_where_closed(build: Builder, attention: fx.Node, mask: fx.Node, some: fx.Node) -> fx.Node:
    if mask.op == "get_attr" and bool((build.program.weight(mask) > -math.inf).any(-1).all()):
        return attention
    return zero_closed_rows(build, attention, some)


def _always_open(build: Builder, mask: fx.Node) -> bool:
    """Whether a mask is a constant with an open key in every row."""
    return mask.op == "get_attr" and bool((build.program.weight(mask) > _LOWEST).any(-1).all())


def _additive(build: Builder, node: fx.Node, mask: fx.Node) -> fx.Node:
    wanted = node.meta["val"].dtype
    if is_bool(mask):
        zero = build.constant("coreml.open_key", torch.zeros((), dtype=wanted))
        found = build(aten.where.ScalarOther, mask, zero, _CLOSED)
    else:
        finite = build.shared(aten.clamp.default, cast(build, mask, wanted), _CLOSED)
        absent = build.shared(aten.eq.Scalar, mask, -math.inf)
        found = build.shared(aten.masked_fill.Scalar, finite, absent, 2 * _CLOSED)
    return found


_CLOSED = -3e4
"""Added to closed keys: finite in float16 even twice, and its exponential is zero."""
_LOWEST = -1e30
"""Below it a float32 mask swallows every score."""


def at_rank_four(build: Builder, node: fx.Node) -> fx.Node | None:
    """Sdpa of rank 3, or 5 and more -> of rank 4; batch sizes are broadcast first."""
    if node.target is not _SDPA:
        return None
    q, k, v = (_operand(node, i) for i in range(3))
    ranks = {rank(x) for x in (q, k, v)}
    if ranks == {4} and _same_batch(q, k, v):
        return None
    if ranks == {3}:
        wide = [build(aten.unsqueeze.default, x, 0) for x in (q, k, v)]
        result = _attention(build, node, query=wide[0], key=wide[1], value=wide[2])
        return build(aten.squeeze.dim, result, 0)
    if ranks == {4}:
        batch = [build.sizes(q)[0], build.sizes(q)[1]]
        k, v = (build(aten.expand.default, x, [*batch, *build.sizes(x)[2:]]) for x in (k, v))
        return _attention(build, node, key=k, value=v)
    return None


def _same_batch(*operands: fx.Node) -> bool:
    return len({tuple(map(str, x.meta["val"].shape[:-2])) for x in operands}) == 1


def _operand(node: fx.Node, index: int) -> fx.Node:
    found = argument(node, ("query", "key", "value")[index])
    assert isinstance(found, fx.Node), node
    return found


def _attention(build: Builder, node: fx.Node, **changes: Any) -> fx.Node:
    """The same attention with some arguments changed."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    found = {name: argument(node, name) for name in (*names, "scale", "enable_gqa")}
    found.update(changes)
    extra = {"scale": found["scale"]} if found["scale"] is not None else {}
    extra |= {"enable_gqa": True} if found["enable_gqa"] else {}
    new = build(_SDPA, *(found[name] for name in names), **extra)
    if "resplice_open" in node.meta:
        new.meta["resplice_open"] = True
    return new


def products_of_parts(build: Builder, node: fx.Node) -> fx.Node | None:
    """addmm(c, a, b, beta, alpha), baddbmm, addbmm -> matmul, mul and add."""
    if node.target not in (aten.addmm.default, aten.baddbmm.default, aten.addbmm.default):
        return None
    bias, left, right = node.args[:3]
    result = build(aten.matmul.default, left, right)
    if node.target is aten.addbmm.default:
        result = build(aten.sum.dim_IntList, result, [0])
    for factor, name in ((argument(node, "alpha"), "alpha"), (argument(node, "beta"), "beta")):
        if factor in (1, None):
            continue
        if name == "alpha":
            result = build(aten.mul.Tensor, result, factor)
        else:
            bias = build(aten.mul.Tensor, bias, factor)
    return build(aten.add.Tensor, result, bias)


def vectors_as_matrices(build: Builder, node: fx.Node) -> fx.Node | None:
    """matmul(a, v) of a vector, mv, dot -> matmul of a matrix of one column or row, reshaped."""
    if node.target not in (aten.matmul.default, aten.mv.default, aten.dot.default):
        return None
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if rank(left) > 1 and rank(right) > 1:
        return None
    left = build(aten.unsqueeze.default, left, 0) if rank(left) == 1 else left
    right = build(aten.unsqueeze.default, right, 1) if rank(right) == 1 else right
    return build.reshape(build(aten.matmul.default, left, right), build.sizes(node))


RULES: tuple[Legalizer, ...] = (
    repeat_shared_heads, scale_the_query, causal_by_position, at_rank_four, additive_masks,
    products_of_parts, vectors_as_matrices,
)  # fmt: skip
