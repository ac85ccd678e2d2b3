"""The ONNX backend: lower, export with torch.onnx, name things, store metadata, save, check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx_ir as ir

from resplice import weights
from resplice.artifact import staged
from resplice.backends.onnx.artifact import EXACT_BAR, OnnxArtifact, function_file
from resplice.backends.onnx.export import export_model
from resplice.backends.onnx.lower import lower_program
from resplice.backends.onnx.options import OnnxOptions
from resplice.cases import fresh_cases
from resplice.compare import Difference
from resplice.program import Program
from resplice.saving import program_metadata


class OnnxBackend:
    """Lowers programs to ONNX models.

    Several functions become several `.onnx` files that share one weight file.
    """

    name = "onnx"
    options = OnnxOptions

    def lower(
        self,
        program: Program,
        path: str | Path,
        options: OnnxOptions | None = None,
        *,
        check: bool = True,
    ) -> OnnxArtifact:
        """Write `path` (and a `.data` file beside it for large weights).

        Args:
            program: What to lower.
            path: Ends in `.onnx`.
            options: See `OnnxOptions`.
            check: Run it in onnxruntime on fresh random inputs, at two sizes where the program is
                dynamic, before it appears under its final name.

        Raises:
            LoweringError: Parts of the program can't be expressed; lists all of them.
            NumericsError: The model's results differ from the program's; nothing is written.
            ResourceError: The disk is full; nothing is left behind.
        """
        options, target = options or OnnxOptions(), Path(path)
        errors: list[float] = []
        notes: dict[str, Any] = {}
        with staged(target) as stage:
            shared = _SharedWeights(target.name + ".data")
            for name, function in program.all_functions():
                exported, found = lower_program(function, options)
                errors, notes[name] = errors + found["errors"], found
                model = export_model(exported, function, options.opset)
                _describe(model, function, _bar(found.pop("errors")), found["paths"])
                file = function_file(stage / target.name, name)
                _save(model, file, function, options, shared)
            artifact = OnnxArtifact(
                stage / target.name, _bar(errors), notes, threads=options.threads
            )
            if check:
                notes["check"] = _check(artifact, program)
        artifact.path = target
        return artifact


def _bar(errors: list[float]) -> float:
    """Independent errors of n operators add up like their root sum of squares."""
    return EXACT_BAR + 2 * math.sqrt(sum(e * e for e in errors))


def _check(artifact: OnnxArtifact, program: Program) -> dict[str, dict[str, Difference]]:
    return {
        name: artifact.check(function, fresh_cases(function), function=name)
        for name, function in program.all_functions()
    }


def _describe(model: ir.Model, program: Program, bar: float, paths: dict[str, int]) -> None:
    """Name the dimensions and store what a later tool needs to know."""
    stored = {**program_metadata(program), "bar": bar, "paths": paths}
    model.metadata_props.update(
        {f"resplice.{key}": json.dumps(value) for key, value in stored.items()}
    )
    for value, port in zip(model.graph.inputs, program.inputs, strict=True):
        value.shape = ir.Shape(port.shape)
    for value, port in zip(model.graph.outputs, program.outputs, strict=True):
        value.shape = ir.Shape(port.shape)


def _save(
    model: ir.Model, file: Path, program: Program, options: OnnxOptions, shared: _SharedWeights
) -> None:
    size = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    reused = shared.reuse(model, program)
    if size <= options.external_above and not reused:
        ir.save(model, file)
        return
    data = shared.file if not reused else file.name + ".data"
    ir.save(model, file, external_data=data, size_threshold_bytes=1024)
    shared.learn(model, program)


class _SharedWeights:
    """Remembers where the first function's weights lie, so that the others point there."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._known: dict[Any, ir.ExternalTensor] = {}

    def reuse(self, model: ir.Model, program: Program) -> int:
        """Point equal weights to the known file; returns how many."""
        count = 0
        for name, value in model.graph.initializers.items():
            known = self._known.get(self._key(program, name))
            if known is not None:
                value.const_value = ir.ExternalTensor(
                    known.location, known.offset, known.length, known.dtype,
                    shape=known.shape, name=name, base_dir=known.base_dir,
                )  # fmt: skip
                count += 1
        return count

    def learn(self, model: ir.Model, program: Program) -> None:
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                self._known.setdefault(self._key(program, name), value.const_value)

    @staticmethod
    def _key(program: Program, name: str) -> Any:
        return weights.key(program.weight(name)) if weights.has(program.module, name) else name
