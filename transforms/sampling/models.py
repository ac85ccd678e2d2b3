"""Whatever computes a velocity as one callable: modules, artefacts, and two of them in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from resplice.errors import UsageError

Model = Callable[..., Any]
"""Takes named tensors; returns a tensor or array, or a tuple, dict or output class led by one."""


class Runs(Protocol):
    """Anything that executes on named tensors, such as an artefact of a backend."""

    def run(self, inputs: Mapping[str, Tensor], *, function: str = "main") -> Mapping[str, Tensor]:
        """Outputs by name."""


def of_artifact(artifact: Runs, function: str = "main", output: str = "") -> Model:
    """An artefact (ONNX, Core ML in our interpreter) as a callable of named tensors.

    Args:
        artifact: What a backend returned.
        function: Which of its functions.
        output: Which output is the velocity; by default the first.
    """

    def run(**inputs: Tensor) -> Tensor:
        results = artifact.run(inputs, function=function)
        return results[output] if output else next(iter(results.values()))

    return run


@dataclass(frozen=True)
class Phased:
    """One model for the first steps and another afterwards (TDTM's merged steps come first)."""

    early: Model
    late: Model
    steps: int

    def at(self, step: int) -> Model:
        """The model of a step, counted from 0."""
        return self.early if step < self.steps else self.late


@dataclass(frozen=True)
class Switched:
    """One model with an input that says whether to merge, true in the first steps."""

    model: Model
    steps: int
    name: str = "merge"

    def at(self, step: int) -> Model:
        """The model with its input set for a step, counted from 0."""
        flag = torch.tensor(step < self.steps)
        return lambda **inputs: self.model(**inputs, **{self.name: flag})


def model_at(model: Model | Phased | Switched, step: int) -> Model:
    """The callable that computes a step."""
    return model.at(step) if isinstance(model, Phased | Switched) else model


def velocity_of(result: Any, channels: int) -> Tensor:
    """The first `channels` channels (axis 1) of whatever a model returned.

    Raises:
        UsageError: It holds no tensor, or one with fewer channels.
    """
    found: Any = result
    if isinstance(found, Mapping):
        found = next(iter(found.values()), None)
    elif isinstance(found, list | tuple):
        found = found[0] if found else None
    elif hasattr(found, "sample") and not isinstance(found, Tensor):
        found = found.sample
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found) if hasattr(found, "__array__") else None
    if found is None or found.dim() < 2 or found.shape[1] < channels:
        what = "nothing" if found is None else f"shape {list(found.shape)}"
        raise UsageError(f"the model returned {what}, not a velocity of {channels} channels")
    velocity: Tensor = found[:, :channels]
    return velocity
