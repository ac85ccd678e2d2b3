"""Saving programs as `.pt2` with our metadata, and loading them without running foreign code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from resplice.artifact import staged
from resplice.calling import CallSpec, Leaf
from resplice.dims import Dim
from resplice.errors import CaptureError, UsageError
from resplice.exported import close, drop_metadata_asserts, functional, lift, lift_open, unlift
from resplice.facts import Facts, FloatWeights
from resplice.fxtypes import returned
from resplice.program import Program
from resplice.registry import load_ops
from resplice.safety import check_archive

SCHEMA = 1
_EXTRA = "resplice.json"


def program_metadata(program: Program) -> dict[str, Any]:
    """Everything a later tool needs to know besides graph and weights; JSON-able."""
    return {
        "schema": SCHEMA,
        "pipeline": ",".join(program.history),
        "facts": program.facts.to_json(),
        "dims": [str(dim) for dim in program.dims.values()],
        "symbols": program.symbols,
        "call": program.call.to_json(),
        "inputs": [str(port) for port in program.inputs],
        "outputs": [str(port) for port in program.outputs],
        "notes": program.metadata,
        "training": program.training,
    }


def save(program: Program, path: str | Path) -> Path:
    """Write a program as `.pt2` with its metadata inside.

    Further functions are stored as graphs that take the weights as inputs, so every weight is in
    the file once.

    Args:
        program: What to save.
        path: Ends in `.pt2`.

    Raises:
        ResourceError: The disk is full; nothing is left behind.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise UsageError(f"{target} does not end in .pt2")
    functions = dict(program.all_functions())
    exported = {"model": lift(program, extra=_extra_weights(program))}
    weight_inputs = {}
    for name, function in program.functions.items():
        exported[name], weight_inputs[name] = lift_open(function)
    stored = {name: program_metadata(function) for name, function in functions.items()}
    metadata = {"schema": SCHEMA, "functions": stored, "weight_inputs": weight_inputs}
    from torch.export.pt2_archive._package import package_pt2  # imports triton where there is one

    with staged(target) as stage:
        package_pt2(
            str(stage / target.name),
            exported_programs=exported,
            extra_files={_EXTRA: json.dumps(metadata)},
        )
    return target


def load(path: str | Path, *, allow_pickle: bool = False) -> Program:
    """Read a `.pt2` file: ours with everything in it, or anybody's from torch.export.save.

    Args:
        path: The file.
        allow_pickle: Skip the check that loading can't run code; only for files you trust.

    Raises:
        CaptureError: The file is missing, broken, unsafe to load, or made by a newer resplice.
    """
    source = Path(path)
    if not source.is_file():
        raise CaptureError(f"there is no file {source}")
    if not allow_pickle:
        check_archive(source)
    from torch.export.pt2_archive._package import load_pt2  # imports triton where there is one

    load_ops()
    try:
        contents = load_pt2(str(source))
    except Exception as error:
        raise CaptureError(f"{source.name} can't be read: {error}", where=str(source)) from error
    extra = (contents.extra_files or {}).get(_EXTRA)
    if extra is None:
        return _foreign(contents.exported_programs["model"])
    metadata = json.loads(extra)
    if metadata["schema"] > SCHEMA:
        raise CaptureError(f"{source.name} was written by a newer resplice", hint="update resplice")
    main = _restore(contents.exported_programs["model"], metadata["functions"]["main"])
    for name, inputs in metadata["weight_inputs"].items():
        stored = metadata["functions"][name]
        module = close(
            contents.exported_programs[name],
            CallSpec.from_json(stored["call"]).tensor_names,
            inputs,
            main,
        )
        main.functions[name] = _with_metadata(module, stored, main.samples)
    main.drop_unused_weights()
    return main


def _extra_weights(program: Program) -> dict[str, torch.Tensor]:
    """Weights that only further functions read, or read under a name of their own."""
    known = {name for name, _ in program.named_weights()}
    return {
        name: value
        for function in program.functions.values()
        for name, value in function.named_weights()
        if name not in known
    }


def _restore(exported: ExportedProgram, stored: dict[str, Any]) -> Program:
    call = CallSpec.from_json(stored["call"])
    module = unlift(exported, call.tensor_names)
    samples = dict(zip(call.tensor_names, (exported.example_inputs or ((), {}))[0], strict=False))
    return _with_metadata(module, stored, samples)


def _with_metadata(
    module: fx.GraphModule, stored: dict[str, Any], samples: dict[str, torch.Tensor]
) -> Program:
    dims = [Dim.parse(text) for text in stored["dims"]]
    return Program(
        module=module,
        call=CallSpec.from_json(stored["call"]),
        dims={dim.label: dim for dim in dims},
        symbols=dict(stored["symbols"]),
        facts=Facts.from_json(stored["facts"]),
        samples=samples,
        history=tuple(filter(None, [stored["pipeline"]])),
        metadata=stored["notes"],
        training=stored["training"],
    )


def _foreign(exported: ExportedProgram) -> Program:
    """A program saved by torch.export.save: inputs by their own names, a flat tuple of outputs."""
    users = [
        s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT
    ]
    samples = pytree.tree_leaves(exported.example_inputs) if exported.example_inputs else []
    if len(samples) != len(users) or not all(isinstance(s, torch.Tensor) for s in samples):
        raise CaptureError(
            "the .pt2 file holds no sample tensors for all of its inputs",
            hint="capture the model itself with resplice.capture, or export it with tensors only",
        )
    leaves = tuple(Leaf(name, tensor=name) for name in users)
    module = unlift(functional(exported), tuple(users))
    drop_metadata_asserts(module.graph)
    count = len(returned(module.graph))
    outputs = {"type": "builtins:tuple", "names": None, "items": ["*"] * count}
    call = CallSpec(tuple(users), leaves, outputs)
    facts = (
        Facts(FloatWeights())
        if all(p.is_floating_point() for p in module.parameters())
        else Facts()
    )
    return Program(
        module=module, call=call, samples=dict(zip(users, samples, strict=True)), facts=facts
    )
