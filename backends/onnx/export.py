"""torch.onnx's exporter on an ExportedProgram of ours: without what it need not do again.

The exporter traces the whole program a second time to decompose and functionalise it, adds type
promotion, and rewrites the result with rules whose cost grows with the square of the graph. Our
graphs are functional already, so the first two are skipped wherever they would change nothing, and
the last is replaced by linear clean-ups; onnxruntime optimises when it loads the model.
On SmolLM2-135M this takes the export from minutes to seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import fx
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration

from resplice.backends.onnx.composite import expand_composites
from resplice.errors import LoweringError
from resplice.program import Program
from resplice.quiet import quiet
from resplice.repairs.base import replaced

_SYMBOLIC = "onnx_symbolic"


def export_model(exported: ExportedProgram, program: Program, opset: int | None) -> ir.Model:
    """Translate to an ONNX model with the program's input and output names.

    Raises:
        LoweringError: Lists the operators that have no translation.
    """
    try:
        with quiet(), _shortcuts(exported):
            result = torch.onnx.export(
                exported,
                input_names=[port.name for port in program.inputs],
                output_names=[port.name for port in program.outputs],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise LoweringError("onnx", _problems(error)) from error
    assert result is not None
    model: ir.Model = result.model
    expand_composites(model)
    _clean_up(model)
    return model


def _clean_up(model: ir.Model) -> None:
    optimizer.fold_constants(model)
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    for node in model.graph.all_nodes():
        source = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        if source:
            node.metadata_props["resplice.module"] = source


@contextmanager
def _shortcuts(exported: ExportedProgram) -> Iterator[None]:
    """Skip steps of the exporter that would change nothing."""
    nodes = [n for n in exported.graph.nodes if n.op == "call_function"]
    with ExitStack() as stack:
        if _all_translatable(nodes):
            keep = replaced(_fx_passes, "decompose_with_registry", lambda program, _: program)
            stack.enter_context(keep)
            if not any(map(_promotes, nodes)):
                same = replaced(_fx_passes, "insert_type_promotion_nodes", lambda _: None)
                stack.enter_context(same)
        yield


def _all_translatable(nodes: list[fx.Node]) -> bool:
    registry = _registration.ONNXRegistry.from_torchlib()
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    return all(
        n.target in known or n.target.namespace == _SYMBOLIC
        for n in nodes
        if isinstance(n.target, torch._ops.OpOverload)
    )


def _promotes(node: fx.Node) -> bool:
    """Whether an elementwise operator mixes dtypes or computes in another one."""
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or torch.Tag.pointwise not in node.target.tags
    ):
        return False
    if node.target in (torch.ops.aten.where.self, torch.ops.aten._to_copy.default):
        return False
    kinds = {v.dtype for v in map(_value, node.all_input_nodes) if isinstance(v, torch.Tensor)}
    result = _value(node).dtype
    return len(kinds) > 1 or (result != torch.bool and kinds != {result})


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _problems(error: BaseException) -> list[str]:
    """The exporter's own complaints, one line each."""
    found: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = str(current).strip().splitlines()
        chosen = [line for line in lines if "No ONNX function" in line or "Error" in line]
        found += chosen[:5] or lines[:1]
        current = current.__cause__
    return list(dict.fromkeys(found))
