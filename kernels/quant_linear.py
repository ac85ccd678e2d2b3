"""quant_linear: a linear layer whose weight is held as packed b-bit codes.

y = x W^T + bias with W[n, k] = (code[n, k] - 2**(b-1) + 1/2) * step[n, k // group]

Source: the mid-rise grid of arXiv 2502.05003, section 3 (see `gaussian_grid.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels import quant_fast
from resplice.kernels.gaussian_grid import from_codes
from resplice.kernels.packing import pack, packed_bytes, unpack
from resplice.ops import OpSample, op

BITS = (1, 2, 3, 4, 8)


def group_count(size: int, group: int) -> int:
    """Groups along K; `group` 0 means one group, the last one may be shorter."""
    return 1 if group == 0 else -(-size // group)


def dequantize(codes: Tensor, step: Tensor, bits: int, group: int, size: int) -> Tensor:
    """The weight behind packed codes.

    Args:
        codes: uint8 [N, ceil(K*bits/8)], see `packing.py`.
        step: Floating point [N, groups].
        bits: Bits per code.
        group: Weights per step along K; 0 means the whole row.
        size: K.

    Returns:
        [N, K] in the dtype of `step`.
    """
    spread = step if group == 0 else step.repeat_interleave(group, -1)[:, :size]
    return from_codes(unpack(codes, bits, size), spread, bits)


def _verify(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> None:
    def refuse(argument: str, what: str) -> None:
        raise OpError("quant_linear", argument, what)

    if x.dim() < 1:
        refuse("x", "has no axes")
    if bits not in BITS:
        refuse("bits", f"is {bits}, not one of {BITS}")
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        refuse("codes", f"must be uint8 [N, bytes], is {codes.dtype} with {codes.dim()} axes")
    if group < 0:
        refuse("group", f"is {group}, must be 0 or positive")
    expected = packed_bytes(int(x.shape[-1]), bits)
    if codes.shape[1] != expected:
        refuse(
            "codes",
            f"has {codes.shape[1]} bytes a row, {x.shape[-1]} codes of {bits} bits need {expected}",
        )
    groups = (codes.shape[0], group_count(int(x.shape[-1]), group))
    if tuple(step.shape) != groups:
        refuse("step", f"has shape {list(step.shape)}, expected {list(groups)}")
    if bias is not None and tuple(bias.shape) != (codes.shape[0],):
        refuse("bias", f"has shape {list(bias.shape)}, expected [{codes.shape[0]}]")
    if not x.is_floating_point():
        refuse("x", f"has dtype {x.dtype}, not floating point")


def _cost(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Cost:
    out = math.prod(x.shape[:-1]) * codes.shape[0]
    read = sum(t.numel() * t.element_size() for t in (x, codes, step, bias) if t is not None)
    return Cost(2 * out * int(x.shape[-1]), read, out * x.element_size())


def _fake(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _samples() -> Iterator[OpSample]:
    generator = torch.Generator().manual_seed(0)

    def call(
        rows: tuple[int, ...], size: int, out: int, bits: int, group: int, bias: bool = False
    ) -> tuple[Any, ...]:
        codes = torch.randint(0, 2**bits, (out, size), generator=generator)
        step = torch.rand(out, group_count(size, group), generator=generator) + 0.1
        x = torch.randn(*rows, size, generator=generator)
        offset = torch.randn(out, generator=generator) if bias else None
        return x, pack(codes, bits), step, offset, bits, group

    for bits in BITS:
        yield OpSample(f"{bits} bits, per channel", call((2, 3), 64, 10, bits, 0), grad=True)
        yield OpSample(
            f"{bits} bits, groups of 32, bias", call((5,), 96, 7, bits, 32, True), grad=True
        )
    yield OpSample("ragged last group", call((4,), 100, 6, 3, 32))
    yield OpSample("odd row of codes", call((4,), 33, 6, 3, 0, True))
    yield OpSample("no rows", call((0,), 32, 4, 4, 0))
    x, codes, step, *_ = call((4,), 64, 8, 4, 0)
    yield OpSample("bad bits", (x, codes, step, None, 5, 0), refused="not one of")
    yield OpSample("short codes", (x, codes[:, 1:], step, None, 4, 0), refused="bytes a row")
    yield OpSample("wrong steps", (x, codes, step, None, 4, 32), refused="step has shape")
    yield OpSample(
        "integer input", (x.long(), codes, step, None, 4, 0), refused="not floating point"
    )


def _fast(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    found = quant_fast.linear(x, codes, step, bias, bits, group)
    if found is None:
        found = quant_linear.reference(x, codes, step, bias, bits, group)
    return found


@op(
    "quant_linear(Tensor x, Tensor codes, Tensor step, Tensor? bias, int bits, int group)"
    " -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=_fake,
    fast=_fast,
    parameters=lambda x, codes, step, *_: codes.shape[0] * x.shape[-1] - step.numel(),
    samples=_samples,
    autocast=("x", "bias"),
)
def quant_linear(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """Linear layer with packed weights.

    Args:
        x: Floating point [..., K].
        codes: uint8 [N, ceil(K*bits/8)], packed little-endian along K.
        step: float32 [N, groups], the distance between levels.
        bias: [N] or None.
        bits: 1, 2, 3, 4 or 8.
        group: Weights per step along K; 0 means the whole row.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        OpError: Shapes, dtypes or bits do not fit together.
    """
    weight = dequantize(codes, step, bits, group, int(x.shape[-1])).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, step, bias, ctx.bits, ctx.group = inputs
    ctx.size, ctx.has_bias = inputs[0].shape[-1], bias is not None
    ctx.save_for_backward(codes, step)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient reaches x and bias; codes and steps are constants of the program."""
    codes, step = ctx.saved_tensors
    weight = dequantize(codes, step, ctx.bits, ctx.group, ctx.size).to(grad.dtype)
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, bias, None, None


quant_linear.differentiate(_backward, setup=_save)
quant_linear.lowerings["onnx"] = "resplice.backends.onnx.quant_linear:lower"
quant_linear.lowerings["coreml"] = "resplice.backends.coreml.quant_linear:lower"
