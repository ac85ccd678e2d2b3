"""code_linear: integer activations times packed integer weights, multiplied exactly.

    y = sum_k (a[k] + 1/2) x_step * (c[n, k] - 2**(b-1) + 1/2) step[n] + bias[n]

a and c are codes on mid-rise grids. With w = c - 2**(b-1), the sum of products of half-integers is
an integer: 4 sum (a + 1/2)(w + 1/2) = sum (2a + 1)(2w + 1) = 4 sum aw + 2 sum a + 2 sum w + K; for
one bit by one bit it is K - 2 popcount(a xor c). Source: arXiv 2502.05003, section 4 and the
kernels published with it.
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
from resplice.kernels.packing import pack, packed_bytes, unpack
from resplice.kernels.quant_linear import BITS, group_count
from resplice.ops import OpSample, op


def _verify(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> None:  # fmt: skip
    def refuse(argument: str, what: str) -> None:
        raise OpError("code_linear", argument, what)

    if x.dim() < 1:
        refuse("x", "has no axes")
    if x.dtype != torch.int8:
        refuse("x", f"has dtype {x.dtype}, not int8")
    if bits not in BITS:
        refuse("bits", f"is {bits}, not one of {BITS}")
    if not 1 <= x_bits <= 8:
        refuse("x_bits", f"is {x_bits}, not 1 to 8")
    if tuple(x_step.shape) != (*x.shape[:-1], 1):
        refuse("x_step", f"has shape {list(x_step.shape)}, expected {[*x.shape[:-1], 1]}")
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        refuse("codes", f"must be uint8 [N, bytes], is {codes.dtype} with {codes.dim()} axes")
    if group < 0:
        refuse("group", f"is {group}, must be 0 or positive")
    size, rows = int(x.shape[-1]), codes.shape[0]
    if codes.shape[1] != packed_bytes(size, bits):
        refuse("codes", f"has {codes.shape[1]} bytes a row, {size} codes of {bits} bits need "
               f"{packed_bytes(size, bits)}")  # fmt: skip
    if tuple(step.shape) != (rows, group_count(size, group)):
        refuse("step", f"has shape {list(step.shape)}, expected {[rows, group_count(size, group)]}")
    if bias is not None and tuple(bias.shape) != (rows,):
        refuse("bias", f"has shape {list(bias.shape)}, expected [{rows}]")


def _cost(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> Cost:  # fmt: skip
    out = math.prod(x.shape[:-1]) * codes.shape[0]
    tensors = (x, x_step, codes, step, bias)
    read = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return Cost(2 * out * int(x.shape[-1]), read, 4 * out)


def _samples() -> Iterator[OpSample]:
    generator = torch.Generator().manual_seed(0)

    def call(
        rows: tuple[int, ...], size: int, out: int, bits: int, x_bits: int, group: int = 0,
        bias: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        half = 2 ** (x_bits - 1)
        x = torch.randint(-half, half, (*rows, size), generator=generator).to(torch.int8)
        x_step = torch.rand(*rows, 1, generator=generator) + 0.1
        codes = pack(torch.randint(0, 2**bits, (out, size), generator=generator), bits)
        step = torch.rand(out, group_count(size, group), generator=generator) + 0.1
        offset = torch.randn(out, generator=generator) if bias else None
        return x, x_step, codes, step, offset, bits, group, x_bits

    for bits in BITS:
        for x_bits in (1, 4, 8):
            yield OpSample(f"W{bits}A{x_bits}", call((2, 3), 64, 10, bits, x_bits))
        yield OpSample(f"W{bits}A{bits}, groups", call((3,), 80, 7, bits, bits, 32, True))
    yield OpSample("odd sizes", call((5,), 37, 3, 3, 2, 0, True))
    yield OpSample("one bit, odd sizes", call((2,), 77, 3, 1, 1))
    yield OpSample("groups of odd length", call((2,), 30, 3, 4, 4, 7))
    yield OpSample("no rows", call((0,), 32, 4, 4, 4))
    x, x_step, codes, step, *rest = call((4,), 64, 8, 4, 4)
    yield OpSample("floats", (x.float(), x_step, codes, step, *rest), refused="not int8")
    yield OpSample("bad bits", (x, x_step, codes, step, None, 5, 0, 4), refused="not one of")
    yield OpSample("wrong x_step", (x, x_step[:2], codes, step, *rest), refused="has shape [2, 1]")
    yield OpSample("short codes", (x, x_step, codes[:, 1:], step, *rest), refused="bytes a row")
    yield OpSample("nine bits", (x, x_step, codes, step, None, 4, 0, 9), refused="not 1 to 8")


def _fast(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> Tensor:  # fmt: skip
    found = quant_fast.code_linear(x, x_step, codes, step, bias, bits, group, x_bits)
    if found is None:
        found = code_linear.reference(x, x_step, codes, step, bias, bits, group, x_bits)
    return found


@op(
    "code_linear(Tensor x, Tensor x_step, Tensor codes, Tensor step, Tensor? bias, int bits,"
    " int group, int x_bits) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda x, x_step, codes, *_: x_step.new_empty((*x.shape[:-1], codes.shape[0])),
    fast=_fast,
    parameters=lambda x, x_step, codes, step, *_: codes.shape[0] * x.shape[-1] - step.numel(),
    samples=_samples,
    autocast=(),
)
def code_linear(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> Tensor:  # fmt: skip
    """Linear layer in integer arithmetic.

    Args:
        x: int8 [..., K], codes of `quest_codes`.
        x_step: float32 [..., 1], their steps.
        codes: uint8 [N, ceil(K*bits/8)], packed little-endian along K.
        step: float32 [N, groups].
        bias: [N] or None.
        bits: Of a weight: 1, 2, 3, 4 or 8.
        group: Weights per step along K; 0 means the whole row.
        x_bits: Of an activation, 1 to 8: codes lie within -2**(x_bits-1) and 2**(x_bits-1) - 1.

    Returns:
        [..., N] in the dtype of `x_step`.

    Raises:
        OpError: Shapes, dtypes or bits do not fit together.
    """
    size = int(x.shape[-1])
    length = group if 0 < group < size else size
    odd = 2 * x.double() + 1  # integers: their products and sums are exact in float64
    weight = 2 * unpack(codes, bits, size).double() - (2**bits - 1)
    parts = [
        (a @ w.t()) * s
        for a, w, s in zip(
            odd.split(length, -1), weight.split(length, -1), step.double().unbind(-1), strict=True
        )
    ]
    total = torch.stack(parts).sum(0) * x_step.double() / 4
    return (total if bias is None else total + bias.double()).to(x_step.dtype)


code_linear.lowerings["onnx"] = "resplice.backends.onnx.code_linear:lower"
code_linear.lowerings["coreml"] = "resplice.backends.coreml.quant_linear:lower_codes"
