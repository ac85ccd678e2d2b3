"""The Core ML backend: lower, convert with coremltools, save, run and compare here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from resplice.artifact import staged
from resplice.backends.coreml.artifact import FP16_BAR, FP32_BAR, CoremlArtifact, packed
from resplice.backends.coreml.convert import convert_program
from resplice.backends.coreml.legalize import RULES
from resplice.backends.coreml.lower import lower_program
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent
from resplice.backends.coreml.options import CoremlOptions
from resplice.backends.coreml.precision import fragile_nodes
from resplice.backends.coreml.validation import validated_once
from resplice.backends.legal import Legalizer
from resplice.cases import fresh_cases, fresh_inputs
from resplice.compare import EXACT_BARS, Difference
from resplice.errors import LoweringError, UsageError
from resplice.program import Program
from resplice.saving import program_metadata

_HALVES = {torch.float16, torch.bfloat16}


class CoremlBackend:
    """Lowers programs to Core ML packages; several functions share one set of weights."""

    name = "coreml"
    options = CoremlOptions
    rules: tuple[Legalizer, ...] = RULES

    def lower(
        self,
        program: Program,
        path: str | Path,
        options: CoremlOptions | None = None,
        *,
        check: bool = True,
    ) -> CoremlArtifact:
        """Write an `.mlpackage`.

        Args:
            program: What to lower; its further functions go into the same package.
            path: Ends in `.mlpackage`.
            options: See `CoremlOptions`.
            check: Execute it with the MIL interpreter on fresh random inputs, at two sizes where
                the program is dynamic, before it appears under its final name.

        Raises:
            LoweringError: Parts of the program can't be expressed; lists all of them.
            NumericsError: The package's results differ from the program's; nothing is written.
            ResourceError: The disk is full; nothing is left behind.
        """
        options, target = options or CoremlOptions(), Path(path)
        if target.suffix != ".mlpackage":
            raise UsageError(f"{target} does not end in .mlpackage")
        if program.functions and options.generation < 18:
            raise LoweringError("coreml", ["several functions in one package need target iOS18"])
        notes: dict[str, Any] = {}
        stored: dict[str, Any] = {"functions": {}, "origins": {}}
        with staged(target) as stage:
            parts = {
                name: self._part(
                    function, stage / f"part-{i}.mlpackage", name, options, notes, stored
                )
                for i, (name, function) in enumerate(program.all_functions())
            }
            bar = _bar(program, options)
            _assemble(parts, stage / target.name, {**stored, "bar": bar})
            artifact = CoremlArtifact(stage / target.name, bar, notes)
            if check:
                notes["check"] = _check(artifact, program, options)
        artifact.path = target
        return artifact

    def _part(
        self,
        program: Program,
        path: Path,
        name: str,
        options: CoremlOptions,
        notes: dict[str, Any],
        stored: dict[str, Any],
    ) -> Path:
        """One function as a package of its own."""
        lowered = lower_program(program, options, self.rules)
        wide = fragile_nodes(program) if options.precision == "fp16" else set[str]()
        model, origins = convert_program(lowered, program, options, wide)
        notes[name] = {**lowered.notes, "kept in float32": len(wide)}
        stored["origins"][name] = origins["main"]
        stored["functions"][name] = {
            **program_metadata(program),
            "inputs": {p.name: options.names.get(p.name, p.name) for p in program.inputs},
            "outputs": {p.name: options.names.get(p.name, p.name) for p in program.outputs},
            "kinds": {
                p.name: str(p.dtype).removeprefix("torch.") + ("" if p.shape else " scalar")
                for p in program.outputs
            },
        }
        with silent():
            model.save(str(path))
        return path


def _bar(program: Program, options: CoremlOptions) -> float:
    """Core ML keeps state in float16 at any precision; a half-precision original rounds too."""
    functions = [function for _, function in program.all_functions()]
    stateful = any(function.effects for function in functions)
    bar = FP32_BAR if options.precision == "fp32" and not stateful else FP16_BAR
    values = (n.meta.get("val") for function in functions for n in function.graph.nodes)
    halves = {v.dtype for v in values if isinstance(v, torch.Tensor)} & _HALVES
    return max([bar, *(EXACT_BARS[dtype] for dtype in halves)])


def _assemble(parts: dict[str, Path], target: Path, stored: dict[str, Any]) -> None:
    """One package of all functions, with what resplice stores in it."""
    with silent(), validated_once():
        if len(parts) == 1:
            (only,) = parts.values()
        else:
            only = target.with_name("joined.mlpackage")
            joined = ct.utils.MultiFunctionDescriptor()
            for name, part in parts.items():
                joined.add_function(str(part), "main", name)
            joined.default_function_name = "main"
            ct.utils.save_multifunction(joined, str(only))
        model = ct.models.MLModel(str(only), skip_model_load=True)
        for key, value in stored.items():
            model.user_defined_metadata[f"resplice.{key}"] = packed(value)
        model.save(str(target))
    for path in {*parts.values(), only}:
        shutil.rmtree(path)


def _check(
    artifact: CoremlArtifact, program: Program, options: CoremlOptions
) -> dict[str, dict[str, Difference]]:
    return {
        name: artifact.check(function, _cases(function, options), function=name)
        for name, function in program.all_functions()
    }


def _cases(program: Program, options: CoremlOptions) -> list[Any]:
    """Fresh inputs, of sizes that the package admits."""
    if any(name in options.shapes for name in (p.name for p in program.inputs)):
        return [fresh_inputs(program)]
    return fresh_cases(program)
