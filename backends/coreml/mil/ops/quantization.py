"""Quantisation and dequantisation of activations."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements

_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def _along(value: object, rank: int, axis: int | None) -> torch.Tensor:
    """A scalar or vector parameter, shaped to broadcast along `axis`."""
    tensor = torch.as_tensor(value)
    if tensor.dim() == 0 or axis is None:
        return tensor
    return tensor.reshape([-1 if at == axis % rank else 1 for at in range(rank)])


@implements("quantize")
def quantize(
    input: torch.Tensor,
    scale: torch.Tensor | float,
    output_dtype: str,
    zero_point: int | list[int] | None = None,
    axis: int | None = None,
) -> torch.Tensor:
    """clip(round(x / scale) + zero point)."""
    low, high = _RANGES[output_dtype]
    steps = torch.round(input / _along(scale, input.dim(), axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input.dim(), axis)
    return torch.clamp(steps, low, high)


@implements("dequantize")
def dequantize(
    input: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: int | list[int] | None = None,
    axis: int | None = None,
) -> torch.Tensor:
    """(q - zero point) * scale."""
    steps = input.to(torch.float32)
    if zero_point is not None:
        steps = steps - _along(zero_point, input.dim(), axis)
    return steps * _along(scale, input.dim(), axis)
