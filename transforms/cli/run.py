"""`run MODEL`: execute an artefact on named inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from resplice.artifact import staged
from resplice.cli.options import Function, Json, Mode, is_folder_of_kernels, read_npz
from resplice.cli.output import emit, working
from resplice.errors import UsageError
from resplice.registry import load


def run(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="an .mlpackage, .onnx file or folder")
    ],
    inputs: Annotated[
        list[Path],
        typer.Option(help=".npz with named inputs; given several times: consecutive calls"),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npz for the last call's outputs")
    ] = None,
    function: Function = "main",
    mode: Mode = "declared",
    json: Json = False,
) -> None:
    """Execute an artefact on this machine; state is carried from call to call."""
    with working(f"running {model}"):
        artifact = _opened(model, mode)
        state = {"state": artifact.make_state(function)} if hasattr(artifact, "make_state") else {}
        found: dict[str, torch.Tensor] = {}
        for path in inputs:
            found = artifact.run(read_npz(path), function=function, **state)
        if output is not None:
            with staged(output) as stage:
                np.savez(
                    stage / output.name, allow_pickle=False,
                    **{name: value.float().numpy() if value.dtype == torch.bfloat16
                       else value.numpy() for name, value in found.items()},
                )  # fmt: skip
    emit(
        {name: _summary(value) for name, value in found.items()},
        lambda: "\n".join(f"{name}: {_text(value)}" for name, value in found.items()),
        as_json=json,
    )


def _opened(path: Path, mode: str) -> Any:
    if path.suffix == ".mlpackage":
        return load("resplice.backends.coreml.artifact:CoremlArtifact").open(path, mode=mode)
    if path.suffix == ".onnx":
        return load("resplice.backends.onnx.artifact:OnnxArtifact").open(path)
    if is_folder_of_kernels(path):
        return load("resplice.backends.triton.artifact:TritonArtifact").open(path)
    raise UsageError(f"{path} is no .mlpackage, no .onnx file and no folder of --to triton")


def _summary(value: torch.Tensor) -> dict[str, Any]:
    numbers = value.double()
    empty = not value.numel()
    return {
        "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."),
        "min": None if empty else float(numbers.min()),
        "max": None if empty else float(numbers.max()),
        "mean": None if empty else float(numbers.mean()),
    }  # fmt: skip


def _text(value: torch.Tensor) -> str:
    found = _summary(value)
    if found["mean"] is None:
        return f"{found['dtype']} {found['shape']}, empty"
    return (
        f"{found['dtype']} {found['shape']}, {found['min']:.6g} to {found['max']:.6g}, "
        f"mean {found['mean']:.6g}"
    )
