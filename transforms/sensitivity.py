"""How far a program that rounds lands from itself, and what may differ from it by how much.

A value in the middle between two levels goes to one or the other with the last bit of its sum, and
a whole level is then carried on. Two right implementations of such a program differ by that, so an
artefact can't be held closer to the program than the program stays to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from resplice.compare import Difference, difference
from resplice.ops import find_op
from resplice.program import Program
from resplice.walk import node_values

_DRAWS = 3
_MARGIN = 4.0


def past_bar(
    found: Mapping[str, Difference],
    bar: float,
    error_of: Callable[[Difference], float],
    program: Program | None,
    cases: Sequence[Mapping[str, Tensor]],
) -> Iterator[tuple[str, float, float]]:
    """Outputs past the bar: name, error and bar.

    Where the program rounds, the rms error counts, and it may be four times what a thirtieth of the
    bar, added to what is rounded, makes of the program itself.

    Args:
        found: By output, how far something is from the program.
        bar: Largest error of a program that does not round.
        error_of: The error that counts there.
        program: Named outputs; None if unknown.
        cases: What both were run on.
    """
    rough = program is not None and rounds(program)
    errors = {name: d.rms if rough else error_of(d) for name, d in found.items()}
    past = [name for name, d in found.items() if not (d.finite and errors[name] <= bar)]
    itself = _margins(program, cases, bar / 30) if program is not None and rough and past else {}
    rest = max(itself.values(), default=0.0)
    for name in past:
        limit = bar + itself.get(name, rest)
        if not (found[name].finite and errors[name] <= limit):
            yield name, errors[name], limit


def _margins(
    program: Program, cases: Sequence[Mapping[str, Tensor]], noise: float
) -> dict[str, float]:
    """What every output may differ by, the worst of all cases."""
    found: dict[str, float] = {}
    for case in cases:
        for name, change in sensitivity(program, case, noise).items():
            found[name] = max(found.get(name, 0.0), _MARGIN * min(change, 1.0))
    return found


def rounds(program: Program) -> bool:
    """Whether an op of the program maps values to levels."""
    return any(_rounds(node) for node in program.graph.nodes)


def sensitivity(program: Program, inputs: Mapping[str, Tensor], noise: float) -> dict[str, float]:
    """Root mean square change of every output, relative to the output's own; worst of three draws.

    Args:
        program: What to disturb; its state stays as it is.
        inputs: Flat, named.
        noise: Standard deviation of what is added to every value that is rounded, relative to the
            root mean square of its row (the last axis).
    """
    names = [port.name for port in program.outputs]
    expected = _outputs(program, inputs, None)
    found = dict.fromkeys(names, 0.0)
    for seed in range(_DRAWS):
        actual = _outputs(program, inputs, _Noise(noise, seed))
        for name, value, other in zip(names, expected, actual, strict=True):
            found[name] = max(found[name], difference(value, other).rms)
    return found


class _Noise:
    """Disturbs the first argument of ops that round."""

    def __init__(self, size: float, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __call__(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not _rounds(node):
            return args
        x = args[0]
        scale = x.double().square().mean(-1, keepdim=True).sqrt() * self.size
        drawn = torch.randn(x.shape, generator=self.generator).to(x.device)
        return ((x + drawn * scale).to(x.dtype), *args[1:])


def _outputs(program: Program, inputs: Mapping[str, Tensor], change: _Noise | None) -> Any:
    *_, outputs = (
        value if node.op == "output" else None
        for node, value in node_values(program, inputs, change)
    )
    return outputs


def _rounds(node: fx.Node) -> bool:
    op = find_op(node.target)
    return op is not None and op.rounds
