"""`bench` and `bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resplice.bench import compare_speed
from resplice.bisect import bisect as find_culprit
from resplice.cli.options import AllowPickle, Dynamic, Json, Model, Spec, open_model
from resplice.cli.output import emit, working
from resplice.errors import NumericsError
from resplice.pipeline import Pipeline


def bench(
    model: Model, passes: Spec,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 10,
    dynamic: Dynamic = None, allow_pickle: AllowPickle = False, json: Json = False,
) -> None:  # fmt: skip
    """Time a program before and after passes on this machine, eagerly, in interleaved runs."""
    pipeline = Pipeline.of(passes)
    with working(f"capturing {model}") as step:
        program = open_model(model, dynamic, allow_pickle=allow_pickle)
        rewritten, _ = pipeline.run(program)
        step("timing")
        found = compare_speed(program, rewritten, rounds=rounds)
    text = (
        f"before {found.before_ms:.2f} ms, after {found.after_ms:.2f} ms: x{found.speedup:.2f} "
        f"({found.spread[0]:.2f} to {found.spread[1]:.2f}, {rounds} rounds, "
        f"{found.threads} threads)\n"
        f"ideal by FLOPs x{found.flops_ideal:.2f}, by bytes x{found.bytes_ideal:.2f}"
    )
    emit(found.to_json(), text, as_json=json)


def bisect(
    model: Model, passes: Spec,
    bar: Annotated[float, typer.Option(help="largest error relative to the output scale")] = 1e-3,
    save: Annotated[Path | None, typer.Option(help="folder for before.pt2 and after.pt2")] = None,
    dynamic: Dynamic = None, allow_pickle: AllowPickle = False, json: Json = False,
) -> None:  # fmt: skip
    """Find the first single rewrite that takes the error past the bar; exit 6 if there is one."""
    pipeline = Pipeline.of(passes)
    with working(f"capturing {model}") as step:
        program = open_model(model, dynamic, allow_pickle=allow_pickle)
        found = find_culprit(
            program, pipeline, bar=bar, save_to=save,
            on_try=lambda limit, error: step(f"{limit} rewrites: {error}"),
        )  # fmt: skip
    if found is None:
        emit({"culprit": None}, f"no rewrite takes the error past {bar:g}", as_json=json)
        return
    text = (
        f"rewrite {found.index} of {found.total}, {found.label}\n"
        f"  before: {found.before}\n  after:  {found.after}"
    )
    emit({"culprit": found.to_json()}, text, as_json=json)
    raise NumericsError(f"{found.label} takes the error past the bar",
                        measured=found.after.relative, bar=bar)  # fmt: skip
