"""Lowering steps on our graph, before coremltools sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.borders import settle_inputs, settle_outputs
from resplice.backends.coreml.builder import CoremlBuilder
from resplice.backends.coreml.frontend import is_known
from resplice.backends.coreml.legalize import RULES
from resplice.backends.coreml.legalize.rank import is_deep
from resplice.backends.coreml.options import CoremlOptions
from resplice.backends.coreml.refusals import refuse_impossible
from resplice.backends.coreml.widths import one_float_width
from resplice.backends.legal import Legalizer, legalize
from resplice.backends.lowering import lower_ops
from resplice.errors import LoweringError, PassError, VerifyError
from resplice.exported import decompose, lift, unlift
from resplice.normal import normalize
from resplice.program import Program

_ROUNDS = 3


@dataclass
class Lowered:
    """A program that coremltools can translate.

    Attributes:
        program: Our copy, legalised.
        notes: How each op was lowered and which rules applied, for the report.
    """

    program: Program
    notes: dict[str, Any] = field(default_factory=dict)


def lower_program(
    program: Program, options: CoremlOptions, rules: tuple[Legalizer, ...] = RULES
) -> Lowered:
    """Our ops become MIL operators or their references, everything else legal ATen.

    Args:
        program: What to lower; it is not changed.
        options: The conversion's options.
        rules: The legaliser's rules.

    Raises:
        LoweringError: Parts of the program have no Core ML form; lists all of them.
    """
    refuse_impossible(program, options)
    draft = program.copy()
    normalize(draft)
    one_float_width(draft)
    _mark(draft)
    ops = lower_ops(draft, "coreml", partial(CoremlBuilder, draft, options=options))
    references = {op.overload: op.reference for op in ops.composite.values()}
    if references:
        _decompose(draft, references)
    settle_inputs(draft)
    try:
        legalized = _legalize(draft, options, rules)
    except (PassError, VerifyError) as error:
        raise LoweringError("coreml", [error.what], where=error.where) from error
    settle_outputs(draft)
    draft.drop_unused_weights()
    draft.module.recompile()
    refuse_impossible(draft, options, final=True)
    return Lowered(draft, {"ops": dict(ops.ways), "legalized": legalized})


def _legalize(
    draft: Program, options: CoremlOptions, rules: tuple[Legalizer, ...]
) -> dict[str, int]:
    """Rules, and torch's own decomposition of what is then still unknown, until nothing changes."""
    counts: dict[str, int] = {}
    make = partial(CoremlBuilder, options=options)
    for _ in range(_ROUNDS):
        found = legalize(draft, rules, again=True, builder=make)
        for rule, count in found.items():
            counts[rule] = counts.get(rule, 0) + count
        _erase_unused(draft)
        table = _decompositions(draft)
        if not table:
            break
        try:
            _decompose(draft, table)
        except (RecursionError, AssertionError):
            break  # a definition in terms of itself, or one that writes: refused by name afterwards
    return {rule: count for rule, count in counts.items() if count}


def _decompositions(draft: Program) -> dict[Any, Callable[..., Any]]:
    """Torch's own definition of every operator that is unknown, or has too many axes."""
    calls = [node for node in draft.graph.nodes if node.op == "call_function"]
    wanted = {node.target for node in calls if not is_known(node) or is_deep(node)}
    found = {target: _definition(target) for target in wanted}
    return {target: rule for target, rule in found.items() if rule is not None}


def _definition(target: Any) -> Callable[..., Any] | None:
    from torch._decomp import decomposition_table

    if target in decomposition_table:
        return decomposition_table[target]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(composite):
        return target.decompose
    return None


def _decompose(draft: Program, table: dict[Any, Callable[..., Any]]) -> None:
    exported = decompose(lift(draft), table)
    names = tuple(node.name for node in draft.placeholders)
    module = unlift(exported, names)
    draft.module = module
    normalize(draft)


def _mark(draft: Program) -> None:
    """Remember which node of the caller's program each node stands for."""
    for node in draft.graph.nodes:
        node.meta["resplice_of"] = node.name


def _erase_unused(draft: Program) -> None:
    for node in reversed(list(draft.graph.nodes)):
        kept = node.op in ("placeholder", "output") or node.target is torch.ops.aten.copy_.default
        if not node.users and not kept:
            draft.graph.erase_node(node)


def stands_for(node: fx.Node) -> str:
    """The node of the caller's program that a lowered node stands for."""
    return str(node.meta.get("resplice_of", node.name))
