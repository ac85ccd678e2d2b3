"""Rotary sites in canonical form: every angle as a row of positions times a frequency.

A site is the pair of tables (cosines, sines) that some rotations share. Its angles are followed
back to the products `positions * frequencies` they come from, element by element (`follow.py`), so
any way of picking sections, interleaving them, or joining axes reads as an axis map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from resplice.origin import module_path
from resplice.passes.videorope.applications import Application, find_applications
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
_TRIG = {"cos": "aten.cos", "sin": "aten.sin"}


@dataclass(frozen=True)
class Term:
    """A product `positions * frequencies` that angles come from.

    Attributes:
        node: The product.
        positions: Its factor that differs between tokens.
        frequencies: Its constant factor.
        axis: The axis of the product along which the frequencies lie, from the end.
    """

    node: fx.Node
    positions: fx.Node
    frequencies: fx.Node
    axis: int


@dataclass
class Tables:
    """The tables of a site, taken apart.

    Attributes:
        key: The two nodes that all its rotations share.
        applications: The rotations.
        scaling: Factor of cosines and sines.
        token_axis: Axis of the tokens in the rotated values, from the end.
        terms: The products.
        choice: [batch or 1, tokens, N]: which element of which product each angle is, counted
            through all products from 1; 0 for an angle of zero.
        reason: Why the tables could not be taken apart.
        origin: Where tables without angles come from: constants or inputs.
    """

    key: tuple[fx.Node, fx.Node]
    applications: list[Application]
    scaling: float = 1.0
    token_axis: int = -2
    terms: list[Term] = field(default_factory=list)
    choice: Tensor | None = None
    reason: str = ""
    origin: tuple[fx.Node, ...] = ()

    @property
    def first(self) -> Application:
        """The earliest rotation."""
        return self.applications[0]

    @property
    def module(self) -> str:
        """Path of the module that made the tables; a hint for people only."""
        return module_path(self.key[0]) or module_path(self.first.root)


def find_tables(program: Program, runner: Runner) -> list[Tables]:
    """Group rotations by the tables they share, and take the tables apart."""
    groups: dict[tuple[fx.Node, fx.Node], list[Application]] = {}
    for application in find_applications(program, runner):
        key = _producer(application.cos), _producer(application.sin)
        groups.setdefault(key, []).append(application)
    found = [Tables(key, applications) for key, applications in groups.items()]
    for tables in found:
        try:
            _take_apart(tables, runner)
        except NoMatch as reason:
            tables.reason = reason.reason
    return found


def _producer(table: fx.Node) -> fx.Node:
    """Back through views, casts and factors to the node that several rotations share."""
    node = table
    while True:
        scaled = _scale(node)
        if scaled is not None:
            node = scaled[0]
        elif moves(node) and target_name(node) not in _JOINS and len(data_inputs(node)) == 1:
            node = data_inputs(node)[0]
        else:
            return node


_JOINS = ("aten.cat", "aten.stack", "getitem")


def _scale(node: fx.Node) -> tuple[fx.Node, float] | None:
    """`mul(x, number)`: x and the number."""
    if target_name(node) != "aten.mul" or isinstance(node.args[1], fx.Node):
        return None
    assert isinstance(node.args[0], fx.Node)
    return node.args[0], float(arg(node, 1))


# ---- tables -> products --------------------------------------------------------------------


def _take_apart(tables: Tables, runner: Runner) -> None:
    _refuse_other_readers(tables)
    first = tables.first
    cos = _Table(runner, first.cos, _TRIG["cos"])
    sin = _Table(runner, first.sin, _TRIG["sin"])
    if not cos.angles and not sin.angles:
        tables.origin = tuple(dict.fromkeys([*cos.others, *sin.others]))
        raise NoMatch("its tables are no cosines and sines of angles in the graph", first.cos)
    if cos.scaling != sin.scaling:
        raise NoMatch("its cosines and sines are scaled differently", first.cos)
    tables.scaling = cos.scaling
    products = sorted({p for angle in (*cos.angles, *sin.angles) for p in _products(angle)})
    tables.token_axis = token_axis(runner, first)
    labels, start = dict[fx.Node, Tensor](), 1
    for product in products:
        labels[product] = fresh_labels(runner.shape(product), start)
        start += labels[product].numel()
    chosen = [per_angle(runner, t.node, t.through, labels, tables) for t in (cos, sin)]
    if not torch.equal(*chosen):
        raise NoMatch("its cosines and sines are of different angles", first.cos)
    tables.choice = chosen[0]
    tables.terms = _terms(runner, products, labels, tables.choice)


def _refuse_other_readers(tables: Tables) -> None:
    """Everything between the shared tables and the rotations must lead to a rotation."""
    known = {node for a in tables.applications for node in a.nodes}
    stack = list(tables.key)
    while stack:
        for user in stack.pop().users:
            if user in known:
                continue
            if not moves(user) and _scale(user) is None:
                raise NoMatch(
                    f"its tables are also read by {user.name}, which is no rotation", user
                )
            stack.append(user)


class _Table:
    """One table: the angles below its cosines (or sines), and its factor."""

    def __init__(self, runner: Runner, node: fx.Node, function: str) -> None:
        self.node, self.function = node, function
        self.angles, self.others, self.scaling = list[fx.Node](), list[fx.Node](), 1.0
        stack, seen = [node], set[fx.Node]()
        while stack:
            for root in roots(stack.pop(), lambda _: False):
                scaled = _scale(root)
                if root in seen:
                    continue
                seen.add(root)
                if scaled is not None:
                    stack.append(scaled[0])
                    self.scaling *= scaled[1]
                elif target_name(root) == function:
                    self.angles += data_inputs(root)
                else:
                    self.others.append(root)
        if self.angles and self.others:
            name = target_name(self.others[0])
            raise NoMatch(f"its tables also hold values of {name}", self.others[0])

    def through(self, node: fx.Node) -> fx.Node | None:
        """A cosine stands for its angle, a multiple for what is multiplied."""
        scaled = _scale(node)
        if scaled is not None:
            return scaled[0]
        return data_inputs(node)[0] if target_name(node) == self.function else None


def _products(angle: fx.Node) -> list[fx.Node]:
    found = roots(angle, lambda _: False)
    for node in found:
        name = target_name(node)
        if name == "aten.einsum" or (name == "aten.matmul" and not _is_outer(node)):
            raise NoMatch(
                f"each of its angles mixes several axes ({name}): none belongs to one", node
            )
        if name not in ("aten.mul", "aten.outer", "aten.matmul", "aten.bmm"):
            raise NoMatch(
                f"its angles come from {name}, not from positions times frequencies", node
            )
    return found


def _is_outer(node: fx.Node) -> bool:
    left, right = (arg(node, i).meta["val"] for i in range(2))
    deep = left.dim() > 1 and right.dim() > 1
    return bool(deep and left.shape[-1] == 1 and right.shape[-2] == 1)


def per_angle(
    runner: Runner, table: fx.Node, through: Any, labels: dict[fx.Node, Tensor], tables: Tables
) -> Tensor:
    """[batch or 1, tokens, N]: the label of each angle; both channels of a pair must agree."""
    return by_angle(runner, table, runner.labels(table, labels, through), tables)


def by_angle(runner: Runner, table: fx.Node, found: Tensor, tables: Tables) -> Tensor:
    """Something per channel, shaped like a table, as [batch or 1, tokens, N].

    Raises:
        NoMatch: Heads differ, or the two channels of a pair do.
    """
    angles = runner.shape(tables.first.root)[-1] // 2
    rank = len(runner.shape(tables.first.root))
    while found.dim() < rank + (tables.token_axis == -rank):
        found = found.unsqueeze(0)
    for axis in range(1, found.dim() - 1):
        if axis - found.dim() != tables.token_axis and found.shape[axis] != 1:
            raise NoMatch("its tables differ between heads", table)
    flat = found.transpose(1, tables.token_axis).flatten(1, -2)
    if flat.shape[-1] == angles:
        return flat
    halves = (flat[..., 0::2], flat[..., 1::2]) if tables.first.pairs else flat.chunk(2, -1)
    if flat.shape[-1] != 2 * angles or not torch.equal(*halves):
        raise NoMatch("the two channels of a pair have different angles", table)
    return halves[0]


def token_axis(runner: Runner, application: Application) -> int:
    """The axis of the tokens, from the end: where the tables are as long as what they rotate.

    Raises:
        NoMatch: There is none, or there are several.
    """
    shape = runner.shape(application.root)
    table = [1] * len(shape) + list(runner.shape(application.cos))
    inner = range(-2, -len(shape), -1)
    for axis in (*inner, -len(shape)):
        others = [table[a] for a in inner if a != axis]
        if table[axis] == shape[axis] and all(size == 1 for size in others):
            return int(axis)
    raise NoMatch("its tables differ between heads, or have no axis of tokens", application.cos)


# ---- products -> positions and frequencies ---------------------------------------------------


def _terms(
    runner: Runner, products: Sequence[fx.Node], labels: dict[fx.Node, Tensor], choice: Tensor
) -> list[Term]:
    found = []
    for product in products:
        own = labels[product]
        inside = (choice >= int(own.min())) & (choice <= int(own.max()))
        angles = inside.any(0).any(0)
        picked = choice[:, :, angles] - int(own.min())
        found.append(_term(runner, product, tuple(own.shape), picked))
    return found


def _term(runner: Runner, product: fx.Node, shape: tuple[int, ...], picked: Tensor) -> Term:
    """Tell the factors apart: frequencies vary along one axis, from angle to angle."""
    index = torch.stack(torch.unravel_index(picked, shape), -1)  # [B, S, n, rank]
    between_tokens = [(index[..., a] != index[:1, :1, :, a]).any() for a in range(len(shape))]
    for positions, spread in itertools.permutations(_factors(product)):
        frequencies = _unexpanded(spread)
        size = _aligned(runner.shape(frequencies), len(shape), product, spread)
        axes = [a for a, length in enumerate(size) if length > 1]
        if len(axes) > 1 or not _is_constant(frequencies):
            continue
        axis = axes[0] if axes else _only_axis(shape, runner, positions, product)
        along = _aligned(runner.shape(positions), len(shape), product, positions)
        if axis is not None and along[axis] == 1 and not between_tokens[axis]:
            return Term(product, positions, frequencies, axis - len(shape))
    raise NoMatch("its angles are no product of positions and constant frequencies", product)


def _unexpanded(node: fx.Node) -> fx.Node:
    """Before axes of size 1 were spread."""
    while target_name(node) == "aten.expand":
        node = data_inputs(node)[0]
    return node


def _factors(product: fx.Node) -> list[fx.Node]:
    found = [arg for arg in product.args[:2] if isinstance(arg, fx.Node)]
    if len(found) != 2:
        raise NoMatch("its angles are not positions times frequencies", product)
    return found


def _only_axis(
    shape: Sequence[int], runner: Runner, positions: fx.Node, product: fx.Node
) -> int | None:
    """For a single frequency: the last axis the positions have only once."""
    along = _aligned(runner.shape(positions), len(shape), product, positions)
    return max((a for a, size in enumerate(along) if size == 1), default=None)


def _aligned(shape: Sequence[int], rank: int, product: fx.Node, factor: fx.Node) -> tuple[int, ...]:
    """A factor's sizes on the axes of the product."""
    if target_name(product) == "aten.outer":
        return (shape[0], 1) if factor is product.args[0] else (1, shape[0])
    return (*[1] * (rank - len(shape)), *shape)


