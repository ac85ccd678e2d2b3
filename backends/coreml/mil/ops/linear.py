"""Matrix products and attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.registry import implements


@implements("linear")
def linear(
    x: torch.Tensor,
    weight: torch.Tensor | list[list[int]],
    bias: torch.Tensor | list[int] | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` with weight `[out, in]`; integers meeting floats become floats."""
    if isinstance(weight, torch.Tensor) and weight.dtype == x.dtype and not isinstance(bias, list):
        return functional.linear(x, weight, bias)
    matrix = torch.as_tensor(weight)
    wide = torch.promote_types(x.dtype, matrix.dtype)
    shift = None if bias is None else torch.as_tensor(bias).to(wide)
    return functional.linear(x.to(wide), matrix.to(wide), shift)


@implements("matmul")
def matmul(
    x: torch.Tensor, y: torch.Tensor, transpose_x: bool = False, transpose_y: bool = False
) -> torch.Tensor:
    """The matrix product over the last two axes, leading axes broadcast.

    From iOS 17 on the two may differ in type; integers then become floats.
    """
    if x.dtype != y.dtype:
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
    left = x.mT if transpose_x and x.dim() > 1 else x
    right = y.mT if transpose_y and y.dim() > 1 else y
    return torch.matmul(left, right)


@implements("einsum")
def einsum(values: list[torch.Tensor], equation: str) -> torch.Tensor:
    """A sum of products in Einstein's notation; axes of size 1 broadcast."""
    return torch.einsum(equation, *values)


@implements("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kT / sqrt(d) + mask) v; a boolean mask says which elements take part."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)
