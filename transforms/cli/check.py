"""`check A B`: compare two artefacts on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from resplice.cases import fresh_cases
from resplice.cli.options import AllowPickle, Json, open_model, read_npz
from resplice.cli.output import emit, working
from resplice.compare import Difference, keep_worst
from resplice.errors import NumericsError, UsageError
from resplice.program import Program
from resplice.registry import load

Run = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def check(
    reference: Annotated[
        str, typer.Argument(metavar="A", help="the reference: .onnx or any MODEL")
    ],
    candidate: Annotated[str, typer.Argument(metavar="B", help="what is checked against it")],
    inputs: Annotated[
        Path | None, typer.Option(help=".npz with named inputs; default: random")
    ] = None,
    bar: Annotated[float, typer.Option(help="largest error relative to the output scale")] = 1e-4,
    seed: Annotated[int, typer.Option(help="seed of the random inputs")] = 0,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Compare two artefacts, output by output; exit 6 past the bar."""
    with working(f"comparing {candidate} with {reference}"):
        (run_a, program_a), (run_b, program_b) = (
            _open(text, allow_pickle) for text in (reference, candidate)
        )
        found = _compare(run_a, run_b, _cases(inputs, program_a or program_b, seed))
    emit(
        {name: d.to_json() for name, d in found.items()},
        lambda: "\n".join(f"{name}: {d}" for name, d in found.items()),
        as_json=json,
    )
    for name, measured in found.items():
        if not measured.within(bar):
            raise NumericsError(f"output {name} differs", measured=measured.relative, bar=bar)


def _open(text: str, allow_pickle: bool) -> tuple[Run, Program | None]:
    if text.endswith(".onnx"):
        artifact: Any = load("resplice.backends.onnx.artifact:OnnxArtifact").open(text)
        return artifact.run, None
    program = open_model(text, allow_pickle=allow_pickle)

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        program.check_inputs(inputs)
        return program.run_fresh(inputs)

    return run, program


def _cases(path: Path | None, program: Program | None, seed: int) -> list[dict[str, torch.Tensor]]:
    if path is not None:
        return [read_npz(path)]
    if program is None:
        raise UsageError(
            "two .onnx files do not say what inputs look like", hint="give --inputs FILE.npz"
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
