"""Linear proportional leap: one step over all the time that is left, once the flow runs straight.

Source: On-device Sora, arXiv 2502.04363, equations 3 to 5 and its code. n steps and the leap take
n + 1 evaluations instead of K. It is for models trained with a straight (rectified-flow) target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from resplice.errors import UsageError

Cosine = Callable[[Tensor, Tensor], float]


class Judge(Protocol):
    """Decides for one sample, step by step, whether to leap."""

    def __call__(self, step: int, velocity: Tensor) -> bool:
        """Whether this step leaps; `velocity` [C,T,H,W] is that after guidance."""


class Leap(Protocol):
    """When to leap; `judge` starts afresh for every sample."""

    def judge(self, steps: int) -> Judge:
        """The judge of one new sample of at most `steps` steps."""


@dataclass(frozen=True)
class Fixed:
    """Leap at one step: `at` counts from 0, so `at + 1` evaluations."""

    at: int = 15

    def judge(self, steps: int) -> Judge:
        """A judge that waits for the step.

        Raises:
            UsageError: There is no such step.
        """
        if not 0 <= self.at < steps:
            raise UsageError(f"leap at step {self.at}: there are steps 0 to {steps - 1}")
        return lambda step, velocity: step == self.at


def frame_cosine(now: Tensor, before: Tensor) -> float:
    """The published measure: channel 0, frame 0, cosine per row along the width, mean over rows.

    Args:
        now: Velocity [C,T,H,W] or, without frames, [C,H,W].
        before: That of the step before, same shape.
    """
    first = (0, 0) if now.dim() > 3 else (0,)
    return float(torch.cosine_similarity(now[first].float(), before[first].float(), dim=-1).mean())


def whole_cosine(now: Tensor, before: Tensor) -> float:
    """The cosine of the whole velocities, of any shape."""
    a, b = now.double().flatten(), before.double().flatten()
    return float(torch.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True)
class Dynamic:
    """Leap when the cosine of consecutive velocities has stopped growing.

    Attributes:
        first: First step tested; a fraction counts as that part of all steps.
        tolerance: By how much the cosine must exceed the best one to count as growth.
        patience: How many steps without growth in all since the last growth.
        cosine: `frame_cosine` as published, or `whole_cosine`.
    """

    first: int | float = 14
    tolerance: float = 1e-3
    patience: int = 3
    cosine: Cosine = frame_cosine

    def judge(self, steps: int) -> Judge:
        """A judge that has seen nothing yet.

        Raises:
            UsageError: `first` or `patience` is out of range.
        """
        first = round(self.first * steps) if isinstance(self.first, float) else self.first
        if first < 0 or self.patience < 1:
            raise UsageError(f"first={self.first} must not be negative, patience={self.patience} 1")
        return _Watching(self, first, self.patience)


@dataclass
class _Watching:
    rule: Dynamic
    first: int
    patience: int
    best: float = 0.0
    before: Tensor | None = field(default=None, repr=False)

    def __call__(self, step: int, velocity: Tensor) -> bool:
        before, self.before = self.before, velocity
        if step < self.first or before is None:
            return False
        cosine = self.rule.cosine(velocity, before)
        if cosine > self.best + self.rule.tolerance:
            self.best, self.patience = cosine, self.rule.patience
        else:
            self.patience -= 1
        return self.patience == 0


PRESETS: dict[str, Leap] = {
    "fixed": Fixed(15),
    "dynamic": Dynamic(first=14, tolerance=1e-3, patience=3),
    "paper": Dynamic(first=0.5, tolerance=1e-4, patience=3),
}
"""Named settings. The three published ones disagree: `dynamic` is that of the Python code, `fixed`
that of the iPhone app and of the paper's "16/30", `paper` that of the text, which does not say the
patience; ours is that of the code."""


def leap_of(value: str | Leap | None) -> Leap | None:
    """A setting by name.

    Raises:
        UsageError: There is none of that name.
    """
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise UsageError(f"there is no leap {value!r}", hint=f"settings are {', '.join(PRESETS)}")
    return PRESETS[value]
