"""Where a graph rotates queries and keys, told from the arithmetic alone.

Two forms, whatever way the channels of a pair are taken apart and put together:

    whole   x * cos + turned * sin        turned: x with each pair (a, b) as (-b, a)
    split   a * cos - b * sin, b * cos + a * sin, put together again

Pairs are (n, n + N) or (2n, 2n + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resplice.passes.videorope.follow import (
    KEEPING,
    Runner,
    data_inputs,
    fresh_labels,
    moves,
    roots,
)
from resplice.pattern import NoMatch, arg, target_name
from resplice.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Application:
    """One rotation of queries or keys.

    Attributes:
        root: The node that holds the rotated value.
        x: What is rotated, in the shape and dtype of the root.
        cos: Table of cosines as it is multiplied; [.., 2N], or [.., N] in the split form.
        sin: Table of sines.
        pairs: Whether channels (2n, 2n + 1) are a pair; else (n, n + N).
        nodes: The arithmetic, the root included.
    """

    root: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    pairs: bool
    nodes: tuple[fx.Node, ...]


def find_applications(program: Program, runner: Runner) -> list[Application]:
    """All rotations of a program, in graph order."""
    found = [*_whole(program, runner), *_split(program, runner)]
    return sorted(found, key=lambda application: application.root)


# ---- x * cos + turned * sin --------------------------------------------------------------


def _whole(program: Program, runner: Runner) -> Iterator[Application]:
    for root in _calls(program, aten.add.Tensor):
        products: list[Any] = [n for n in root.args[:2] if _is_product(n)]
        if len(products) != 2 or root.kwargs:
            continue
        for kept, other in (products, products[::-1]):
            application = _whole_at(runner, root, kept, other)
            if application is not None:
                yield application
                break


def _whole_at(runner: Runner, root: fx.Node, kept: fx.Node, other: fx.Node) -> Application | None:
    for turned, sin in _both_orders(other):
        if not _turns(turned):
            continue
        for x, cos in _both_orders(kept):
            pairs = _pairing(runner, turned, x)
            same_shape = pairs is not None and _same_shape(root, x)
            if same_shape:
                return Application(root, x, cos, sin, bool(pairs), (root, kept, other))
    return None


def _both_orders(product: Any) -> tuple[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]]:
    a, b = product.args[:2]
    return (a, b), (b, a)


def _turns(node: Any) -> bool:
    """Whether a value is put together from a negated part and another one."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if target_name(node) in ("aten.cat", "aten.stack"):
            return any(target_name(n) == "aten.neg" for n in _through_views(data_inputs(node)))
        if not moves(node) or len(data_inputs(node)) != 1:
            return False
        node = data_inputs(node)[0]
    return False


