"""coremltools on a legalised program: I/O description, precision, provenance of every MIL op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx

from resplice.backends.coreml.frontend import plain_input_shapes, taught
from resplice.backends.coreml.lower import Lowered, stands_for
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent
from resplice.backends.coreml.options import CoremlOptions
from resplice.backends.coreml.precision import angle_nodes
from resplice.backends.coreml.validation import validate, validated_once
from resplice.dims import Dim
from resplice.errors import LoweringError, UsageError
from resplice.exported import lift
from resplice.origin import where
from resplice.program import Program

with silent():
    from coremltools.converters.mil.mil.scope import ScopeSource

_NUMPY = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}


def convert_program(
    lowered: Lowered, program: Program, options: CoremlOptions, keep_wide: set[str]
) -> Any:
    """Translate to an in-memory Core ML model.

    Args:
        lowered: The legalised program.
        program: The caller's, for names and dims.
        options: The conversion's options.
        keep_wide: Nodes of the caller's program that stay in float32 at precision fp16.

    Returns:
        The coremltools model, and which node each of its values stands for.

    Raises:
        LoweringError: coremltools fails; names the node it was at.
    """
    draft = lowered.program
    nodes = list(draft.graph.nodes)
    for number, node in enumerate(nodes):
        node.meta["debug_handle"] = number
    exported = lift(draft, dialect="ATEN")
    angles = angle_nodes(draft.graph)
    wide = {i for i, node in enumerate(nodes) if stands_for(node) in keep_wide or node in angles}
    try:
        with silent(), taught(), plain_input_shapes(), validated_once(), torch.no_grad():
            model = ct.convert(
                exported,
                inputs=_inputs(draft, program, options),
                outputs=_outputs(draft, program, options),
                minimum_deployment_target=getattr(ct.target, options.target),
                compute_precision=_precision(options, wide),
                convert_to="mlprogram",
                skip_model_load=True,
            )
        validate(model)
    except (LoweringError, UsageError):
        raise
    except Exception as error:
        raise LoweringError(
            "coreml", [f"coremltools: {_first_line(error)}"], where=_place(error, nodes)
        ) from error
    return model, values_by_node(model, nodes)


def _inputs(draft: Program, program: Program, options: CoremlOptions) -> list[Any]:
    ranges = _Ranges(program, options)
    return [
        ct.TensorType(
            name=options.names.get(node.name, node.name),
            shape=ranges.shape(node),
            dtype=_border(options.dtypes.get(node.name), node.meta["val"].dtype),
        )
        for node in draft.placeholders
    ]


def _outputs(draft: Program, program: Program, options: CoremlOptions) -> list[Any]:
    return [
        ct.TensorType(
            name=options.names.get(port.name, port.name),
            dtype=_border(options.dtypes.get(port.name), node.meta["val"].dtype),
        )
        for port, node in zip(program.outputs, draft.output_nodes, strict=True)
    ]


def _border(wanted: str | None, dtype: torch.dtype) -> Any:
    return _NUMPY[wanted or ("fp32" if dtype.is_floating_point else "int32")]


class _Ranges:
    """Shapes of inputs: one `RangeDim` per named size, so that equal names stay equal."""

    def __init__(self, program: Program, options: CoremlOptions) -> None:
        self._program, self._options = program, options
        self._known: dict[str, Any] = {}

    def shape(self, node: fx.Node) -> Any:
        listed = self._options.shapes.get(node.name)
        sizes = node.meta["val"].shape
        if listed is not None:
            self._check(node, listed)
            return ct.EnumeratedShapes(shapes=[list(shape) for shape in listed])
        sample = self._program.samples[node.name].reshape(
            tuple(self._program.samples[node.name].shape) or (1,)
        )
        return [
            size if isinstance(size, int) else self._range(size, int(sample.shape[axis]))
            for axis, size in enumerate(sizes)
        ]

    def _range(self, size: Any, sample: int) -> Any:
        expr = size.node.expr
        if str(expr) not in self._known:
            low, high = self._bounds(expr, sample)
            self._known[str(expr)] = ct.RangeDim(lower_bound=low, upper_bound=high, default=sample)
        return self._known[str(expr)]

    def _bounds(self, expr: Any, sample: int) -> tuple[int, int]:
        symbols = sorted(expr.free_symbols, key=str)
        low, high = dict[Any, int](), dict[Any, int]()
        for symbol in symbols:
            dim = self._program.dims.get(self._program.symbols.get(str(symbol), "")) or Dim("size")
            low[symbol] = dim.min * dim.factor
            high[symbol] = (dim.max or self._options.longest) * dim.factor
        return int(expr.subs(low)), max(int(expr.subs(high)), sample)

    def _check(self, node: fx.Node, listed: Iterable[tuple[int, ...]]) -> None:
        for shape in listed:
            pairs = zip(shape, node.meta["val"].shape, strict=False)
            fits = len(shape) == node.meta["val"].dim()
            if not fits or any(isinstance(own, int) and own != size for size, own in pairs):
                raise UsageError(
                    f"coreml: shape {list(shape)} does not fit input {node.name}",
                    where=str(next(p for p in self._program.inputs if p.name == node.name)),
                )


def _precision(options: CoremlOptions, wide: set[int]) -> Any:
    if options.precision == "fp32":
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(
        op_selector=lambda op: not wide.intersection(_handles(op))
    )


def _handles(op: Any) -> list[int]:
    return [item for item in op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ()) if item is not None]


def values_by_node(model: Any, nodes: list[fx.Node]) -> dict[str, dict[str, tuple[str, str]]]:
    """MIL value name -> (node of the caller's program, its source line), function by function."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for function, block in model._mil_program.functions.items():
        known: dict[str, tuple[str, str]] = {}
        for op in block.operations:
            handles = _handles(op)
            if op.op_type == "const" or not handles:
                continue
            node = nodes[max(handles)]
            for value in op.outputs:
                known[value.name] = (stands_for(node), where(node))
        found[function] = known
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _place(error: Exception, nodes: list[fx.Node]) -> str:
    """The node coremltools was translating, from the frame that held it."""
    by_name = {node.name: node for node in nodes}
    trace, found = error.__traceback__, ""
    while trace is not None:
        current = trace.tb_frame.f_locals.get("node")
        name = getattr(current, "name", None)
        if isinstance(name, str) and name in by_name:
            found = where(by_name[name])
        trace = trace.tb_next
    return found
