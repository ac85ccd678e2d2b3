"""Whether a mask leaves some keys open for all inputs: interval arithmetic on its graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from resplice.pattern import argument, target_name
from resplice.program import Program

Interval = tuple[float, float]
_ANYTHING: Interval = (-math.inf, math.inf)


def is_open(program: Program, mask: fx.Node, start: int, stop: int) -> bool:
    """Whether keys `start` to `stop` of a mask are open for all inputs.

    Integer inputs without a negative sample count as non-negative, as masks of zeros and ones are.

    Args:
        program: The program.
        mask: Boolean (open where true) or additive (open where zero), keys on the last axis.
        start: First key.
        stop: One past the last key.
    """
    tokens = int(mask.meta["val"].shape[-1])
    low, high = _Bounds(program, tokens).of(mask, start, stop)
    return low >= 1 if mask.meta["val"].dtype == torch.bool else low == high == 0


@dataclass
class _Bounds:
    """Bounds of values, at some positions of the last axis where that has all tokens."""

    program: Program
    tokens: int

    def of(self, value: Any, start: int, stop: int) -> Interval:
        """Bounds of a node or a number."""
        if isinstance(value, bool | int | float):
            return float(value), float(value)
        if not isinstance(value, fx.Node):
            return _ANYTHING
        if value.op == "placeholder":
            return self._input(value)
        rule = _RULES.get(target_name(value))
        found = rule(self, value, start, stop) if rule else _ANYTHING
        found = _ANYTHING if math.isnan(sum(found)) and found != _ANYTHING else found
        is_bool = value.meta["val"].dtype == torch.bool
        return (max(found[0], 0.0), min(found[1], 1.0)) if is_bool else found

    def _input(self, node: fx.Node) -> Interval:
        kind, sample = node.meta["val"].dtype, self.program.samples.get(node.name)
        if kind == torch.bool:
            return 0.0, 1.0
        if kind.is_floating_point or sample is None or (sample.numel() and int(sample.min()) < 0):
            return _ANYTHING
        return 0.0, math.inf


Rule = Callable[[_Bounds, fx.Node, int, int], Interval]


def _same(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    return bounds.of(node.args[0], start, stop)


def _everywhere(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    """The source has its tokens elsewhere: bounds over all of them."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kept = source.meta["val"].dim() and source.meta["val"].shape[-1] == bounds.tokens
    same = kept and node.meta["val"].shape[-1] == bounds.tokens
    return bounds.of(source, start, stop) if same else bounds.of(source, 0, bounds.tokens)


def _arange(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    numbers = [a for a in node.args if isinstance(a, int)]
    first = 0 if len(numbers) < 2 else numbers[0]
    if len(numbers) > 2 or len(numbers) != len(node.args):
        return _ANYTHING
    if node.meta["val"].shape[-1] != bounds.tokens:
        return float(first), float(first + node.meta["val"].shape[-1] - 1)
    return float(first + start), float(first + stop - 1)


def _filled(value: float | None) -> Rule:
    def rule(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
        number = argument(node, "fill_value") if value is None else value
        return bounds.of(number, start, stop)

    return rule


def _cat(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    if argument(node, "dim") not in (-1, node.meta["val"].dim() - 1):
        return _ANYTHING
    if node.meta["val"].shape[-1] != bounds.tokens:
        start, stop = 0, 1 << 62
    pieces: Any = node.args[0]
    place, found = 0, list[Interval]()
    for piece in pieces:
        length = piece.meta["val"].shape[-1]
        if not isinstance(length, int):
            return _ANYTHING
        if place < stop and start < place + length:
            found.append(_Bounds(bounds.program, -1).of(piece, 0, 0))
        place += length
    return min(low for low, _ in found), max(high for _, high in found)


def _sum(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    low, high = bounds.of(node.args[0], 0, bounds.tokens)
    return (0.0 if low >= 0 else -math.inf), (0.0 if high <= 0 else math.inf)


def _add(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    a, b = (bounds.of(x, start, stop) for x in node.args[:2])
    return (a[0] + b[0], a[1] + b[1]) if argument(node, "alpha") == 1 else _ANYTHING


def _not(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    low, high = bounds.of(node.args[0], start, stop)
    known = node.meta["val"].dtype == torch.bool and low >= 0 and high <= 1
    return (1 - high, 1 - low) if known else _ANYTHING


def _ge(swapped: bool, strict: bool) -> Rule:
    """A >= b, or with the operands swapped; `strict` for >."""

    def rule(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
        a, b = (bounds.of(x, start, stop) for x in node.args[:2])
        a, b = (b, a) if swapped else (a, b)
        always = a[0] > b[1] if strict else a[0] >= b[1]
        never = a[1] <= b[0] if strict else a[1] < b[0]
        return (1.0, 1.0) if always else (0.0, 0.0) if never else (0.0, 1.0)

    return rule


def _and(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    a, b = (bounds.of(x, start, stop) for x in node.args[:2])
    return min(a[0], b[0]), min(a[1], b[1])


def _or(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    a, b = (bounds.of(x, start, stop) for x in node.args[:2])
    return max(a[0], b[0]), max(a[1], b[1])


def _chosen(bounds: _Bounds, condition: Any, yes: Any, no: Any, start: int, stop: int) -> Interval:
    low, high = bounds.of(condition, start, stop)
    sides = ([bounds.of(yes, start, stop)] if high > 0 else []) + (
        [bounds.of(no, start, stop)] if low < 1 else []
    )
    return min(side[0] for side in sides), max(side[1] for side in sides)


def _masked_fill(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    source, condition, value = node.args[:3]
    return _chosen(bounds, condition, value, source, start, stop)


def _where(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    condition, yes, no = node.args[:3]
    return _chosen(bounds, condition, yes, no, start, stop)


def _cast(bounds: _Bounds, node: fx.Node, start: int, stop: int) -> Interval:
    low, high = bounds.of(node.args[0], start, stop)
    if node.meta["val"].dtype != torch.bool:
        return low, high
    return (1.0 if low > 0 or high < 0 else 0.0), (0.0 if low == high == 0 else 1.0)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.expand", "aten.clone", "aten.alias"), _same),
    **dict.fromkeys(("aten.unsqueeze", "aten.squeeze", "aten.reshape", "aten.view"), _everywhere),
    **dict.fromkeys(("aten.ones", "aten.new_ones", "aten.ones_like"), _filled(1.0)),
    **dict.fromkeys(("aten.zeros", "aten.new_zeros", "aten.zeros_like"), _filled(0.0)),
    **dict.fromkeys(("aten.full", "aten.new_full", "aten.full_like"), _filled(None)),
    **dict.fromkeys(("aten.cat", "aten.concat"), _cat),
    **dict.fromkeys(("aten.logical_not", "aten.bitwise_not"), _not),
    **dict.fromkeys(("aten.logical_and", "aten.bitwise_and", "aten.__and__"), _and),
    **dict.fromkeys(("aten.logical_or", "aten.bitwise_or", "aten.__or__"), _or),
    **dict.fromkeys(("aten.to", "aten._to_copy"), _cast),
    "aten.arange": _arange, "aten.sum": _sum, "aten.add": _add, "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.ge": _ge(False, False), "aten.gt": _ge(False, True),
    "aten.le": _ge(True, False), "aten.lt": _ge(True, True),
}  # fmt: skip