def _is_constant(node: fx.Node) -> bool:
    """Whether a value depends on no input, not even on its sizes."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        value = top.meta.get("val")
        if top.op == "placeholder" or isinstance(value, torch.SymInt):
            return False
        stack += top.all_input_nodes
    return True


# ---- canonical form ------------------------------------------------------------------------


def frequencies_of(runner: Runner, tables: Tables) -> Tensor:
    """The frequency of every angle, [N], in the dtype that the graph multiplies in."""
    values: list[tuple[Tensor, Tensor]] = []
    kind = torch.float32
    for term, _, offset in _spans(runner, tables):
        index = torch.unravel_index(offset, runner.shape(term.node))[term.axis]
        value = runner.value(term.frequencies)
        kind = torch.promote_types(kind, value.dtype)
        values.append((value.reshape(-1), index))
    assert tables.choice is not None
    result = torch.zeros(tables.choice.shape[-1], dtype=kind)
    for (_, mask, _), (value, index) in zip(_spans(runner, tables), values, strict=True):
        flat = value if value.numel() > 1 else value.expand(int(index.max()) + 1)
        result[mask] = flat[index[0, 0]].to(kind)
    return result


def position_index(runner: Runner, tables: Tables) -> list[tuple[Term, Tensor, Tensor]]:
    """Per product: its angles (a mask [N]) and which element of its positions each token has.

    The elements are [batch or 1, tokens, n], counted from 0 through the positions' value.
    """
    found = []
    for term, mask, offset in _spans(runner, tables):
        shape = runner.shape(term.node)
        index = list(torch.unravel_index(offset, shape))
        own = runner.shape(term.positions)
        if target_name(term.node) == "aten.outer":
            flat = index[0] if term.positions is term.node.args[0] else index[1]
        else:
            index = [
                i * (size > 1) for i, size in zip(index[len(shape) - len(own) :], own, strict=True)
            ]
            flat = torch.zeros_like(offset)
            for i, size in zip(index, own, strict=True):
                flat = flat * size + i
        found.append((term, mask, flat))
    return found


def _spans(runner: Runner, tables: Tables) -> list[tuple[Term, Tensor, Tensor]]:
    """Per product: the angles that come from it, and their elements of it, from 0."""
    assert tables.choice is not None
    found, start = [], 1
    for term in tables.terms:
        count = fresh_labels(runner.shape(term.node)).numel()
        inside = (tables.choice >= start) & (tables.choice < start + count)
        mask = inside.any(0).any(0)
        found.append((term, mask, tables.choice[:, :, mask] - start))
        start += count
    return found


def uncast(node: fx.Node) -> fx.Node:
    """Back through casts and copies."""
    while target_name(node) in KEEPING:
        node = data_inputs(node)[0]
    return node
