"""`check A B`: compare two artefacts on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from resplice.cases import fresh_cases
from resplice.cli.options import (
    AllowPickle,
    Function,
    Json,
    Mode,
    is_folder_of_kernels,
    open_model,
    read_npz,
)
from resplice.cli.output import emit, working
from resplice.compare import EXACT_BARS, Difference, keep_worst
from resplice.errors import NumericsError, UsageError
from resplice.program import Program
from resplice.registry import load
from resplice.sensitivity import past_bar

_RELATIVE: Callable[[Difference], float] = attrgetter("relative")
Run = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Side:
    """One of the two things compared: how to run it, and what else is known of it."""

    run: Run
    bar: float
    program: Program | None = None
    package: Any = None
    error_of: Callable[[Difference], float] = _RELATIVE


def check(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="the reference: .onnx, .mlpackage, a folder of --to triton, or any MODEL",
        ),
    ],
    candidate: Annotated[str, typer.Argument(metavar="B", help="what is checked against it")],
    inputs: Annotated[
        Path | None, typer.Option(help=".npz with named inputs; default: random")
    ] = None,
    bar: Annotated[
        float | None,
        typer.Option(help="largest error relative to the output scale; default: the artefact's"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the random inputs")] = 0,
    function: Function = "main",
    mode: Mode = "declared",
    values: Annotated[
        bool, typer.Option("--values", help="list every value of a package, not only outputs")
    ] = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Compare two artefacts, output by output; exit 6 past the bar.

    For a Core ML package against the program it was made from, the first operator that differs is
    named with its source line.
    """
    with working(f"comparing {candidate} with {reference}"):
        a, b = (_open(text, function, mode, allow_pickle) for text in (reference, candidate))
        cases = _cases(inputs, a.program or b.program, seed)
        found = _compare(a.run, b.run, cases)
        rows = _values(a, b, cases[0], function) if values else []
    emit(
        {
            **{name: d.to_json() for name, d in found.items()},
            **({"values": [row.to_json() for row in rows]} if values else {}),
        },
        lambda: "\n".join([*map(str, rows), *(f"{name}: {d}" for name, d in found.items())]),
        as_json=json,
    )
    loosest = max((a, b), key=lambda side: side.bar)
    most, error_of = (loosest.bar, loosest.error_of) if bar is None else (bar, _RELATIVE)
    program = a.program or b.program if bar is None else None
    for name, error, limit in past_bar(found, most, error_of, program, cases):
        first = next((row for row in _values(a, b, cases[0], function)
                      if not row.difference.within(limit)), "")  # fmt: skip
        raise NumericsError(f"output {name} differs", measured=error, bar=limit, where=str(first))


def _open(text: str, function: str, mode: str, allow_pickle: bool) -> Side:
    if text.endswith(".onnx"):
        artifact: Any = load("resplice.backends.onnx.artifact:OnnxArtifact").open(text)
        return Side(
            lambda given: artifact.run(given, function=function), artifact.bar,
            error_of=artifact.error_of,
        )  # fmt: skip
    if text.rstrip("/").endswith(".mlpackage"):
        package: Any = load("resplice.backends.coreml.artifact:CoremlArtifact").open(
            text, mode=mode
        )
        return Side(
            lambda given: package.run(given, function=function), package.bar, package=package
        )
    if is_folder_of_kernels(text):
        folder: Any = load("resplice.backends.triton.artifact:TritonArtifact").open(text)
        return Side(lambda given: folder.run(given, function=function), folder.bar)
    whole = open_model(text, allow_pickle=allow_pickle)
    functions = dict(whole.all_functions())
    if function not in functions:
        raise UsageError(
            f"{text} has no function {function!r}", hint=f"it has {', '.join(functions)}"
        )
    program = functions[function]

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        program.check_inputs(inputs)
        return program.copy().run_fresh(inputs)

    return Side(run, EXACT_BARS[torch.float32], program)


def _cases(path: Path | None, program: Program | None, seed: int) -> list[dict[str, torch.Tensor]]:
    if path is not None:
        return [read_npz(path)]
    if program is None:
        raise UsageError(
            "two artefacts do not say what inputs look like", hint="give --inputs FILE.npz"
        )
    return fresh_cases(program, seed=seed)


def _compare(run_a: Run, run_b: Run, cases: list[dict[str, torch.Tensor]]) -> dict[str, Difference]:
    worst: dict[str, Difference] = {}
    for case in cases:
        expected, actual = run_a(case), run_b(case)
        if expected.keys() != actual.keys():
            raise UsageError(f"outputs differ: {', '.join(expected)} and {', '.join(actual)}")
        keep_worst(worst, expected, actual)
    return worst


def _values(a: Side, b: Side, case: Mapping[str, torch.Tensor], function: str) -> list[Any]:
    """Every value of a package against the program on the other side, if these are the two."""
    package, program = a.package or b.package, a.program or b.program
    if package is None or program is None:
        return []
    compare_values = load("resplice.backends.coreml.compare:compare_values")
    rows: list[Any] = compare_values(package, program, case, function=function)
    return rows
