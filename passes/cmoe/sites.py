"""Where a program has a feed-forward layer, told by dataflow.

A layer is a constant projection, read through pointwise operators that start at one projection
(ungated) or at two of the same value (gated), or at two parts of one (fused gate and up). Names of
modules and classes play no part. The result may first be concatenated with other values (blocks
that project attention and feed-forward together): the other columns are then kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from resplice.change import Refused
from resplice.dims import same_shape
from resplice.origin import describe_target
from resplice.passes.cmoe.activations import IDENTITY, is_pointwise, name_activation
from resplice.passes.cmoe.ffn import Ffn
from resplice.pattern import argument
from resplice.program import Program

aten = torch.ops.aten
_LINEAR = aten.linear.default
_TRANSPOSED = {aten.addmm.default: 0, aten.matmul.default: -1, aten.mm.default: -1}
_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Projection:
    """A product with a constant matrix.

    Attributes:
        node: The product.
        x: What it multiplies.
        weight: The matrix's node.
        bias: The bias's node, or None.
        transposed: Whether the matrix is [in, out] (GPT-2's Conv1D).
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    def matrix(self, program: Program) -> Tensor:
        """[out, in]."""
        value = program.weight(self.weight).detach()
        return value.t() if self.transposed else value

    def vector(self, program: Program) -> Tensor | None:
        """The bias [out]."""
        return None if self.bias is None else program.weight(self.bias).detach()


@dataclass(frozen=True)
class Leaf:
    """A projection, or a run of its outputs."""

    projection: Projection
    start: int
    length: int


@dataclass(frozen=True)
class FfnSite:
    """One feed-forward layer.

    Attributes:
        down: The output projection.
        first: The rows behind the activation.
        second: The rows it multiplies, or None.
        activation: A key of `moe_routing.ACTIVATIONS`.
        start: Node before which calibration stops: the first of the input projections.
        others: Values concatenated before the output projection, [before, after] this layer's.
        offset: First column of this layer in the output projection.
        layer: Number of the site in the order of execution, from 0.
    """

    down: Projection
    first: Leaf
    second: Leaf | None
    activation: str
    start: fx.Node
    others: tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]] = ((), ())
    offset: int = 0
    layer: int = 0

    @property
    def x(self) -> fx.Node:
        """The layer's input."""
        return self.first.projection.x

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.first.length

    def ffn(self, program: Program) -> Ffn:
        """The layer's weights; views where possible."""
        first, b1 = _rows(program, self.first)
        second, b2 = (None, None) if self.second is None else _rows(program, self.second)
        down = self.down.matrix(program)[:, self.offset : self.offset + self.size]
        bias = None if any(self.others) else self.down.vector(program)
        return Ffn(first, second, down, b1, b2, bias, self.activation)


def _rows(program: Program, leaf: Leaf) -> tuple[Tensor, Tensor | None]:
    rows = slice(leaf.start, leaf.start + leaf.length)
    bias = leaf.projection.vector(program)
    return leaf.projection.matrix(program)[rows], None if bias is None else bias[rows]


@dataclass
class Sites:
    """What `find_ffns` found.

    Attributes:
        found: Layers in the order of execution.
        refused: Projections behind an activation that are no layer of this kind, with the reason.
    """

    found: list[FfnSite] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


class _NoLayer(Exception):  # noqa: N818  # control flow: nothing like a feed-forward layer
    """Not worth a refusal."""


def find_ffns(program: Program) -> Sites:
    """Find the feed-forward layers of a program in normal form."""
    found, order = Sites(), {node: i for i, node in enumerate(program.graph.nodes)}
    projections = {n: p for n in program.graph.nodes if (p := _projection(n)) is not None}
    taken: set[fx.Node] = set()
    for down in projections.values():
        try:
            site = _Search(program, projections, order).site(down, len(found.found))
            own = {down.node, site.first.projection.node}
            if own & taken:
                raise Refused("its projections belong to the layer before it")
            taken |= own
            found.found.append(site)
        except Refused as reason:
            found.refused.append((down.node, str(reason)))
        except _NoLayer:
            continue
    return found


