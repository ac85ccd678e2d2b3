"""The program that goes into the artefact: ops with a kernel stay, the others become ATen."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from resplice import weights
from resplice.backends.triton.hosts import host_of
from resplice.compare import EXACT_BARS
from resplice.errors import LoweringError
from resplice.exported import decompose, lift, unlift
from resplice.ops import Op, find_op
from resplice.program import Program


def lower_program(program: Program) -> tuple[Program, dict[str, dict[str, Any]]]:
    """A program of ATen and of ops that have a Triton kernel, with the same further functions.

    Returns:
        It, and per function how each op was lowered.
    """
    lowered, notes = _lower(program, "")
    lowered.functions = {}
    found = {"main": notes}
    for name, function in program.functions.items():
        lowered.functions[name], found[name] = _lower(function, name)
    return lowered, found


def exact_bar(program: Program) -> float:
    """Largest relative error of an exact rewrite, at the coarsest dtype that a kernel returns."""
    nodes = [n for _, f in program.all_functions() for n in f.graph.nodes if host_of(n)]
    dtypes = {n.meta["val"].dtype for n in nodes if isinstance(n.meta["val"], torch.Tensor)}
    return max((EXACT_BARS.get(d, 0.0) for d in dtypes | {torch.float32}), default=0.0)


def _lower(program: Program, title: str) -> tuple[Program, dict[str, Any]]:
    ways: Counter[str] = Counter()
    without: dict[str, Op] = {}
    for node in program.graph.nodes:
        op = find_op(node.target)
        if op is None:
            continue
        kernel = host_of(node) is not None
        ways[f"{op.name}: {'kernel' if kernel else 'reference'}"] += 1
        if not kernel:
            without[op.name] = op
    draft = program.copy()
    if without:
        draft = _decomposed(draft, without, title)
    draft.drop_unused_weights()
    return draft, {"ops": dict(ways)}


def _decomposed(draft: Program, ops: dict[str, Op], title: str) -> Program:
    """Replace the ops by their references; constants made there get names of their own.

    Raises:
        LoweringError: torch can't trace a reference.
    """

    def named(name: str) -> str:
        return name if weights.has(draft.module, name) else f"{title or 'main'}_{name}"

    references = {op.overload: op.reference for op in ops.values()}
    try:
        exported = decompose(lift(draft), references)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"{', '.join(ops)}: no kernel, and the reference can't be inlined: {reason}"
        raise LoweringError("triton", [problem]) from error
    names = tuple(node.name for node in draft.placeholders)
    return replace(draft, module=unlift(exported, names, named))
