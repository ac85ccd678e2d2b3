"""Following elements through a graph: run the operators that only move values on labels.

labels of a source: 1, 2, 3, ...; the graph from there on is executed, on labels instead of
values; what comes out says for every element which source element it is (0: none, negative:
negated). Splits, selections, strided writes and concatenations need no rule of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from resplice.pattern import NoMatch, target_name
from resplice.program import Program
from resplice.walk import run_node

aten = torch.ops.aten
MOVING = frozenset(
    {"aten.split_with_sizes", "aten.split", "aten.chunk", "aten.unbind", "getitem", "aten.select",
     "aten.slice", "aten.cat", "aten.concat", "aten.stack", "aten.reshape", "aten.view",
     "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.expand",
     "aten.expand_as", "aten.permute", "aten.transpose", "aten.t", "aten.repeat_interleave",
     "aten.repeat", "aten.index_select", "aten.slice_scatter", "aten.select_scatter", "aten.copy",
     "aten.movedim", "aten.narrow", "aten.meshgrid", "aten.tile", "aten.flip", "aten.index",
     "aten.where"}
)  # fmt: skip
"""Operators whose results hold elements of their tensor inputs and nothing else."""
KEEPING = frozenset(
    {"aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach",
     "aten.type_as", "aten.lift_fresh_copy"}
)  # fmt: skip
"""Operators that keep every element where it is, up to rounding."""
_BLANK = frozenset(
    {"aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.new_zeros", "aten.new_ones",
     "aten.zeros", "aten.ones", "aten.empty", "aten.full", "aten.full_like"}
)  # fmt: skip


class Runner:
    """Concrete values of a program's nodes, computed when asked for.

    Attributes:
        program: The program.
        inputs: Values of all inputs.
    """

    def __init__(self, program: Program, inputs: Mapping[str, Tensor]) -> None:
        """Nothing is run yet."""
        self.program, self.inputs = program, inputs
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a node on these inputs."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in top.all_input_nodes if n not in self._values]
            if top in self._values:
                stack.pop()
            elif missing:
                stack += missing
            else:
                with torch.no_grad():
                    self._values[top] = run_node(self.program, top, self._values, self.inputs)
        return self._values[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The concrete shape of a node's value, without computing the value."""
        return tuple(self._size(size) for size in node.meta["val"].shape)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        symbols = self._symbols()
        return int(size.node.expr.subs(symbols))

    def _symbols(self) -> dict[Any, int]:
        if not hasattr(self, "_known"):
            from resplice.dims import expression, solve

            found: dict[Any, int] = {}
            pairs = [
                (size, int(actual))
                for node in self.program.placeholders
                for size, actual in zip(
                    node.meta["val"].shape, self.inputs[node.name].shape, strict=True
                )
            ]
            for size, actual in sorted(pairs, key=lambda p: len(expression(p[0]).free_symbols)):
                solve(size, actual, found)
            self._known = found
        return self._known

    def labels(
        self,
        node: fx.Node,
        sources: Mapping[fx.Node, Tensor],
        through: Callable[[fx.Node], fx.Node | None] = lambda _: None,
    ) -> Tensor:
        """Which element of which source each element of a node's value is.

        Args:
            node: Where to look.
            sources: Nodes with their labels, int64 and positive.
            through: For other operators than those that move or keep: the input whose elements
                the result's stand for (a cosine, say), or None to refuse.

        Raises:
            NoMatch: Some operator on the way computes new values.
        """
        known: dict[fx.Node, Any] = dict(sources)
        found: Tensor = self._label(node, known, through)
        return found

    def _label(
        self, node: fx.Node, known: dict[fx.Node, Any], through: Callable[[fx.Node], fx.Node | None]
    ) -> Any:
        if node in known:
            return known[node]
        name, passed = target_name(node), through(node)
        if passed is not None:
            known[node] = self._label(passed, known, through)
        elif name in KEEPING:
            known[node] = self._label(_first(node), known, through)
        elif name == "aten.neg":
            known[node] = -self._label(_first(node), known, through)
        elif name in _BLANK:
            known[node] = torch.zeros(self.shape(node), dtype=torch.int64)
        elif name in MOVING:
            known[node] = self._moved(node, known, through)
        else:
            raise NoMatch(f"{name} computes new values", node)
        return known[node]

    def _moved(
        self, node: fx.Node, known: dict[fx.Node, Any], through: Callable[[fx.Node], fx.Node | None]
    ) -> Any:
        def replaced(n: fx.Node) -> Any:
            value = n.meta.get("val")
            if isinstance(value, torch.Tensor | list | tuple) and n not in indices:
                return self._label(n, known, through)
            if isinstance(value, torch.Tensor) and depends_on_inputs(n):
                raise NoMatch(f"what {name} picks depends on an input", node)
            return self.value(n)

        name, indices = target_name(node), _indices(node)
        mapped: Any = fx.map_arg((node.args, node.kwargs), replaced)
        args, kwargs = mapped
        if name == "aten.copy":
            return args[1].expand_as(args[0])
        if node.target is operator.getitem:
            return args[0][args[1]]
        assert callable(node.target), node
        return node.target(*args, **kwargs)


def _indices(node: fx.Node) -> list[fx.Node]:
    """Inputs that say which elements, not what they are."""
    name, inputs = target_name(node), node.all_input_nodes
    if name in ("aten.index_select", "aten.index"):
        return [n for n in inputs if n is not node.args[0]]
    return inputs[:1] if name == "aten.where" else []


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node), node
    return source


def fresh_labels(shape: tuple[int, ...], start: int = 1) -> Tensor:
    """Labels start, start + 1, ... in that shape."""
    count = 1
    for size in shape:
        count *= size
    return torch.arange(start, start + count).reshape(shape)


def moves(node: fx.Node) -> bool:
    """Whether an operator only moves or keeps elements."""
    return target_name(node) in MOVING or target_name(node) in KEEPING


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of a moving operator that hold its elements: no sizes, no indices."""
    indices = _indices(node)
    return [
        n for n in node.all_input_nodes
        if n not in indices and isinstance(n.meta.get("val"), torch.Tensor | list | tuple)
    ]  # fmt: skip


def roots(node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Where a value's elements come from: back through moving operators to the first others.

    Args:
        node: Where to start; itself if it moves nothing.
        stop: Moving operators to stop at.
    """
    found, seen, stack = list[fx.Node](), set[fx.Node](), [node]
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if top.op == "call_function" and moves(top) and not stop(top):
            stack += data_inputs(top)
        elif target_name(top) not in _BLANK:
            found.append(top)
    return sorted(found)


def depends_on_inputs(node: fx.Node) -> bool:
    """Whether a value depends on what an input holds; its sizes do not count."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if top.op == "placeholder":
            return True
        blank = target_name(top) in ("aten.zeros_like", "aten.ones_like", "aten.empty_like")
        stack += [
            n for n in top.all_input_nodes
            if not blank and not isinstance(n.meta.get("val"), torch.SymInt | int)
        ]  # fmt: skip
    return False
