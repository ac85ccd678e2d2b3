"""Rules and their driver: pattern, optional check, rewrite; to a fixed point, with a limit."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx

from resplice import weights
from resplice.build import Builder
from resplice.change import Change, RuleStats, Site
from resplice.context import Context
from resplice.errors import PassError
from resplice.origin import inherit, origin
from resplice.pattern import Match, NoMatch, match
from resplice.program import Program
from resplice.show import show_nodes

_TOO_MANY = 1_000_000


class Rule(ABC):
    """One rewrite. Subclass it, or see `passes/quest` for a rule with options.

    `pattern` gives the term; `check` refuses a match by raising `NoMatch` (or `match.require`);
    `rewrite` builds the replacement of the root and returns it, with site metrics if it has any.
    """

    name: ClassVar[str]

    @abstractmethod
    def pattern(self) -> Any:
        """The term to look for."""

    def check(self, found: Match) -> None:
        """Refuse a match that must not be rewritten."""
        return

    @abstractmethod
    def rewrite(self, found: Match, build: Builder) -> fx.Node | tuple[fx.Node, dict[str, Any]]:
        """Insert the replacement; return the node that takes the root's place."""


def apply_rules(
    program: Program, rules: Sequence[Rule], context: Context, pass_name: str
) -> Change:
    """Rewrite every match of every rule, in graph order, until nothing matches.

    A site whose pattern matches but whose `check` refuses becomes a refusal with the reason.
    """
    change = Change(rules={rule.name: RuleStats() for rule in rules})
    patterns = [(rule, rule.pattern()) for rule in rules]
    refused, before = set[tuple[str, fx.Node]](), -1
    while before != change.count:  # a rewrite may let a node match that was tried before it
        before = change.count
        _sweep(program, patterns, context, pass_name, change, refused)
    program.drop_unused_weights()
    program.module.recompile()
    return change


def _sweep(
    program: Program,
    patterns: Sequence[tuple[Rule, Any]],
    context: Context,
    pass_name: str,
    change: Change,
    refused: set[tuple[str, fx.Node]],
) -> None:
    """Try every rule on every node once, the nodes made on the way included."""
    queue = list(program.graph.nodes)
    for node in queue:
        if change.count > _TOO_MANY:
            raise PassError(pass_name, "its rules never stop matching")
        for rule, term in patterns:
            if node.op != "call_function" or node._erased:
                break
            if (rule.name, node) not in refused:
                queue += _try(program, rule, term, node, context, pass_name, change, refused)


def _try(
    program: Program,
    rule: Rule,
    term: Any,
    node: fx.Node,
    context: Context,
    pass_name: str,
    change: Change,
    refused: set[tuple[str, fx.Node]],
) -> list[fx.Node]:
    stats, start = change.rules[rule.name], time.perf_counter()
    stats.tried += 1
    found = None
    try:
        found = match(term, node)
        rule.check(found)
        if not context.take(f"{pass_name}:{node.name}"):
            return []
        stats.hits += 1
        return _replace(program, rule, found, pass_name, change)
    except NoMatch as miss:
        if found is not None:
            change.refuse(node, miss.reason)
            refused.add((rule.name, node))
        elif miss.depth > stats.near_miss_depth:
            stats.near_miss, stats.near_miss_depth = str(miss), miss.depth
        return []
    finally:
        stats.seconds += time.perf_counter() - start


def _replace(
    program: Program, rule: Rule, found: Match, pass_name: str, change: Change
) -> list[fx.Node]:
    build = Builder(program, found.root, pass_name)
    before = show_nodes(program, sorted(found.nodes))
    constants = {n for node in found.nodes for n in node.all_input_nodes if n.op == "get_attr"}
    result = rule.rewrite(found, build)
    new, metrics = result if isinstance(result, tuple) else (result, {})
    made_at, name = origin(found.root), found.root.name
    replace_node(program, found.root, new, pass_name)
    erase_dead(program, [*found.nodes, *constants])
    change.sites.append(Site(name, made_at, before, show_nodes(program, build.made), metrics))
    return build.made


def replace_node(program: Program, old: fx.Node, new: fx.Node, pass_name: str = "") -> None:
    """Put `new` in the place of `old`: uses, provenance and name (so that ledgers line up).

    A node that was there before the rewrite keeps its own provenance and name.
    """
    fresh = not new.users
    old.replace_all_uses_with(new)
    if fresh:
        inherit(new, old, pass_name)
    if not old.users:
        program.graph.erase_node(old)
        if fresh and new.op == "call_function":
            new.name = old.name


def erase_dead(program: Program, nodes: Sequence[fx.Node]) -> None:
    """Erase the given nodes, users first, where nothing uses them any more.

    A weight read by no node afterwards is released at once, so that replacing weights one by one
    never holds two copies of the model.
    """
    for node in sorted((n for n in nodes if not n._erased), reverse=True):
        if node.users or node.op in ("placeholder", "output"):
            continue
        program.graph.erase_node(node)
        readers = program.graph.find_nodes(op="get_attr") if node.op == "get_attr" else []
        if node.op == "get_attr" and not any(n.target == node.target for n in readers):
            weights.drop(program.module, str(node.target))
