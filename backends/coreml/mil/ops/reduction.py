"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resplice.backends.coreml.mil.ops.values import Numbers, axes_of
from resplice.backends.coreml.mil.registry import implements

Reduce = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _reduction(name: str, reduce: Reduce, *, moves: bool = False) -> None:
    def run(x: torch.Tensor, keep_dims: bool, axes: Numbers | None = None) -> torch.Tensor:
        return reduce(x, axes_of(axes, x.dim()), keep_dims)

    implements(name, moves=moves)(run)


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.mean(x if x.is_floating_point() else x.double(), axes, keepdim=keep)


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _l2(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sqrt(torch.sum(torch.square(x), axes, keepdim=keep))


_reduction("reduce_sum", lambda x, axes, keep: torch.sum(x, axes, keepdim=keep))
_reduction("reduce_mean", _mean)
_reduction("reduce_max", lambda x, axes, keep: torch.amax(x, axes, keepdim=keep), moves=True)
_reduction("reduce_min", lambda x, axes, keep: torch.amin(x, axes, keepdim=keep), moves=True)
_reduction("reduce_prod", _prod)
_reduction("reduce_l1_norm", lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep))
_reduction("reduce_l2_norm", _l2)
_reduction(
    "reduce_sum_square", lambda x, axes, keep: torch.sum(torch.square(x), axes, keepdim=keep)
)
_reduction("reduce_log_sum", lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep)))
_reduction("reduce_log_sum_exp", lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep))


@implements("reduce_argmax")
def reduce_argmax(
    x: torch.Tensor, axis: int, keep_dims: bool, output_dtype: str = "int32"
) -> torch.Tensor:
    """Where the largest element lies along an axis; the first of equals."""
    return torch.argmax(x, axis, keepdim=keep_dims)


@implements("reduce_argmin")
def reduce_argmin(
    x: torch.Tensor, axis: int, keep_dims: bool, output_dtype: str = "int32"
) -> torch.Tensor:
    """Where the smallest element lies along an axis; the first of equals."""
    return torch.argmin(x, axis, keepdim=keep_dims)
