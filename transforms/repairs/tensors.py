"""Repairs of torch calls that tracing loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resplice.repairs.base import Intercept, Repair, Tally


@contextmanager
def _traced_tensor_data(model: nn.Module) -> Iterator[Tally]:
    read = torch.Tensor.data.__get__  # type: ignore[attr-defined]  # a C-level property
    with Intercept(read, lambda tensor, *_: tensor.detach()) as watcher:
        yield watcher.tally


TRACED_TENSOR_DATA = Repair(
    "traced-tensor-data",
    what="reads `tensor.data` as `tensor.detach()`",
    why="`.data` makes a tensor that the tracer has no record of. Writing into it (CogVideoX fills "
    "its position table by `table.data[:, n:].copy_(...)`) is lost, and the fake tensor is then "
    "taken for a constant: 'found a fake tensor in the exported program constant's list'. "
    "`detach()` shares memory in the same way and is traced as a view.",
    applies=lambda model: True,
    patch=_traced_tensor_data,
)


@contextmanager
def _traced_linspace(model: nn.Module) -> Iterator[Tally]:
    with Intercept(torch.linspace, symbolic_linspace) as watcher:
        yield watcher.tally


TRACED_LINSPACE = Repair(
    "traced-linspace",
    what="computes `torch.linspace` from `arange` when its number of steps is symbolic",
    why="`linspace` takes a plain integer, so capture replaces a symbolic number of steps by its "
    "current value without an error: a guard is all that remains of it, and exporters keep no "
    "guards. Mochi's rotary positions are then those of the captured size at every size.",
    applies=lambda model: True,
    patch=_traced_linspace,
)


def symbolic_linspace(start: Any, end: Any, steps: Any, **options: Any) -> Any:
    """``torch.linspace`` for a symbolic number of steps, equal up to the last bit or so."""
    if not isinstance(steps, torch.SymInt) or not set(options) <= {"dtype", "device"}:
        return NotImplemented
    dtype = options.get("dtype") or torch.get_default_dtype()
    if not dtype.is_floating_point:
        return NotImplemented
    return _linspace(start, end, steps, dtype, options.get("device"))


def _linspace(start: Any, end: Any, steps: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """From both ends to the middle, as torch does; `steps` is an int or a SymInt."""
    index = torch.arange(steps, dtype=dtype, device=device)
    last = torch.full_like(index[:1], 1) * (steps - 1)
    step = (end - start) / last.clamp(min=1)
    return torch.where(index < steps / 2, start + step * index, end - step * (last - index))
