"""Whether passes may run in a given order: decided by facts and declared order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import networkx as nx

from resplice.errors import CompositionError
from resplice.facts import Fact, Facts
from resplice.pass_base import Pass
from resplice.registry import PASSES, load


def complete(passes: Sequence[Pass], facts: Facts) -> tuple[Pass, ...]:
    """Insert automatic passes (such as `canonicalize`) where a needed fact is missing."""
    held = {type(fact) for fact in facts}
    result: list[Pass] = []
    for item in passes:
        for kind in item.needs:
            provider = None if kind in held else _automatic(kind)
            if provider is not None:
                result.append(provider)
                held = _after(provider, held)
        result.append(item)
        held = _after(item, held)
    return tuple(result)


def check(passes: Sequence[Pass], facts: Facts) -> None:
    """Refuse an illegal order.

    Raises:
        CompositionError: Names the pass, the broken fact or order, who broke it, and a legal order.
    """
    problem = _first_problem(passes, facts)
    if problem is None:
        return
    order = legal_order(passes, facts)
    hint = (
        f"a legal order is {','.join(map(str, order))}"
        if order
        else "no order of these passes is legal"
    )
    raise CompositionError(problem, where=",".join(map(str, passes)), hint=hint)


def legal_order(passes: Sequence[Pass], facts: Facts) -> tuple[Pass, ...] | None:
    """The legal order nearest to the given one, if there is any."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, j in combinations(range(len(passes)), 2):
        for a, b in ((i, j), (j, i)):
            if _must_precede(passes[a], passes[b], facts):
                graph.add_edge(a, b)
    try:
        order = list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        return None
    candidate = tuple(passes[index] for index in order)
    return candidate if _first_problem(complete(candidate, facts), facts) is None else None


def _first_problem(passes: Sequence[Pass], facts: Facts) -> str | None:
    held = {type(fact) for fact in facts}
    broken_by: dict[type[Fact], str] = {}
    names = [item.name for item in passes]
    for index, item in enumerate(passes):
        for kind in item.needs:
            if kind not in held:
                blame = (
                    f"which {broken_by[kind]} broke"
                    if kind in broken_by
                    else "which does not hold for this model"
                )
                return f'{item.name} needs "{kind.title}", {blame}'
        late = [name for name in names[index + 1 :] if name in item.after]
        early = [name for name in names[:index] if name in item.before]
        if late or early:
            return f"{item.name} must run {'after' if late else 'before'} {(late or early)[0]}"
        broken_by.update(dict.fromkeys(item.destroys, item.name))
        held = _after(item, held)
    return None


def _must_precede(a: Pass, b: Pass, facts: Facts) -> bool:
    """Whether `a` has to run before `b`: by declaration, or because of a fact between them."""
    if b.name in a.before or a.name in b.after:
        return True
    breaks = set(b.destroys) & set(a.needs)
    creates = set(a.creates) & set(b.needs) - {type(fact) for fact in facts}
    mutual = set(a.destroys) & set(b.needs)
    return bool(creates) or (bool(breaks) and not mutual)


def _after(item: Pass, held: set[type[Fact]]) -> set[type[Fact]]:
    return held - set(item.destroys) | set(item.creates)


def _automatic(kind: type[Fact]) -> Pass | None:
    for place in PASSES.values():
        cls: type[Pass] = load(place)
        if cls.automatic and kind in cls.creates:
            return cls()
    return None
