"""Gradients of a rewritten program against the estimator written out in float64, and where it runs.

The reference is the linear layer of arXiv 2502.05003, section 3, without autograd:

    x_h = HT(x)   x' = Q(x_h)   W_h = HT(W)   W' = Q(W_h)   y = x' W'^T + b
    dx = HT(M_x * (dy W'))      dW = HT(M_W * (dy^T x'))      db = sum(dy)

Nothing flows through root mean square, scale or clip bound.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resplice
from resplice.kernels.gaussian_grid import ALPHA
from resplice.passes.quest import Quest, freeze
from resplice.recompute import in_segments

BLOCK, WIDTH, HIDDEN, ROWS = 32, 96, 160, 7
LIMIT = {1: 1.30, 2: 4 / 3, 3: 8 / 7, 4: 16 / 15}
"""Multiples of alpha * rms up to which a value is trusted; at one bit the paper's clip."""


class Net(nn.Module):
    """Two linear layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] -> the same."""
        return x + self.down(nn.functional.silu(self.up(x)))


def turn(x: Tensor) -> Tensor:
    """The block transform, from its definition: the sign is the parity of common bits."""
    index = torch.arange(BLOCK)
    parity = torch.tensor([[bin(int(i & j)).count("1") % 2 for j in index] for i in index])
    matrix = (1 - 2 * parity).to(x.dtype) / math.sqrt(BLOCK)
    return (x.unflatten(-1, (-1, BLOCK)) @ matrix).flatten(-2)


def quantized(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Nearest level of every rotated value, and where its gradient passes."""
    values = turn(x)
    scale = ALPHA[bits] * values.square().mean(-1, keepdim=True).sqrt()
    levels = torch.linspace(-1, 1, 2**bits, dtype=x.dtype) * (scale + 1e-8)[..., None]
    nearest = (values[..., None] - levels).abs().argmin(-1, keepdim=True)
    rounded = levels.expand(*values.shape, -1).gather(-1, nearest)[..., 0]
    return rounded, values.abs() <= LIMIT[bits] * scale


class Layer:
    """One linear layer: forward, and backward by hand."""

    def __init__(self, linear: nn.Linear, weight_bits: int, act_bits: int) -> None:
        self.linear, self.bits = linear, (weight_bits, act_bits)

    def forward(self, x: Tensor) -> Tensor:
        self.w, self.mask_w = quantized(self.linear.weight.detach(), self.bits[0])
        self.x, self.mask_x = quantized(x, self.bits[1])
        return self.x @ self.w.T + self.linear.bias.detach()

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input, weight and bias."""
        dx, dw = turn(self.mask_x * (dy @ self.w)), turn(self.mask_w * (dy.T @ self.x))
        return dx, dw, dy.sum(0)


def by_hand(net: Net, x: Tensor, dy: Tensor, bits: tuple[int, int]) -> dict[str, Tensor]:
    """Output and all gradients of the two-layer net, in float64."""
    up, down = Layer(net.up, *bits), Layer(net.down, *bits)
    inner = up.forward(x)
    gate = inner.sigmoid()
    y = x + down.forward(inner * gate)
    dh, dw_down, db_down = down.backward(dy)
    dx, dw_up, db_up = up.backward(dh * (gate + inner * gate * (1 - gate)))
    return {
        "y": y, "x": dx + dy, "up.weight": dw_up, "up.bias": db_up, "down.weight": dw_down,
        "down.bias": db_down,
    }  # fmt: skip


def net(dtype: torch.dtype = torch.float32) -> Net:
    """Weights of very different rows, so that a scale shared by mistake shows."""
    torch.manual_seed(5)
    made = Net().to(dtype).eval()
    with torch.no_grad():
        made.up.weight.mul_(torch.logspace(-1, 1, HIDDEN, dtype=dtype)[:, None])
        made.up.weight[:, 3] *= 20
    return made


def trainable(weight_bits: int, act_bits: int, dtype: torch.dtype = torch.float32) -> Any:
    """The rewritten net with weights of its own."""
    item = Quest(weight_bits=weight_bits, act_bits=act_bits, mode="qat", hadamard=BLOCK)
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    return resplice.optimize(net(dtype), [item], example_inputs=(x,)).trainable()


def gradients(model: Any, run: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients after one backward pass."""
    x = x.clone().requires_grad_()
    for value in model.parameters():
        value.grad = None
    y = run(x)
    y.backward(dy.to(y.dtype))
    named = {name: value.grad.clone() for name, value in model.program.named_weights()}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **named}


def sample(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Input with rows of different size, and an output gradient."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=draw, dtype=dtype)
    scale = torch.logspace(-2, 1, ROWS, dtype=dtype)[:, None]
    return x * scale, torch.randn(ROWS, WIDTH, generator=draw, dtype=dtype)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 1), (2, 2), (4, 4), (1, 4), (3, 2)])
def test_gradients_are_those_of_the_paper(weight_bits: int, act_bits: int) -> None:
    model = trainable(weight_bits, act_bits, torch.float64)
    x, dy = sample(weight_bits * 10 + act_bits, torch.float64)
    expected = by_hand(net(torch.float64), x, dy, (weight_bits, act_bits))
    found = gradients(model, model, x, dy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["x", "up.weight", "down.weight"])
def test_masks_matter_in_these_tests(name: str) -> None:
    """Where every gradient passes, results are far from the reference's."""
    x, dy = sample(0, torch.float64)
    item = Quest(weight_bits=1, act_bits=1, mode="qat", hadamard=BLOCK, clip=1e6)
    model = resplice.optimize(net(torch.float64), [item], example_inputs=(x,)).trainable()
    expected, found = by_hand(net(torch.float64), x, dy, (1, 1)), gradients(model, model, x, dy)
    assert (found[name] - expected[name]).norm() > 0.1 * expected[name].norm()


def test_gradients_under_checkpointing_are_bit_equal() -> None:
    model = trainable(2, 2)
    x, dy = sample(1)
    expected = gradients(model, model, x, dy)
    segments = in_segments(model.program, 3)
    runs = {
        "whole": lambda v: checkpoint(model, v, use_reentrant=False),
        "reentrant": lambda v: checkpoint(model, v, use_reentrant=True),
        "segments": lambda v: segments({"x": v})[0],
    }
    for label, run in runs.items():
        found = gradients(model, run, x, dy)
        assert all(torch.equal(found[name], expected[name]) for name in expected), label


@pytest.mark.parametrize("whole", [True, False], ids=["graph", "model"])
def test_gradients_under_compilation(whole: bool) -> None:
    model = trainable(4, 4)
    x, dy = sample(2)
    expected = gradients(model, model, x, dy)
    if whole:
        compiled = torch.compile(model.program.module, backend="aot_eager", fullgraph=True)
        found = gradients(model, lambda v: compiled(v)[0], x, dy)
    else:
        found = gradients(model, torch.compile(model, backend="aot_eager"), x, dy)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.slow
def test_gradients_under_inductor() -> None:
    """Needs a C++ compiler."""
    model = trainable(1, 1)
    x, dy = sample(3)
    expected = gradients(model, model, x, dy)
    compiled = torch.compile(model.program.module, fullgraph=True)
    found = gradients(model, lambda v: compiled(v)[0], x, dy)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 1), (4, 4), (3, 16)])
