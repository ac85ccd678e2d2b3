"""Dataflow patterns over ATen: terms, matching with backtracking, and reasons for a mismatch.

A pattern is written with the ops themselves:

    x, gate, up, down = Var("x"), Var("gate"), Var("up"), Var("down")
    aten.linear(aten.mul(aten.silu(aten.linear(x, gate)), aten.linear(x, up)), down)

- a `Var` binds any node or literal; a second use must meet the same one;
- an op matches any overload of that name; arguments are compared by schema position, so defaults
  and keywords do not matter; arguments the pattern leaves out must have their default value;
- `add`, `mul` and other commutative ops match in both orders;
- a Python list matches a list argument item by item;
- interior nodes must have no user outside the match, unless wrapped in `shared(...)`;
- `maybe(aten.to, x)` looks through an optional op; `either(a, b)` tries alternatives;
- sub-patterns traced from plain Python functions: `trace.traced`.

A failed match is a `NoMatch` with the reason, the node and how deep it got.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from resplice.origin import describe_target, where

COMMUTATIVE = frozenset(
    {"aten.add", "aten.mul", "aten.maximum", "aten.minimum", "aten.logical_and", "aten.logical_or",
     "aten.bitwise_and", "aten.bitwise_or", "aten.__and__", "aten.__or__", "aten.eq", "aten.ne"}
)  # fmt: skip


@dataclass(frozen=True)
class NoMatch(Exception):  # noqa: N818  # not an error: control flow and a value in reports
    """Why a pattern did not match: the reason, the node, and how many nodes matched before it."""

    reason: str
    node: fx.Node | None = None
    depth: int = 0

    def __str__(self) -> str:
        """The reason and where."""
        return f"{self.reason} (at {where(self.node)})" if self.node is not None else self.reason


class Term:
    """Base of all pattern terms."""


@dataclass(frozen=True)
class Var(Term):
    """Binds a node or a literal to a name; `where` restricts what it accepts.

    `where` returns None to accept, or the reason to refuse.
    """

    name: str
    where: Callable[[Any], str | None] | None = None


@dataclass(frozen=True)
class Call(Term):
    """A call of the op called `target` (`aten.linear`) with argument terms."""

    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    may_share: bool = False


@dataclass(frozen=True)
class Either(Term):
    """Any of several terms, tried in order."""

    options: tuple[Any, ...]


class _Anything(Term):
    """Matches whatever stands there."""


ANY = _Anything()


class OpNamespace:
    """`aten.linear(x, w)` builds a `Call`; any registered namespace works."""

    def __init__(self, namespace: str) -> None:
        """Remember the namespace."""
        self._namespace = namespace

    def __getattr__(self, name: str) -> Callable[..., Call]:
        """The builder of calls to `namespace.name`."""

        def call(*args: Any, **kwargs: Any) -> Call:
            return Call(f"{self._namespace}.{name}", args, tuple(kwargs.items()))

        return call


aten = OpNamespace("aten")
resplice = OpNamespace("resplice")


def getitem(term: Any, index: Any) -> Call:
    """Item `index` of an op with several results."""
    return Call("getitem", (term, index))


def shared(term: Call) -> Call:
    """The same call, allowed to have users outside the match."""
    return Call(term.target, term.args, term.kwargs, may_share=True)


def either(*options: Any) -> Either:
    """Any of the given terms."""
    return Either(options)


def maybe(op: Callable[..., Call], term: Any, *rest: Any) -> Either:
    """`op(term, *rest)` or `term` itself; any further arguments of the op are ignored."""
    return Either((op(term, *(rest or (...,))), term))


@dataclass
class Match:
    """A successful match: the root, the bound variables and the interior nodes."""

    root: fx.Node
    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        """The node or literal bound to a variable (None if its branch was not taken)."""
        return self.bindings.get(name)

    def node(self, name: str) -> fx.Node:
        """The node bound to a variable; refuses a literal."""
        value = self.bindings[name]
        if not isinstance(value, fx.Node):
            raise NoMatch(f"{name} is the literal {value!r}, not a tensor", self.root)
        return value

    def require(self, condition: object, reason: str, node: fx.Node | None = None) -> None:
        """Refuse the match with a reason unless the condition holds."""
        if not condition:
            raise NoMatch(reason, node if node is not None else self.root, len(self.nodes))


def match(term: Any, root: fx.Node) -> Match:
    """Match a term with `root` as the outermost op.

    Raises:
        NoMatch: With the reason of the attempt that got deepest.
    """
    search = _Search(root)
    for state in search.term(term, root, _State({}, ())):
        escaped = search.escape(state)
        if escaped is None:
            nodes = tuple(dict.fromkeys(node for node, _ in state.nodes))
            return Match(root, dict(state.bindings), nodes)
        search.fail(*escaped, depth=len(state.nodes))
    raise search.deepest


@dataclass(frozen=True)
class _State:
    bindings: Mapping[str, Any]
    nodes: tuple[tuple[fx.Node, bool], ...]


class _Search:
    """One matching attempt: yields every way a term can match; remembers the deepest failure."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.deepest = NoMatch("nothing was tried", root, -1)

    def fail(self, reason: str, node: fx.Node | None, *, depth: int) -> None:
        if depth > self.deepest.depth:
            self.deepest = NoMatch(reason, node, depth)

    def escape(self, state: _State) -> tuple[str, fx.Node] | None:
        """An interior node used outside the match, if there is one."""
        inside = {node for node, _ in state.nodes}
        for node, may_share in state.nodes:
            outside = [user for user in node.users if user not in inside]
            if node is not self.root and outside and not may_share:
                return f"{node.name} is used outside the pattern, by {outside[0].name}", node
        return None

    def term(self, term: Any, actual: Any, state: _State) -> Iterator[_State]:
        if term is ANY:
            yield state
        elif isinstance(term, Var):
            yield from self._variable(term, actual, state)
        elif isinstance(term, Either):
            for option in term.options:
                yield from self.term(option, actual, state)
        elif isinstance(term, Call):
            yield from self._call(term, actual, state)
        elif isinstance(term, list):
            yield from self._list(term, actual, state)
        elif (
            isinstance(actual, fx.Node)
            or term != actual
            or isinstance(term, bool) != isinstance(actual, bool)
        ):
            self.fail(f"expected {term!r}, found {actual}", _node(actual), depth=len(state.nodes))
        else:
            yield state

    def _variable(self, term: Var, actual: Any, state: _State) -> Iterator[_State]:
        if term.name in state.bindings:
            if _equal(state.bindings[term.name], actual):
                yield state
            else:
                known = state.bindings[term.name]
                self.fail(
                    f"{term.name} is both {known} and {actual}",
                    _node(actual),
                    depth=len(state.nodes),
                )
            return
        reason = term.where(actual) if term.where else None
        if reason:
            self.fail(f"{term.name}: {reason}", _node(actual), depth=len(state.nodes))
        else:
            yield _State({**state.bindings, term.name: actual}, state.nodes)

    def _call(self, term: Call, actual: Any, state: _State) -> Iterator[_State]:
        found = target_name(actual) if isinstance(actual, fx.Node) else repr(actual)
        if found != term.target:
            self.fail(
                f"expected {term.target}, found {found}", _node(actual), depth=len(state.nodes)
            )
            return
        inner = _State(state.bindings, (*state.nodes, (actual, term.may_share)))
        for arguments in _orders(term, positional(actual)):
            yield from self._arguments(term, arguments, actual, inner)

    def _arguments(
        self, term: Call, actual: list[Any], node: fx.Node, state: _State
    ) -> Iterator[_State]:
        problem = _bad_arguments(term, node, len(actual))
        if problem:
            self.fail(problem, node, depth=len(state.nodes))
            return
        wanted, rest_free = _wanted(term, node)
        pairs = list(zip(wanted, actual, strict=False))
        if not rest_free:
            for value, default in list(zip(actual, _defaults(node), strict=True))[len(wanted) :]:
                if not _equal(value, default):
                    self.fail(
                        f"{term.target} has an extra argument {value}", node, depth=len(state.nodes)
                    )
                    return
        yield from self._all(pairs, state)

    def _list(self, term: list[Any], actual: Any, state: _State) -> Iterator[_State]:
        if not isinstance(actual, list | tuple) or len(actual) != len(term):
            self.fail(
                f"expected a list of {len(term)}, found {actual}", None, depth=len(state.nodes)
            )
            return
        yield from self._all(list(zip(term, actual, strict=True)), state)

    def _all(self, pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        (term, actual), rest = pairs[0], pairs[1:]
        for next_state in self.term(term, actual, state):
            yield from self._all(rest, next_state)


def target_name(node: fx.Node) -> str:
    """`aten.linear`, `getitem`, or the node's kind."""
    if node.op != "call_function":
        return "weight" if node.op == "get_attr" else node.op
    return "getitem" if node.target is operator.getitem else describe_target(node)


def positional(node: fx.Node) -> list[Any]:
    """All arguments in schema order, defaults filled in."""
    schema = _schema(node)
    if schema is None:
        return list(node.args)
    rest = schema.arguments[len(node.args) :]
    return [*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest)]


