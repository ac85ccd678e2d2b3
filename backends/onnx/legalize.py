"""Rewrites that make the ONNX translation of ATen mean what PyTorch means.

See `legal.py` for what a rule is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.legal import Legalizer
from resplice.backends.legal_rules import drop_idle_squeeze, zero_closed_rows
from resplice.build import Builder
from resplice.pattern import argument

aten = torch.ops.aten


def select_booleans_by_logic(build: Builder, node: fx.Node) -> fx.Node | None:
    """where(c, a, b) of booleans -> (c & a) | (~c & b);  masked_fill alike.

    ONNX allows booleans in `Where`; onnxruntime has no kernel for them.
    """
    if node.target is aten.where.self:
        mask, chosen, other = node.args
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        other, mask, chosen = node.args
    else:
        return None
    scalar = isinstance(chosen, bool | int | float)
    if not _is_bool(node) or not _is_bool(other) or not (scalar or _is_bool(chosen)):
        return None
    if scalar and chosen:
        return build(aten.logical_or.default, other, mask)
    kept = build(aten.logical_and.default, other, build(aten.logical_not.default, mask))
    if scalar:
        return kept
    return build(aten.logical_or.default, build(aten.logical_and.default, chosen, mask), kept)


def zero_unattended_rows(build: Builder, node: fx.Node) -> fx.Node | None:
    """sdpa(q, k, v, mask) -> masked_fill(sdpa(q, k, v, mask), ~any(mask, -1), 0).

    PyTorch defines attention over no key as zero. The ONNX translation takes the softmax of the
    masked row instead: the mean of all values for a boolean mask, NaN for one of -inf. Padding on
    the left of a causal model makes such rows.
    """
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node):
        return None
    open_keys = mask if _is_bool(mask) else build.shared(aten.ne.Scalar, mask, float("-inf"))
    return zero_closed_rows(build, build(node.target, *node.args, **node.kwargs), open_keys)


def repeat_by_expanding(build: Builder, node: fx.Node) -> fx.Node | None:
    """repeat_interleave(x: [a,b], n, 1) -> flatten(expand(unsqueeze(x, 2), [-1,-1,n]), 1, 2).

    For a symbolic number of repeats the exporter expands the axis before the one it inserted.
    """
    if node.target is not aten.repeat_interleave.self_int or not isinstance(node.args[1], fx.Node):
        return None
    source, repeats, axis = node.args[0], node.args[1], argument(node, "dim")
    assert isinstance(source, fx.Node)
    if axis is None:
        source, axis = build(aten.flatten.using_ints, source), 0
    rank = source.meta["val"].dim()
    axis = axis % max(rank, 1)
    sizes: list[Any] = [-1] * (rank + 1)
    sizes[axis + 1] = repeats
    spread = build(aten.expand.default, build(aten.unsqueeze.default, source, axis + 1), sizes)
    return build(aten.flatten.using_ints, spread, axis, axis + 1)


def spell_for_exporter(build: Builder, node: fx.Node) -> fx.Node | None:
    """to.dtype(x, d) -> _to_copy(x, d);  a & b of booleans -> logical_and(a, b).

    The exporter translates these spellings directly, without tracing the program once more.
    """
    if node.target is aten.to.dtype:
        return build(aten._to_copy.default, node.args[0], dtype=node.args[1])
    logical = {
        aten.__and__.Tensor: aten.logical_and.default,
        aten.__or__.Tensor: aten.logical_or.default,
    }
    if node.target in logical and all(map(_is_bool, node.args)):
        return build(logical[node.target], *node.args)
    return None


RULES: tuple[Legalizer, ...] = (
    drop_idle_squeeze,
    select_booleans_by_logic,
    zero_unattended_rows,
    repeat_by_expanding,
    spell_for_exporter,
)


def _is_bool(value: Any) -> bool:
    if isinstance(value, fx.Node):
        found = value.meta["val"]
        return isinstance(found, torch.Tensor) and found.dtype == torch.bool
    return isinstance(value, bool)
