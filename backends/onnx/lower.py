"""Lowering steps on our graph, before the exporter sees it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from resplice.backends.legal import legalize
from resplice.backends.lowering import lower_ops
from resplice.backends.onnx.builder import OnnxBuilder
from resplice.backends.onnx.legalize import RULES
from resplice.backends.onnx.options import OnnxOptions
from resplice.errors import LoweringError
from resplice.exported import decompose, lift
from resplice.normal import normalize
from resplice.origin import where
from resplice.program import Program


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
    ops = lower_ops(draft, "onnx", partial(OnnxBuilder, draft, options=options))
    legalized = legalize(draft, RULES)
    draft.drop_unused_weights()
    draft.module.recompile()
    exported = lift(draft)
    if ops.composite:
        references = {op.overload: op.reference for op in ops.composite.values()}
        exported = decompose(exported, references)
    errors = [build.error for build in ops.builders if build.error]
    legalized = {rule: count for rule, count in legalized.items() if count}
    paths = dict(Counter(build.path for build in ops.builders if build.path))
    return exported, {
        "ops": dict(ops.ways), "paths": paths, "errors": errors, "legalized": legalized
    }  # fmt: skip


def _refuse_effects(program: Program) -> None:
    problems = [f"it writes {node.args[0]} ({where(node)})" for node in program.effects]
    if problems:
        raise LoweringError(
            "onnx",
            problems,
            hint="ONNX graphs have no state and the exporter drops such writes silently: capture "
            "in eval mode, or pass the state as an input and return it",
        )