def arg(node: fx.Node, index: int) -> Any:
    """A positional argument as its schema says: torch types every one as a wide union."""
    return node.args[index]


def argument(node: fx.Node, name: str) -> Any:
    """One argument by its schema name, default filled in."""
    schema = _schema(node)
    assert schema is not None, node
    names = [a.name for a in schema.arguments]
    return positional(node)[names.index(name)]


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _defaults(node: fx.Node) -> list[Any]:
    schema = _schema(node)
    return [a.default_value for a in schema.arguments] if schema else [None] * len(node.args)


def _wanted(term: Call, node: fx.Node) -> tuple[list[Any], bool]:
    """Argument terms in schema order and whether the rest is free (`...`)."""
    wanted = list(term.args)
    free = bool(wanted) and wanted[-1] is ...
    wanted = [ANY if item is ... else item for item in (wanted[:-1] if free else wanted)]
    for name, value in term.kwargs:
        position, defaults = _names(node).index(name), _defaults(node)
        wanted += [ANY if free else d for d in defaults[len(wanted) : position]]
        wanted[position : position + 1] = [value]
    return wanted, free


def _bad_arguments(term: Call, node: fx.Node, count: int) -> str | None:
    """Why a term's own arguments don't fit the op, if they don't."""
    unknown = [name for name, _ in term.kwargs if name not in _names(node)]
    if unknown:
        return f"{term.target} has no argument {unknown[0]}"
    given = len(term.args) - (bool(term.args) and term.args[-1] is ...)
    return (
        f"{term.target} takes {count} arguments, the pattern has {given}" if given > count else None
    )


def _names(node: fx.Node) -> list[str]:
    schema = _schema(node)
    return [a.name for a in schema.arguments] if schema else []


def _orders(term: Call, arguments: list[Any]) -> Iterator[list[Any]]:
    yield arguments
    if term.target in COMMUTATIVE and len(arguments) >= 2:
        yield [arguments[1], arguments[0], *arguments[2:]]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return left is right or _same_constant(left, right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return (type(left) is type(right) and bool(left == right)) or (
        not isinstance(left, bool) and not isinstance(right, bool) and bool(left == right)
    )


def _same_constant(left: Any, right: Any) -> bool:
    """Two reads of one weight are the same value."""
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return both and left.op == right.op == "get_attr" and left.target == right.target


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None
