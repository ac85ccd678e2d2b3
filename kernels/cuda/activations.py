"""The activations of `moe_ffn` inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(z: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """`moe_routing.ACTIVATIONS` of float32 values; tanh by way of the sigmoid."""
    tl.static_assert(
        kind == "silu" or kind == "gelu" or kind == "gelu_tanh" or kind == "gelu_sigmoid"
        or kind == "relu" or kind == "relu_squared" or kind == "sigmoid" or kind == "tanh"
    )  # fmt: skip
    if kind == "silu":
        found = z * tl.sigmoid(z)
    elif kind == "gelu":
        found = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif kind == "gelu_tanh":
        found = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif kind == "gelu_sigmoid":
        found = z * tl.sigmoid(1.702 * z)
    elif kind == "relu":
        found = tl.maximum(z, 0.0)
    elif kind == "relu_squared":
        found = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    elif kind == "sigmoid":
        found = tl.sigmoid(z)
    else:
        found = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return found