def test_autocast_narrows_products_only(weight_bits: int, act_bits: int) -> None:
    """Weights, gradients and the rounding stay in float32; freezing is bit-equal there, too."""
    model = trainable(weight_bits, act_bits)
    x, dy = sample(4)
    expected = gradients(model, model, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, model, x, dy)
        packed, change = freeze(model.program)
        with torch.no_grad():
            assert torch.equal(packed(x), model(x))
    assert change.count == 2
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        error = (found[name] - value).norm() / value.norm()
        bar = 0.3 if act_bits == 1 else 0.1  # some values of the second layer change their level
        assert error < bar, (name, error)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model.program.module(x)[0]
    assert not torch.equal(narrow, expected["y"]), "the products ran in bfloat16"


def test_rounding_ignores_autocast() -> None:
    """A transform in bfloat16 would move values across the borders of levels."""
    from resplice.kernels.hadamard import hadamard
    from resplice.kernels.quest_quantize import quest_quantize

    x = torch.randn(64, 256)
    expected, turned = quest_quantize(x, 4), hadamard(x, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quest_quantize(x, 4), expected)
        assert torch.equal(hadamard(x, 128), turned)


def test_no_gradient_reaches_the_scale() -> None:
    """Shrinking a row by its gradient alone would show a component along the row."""
    from resplice.kernels.quest_quantize import quest_quantize

    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    y = quest_quantize(x, 2, hadamard="off", estimator="ste")
    g = torch.randn(5, 64, dtype=torch.float64)
    y.backward(g)
    assert x.grad is not None
    assert torch.equal(x.grad, g)
