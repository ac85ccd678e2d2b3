"""moe_ffn: a feed-forward layer of always-on neurons and of experts that tokens are sent to.

    y = shared(x) + sum over the A experts chosen for x of (1 + p_j u_j) expert_j(x) + bias

Source: CMoE, arXiv 2502.04416. Biases, other activations than SiLU, layers without gates, several
representatives per expert and linear routers are our extension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels.moe_fast import fast, gradients
from resplice.kernels.moe_one_token import one_token
from resplice.kernels.moe_routing import (
    ACTIVATIONS,
    SCORES,
    expert_scores,
    hidden,
    route,
)
from resplice.ops import OpSample, _library, op

_TENSORS = (
    "x", "shared_in", "shared_in_bias", "shared_out", "experts_in", "experts_in_bias",
    "experts_out", "out_bias", "router", "router_bias", "gate_scale", "balance",
)  # fmt: skip
_ARGUMENTS = (
    "Tensor x, Tensor? shared_in, Tensor? shared_in_bias, Tensor? shared_out, Tensor? experts_in,"
    " Tensor? experts_in_bias, Tensor? experts_out, Tensor? out_bias, Tensor? router,"
    " Tensor? router_bias, Tensor? gate_scale, Tensor? balance, int active, str activation,"
    " bool gated, str score"
)


def _require(condition: bool, argument: str, what: str) -> None:
    if not condition:
        raise OpError("moe_ffn", argument, what)


def _verify(
    x: Tensor, shared_in: Tensor | None, shared_in_bias: Tensor | None, shared_out: Tensor | None,
    experts_in: Tensor | None, experts_in_bias: Tensor | None, experts_out: Tensor | None,
    out_bias: Tensor | None, router: Tensor | None, router_bias: Tensor | None,
    gate_scale: Tensor | None, balance: Tensor | None, active: int, activation: str, gated: bool,
    score: str,
) -> None:  # fmt: skip
    _require(x.dim() > 0, "x", "has no axes")
    _require(x.is_floating_point(), "x", f"has dtype {x.dtype}, not floating point")
    names = ", ".join(ACTIVATIONS)
    _require(activation in ACTIVATIONS, "activation", f"is {activation!r}, not one of {names}")
    _require(score in SCORES, "score", f"is {score!r}, not one of {', '.join(SCORES)}")
    given = experts_in is not None and active > 0
    _require(shared_in is not None or given, "shared_in", "is missing, and no expert is active")
    for name, a, b in (("shared_in", shared_in, shared_out),
                       ("experts_in", experts_in, experts_out)):  # fmt: skip
        _require((a is None) == (b is None), name, "is given without its output weights, or they")
    width, double = x.shape[-1], 1 + gated
    if shared_in is not None and shared_out is not None:
        size = shared_out.shape[-1]
        _shape("shared_in", shared_in, (double * size, width))
        _shape("shared_in_bias", shared_in_bias, (double * size,))
    if experts_in is None or experts_out is None:
        _require(active == 0, "active", f"is {active}, there are no experts")
        return
    _require(experts_out.dim() == 3, "experts_out", f"has {experts_out.dim()} axes, needs 3")
    count, out, size = experts_out.shape
    _shape("experts_in", experts_in, (count, double * size, width))
    _shape("experts_in_bias", experts_in_bias, (count, double * size))
    _require(0 <= active <= count, "active", f"is {active}, there are {count} experts")
    if shared_out is not None:
        _shape("shared_out", shared_out, (out, shared_out.shape[-1]))
    _shape("out_bias", out_bias, (out,))
    _shape("gate_scale", gate_scale, (count,))
    _shape("balance", balance, (count,))
    _verify_router(router, router_bias, count, width, double, score, active)


def _verify_router(
    router: Tensor | None, bias: Tensor | None, count: int, width: int, double: int, score: str,
    active: int,
) -> None:  # fmt: skip
    if router is None:
        needless = active in (0, count)
        _require(needless, "router", f"is missing, {active} of {count} experts are to be chosen")
        return
    rows = int(router.shape[0])
    _shape("router", router, (rows, width))
    unit = count if score == "linear" else double * count
    fits = rows == unit if score == "linear" else rows > 0 and rows % unit == 0
    _require(fits, "router", f"has {rows} rows, {count} experts need {unit}")
    _shape("router_bias", bias, (rows,))


def _shape(name: str, value: Tensor | None, expected: tuple[int, ...]) -> None:
    if value is not None:
        fits = tuple(value.shape) == tuple(expected)
        _require(fits, name, f"has shape {list(value.shape)}, expected {list(expected)}")


def _cost(*args: Any) -> Cost:
    """Work of the chosen experts; weights of as many experts as the tokens can reach are read."""
    values, active = dict(zip(_TENSORS, args, strict=False)), int(args[len(_TENSORS)])
    x, shared_out, experts_out = values["x"], values["shared_out"], values["experts_out"]
    tokens = math.prod(x.shape[:-1])
    per_token, read = _products("router", values), _size(x)
    for name in ("shared_in", "shared_out"):
        per_token += _products(name, values)
    read += sum(_size(values[name]) for name in _TENSORS[1:] if not name.startswith("experts"))
    if experts_out is not None and active:
        share = active / experts_out.shape[0]
        reached = min(1.0, tokens * share)
        for name in ("experts_in", "experts_out"):
            per_token += int(share * _products(name, values))
        read += sum(int(reached * _size(values[n])) for n in _TENSORS if n.startswith("experts"))
    width = (experts_out if shared_out is None else shared_out).shape[-2]
    return Cost(2 * tokens * per_token, read, tokens * width * x.element_size())


def _products(name: str, values: dict[str, Tensor | None]) -> int:
    value = values[name]
    return 0 if value is None else value.numel()


def _size(value: Tensor | None) -> int:
    return 0 if value is None else value.numel() * value.element_size()


def _fake(x: Tensor, *args: Any) -> Tensor:
    shared_out, experts_out = args[2], args[5]
    width = (experts_out if shared_out is None else shared_out).shape[-2]
    return x.new_empty(*x.shape[:-1], width)


def sample_arguments(
    shape: tuple[int, ...], *, shared: int, experts: int, size: int, active: int, out: int = 0,
    activation: str = "silu", gated: bool = True, score: str = "absolute", bias: bool = False,
    trained: bool = False, representatives: int = 1, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Random arguments of a call.

    Args:
        shape: Of the input, [..., d].
        shared: Neurons that are always on.
        experts: R.
        size: Neurons per expert.
        active: A.
        out: Width of the result, d by default.
        activation: Of the neurons.
        gated: Whether they are gated.
        score: Of the router.
        bias: Whether there are biases.
        trained: Whether gate scales and balance differ from zero.
        representatives: Per expert, in the router.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / math.sqrt(sizes[-1])

    width, double = shape[-1], 1 + gated
    rows = experts if score == "linear" else double * experts * representatives
    x = torch.randn(shape, generator=generator)
    always = (
        draw(double * shared, width), draw(double * shared) if bias else None,
        draw(out or width, shared),
    ) if shared else (None, None, None)  # fmt: skip
    routed = (
        draw(experts, double * size, width), draw(experts, double * size) if bias else None,
        draw(experts, out or width, size),
    )  # fmt: skip
    router = (3 * draw(rows, width), draw(rows) if bias else None) if 0 < active < experts else ()
    gates = (2 * draw(experts), 0.1 * draw(experts)) if trained else (None, None)
    added = draw(out or width) if bias else None
    return (
        x, *always, *routed, added, *(router or (None, None)), *gates, active, activation, gated,
        score,
    )  # fmt: skip


def _samples() -> Iterator[OpSample]:
    def call(*shape: int, **changes: Any) -> tuple[Any, ...]:
        settings = {"shared": 12, "experts": 4, "size": 6, "active": 2, **changes}
        return sample_arguments(shape, **settings)

    yield OpSample("shared and two of four", call(3, 5, 16), grad=True)
    yield OpSample("nothing shared", call(9, 16, shared=0, active=1), grad=True)
    yield OpSample("trained gates", call(9, 16, trained=True), grad=True)
    yield OpSample("every expert", call(7, 16, active=4), grad=True)
    yield OpSample("every expert, trained", call(7, 16, active=3, experts=4, trained=True))
    yield OpSample("no expert", call(8, 16, active=0), grad=True)
    yield OpSample("one token", call(1, 1, 16, trained=True))
    yield OpSample("no tokens", call(0, 16))
    yield OpSample(
        "ungated, biased, wider out",
        call(10, 16, gated=False, activation="gelu_tanh", bias=True, out=24), grad=True,
    )  # fmt: skip
    yield OpSample("biased gates, nothing shared", call(11, 16, shared=0, bias=True), grad=True)
    yield OpSample("linear router", call(12, 16, score="linear", activation="relu", bias=True))
    yield OpSample("three representatives", call(12, 16, representatives=3, score="signed"))
    yield OpSample("one expert", call(6, 16, experts=1, active=1))
    good = call(5, 16)
    yield OpSample("too many", (*good[:12], 5, *good[13:]), refused="there are 4 experts")
    yield OpSample("no router", (*good[:8], None, *good[9:]), refused="are to be chosen")
    yield OpSample("odd router", (*good[:8], good[8][1:], *good[9:]), refused="experts need 8")
    yield OpSample("other width", (good[0][:, 1:], *good[1:]), refused="shared_in has shape")
    yield OpSample("nothing at all", (good[0], *[None] * 11, 0, "silu", True, "absolute"),
                   refused="no expert is active")  # fmt: skip
    yield OpSample("unknown", (*good[:13], "swish", *good[14:]), refused="not one of silu")
    yield OpSample("integers", (good[0].long(), *good[1:]), refused="not floating point")


def _fast(*args: Any) -> Tensor:
    found = one_token(*args)
    return fast(*args) if found is None else found


@op(
    f"moe_ffn({_ARGUMENTS}) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=_fake,
    fast=_fast,
    samples=_samples,
)
def moe_ffn(
    x: Tensor, shared_in: Tensor | None, shared_in_bias: Tensor | None, shared_out: Tensor | None,
    experts_in: Tensor | None, experts_in_bias: Tensor | None, experts_out: Tensor | None,
    out_bias: Tensor | None, router: Tensor | None, router_bias: Tensor | None,
    gate_scale: Tensor | None, balance: Tensor | None, active: int, activation: str, gated: bool,
    score: str,
) -> Tensor:  # fmt: skip
    """A feed-forward layer carved into always-on neurons and experts.

    Args:
        x: Floating point [..., d].
        shared_in: [s, d]; gated: [2s, d], the activated rows first. None: nothing is shared.
        shared_in_bias: One value per row, or None.
        shared_out: [o, s].
        experts_in: [R, m, d]; gated: [R, 2m, d]. None: no experts.
        experts_in_bias: [R, m] or [R, 2m], or None.
        experts_out: [R, o, m].
        out_bias: [o], added once, or None.
        router: See `moe_routing.expert_scores`; may be None if all experts are active, or none.
        router_bias: One value per row of `router`, or None.
        gate_scale: u, float [R]: the gate of a chosen expert is 1 + p*u. None: 1.
        balance: b, float [R], added to p for the choice only. It gets no gradient.
        active: A, experts per token.
        activation: A key of `moe_routing.ACTIVATIONS`.
        gated: Whether the activated half multiplies the other one (SwiGLU, GeGLU).
        score: "absolute", "signed" or "linear".

    Returns:
        [..., o] in the dtype of `x`.

    Raises:
        OpError: Shapes, dtypes or numbers of experts do not fit together.
    """
    tokens = x.reshape(-1, x.shape[-1])
    result: Tensor | None = out_bias
    if shared_in is not None and shared_out is not None:
        z = linear(tokens, shared_in, shared_in_bias)
        result = linear(hidden(z, activation, gated), shared_out, out_bias)
    if experts_in is not None and experts_out is not None and active > 0:
        count, out, size = experts_out.shape
        bias = None if experts_in_bias is None else experts_in_bias.flatten()
        z = linear(tokens, experts_in.flatten(0, 1), bias).unflatten(-1, (count, -1))
        neurons = hidden(z, activation, gated)
        if router is not None:
            scores = expert_scores(tokens, router, router_bias, count, activation, gated, score)
            mask, gates = route(scores, gate_scale, balance, active)
            gates = mask.to(gates.dtype) * gates
            neurons = neurons * gates.to(x.dtype).unsqueeze(-1)
        weight = experts_out.permute(0, 2, 1).reshape(count * size, out)
        routed = neurons.flatten(1) @ weight
        result = routed if result is None else result + routed
    assert result is not None, "verified before"
    return result.reshape(*x.shape[:-1], result.shape[-1])


# ---- the gradient ------------------------------------------------------------------------

_library().define(f"moe_ffn_grad(Tensor grad, bool[] wanted, {_ARGUMENTS}) -> Tensor[]")
_library().impl("moe_ffn_grad", gradients, "CompositeExplicitAutograd")


def _fake_gradients(grad: Tensor, wanted: list[bool], *args: Any) -> list[Tensor]:
    pairs = zip(args, wanted, strict=False)
    return [torch.empty_like(v) if w else grad.new_empty(0) for v, w in pairs]


torch.library.register_fake("resplice::moe_ffn_grad", _fake_gradients, lib=_library())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.rest = inputs[: len(_TENSORS)], inputs[len(_TENSORS) :]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[: len(_TENSORS)])
    wanted[-1] = False  # the balance only decides who is chosen
    found = torch.ops.resplice.moe_ffn_grad(
        grad.contiguous(), wanted, *ctx.saved_tensors, *ctx.rest
    )
    return (*(g if w else None for g, w in zip(found, wanted, strict=True)), *[None] * 4)


moe_ffn.differentiate(_backward, setup=_save)
moe_ffn.lowerings["onnx"] = "resplice.backends.onnx.moe_ffn:lower"
moe_ffn.lowerings["coreml"] = "resplice.backends.coreml.moe_ffn:lower"
