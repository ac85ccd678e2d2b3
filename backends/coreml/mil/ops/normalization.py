"""Normalisations."""

from __future__ import annotations

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.values import Numbers, axes_of, channels
from resplice.backends.coreml.mil.registry import implements


def _affine(x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


def _per_channel(value: torch.Tensor | None, rank: int) -> torch.Tensor | None:
    return None if value is None else channels(value, rank)


def _standardize(x: torch.Tensor, axes: list[int], epsilon: float) -> torch.Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + epsilon)


@implements("batch_norm")
def batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each channel (axis 1) by stored statistics."""
    return functional.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


@implements("instance_norm")
def instance_norm(
    x: torch.Tensor,
    epsilon: float,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each channel of each sample by its own statistics."""
    rank = x.dim()
    result = _standardize(x, list(range(2, rank)), epsilon)
    return _affine(result, _per_channel(gamma, rank), _per_channel(beta, rank))


@implements("layer_norm")
def layer_norm(
    x: torch.Tensor,
    epsilon: float,
    axes: Numbers | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """By the statistics over `axes`; gamma and beta have the sizes of these axes."""
    over = axes_of(axes, x.dim())
    if sorted(over) == list(range(x.dim() - len(over), x.dim())):
        shape = x.shape[x.dim() - len(over) :]
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    shape = torch.Size(size if axis in over else 1 for axis, size in enumerate(x.shape))
    scale, shift = (None if v is None else v.reshape(shape) for v in (gamma, beta))
    return _affine(_standardize(x, over, epsilon), scale, shift)


@implements("l2_norm")
def l2_norm(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divided by the Euclidean norm over the last three axes."""
    return x / torch.sqrt(torch.sum(torch.square(x), (-3, -2, -1), keepdim=True) + epsilon)


@implements("local_response_norm")
def local_response_norm(
    x: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> torch.Tensor:
    """Divided by a power of the energy of `size` neighbours along the third axis from the end.

    MIL documents axis 1, which is the same for rank 4; for rank 3 its own tests have the first.
    """
    batched = x.unsqueeze(0) if x.dim() == 3 else x
    return functional.local_response_norm(batched, size, alpha, beta, k).reshape(x.shape)
