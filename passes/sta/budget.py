"""Windows for many heads under one budget: the loss is least for the pairs that are computed.

Beyond the paper (arXiv 2502.04507 takes each head's best window from a list of similar densities).
Each head may have one of several windows; their mean density must stay within the budget. That is
a multiple-choice knapsack. From each head's sparsest window, steps along the lower convex hull of
its (density, loss) points are taken in the order of loss saved per density, as long as they fit:
optimal wherever the budget is used up exactly, and else within one step of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from resplice.errors import UsageError


@dataclass(frozen=True)
class _Step:
    """A head goes over to a denser window."""

    rate: float
    head: int
    choice: int
    cost: float


def allocate(losses: Tensor, densities: Sequence[float], budget: float) -> list[int]:
    """One choice per head.

    Args:
        losses: Float64 [heads, choices].
        densities: Of each choice, between 0 and 1.
        budget: Largest mean density over the heads.

    Returns:
        A choice per head. Of choices with equal density and loss the first one is taken, of steps
        with equal gain that of the first head.

    Raises:
        UsageError: Even the sparsest choices are denser.
    """
    least = min(densities)
    if budget < least:
        raise UsageError(
            f"a budget of {budget:.3g} is below the sparsest window, {least:.3g}",
            hint="add sparser candidates",
        )
    chosen, steps = list[int](), list[_Step]()
    for head, row in enumerate(losses.tolist()):
        path = _hull(row, densities)
        chosen.append(path[0])
        steps += _steps(head, path, row, densities)
    left, stopped = (budget - least) * len(chosen) * (1 + 1e-12), set[int]()
    for step in sorted(steps, key=lambda s: -s.rate):
        if step.cost > left or step.head in stopped:
            stopped.add(step.head)
            continue
        left -= step.cost
        chosen[step.head] = step.choice
    return chosen


def _hull(losses: Sequence[float], densities: Sequence[float]) -> list[int]:
    """Choices on the lower convex hull, from the sparsest one on, losses falling."""
    order = sorted(range(len(losses)), key=lambda i: (densities[i], losses[i], i))
    path = [order[0]]
    while True:
        last = path[-1]
        better = [i for i in order if densities[i] > densities[last] and losses[i] < losses[last]]
        if not better:
            return path
        path.append(max(better, key=lambda i: _rate(last, i, losses, densities)))


def _rate(a: int, b: int, losses: Sequence[float], densities: Sequence[float]) -> float:
    return (losses[a] - losses[b]) / (densities[b] - densities[a])


def _steps(
    head: int, path: Sequence[int], losses: Sequence[float], densities: Sequence[float]
) -> list[_Step]:
    return [
        _Step(_rate(a, b, losses, densities), head, b, densities[b] - densities[a])
        for a, b in itertools.pairwise(path)
    ]