def _projection(node: fx.Node) -> Projection | None:
    if node.op != "call_function":
        return None
    if node.target is _LINEAR:
        x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    elif node.target in _TRANSPOSED:
        place = _TRANSPOSED[node.target]
        if place == 0 and (argument(node, "alpha") != 1 or argument(node, "beta") != 1):
            return None
        x, weight = node.args[place + 1 :][:2]
        bias = node.args[0] if place == 0 else None
    else:
        return None
    plain = _constant(weight, 2) and (bias is None or _constant(bias, 1))
    if not plain or not isinstance(x, fx.Node):
        return None
    return Projection(node, x, weight, bias, node.target is not _LINEAR)


def _constant(value: Any, rank: int) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    tensor = value.meta["val"]
    return bool(tensor.dim() == rank and tensor.is_floating_point())


@dataclass
class _Search:
    """Looks backwards from one output projection."""

    program: Program
    projections: dict[fx.Node, Projection]
    order: dict[fx.Node, int]

    def site(self, down: Projection, layer: int) -> FfnSite:
        hidden, others, offset = self._joined(down)
        first, second, activation, inside = self._layer(hidden)
        projections = [first.projection] + ([] if second is None else [second.projection])
        start = min((p.node for p in projections), key=lambda node: self.order[node])
        self._check(down, first, second, any(others))
        self._closed(down, projections, inside, joined=any(others))
        return FfnSite(down, first, second, activation, start, others, offset, layer)

    def _check(self, down: Projection, first: Leaf, second: Leaf | None, joined: bool) -> None:
        if second is not None and second.projection.x is not first.projection.x:
            raise Refused("gate and up read different values")
        if second is not None and second.length != first.length:
            raise Refused(f"gate has {first.length} neurons, up has {second.length}")
        x, result = first.projection.x.meta["val"], down.node.meta["val"]
        if x.shape[-1] != result.shape[-1]:
            raise Refused(
                f"it maps {x.shape[-1]} values to {result.shape[-1]}: an embedder or a head, "
                "no layer of a residual stream"
            )
        if not same_shape(x[..., 0], result[..., 0]):
            raise Refused("its input and its result have different leading axes")

    def _joined(
        self, down: Projection
    ) -> tuple[fx.Node, tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], int]:
        """The layer's own part of what is projected."""
        node = _through_reshapes(down.x)
        if node.target is not aten.cat.default or argument(node, "dim") not in (-1, _last(node)):
            return node, ((), ()), 0
        parts: Any = node.args[0]
        mine = [i for i, part in enumerate(parts) if self._is_hidden(part)]
        if len(mine) != 1 or len(node.users) != 1 or down.x is not node:
            raise _NoLayer
        number = mine[0]
        widths = [part.meta["val"].shape[-1] for part in parts]
        others = (tuple(parts[:number]), tuple(parts[number + 1 :]))
        return parts[number], others, sum(widths[:number])

    def _is_hidden(self, node: fx.Node) -> bool:
        try:
            self._layer(node)
        except (Refused, _NoLayer):
            return False
        return True

    def _layer(self, hidden: fx.Node) -> tuple[Leaf, Leaf | None, str, list[fx.Node]]:
        """The leaves and the activation of a hidden value, and the nodes in between."""
        leaves, inside = self._trace(hidden)
        if len(leaves) == 1:
            name = name_activation(self.program, _through_reshapes(hidden), inside)
            if name == IDENTITY:
                raise _NoLayer
            if name is None:
                raise Refused("its activation is none of those that moe_ffn knows")
            return leaves[0], None, name, inside
        product = _through_reshapes(hidden)
        if len(leaves) > 2 or product.target is not aten.mul.Tensor:
            raise _NoLayer  # a modulation, say
        sides = [self._side(factor) for factor in product.args[:2]]
        names = [name for _, name in sides]
        if names.count(IDENTITY) != 1:
            raise Refused(f"its gate is {names[0]} times {names[1]}")
        (gate, name), (up, _) = sides if names[1] == IDENTITY else sides[::-1]
        return gate, up, name, inside

    def _side(self, factor: Any) -> tuple[Leaf, str]:
        if not isinstance(factor, fx.Node):
            raise _NoLayer
        leaves, inside = self._trace(factor)
        if len(leaves) != 1:
            raise Refused("both factors of its gate depend on both projections")
        name = name_activation(self.program, _through_reshapes(factor), inside)
        if name is None:
            raise Refused("its activation is none of those that moe_ffn knows")
        return leaves[0], name

    def _trace(self, hidden: fx.Node) -> tuple[list[Leaf], list[fx.Node]]:
        """Leaves a value depends on, and the nodes between, both in graph order."""
        leaves: dict[Leaf, None] = {}
        inside: set[fx.Node] = set()
        stack = [hidden]
        while stack:
            node = stack.pop()
            leaf = self._leaf(node)
            if leaf is not None:
                leaves[leaf] = None
                continue
            if node in inside or _is_number(node):
                continue
            if not (is_pointwise(node) or _keeps_last(node)):
                raise _NoLayer
            inside.add(node)
            stack += [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        if not leaves:
            raise _NoLayer
        ordered = sorted(leaves, key=lambda leaf: (self.order[leaf.projection.node], leaf.start))
        return ordered, sorted(inside, key=lambda node: self.order[node])

    def _leaf(self, node: fx.Node) -> Leaf | None:
        whole = self.projections.get(node)
        if whole is not None:
            return Leaf(whole, 0, int(node.meta["val"].shape[-1]))
        part = _part(node)
        if part is None:
            return None
        source, start, length = part
        projection = self.projections.get(_through_reshapes(source))
        return None if projection is None else Leaf(projection, start, length)

    def _closed(
        self, down: Projection, projections: Sequence[Projection], inside: Sequence[fx.Node],
        *, joined: bool,
    ) -> None:  # fmt: skip
        """Refuse values in between that something else reads."""
        own = {down.node, *(p.node for p in projections), *inside}
        own |= {down.x} if joined else set()
        frontier = [p.node for p in projections] + list(inside)
        while frontier:
            node = frontier.pop()
            for user in node.users:
                if user in own:
                    continue
                if _part_or_reshape(user):
                    own.add(user)
                    frontier.append(user)
                    continue
                raise Refused(f"{node.name} is also read by {user.name}")


def _last(node: fx.Node) -> int:
    rank: int = node.meta["val"].dim()
    return rank - 1


def _is_number(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.meta["val"].numel() == 1


def _keeps_last(node: fx.Node) -> bool:
    """Whether an operator only regroups the leading axes."""
    if node.target is not aten.reshape.default:
        return False
    before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    return bool(before and after and before[-1] == after[-1])


def _through_reshapes(node: fx.Node) -> fx.Node:
    while _keeps_last(node):
        node = node.all_input_nodes[0]
    return node


def _part(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Source, start and length, where a node is a run of a value's last axis."""
    value = node.meta.get("val")
    length = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    if not isinstance(length, int) or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if node.target is aten.slice.Tensor:
        start = argument(node, "start") or 0
        plain = argument(node, "step") == 1 and isinstance(start, int)
        fits = plain and argument(node, "dim") in (-1, _last(node))
        return (source, start, length) if fits else None
    if source.target not in _PARTS or describe_target(node) != "getitem":
        return None
    if argument(source, "dim") not in (-1, source.all_input_nodes[0].meta["val"].dim() - 1):
        return None
    sizes = [part.shape[-1] for part in source.meta["val"]]
    number = node.args[1]
    assert isinstance(number, int), node
    return source.all_input_nodes[0], sum(sizes[:number]), length


def _part_or_reshape(node: fx.Node) -> bool:
    return node.target in _PARTS or _part(node) is not None or _keeps_last(node)
