"""Training through tile_attention on GPUs: the forward kernel that saves, and its gradients.

The op returns one tensor, its gradient kernels need the log-sums too. So on GPUs, where gradients
are asked for, the op becomes `tile_attention_saving`, which returns both; compilers trace through
it and through `tile_attention_gradients` like through every op with kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.cuda.register import see_through
from resplice.kernels.tile_attention import tile_attention as op
from resplice.ops import NAMESPACE, _library

_SIZES = "int[] canvas, int[] tile, int[] windows, int text_length=0, bool text_first=False"
_REST = "Tensor? mask=None, float? scale=None"
_TENSORS, _MASK = 3, 8


def register() -> None:
    """Define both operators and let `tile_attention` use them on GPUs."""
    library = _library()
    library.define(
        f"tile_attention_saving(Tensor q, Tensor k, Tensor v, {_SIZES}, {_REST})"
        " -> (Tensor, Tensor)"
    )
    library.define(
        "tile_attention_gradients(Tensor grad, Tensor out, Tensor logsum, Tensor q, Tensor k,"
        f" Tensor v, {_SIZES}, {_REST}) -> (Tensor, Tensor, Tensor)"
    )
    for name, run, fake in (
        ("tile_attention_saving", _saving, _saving_shapes),
        ("tile_attention_gradients", _gradients, _gradient_shapes),
    ):
        see_through(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::tile_attention_saving", _backward, setup_context=_save, lib=library
    )
    library.impl("tile_attention", _forward, "AutogradCUDA")


def _forward(*args: Any) -> Any:
    """The op where gradients may be asked for."""
    wanted = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if wanted and torch.is_grad_enabled() and args[0].dtype != torch.float64:
        assert op.verify is not None
        op.verify(*args)
        return torch.ops.resplice.tile_attention_saving.default(*args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload(*args)


def _saving(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from resplice.kernels.cuda.tile_attention import attend
    from resplice.kernels.cuda.tile_problem import TileProblem, aligned

    problem = TileProblem.of(q, canvas, tile, windows, text_length, text_first, scale)
    out, logsum = attend(aligned(q), aligned(k), aligned(v), mask, problem, True)
    assert logsum is not None
    return out, logsum


def _saving_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(
    grad: Tensor, out: Tensor, logsum: Tensor, q: Tensor, k: Tensor, v: Tensor,
    canvas: Sequence[int], tile: Sequence[int], windows: Sequence[int], text_length: int = 0,
    text_first: bool = False, mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from resplice.kernels.cuda.tile_gradients import gradients
    from resplice.kernels.cuda.tile_problem import TileProblem, aligned

    problem = TileProblem.of(q, canvas, tile, windows, text_length, text_first, scale)
    grad, out, q, k, v = (aligned(x) for x in (grad, out, q, k, v))
    return gradients(grad, q, k, v, mask, out, logsum, problem)


def _gradient_shapes(
    grad: Tensor, out: Tensor, logsum: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for x in (q, k, v)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *sizes, mask, ctx.scale = inputs[_TENSORS:]
    ctx.sizes = sizes
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:_TENSORS], mask)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[_MASK : _MASK + 1]):
        raise OpError("tile_attention", "mask", "can't be differentiated; detach it")
    if torch.is_grad_enabled():
        raise OpError("tile_attention", "q", "can't be differentiated twice")
    *saved, mask = ctx.saved_tensors
    found = torch.ops.resplice.tile_attention_gradients.default(
        grad, *saved, *ctx.sizes, mask, ctx.scale
    )
    return (*found, *([None] * 7))
