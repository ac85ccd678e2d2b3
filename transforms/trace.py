"""Sub-patterns traced from plain Python functions.

The function is captured exactly like a model, at two different sets of sizes; a literal that
differs between the two (a slice bound, a head size) becomes a variable, so the term matches at any
size while following torch's own decompositions:

    def swap_halves(x):
        low, high = x.chunk(2, -1)
        return torch.cat((high, low), -1)

    pattern = aten.mul(traced(swap_halves, x="b h s d")(Var("x")), Var("y"))
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from resplice.capture import capture
from resplice.errors import UsageError
from resplice.normal import normalize
from resplice.pattern import Call, Var, positional, target_name

_USES = itertools.count()
_SIZES = ((2, 4, 6, 8, 10, 12), (14, 16, 18, 20, 22, 24))


def traced(function: Callable[..., Any], **shapes: str) -> Callable[..., Any]:
    """Turn a function of tensors into a builder of pattern terms.

    Args:
        function: A plain function of tensors; it is traced, never called on model data.
        shapes: One entry per parameter: its axes by letter, `x="b h s d"`; one letter, one size.

    Returns:
        A function that takes one term per parameter and returns the term of the result.
    """
    names = list(inspect.signature(function).parameters)
    first, second = (_graph(function, names, shapes, sizes) for sizes in _SIZES)
    pairs = list(zip(first.nodes, second.nodes, strict=True))

    def build(*terms: Any) -> Any:
        known: dict[fx.Node, Any] = {}
        tag = next(_USES)
        given = dict(zip(names, terms, strict=True))
        for a, b in pairs:
            if a.op == "placeholder":
                known[a] = given[a.name]
            elif a.op == "output":
                (result,) = a.args[0]
                return known[result]
            else:
                known[a] = _term(a, b, known, tag)
        raise AssertionError("a graph without output")

    return build


def _graph(
    function: Callable[..., Any],
    names: list[str],
    shapes: Mapping[str, str],
    sizes: tuple[int, ...],
) -> fx.Graph:
    axes = list(dict.fromkeys(axis for name in names for axis in shapes[name].split()))
    size = dict(zip(axes, sizes, strict=False))
    samples = {n: torch.zeros([size[axis] for axis in shapes[n].split()]) for n in names}
    program = capture(_Function(function), tuple(samples.values()), repair=False, check=False)
    for placeholder, name in zip(program.placeholders, names, strict=True):
        placeholder.name = name
    normalize(program)
    return program.graph


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._function(*tensors)


def _term(a: fx.Node, b: fx.Node, known: dict[fx.Node, Any], tag: int) -> Any:
    if a.op == "get_attr":
        raise UsageError(
            "a traced pattern holds a tensor constant, which no term can compare",
            hint="make it a parameter of the function and match it with a Var",
        )
    left, right = positional(a), positional(b)
    args = [_literal(x, y, known, tag) for x, y in zip(left, right, strict=True)]
    name = "getitem" if a.target is operator.getitem else target_name(a)
    return Call(name, tuple(args))


def _literal(a: Any, b: Any, known: dict[fx.Node, Any], tag: int) -> Any:
    """A literal equal in both traces is itself; one that differs is a variable named by both."""
    if isinstance(a, fx.Node):
        return known[a]
    if isinstance(a, list | tuple):
        return [_literal(x, y, known, tag) for x, y in zip(a, b, strict=True)]
    return a if a == b else Var(f"_{tag}_{a}_{b}")
