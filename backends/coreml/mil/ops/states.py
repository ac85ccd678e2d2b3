"""Reading and writing model state; state inputs arrive as `StateCell`."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements
from resplice.backends.coreml.mil.state import StateCell


@implements("read_state", moves=True)
def read_state(input: StateCell) -> torch.Tensor:
    """The present value."""
    return input.read()


@implements("coreml_update_state", moves=True)
def coreml_update_state(state: StateCell, value: torch.Tensor) -> torch.Tensor:
    """Store a value and return it as stored."""
    state.write(value)
    return state.read()
