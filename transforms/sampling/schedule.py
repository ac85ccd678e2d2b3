"""When a rectified-flow sampler evaluates its model: equal steps, shifted by resolution and length.

Source: Open-Sora v1.2, `opensora/schedulers/rf`. Times run from 1000 (noise) down towards 0 (data).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from resplice.errors import UsageError

FULL = 1000.0
"""The time of pure noise."""
_FRAMES, _LATENTS, _PIXELS = 17, 5, 512 * 512


def shift_ratio(height: int, width: int, frames: int = 1) -> float:
    """How far the schedule is shifted for a video: sqrt(area / 512^2) * sqrt(latent frames).

    Args:
        height: In pixels.
        width: In pixels.
        frames: Video frames; 17 of them are 5 latent frames, and fewer count as an image.

    Raises:
        UsageError: A size is not positive.
    """
    if min(height, width, frames) < 1:
        raise UsageError(f"a video of {frames} frames of {height} x {width} pixels has no schedule")
    latents = max(frames // _FRAMES * _LATENTS, 1)
    return math.sqrt(height * width / _PIXELS) * math.sqrt(latents)


def timesteps(steps: int, ratio: float = 1.0, *, whole: bool = False) -> list[float]:
    """The times at which the model is evaluated, from 1000 downwards.

    Args:
        steps: How many, K.
        ratio: r in t <- r t / (1 + (r - 1) t), on t / 1000; 1 leaves equal steps.
        whole: Round the equal steps to integers first, as On-device Sora does.

    Raises:
        UsageError: `steps` or `ratio` is not positive.
    """
    if steps < 1 or not ratio > 0:
        raise UsageError(f"steps={steps} and ratio={ratio} must be positive")
    equal = [FULL * (1 - i / steps) for i in range(steps)]
    return [_shifted(t / FULL, ratio) * FULL for t in (rounded(equal) if whole else equal)]


def rounded(times: Iterable[float]) -> list[float]:
    """Times rounded to integers, halves to even."""
    return [float(round(t)) for t in times]


def durations(times: list[float]) -> list[float]:
    """The length of every step, on the scale of 1; the last one goes to time 0."""
    return [(t - following) / FULL for t, following in zip(times, [*times[1:], 0.0], strict=True)]


def _shifted(t: float, ratio: float) -> float:
    return ratio * t / (1 + (ratio - 1) * t)
