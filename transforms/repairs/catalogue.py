"""All repairs, and the context manager that applies those a model needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from resplice.repairs.base import Repair
from resplice.repairs.experts import STATIC_EXPERTS
from resplice.repairs.mochi import BATCHED_MOCHI_ATTENTION
from resplice.repairs.tensors import TRACED_LINSPACE, TRACED_TENSOR_DATA

CATALOGUE: tuple[Repair, ...] = (
    TRACED_TENSOR_DATA,
    TRACED_LINSPACE,
    STATIC_EXPERTS,
    BATCHED_MOCHI_ATTENTION,
)


@contextmanager
def applied(model: nn.Module, *, enabled: bool = True) -> Iterator[list[str]]:
    """Apply every repair that fits the model.

    Yields a list that holds, after the block, the names of the repairs that changed something.
    """
    fitting = [repair for repair in CATALOGUE if enabled and repair.applies(model)]
    effective: list[str] = []
    with ExitStack() as stack:
        tallies = [(repair.name, stack.enter_context(repair.patch(model))) for repair in fitting]
        yield effective
        effective += [name for name, tally in tallies if tally is None or tally.hits]
