"""Bisection: the first single rewrite after which the result is past a bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resplice.compare import Difference
from resplice.context import Context
from resplice.errors import UsageError
from resplice.ledger import compare_programs
from resplice.pipeline import Pipeline, with_limit
from resplice.program import Program
from resplice.saving import save


@dataclass(frozen=True)
class Culprit:
    """The first rewrite past the bar.

    Attributes:
        index: Its number, from 1, among all rewrites in order.
        total: How many rewrites the pipeline makes.
        label: The pass and the node, `quest:linear_3`.
        before: Error with the rewrites before it; `after` with it.
    """

    index: int
    total: int
    label: str
    before: Difference
    after: Difference

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "index": self.index, "total": self.total, "rewrite": self.label,
            "before": self.before.to_json(), "after": self.after.to_json(),
        }  # fmt: skip


def bisect(
    program: Program,
    pipeline: Pipeline,
    *,
    bar: float,
    context: Context | None = None,
    on_try: Callable[[int, Difference], None] | None = None,
    save_to: Path | None = None,
) -> Culprit | None:
    """Find the first rewrite that takes the error past `bar`; None if none does.

    Rewrites are applied in order up to a limit, and the limit is bisected; this takes
    log2(rewrites) runs. If the error falls again further on, the crossing found is one of several.

    Args:
        program: The captured program.
        pipeline: The passes.
        bar: Largest acceptable error relative to the output scale.
        context: Calibration data and the like.
        on_try: Called with (limit, error) after every run.
        save_to: Folder for a repro: `before.pt2` and `after.pt2` around the culprit.
    """
    if bar < 0:
        raise UsageError(f"the bar is {bar}, must not be negative")
    context = context or Context()
    measured: dict[int, Difference] = {}

    def run(limit: int | None) -> tuple[Difference, list[str], Program]:
        limited = with_limit(context, limit)
        rewritten, _ = pipeline.run(program, limited)
        inputs = {**rewritten.sample_tensors(), **program.sample_tensors()}
        found = compare_programs(program, rewritten, inputs, nodes=False).worst_output
        if on_try:
            on_try(len(limited.taken), found)
        return found, limited.taken, rewritten

    full, taken, _ = run(None)
    measured[len(taken)], measured[0] = full, run(0)[0]
    if full.relative <= bar or not taken:
        return None
    low, high = 0, len(taken)
    while high - low > 1:
        middle = (low + high) // 2
        measured[middle] = run(middle)[0]
        low, high = (low, middle) if measured[middle].relative > bar else (middle, high)
    if save_to is not None:
        save(run(low)[2], save_to / "before.pt2")
        save(run(high)[2], save_to / "after.pt2")
    return Culprit(high, len(taken), taken[high - 1], measured[low], measured[high])
