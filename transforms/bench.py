"""Before/after timing on this machine: interleaved runs, beside what FLOPs and bytes allow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from resplice.cost import program_cost
from resplice.program import Program


@dataclass(frozen=True)
class Ratio:
    """Two programs timed side by side.

    Attributes:
        before_ms: Median of the first, milliseconds.
        after_ms: Median of the second.
        speedup: Median of the per-round ratios before/after.
        spread: Smallest and largest per-round ratio.
        flops_ideal: FLOPs before / FLOPs after.
        bytes_ideal: Bytes moved before / after.
        rounds: Interleaved rounds.
        threads: torch's threads.
    """

    before_ms: float
    after_ms: float
    speedup: float
    spread: tuple[float, float]
    flops_ideal: float
    bytes_ideal: float
    rounds: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def compare_speed(before: Program, after: Program, *, rounds: int = 10) -> Ratio:
    """Time two programs on their sample inputs, alternating, after one warm-up each."""
    timed = interleave({"before": _call(before), "after": _call(after)}, rounds=rounds)
    ratios = [a / b for a, b in zip(timed["before"], timed["after"], strict=True)]
    costs = program_cost(before), program_cost(after)
    return Ratio(
        before_ms=statistics.median(timed["before"]),
        after_ms=statistics.median(timed["after"]),
        speedup=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        flops_ideal=costs[0].flops / max(costs[1].flops, 1),
        bytes_ideal=costs[0].bytes / max(costs[1].bytes, 1),
        rounds=rounds,
        threads=torch.get_num_threads(),
    )


def interleave(
    calls: dict[str, Callable[[], object]], *, rounds: int = 10
) -> dict[str, list[float]]:
    """Time several calls in turn; returns milliseconds per round by name."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_milliseconds(call))
    return times


def _call(program: Program) -> Callable[[], object]:
    inputs = program.sample_tensors()

    def run() -> object:
        with torch.no_grad():
            return program.run(inputs)

    return run


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
