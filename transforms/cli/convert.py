"""`convert`: rewrite, lower, check, write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resplice import registry
from resplice.api import Optimized, optimize
from resplice.cli.options import (
    AllowPickle,
    Dynamic,
    Json,
    Model,
    as_options,
    batches_from,
    open_model,
    pairs,
    shape_lists,
)
from resplice.cli.output import emit, mebibytes, working


def convert(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file or folder to write")],
    to: Annotated[
        str, typer.Option(help="backend (onnx, coreml, triton), or pt2 for the program itself")
    ] = "onnx",
    passes: Annotated[
        str, typer.Option("--passes", "-p", help="pipeline text; none: only lower")
    ] = "",
    check: Annotated[
        bool, typer.Option(help="hold passes and artefact to their declared error")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="folder for report.json and report.html")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="folder of .npz batches")] = None,
    dynamic: Dynamic = None,
    portable: Annotated[
        bool | None, typer.Option("--portable", help="standard ONNX operators only")
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="MatMulNBits: 4 int8 activations (fast), 0 float")
    ] = None,
    moe_strategy: Annotated[
        str | None,
        typer.Option(help="experts: unrolled or moe (ONNX); gather, masked, capacity (Core ML)"),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset")] = None,
    target: Annotated[
        str | None, typer.Option(help="Core ML: oldest system, iOS16, iOS17, iOS18, iOS26")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Core ML: fp16 or fp32")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Core ML: input or output OLD=NEW")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Core ML: border dtype, x=fp16")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shapes", help="Core ML: enumerated shapes of an input, x=1x16,1x32"),
    ] = None,
    longest: Annotated[
        int | None, typer.Option(help="Core ML: bound of dynamic sizes captured without one")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Triton: targets, sm_80,sm_90,sm_100,gfx942")
    ] = None,
    function: Annotated[
        list[str] | None,
        typer.Option("--function", help="a further function of the artefact, NAME=MODEL"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="make at most this many rewrites")] = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Rewrite a model and lower it; nothing appears unless it passes its check."""
    with working(f"capturing {model}") as step:
        program = open_model(model, dynamic, allow_pickle=allow_pickle)
        for title, text in pairs(function or [], "--function").items():
            program.functions[title] = open_model(text, allow_pickle=allow_pickle)
        batches: list[Any] = list(batches_from(calibration, program))
        step(f"running {passes or 'no passes'}")
        result = optimize(program, passes or None, calibration=batches, check=check, limit=limit)
        step(f"lowering to {to}")
        options = as_options(
            portable=portable, accuracy_level=accuracy_level, opset=opset, target=target,
            moe_strategy=moe_strategy, arch=arch,
            precision=precision, names=pairs(name or [], "--name"), longest=longest,
            dtypes=pairs(dtype or [], "--dtype"), shapes=shape_lists(shapes or []),
        )  # fmt: skip
        _write(result, to, output, check, options)
        where = result.report.save(report) if report else None
    data = {**result.report.to_json(), "report": str(where) if where else None}
    emit(data, lambda: _summary(result, output, where), as_json=json)


def _write(result: Optimized, to: str, output: Path, check: bool, options: dict[str, Any]) -> None:
    if to == "pt2":
        result.save(output)
        return
    registry.backend(to)  # an unknown backend is refused before any work
    result.lower(to, output, check=check, **options)


def _summary(result: Optimized, output: Path, report: Path | None) -> str:
    before, after = result.report.before["weight_bytes"], result.report.after["weight_bytes"]
    lines = [f"{output}", f"weights {mebibytes(before)} -> {mebibytes(after)}"]
    for artifact in result.report.artifacts:
        for function, found in artifact["notes"].get("check", {}).items():
            lines += [f"{function}.{name}: {difference}" for name, difference in found.items()]
    lines += [f"report: {report}"] if report else []
    return "\n".join(lines)
