"""hadamard: block Walsh-Hadamard transform of the last axis; orthonormal and its own inverse.

Source: arXiv 2502.05003, section 3: weights and activations are rotated alike before they are
quantised, so that their entries look Gaussian and the product stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels import quant_fast
from resplice.ops import OpSample, op


def largest_block(size: int, limit: int = 128) -> int:
    """The largest power of two, at most `limit`, that divides `size`."""
    return min(size & -size, limit)


@cache
def hadamard_matrix(block: int) -> Tensor:
    """The Sylvester matrix of that order, scaled by block**-0.5, float64 [block, block]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(block)


def _verify(x: Tensor, block: int) -> None:
    if block < 1 or block & (block - 1):
        raise OpError("hadamard", "block", f"is {block}, not a power of two")
    if x.dim() < 1:
        raise OpError("hadamard", "x", "has no axes")
    if x.shape[-1] % block:
        raise OpError("hadamard", "x", f"has last size {x.shape[-1]}, not a multiple of {block}")
    if not x.is_floating_point():
        raise OpError("hadamard", "x", f"has dtype {x.dtype}, not floating point")


def _cost(x: Tensor, block: int) -> Cost:
    size = x.numel() * x.element_size()
    return Cost(2 * x.numel() * block, size, size)


def _samples() -> Iterator[OpSample]:
    torch.manual_seed(0)
    yield OpSample("one block", (torch.randn(3, 128), 128), grad=True)
    yield OpSample("several blocks, three axes", (torch.randn(2, 5, 192), 64), grad=True)
    yield OpSample("order one", (torch.randn(4, 3), 1))
    yield OpSample("float64", (torch.randn(4, 32, dtype=torch.float64), 32))
    yield OpSample("ragged", (torch.randn(3, 100), 128), refused="not a multiple of 128")
    yield OpSample("not a power of two", (torch.randn(3, 36), 12), refused="not a power of two")


def _fast(x: Tensor, block: int) -> Tensor:
    found = quant_fast.hadamard(x, block)
    return hadamard.reference(x, block) if found is None else found


@op(
    "hadamard(Tensor x, int block) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda x, block: torch.empty_like(x, memory_format=torch.contiguous_format),
    fast=_fast,
    samples=_samples,
    autocast=(),
)
def hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply every run of `block` values along the last axis by the Hadamard matrix.

    Args:
        x: Floating point, shape [..., K], K a multiple of `block`.
        block: Order of the transform, a power of two.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        OpError: `block` is not a power of two or does not divide K.
    """
    matrix = hadamard_matrix(block).to(x.device, x.dtype)
    blocks: Tensor = x.unflatten(-1, (-1, block))
    return (blocks @ matrix).flatten(-2)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """The transform is symmetric, hence its own transpose."""
    return hadamard(grad.contiguous(), ctx.block), None


hadamard.differentiate(_backward, setup=_save)


@hadamard.lower("coreml")
@hadamard.lower("onnx")
def transform_by_product(build: Any, x: Any, block: int) -> Any:
    """Reshape, one product with a constant matrix, reshape."""
    dtype = x.meta["val"].dtype
    matrix = build.constant(f"hadamard.order_{block}", hadamard_matrix(block).to(dtype))
    sizes = build.sizes(x)
    split = build.reshape(x, [*sizes[:-1], sizes[-1] // block, block])
    return build.reshape(build(torch.ops.aten.matmul.default, split, matrix), sizes)
