"""Pooling over one, two or three spatial axes."""

from __future__ import annotations

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.conv import flat, padding_for
from resplice.backends.coreml.mil.registry import implements

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEAN = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _pads(
    x: torch.Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int] | None,
    ceil_mode: bool,
) -> tuple[list[int], list[int]]:
    """The declared padding, and what the last windows of `ceil_mode` reach beyond it."""
    sizes = x.shape[2:]
    pads = padding_for(pad_type, sizes, kernel_sizes, strides, pad)
    extra = [(0, 0)] * len(pads)
    if ceil_mode:
        extra = [
            (0, _overhang(size, pair, kernel, stride))
            for size, pair, kernel, stride in zip(sizes, pads, kernel_sizes, strides, strict=True)
        ]
    return flat(pads), flat(extra)


def _overhang(size: int, pad: tuple[int, int], kernel: int, stride: int) -> int:
    padded = size + sum(pad)
    count = -(-(padded - kernel) // stride) + 1
    if (count - 1) * stride >= size + pad[0] and sum(pad) > 0:
        count -= 1
    return max((count - 1) * stride + kernel - padded, 0)


@implements("max_pool", moves=True)
def max_pool(
    x: torch.Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The largest element of each window; padding never wins."""
    for amounts in _pads(x, kernel_sizes, strides, pad_type, pad, ceil_mode):
        x = functional.pad(x, amounts, value=float("-inf")) if any(amounts) else x
    return _MAX[x.dim() - 2](x, kernel_sizes, strides)


@implements("avg_pool")
def avg_pool(
    x: torch.Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> torch.Tensor:
    """The mean of each window, padding counted as zeros or left out."""
    pads, extra = _pads(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    mean = _MEAN[x.dim() - 2]
    if not any(extra) and not (exclude_padding_from_average and any(pads)):
        return mean(functional.pad(x, pads) if any(pads) else x, kernel_sizes, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = functional.pad(counted, pads, value=0.0 if exclude_padding_from_average else 1.0)
    whole = functional.pad(functional.pad(x, pads), extra)
    share = mean(functional.pad(counted, extra), kernel_sizes, strides)
    return mean(whole, kernel_sizes, strides) / share


@implements("l2_pool")
def l2_pool(
    x: torch.Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The Euclidean norm of each window."""
    total = torch.Size(kernel_sizes).numel()
    mean = avg_pool(torch.square(x), kernel_sizes, strides, pad_type, pad, ceil_mode)
    return torch.sqrt(mean * total)
