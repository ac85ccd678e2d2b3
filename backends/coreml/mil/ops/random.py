"""Random tensors: reproducible, of the right shape and distribution, not Core ML's own bits."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, ints
from resplice.backends.coreml.mil.registry import implements


def _generator(seed: int) -> torch.Generator:
    """Seed -1 asks for any seed; we take 0, so that a run can be repeated."""
    return torch.Generator().manual_seed(max(int(seed), 0))


@implements("random_bernoulli")
def random_bernoulli(shape: Numbers, prob: float, seed: int) -> torch.Tensor:
    """Ones with a probability, else zeros."""
    return (torch.rand(ints(shape), generator=_generator(seed)) < prob).to(torch.float32)


@implements("random_normal")
def random_normal(shape: Numbers, mean: float, stddev: float, seed: int) -> torch.Tensor:
    """Normally distributed numbers."""
    return torch.randn(ints(shape), generator=_generator(seed)) * stddev + mean


@implements("random_uniform")
def random_uniform(shape: Numbers, low: float, high: float, seed: int) -> torch.Tensor:
    """Uniformly distributed numbers."""
    return torch.rand(ints(shape), generator=_generator(seed)) * (high - low) + low


@implements("random_categorical")
def random_categorical(x: torch.Tensor, mode: str, size: int, seed: int) -> torch.Tensor:
    """Classes drawn by the logits or probabilities along the last axis."""
    weights = torch.softmax(x, -1) if mode == "logits" else x
    flat = weights.reshape(-1, weights.shape[-1])
    drawn = torch.multinomial(flat, int(size), replacement=True, generator=_generator(seed))
    return drawn.reshape(*x.shape[:-1], int(size))
