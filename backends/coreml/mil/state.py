"""A model's state: tensors that live from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class State:
    """The state of one conversation with a model.

    A run replaces the tensors it updates; it never writes into a tensor it was given.

    Attributes:
        tensors: Present values by state name, in the declared dtype (float32 in mode `fp32`).
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> State:
        """An independent state with the same values."""
        return State({name: value.clone() for name, value in self.tensors.items()})


@dataclass(frozen=True)
class StateCell:
    """One tensor of a state, as the program sees it.

    Attributes:
        state: Where it lives.
        name: Its name there.
    """

    state: State
    name: str

    def read(self) -> torch.Tensor:
        """The value, floats as float32."""
        value = self.state.tensors[self.name]
        return value.to(torch.float32) if value.is_floating_point() else value

    def write(self, value: torch.Tensor) -> None:
        """Store a copy in the dtype of the value it replaces."""
        before = self.state.tensors[self.name]
        self.state.tensors[self.name] = value.detach().to(before.dtype, copy=True)
