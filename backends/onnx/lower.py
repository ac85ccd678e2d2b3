"""Lowering steps on our graph, before the exporter sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from resplice.backends.onnx.builder import OnnxBuilder
from resplice.backends.onnx.legalize import legalize
from resplice.backends.onnx.options import OnnxOptions
from resplice.errors import LoweringError
from resplice.exported import decompose, lift
from resplice.normal import normalize
from resplice.ops import Op, find_op
from resplice.origin import where
from resplice.program import Program
from resplice.registry import load
from resplice.rules import replace_node


def lower_program(program: Program, options: OnnxOptions) -> tuple[ExportedProgram, dict[str, Any]]:
    """Our ops become ONNX operators or their references, everything else legal ATen.

    Returns:
        The exported program and notes: how each op was lowered, how many operators add error.

    Raises:
        LoweringError: The program updates state, which the exporter would silently drop.
    """
    _refuse_effects(program)
    draft = program.copy()
    normalize(draft)
    notes, composite = _lower_ops(draft, options)
    legalized = legalize(draft)
    draft.drop_unused_weights()
    draft.module.recompile()
    exported = lift(draft)
    if composite:
        exported = decompose(exported, {op.overload: op.reference for op in composite})
    return exported, {**notes, "legalized": {k: v for k, v in legalized.items() if v}}


def _refuse_effects(program: Program) -> None:
    problems = [f"it writes {node.args[0]} ({where(node)})" for node in program.effects]
    if problems:
        raise LoweringError(
            "onnx",
            problems,
            hint="ONNX graphs have no state and the exporter drops such writes silently: capture "
            "in eval mode, or pass the state as an input and return it",
        )


def _lower_ops(draft: Program, options: OnnxOptions) -> tuple[dict[str, Any], list[Op]]:
    ways: Counter[str] = Counter()
    errors, composite = [], dict[str, Op]()
    for node in list(draft.graph.nodes):
        op = find_op(node.target)
        if op is None:
            continue
        build = OnnxBuilder(draft, node, options)
        lowered = _lowering(op)(build, *node.args, **node.kwargs)
        if lowered is None:
            composite[op.name] = op
        else:
            replace_node(draft, node, lowered)
            errors.append(build.error)
        ways[f"{op.name}: {'reference' if lowered is None else 'lowered'}"] += 1
    return {"ops": dict(ways), "errors": [e for e in errors if e]}, list(composite.values())


def _lowering(op: Op) -> Callable[..., fx.Node | None]:
    found = op.lowerings.get("onnx")
    if found is None:
        return lambda *_, **__: None
    return load(found) if isinstance(found, str) else found
