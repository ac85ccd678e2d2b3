"""The repair catalogue: known model bugs that stop torch.export, and how each is repaired.

A repair is active only while tracing; the caller's model is as before afterwards. Each one says
what it changes and why, and has a numeric proof in `tests/test_repairs.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Repair:
    """One repair.

    Attributes:
        name: Kebab-case name, printed in reports.
        what: What is changed while tracing.
        why: The bug it works round.
        applies: Whether the model shows the bug.
        patch: Context manager that changes and restores.
    """

    name: str
    what: str
    why: str
    applies: Callable[[nn.Module], bool]
    patch: Callable[[nn.Module], AbstractContextManager[None]]


CATALOGUE: list[Repair] = []


@contextmanager
def applied(model: nn.Module, *, enabled: bool = True) -> Iterator[tuple[str, ...]]:
    """Apply every repair that fits the model; yields their names."""
    fitting = [repair for repair in CATALOGUE if enabled and repair.applies(model)]
    with ExitStack() as stack:
        for repair in fitting:
            stack.enter_context(repair.patch(model))
        yield tuple(repair.name for repair in fitting)