def _through_views(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        while moves(node) and len(data_inputs(node)) == 1:
            node = data_inputs(node)[0]
        yield node


def _pairing(runner: Runner, turned: fx.Node, x: Any) -> bool | None:
    """Which channels are pairs if `turned` is x with each pair (a, b) as (-b, a); else None."""
    if not isinstance(x, fx.Node) or not _same_shape(turned, x):
        return None
    base = _uncast(x)
    shape = runner.shape(base)
    if len(shape) < 3 or shape[-1] % 2:
        return None
    labels = fresh_labels(shape)
    try:
        found = runner.labels(turned, {base: labels})
    except NoMatch:
        return None
    return next((p for p in (False, True) if torch.equal(found, _turned(labels, p))), None)


def _turned(labels: Tensor, pairs: bool) -> Tensor:
    if pairs:
        return torch.stack((-labels[..., 1::2], labels[..., 0::2]), -1).flatten(-2)
    low, high = labels.chunk(2, -1)
    return torch.cat((-high, low), -1)


# ---- a * cos - b * sin, b * cos + a * sin --------------------------------------------------


def _split(program: Program, runner: Runner) -> Iterator[Application]:
    for low in _calls(program, aten.sub.Tensor):
        if low.kwargs or not all(map(_is_product, low.args[:2])):
            continue
        for high in _partners(low):
            application = _split_at(runner, low, high)
            if application is not None:
                yield application
                break


def _partners(low: fx.Node) -> list[fx.Node]:
    """Sums of two products that share all four factors with a difference."""
    factors = _factors(low)
    near = [user for f in factors for user in f.users if _is_product(user)]
    sums = dict.fromkeys(user for product in near for user in product.users)
    return [
        node
        for node in sums
        if node.target is aten.add.Tensor
        and not node.kwargs
        and all(map(_is_product, node.args[:2]))
        and set(_factors(node)) == set(factors)
    ]


def _factors(node: fx.Node) -> list[fx.Node]:
    found = [f for i in range(2) for f in arg(node, i).args[:2]]
    return [f for f in found if isinstance(f, fx.Node)]


def _split_at(runner: Runner, low: fx.Node, high: fx.Node) -> Application | None:
    first, second = (_both_orders(product) for product in low.args[:2])
    sums = [set(arg(high, i).args[:2]) for i in range(2)]
    for a, cos in first:
        for b, sin in second:
            crossed = [{b, cos}, {a, sin}]
            if sums in (crossed, crossed[::-1]) and (root := _joined(runner, low, high)):
                node, pairs = root
                x = _source(runner, a, b, node, pairs)
                if x is not None:
                    products: list[Any] = [*low.args[:2], *high.args[:2]]
                    own = (node, low, high, *products)
                    return Application(node, x, cos, sin, pairs, own)
    return None


def _joined(runner: Runner, low: fx.Node, high: fx.Node) -> tuple[fx.Node, bool] | None:
    """The node that holds both halves of all pairs, and how."""
    sizes = runner.shape(low)
    a, b = fresh_labels(sizes), fresh_labels(sizes) * -1
    whole = {False: torch.cat((a, b), -1), True: torch.stack((a, b), -1).flatten(-2)}
    node: fx.Node | None = low
    for _ in range(6):
        node = (
            next((u for u in sorted(node.users) if moves(u) or _writes(u)), None) if node else None
        )
        if node is None:
            return None
        try:
            found = runner.labels(node, {low: a, high: b})
        except NoMatch:
            continue
        for pairs, expected in whole.items():
            if torch.equal(found, expected):
                return node, pairs
    return None


def _writes(node: fx.Node) -> bool:
    return target_name(node) in ("aten.slice_scatter", "aten.select_scatter")


def _source(runner: Runner, a: Any, b: Any, root: fx.Node, pairs: bool) -> fx.Node | None:
    """The value whose halves a and b are, before it was taken apart."""
    wanted = runner.shape(root)
    for candidate in _ancestors(a):
        if runner.shape(candidate) != wanted or not _same_shape(candidate, root):
            continue
        labels = fresh_labels(wanted)
        expected = (labels[..., 0::2], labels[..., 1::2]) if pairs else tuple(labels.chunk(2, -1))
        try:
            halves = [runner.labels(half, {candidate: labels}) for half in (a, b)]
        except NoMatch:
            continue
        if all(map(torch.equal, halves, expected)):
            return candidate
    return None


def _ancestors(node: Any) -> Iterator[fx.Node]:
    while isinstance(node, fx.Node) and node.op == "call_function" and moves(node):
        node = data_inputs(node)[0]
        if isinstance(node.meta.get("val"), torch.Tensor):
            yield node


# ---- both --------------------------------------------------------------------------------


def _calls(program: Program, target: Any) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def _is_product(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is aten.mul.Tensor
        and all(isinstance(arg, fx.Node) for arg in node.args[:2])
    )


def _same_shape(a: Any, b: Any) -> bool:
    from resplice.dims import same_shape

    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and same_shape(
        a.meta["val"], b.meta["val"]
    )  # fmt: skip


def _uncast(node: fx.Node) -> fx.Node:
    while target_name(node) in KEEPING:
        node = data_inputs(node)[0]
    return node


__all__ = ["Application", "find_applications", "roots"]
