"""Convolutions of one, two and three spatial axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.values import channels
from resplice.backends.coreml.mil.registry import implements
from resplice.errors import LoweringError

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSE = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def padding_for(
    kind: str,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pad: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Elements to add before and after each spatial axis.

    Args:
        kind: `valid`, `custom`, or `same` / `same_lower`, which give `ceil(size / stride)`
            outputs and put the odd element last / first.
        sizes: Of the input.
        kernel: Sizes of the window with its holes.
        strides: Steps of the window.
        pad: The custom padding, before and after the first axis, the second and so on.
    """
    if kind == "custom" and pad is not None:
        return [(pad[2 * axis], pad[2 * axis + 1]) for axis in range(len(sizes))]
    if kind not in {"same", "same_lower"}:
        return [(0, 0)] * len(sizes)
    return [_same(kind, *each) for each in zip(sizes, kernel, strides, strict=True)]


def _same(kind: str, size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    small = total // 2
    return (total - small, small) if kind == "same_lower" else (small, total - small)


def flat(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Paddings in torch's order: the last axis first."""
    return [amount for pair in reversed(pads) for amount in pair]


@implements("conv")
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    strides: list[int],
    pad_type: str,
    dilations: list[int],
    groups: int,
    pad: list[int] | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A convolution of `[N, C, ...]` with weight `[out, C / groups, ...]`."""
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pads = padding_for(pad_type, x.shape[2:], kernel, strides, pad)
    before = [first for first, _ in pads]
    if any(first != last for first, last in pads):
        x, before = functional.pad(x, flat(pads)), [0] * len(pads)
    return _CONV[len(pads)](x, weight, bias, strides, before, dilations, groups)


@implements("conv_quantized")
def conv_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    quantization_type: str,
    nbits: int,
    quant_scale: torch.Tensor,
    quant_bias: torch.Tensor,
    **rest: object,
) -> torch.Tensor:
    """A convolution whose weight is `weight * scale + bias`, one pair per output channel.

    Raises:
        LoweringError: The weight is a look-up table, which mlprograms have other ops for.
    """
    if quantization_type != "linear":
        raise LoweringError("coreml", [f"conv_quantized of type {quantization_type}"])
    shape = (-1, *[1] * (weight.dim() - 1))
    scale, shift = (torch.as_tensor(v).reshape(shape) for v in (quant_scale, quant_bias))
    dense = weight.to(torch.float32) * scale + shift
    return conv(x, dense, **rest)  # type: ignore[arg-type]  # the same inputs as conv


@implements("conv_transpose")
def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    strides: list[int],
    pad_type: str,
    dilations: list[int],
    groups: int,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of a convolution; weight `[C, out / groups, ...]`.

    The whole result is computed and then cut, or extended with what no input reaches (zero).
    """
    spatial = x.dim() - 2
    full = _TRANSPOSE[spatial](x, weight, None, strides, 0, 0, groups, dilations)
    sizes = output_shape[2:] if output_shape is not None else None
    for axis in range(spatial):
        length = full.shape[axis + 2]
        before, after = (pad[2 * axis], pad[2 * axis + 1]) if pad is not None else (0, 0)
        wanted = length
        if pad_type == "custom":
            wanted = length - before - after
        elif pad_type.startswith("same"):
            wanted = x.shape[axis + 2] * strides[axis]
        wanted = wanted if sizes is None else sizes[axis]
        if pad_type.startswith("same"):
            excess = max(length - wanted, 0)
            before = excess // 2 if pad_type == "same" else excess - excess // 2
        full = _window(full, axis + 2, 0 if pad_type == "valid" else before, wanted)
    return full if bias is None else full + channels(bias, full.dim())


def _window(x: torch.Tensor, axis: int, start: int, length: int) -> torch.Tensor:
    lacking = start + length - x.shape[axis]
    if lacking > 0:
        pads = [(0, lacking if each == axis else 0) for each in range(x.dim())]
        x = functional.pad(x, flat(pads))
    return x.narrow(axis, start, length)
