"""Small mlprograms, built op by op and saved, for the tests of the MIL interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent

with silent():
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

TYPES = {
    torch.float32: types.fp32,
    torch.float16: types.fp16,
    torch.int32: types.int32,
    torch.bool: types.bool,
}


def model(
    build: Callable[..., Any],
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    states: Sequence[Sequence[int]] = (),
    target: str = "iOS18",
    passes: bool = False,
    half: bool = False,
    **options: Any,
) -> Any:
    """A converted model whose body is `build(x0, x1, ...)`.

    `passes` runs coremltools' own passes, which fold and fuse; without them the model holds the
    ops as written. `half` lets them turn everything into fp16.
    """
    specs = [mb.TensorSpec(tuple(shape), dtype=TYPES[dtype]) for shape in shapes]
    specs += [mb.StateTensorSpec(tuple(shape), dtype=types.fp16) for shape in states]
    opset = getattr(ct.target, target)
    with silent():
        program = mb.program(input_specs=specs, opset_version=opset)(_with_arity(build, len(specs)))
        return ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.DEFAULT if passes or half else ct.PassPipeline.EMPTY,
            skip_model_load=True,
            **options,
        )


def saved(mlmodel: Any, place: Path) -> Path:
    """The model on disk."""
    path = place / "model.mlpackage"
    with silent():
        mlmodel.save(str(path))
    return path


def outputs(mlmodel: Any, *values: torch.Tensor, mode: Any = "declared") -> list[torch.Tensor]:
    """What the interpreter makes of positional inputs; outputs in the order of the program."""
    package = MilPackage.open(mlmodel.package_path)
    names = [each.name for each in package.inputs()]
    found = Interpreter(package, mode=mode).run(dict(zip(names, values, strict=True)))
    return list(found.values())


def _with_arity(build: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`mb.program` counts the parameters of the function it gets."""
    return {
        1: lambda x0: build(x0),
        2: lambda x0, x1: build(x0, x1),
        3: lambda x0, x1, x2: build(x0, x1, x2),
    }[count]
