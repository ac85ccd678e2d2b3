"""Small kernels whose compiled code is known well enough to test what reads it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from resplice.kernels.cuda.launch import Launch, launch, recording


@triton.jit
def toy_axpy(x, y, out, bias, n, stride, alpha, block: tl.constexpr):
    """out = alpha x + y (+ bias[0])."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    value = alpha * tl.load(x + at * stride, at < n) + tl.load(y + at * stride, at < n)
    if bias is not None:
        value += tl.load(bias)
    tl.store(out + at * stride, value, at < n)


@triton.jit
def toy_product(a, b, c, k, rows: tl.constexpr, columns: tl.constexpr, step: tl.constexpr):
    """c = a b, one block."""
    i, j, s = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, step)
    acc = tl.zeros((rows, columns), tl.float32)
    for first in range(0, k, step):
        x = tl.load(a + i[:, None] * k + first + s[None, :])
        y = tl.load(b + (first + s[:, None]) * columns + j[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + i[:, None] * columns + j[None, :], acc.to(c.dtype.element_ty))


def axpy(
    x: torch.Tensor, y: torch.Tensor, alpha: float, *, bias: torch.Tensor | None = None,
    stride: int = 1, block: int = 256,
) -> torch.Tensor:  # fmt: skip
    """alpha x + y through the toy kernel; every `stride`-th element."""
    out, n = torch.full_like(x, torch.nan), x.numel() // stride
    launch(
        toy_axpy, (triton.cdiv(n, block),), num_warps=4, num_stages=2, x=x, y=y, out=out,
        bias=bias, n=n, stride=stride, alpha=alpha, block=block,
    )  # fmt: skip
    return out


def axpy_launch(n: int = 1000, **changes: Any) -> Launch:
    """A recorded launch of the toy kernel."""
    x = torch.empty(n, device="meta")
    with recording() as found:
        axpy(x, x, 2.0, **changes)
    return found[0]


def product_launch(dtype: torch.dtype = torch.bfloat16, step: int = 64) -> Launch:
    """A recorded launch of the product of 128 x 256 and 256 x 128."""
    a = torch.empty(128, 256, dtype=dtype, device="meta")
    b = torch.empty(256, 128, dtype=dtype, device="meta")
    with recording() as found:
        launch(
            toy_product, (1,), num_warps=4, num_stages=3, a=a, b=b, c=a.new_empty(128, 128), k=256,
            rows=128, columns=128, step=step,
        )  # fmt: skip
    return found[0]
