"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.values import channels
from resplice.backends.coreml.mil.registry import implements


@implements("relu", moves=True)
def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)."""
    return functional.relu(x)


@implements("relu6", moves=True)
def relu6(x: torch.Tensor) -> torch.Tensor:
    """min(max(x, 0), 6)."""
    return functional.relu6(x)


@implements("clamped_relu")
def clamped_relu(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Leaky ReLU with slope `alpha`, limited to at most `beta`."""
    return torch.clamp(torch.where(x >= 0, x, alpha * x), max=beta)


@implements("leaky_relu")
def leaky_relu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """`x`, and `alpha * x` where negative."""
    return functional.leaky_relu(x, alpha)


@implements("prelu")
def prelu(x: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Leaky ReLU with one slope a channel (axis 1)."""
    slope = channels(alpha, x.dim()) if isinstance(alpha, torch.Tensor) else alpha
    return torch.where(x >= 0, x, slope * x)


@implements("elu")
def elu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """`x`, and `alpha * (exp(x) - 1)` where negative."""
    return functional.elu(x, alpha)


@implements("gelu")
def gelu(x: torch.Tensor, mode: str) -> torch.Tensor:
    """X times the normal distribution function, exact or by MIL's two approximations."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@implements("linear_activation")
def linear_activation(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """`alpha * x + beta`."""
    return alpha * x + beta


@implements("scaled_tanh")
def scaled_tanh(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """`alpha * tanh(beta * x)`."""
    return alpha * torch.tanh(beta * x)


@implements("sigmoid")
def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


@implements("sigmoid_hard")
def sigmoid_hard(x: torch.Tensor, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    """`alpha * x + beta`, limited to [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


@implements("silu")
def silu(x: torch.Tensor) -> torch.Tensor:
    """X * sigmoid(x)."""
    return functional.silu(x)


@implements("softmax")
def softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Exponentials along an axis, divided by their sum."""
    return torch.softmax(x, axis)


@implements("softplus")
def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x))."""
    return torch.logaddexp(x, torch.zeros_like(x))


@implements("softplus_parametric")
def softplus_parametric(
    x: torch.Tensor, alpha: torch.Tensor | float, beta: torch.Tensor | float
) -> torch.Tensor:
    """`alpha * log(1 + exp(beta * x))` with one pair of parameters a channel (axis 1)."""
    outer, inner = (channels(torch.as_tensor(value), x.dim()) for value in (alpha, beta))
    return outer * softplus(inner * x)


@implements("softsign")
def softsign(x: torch.Tensor) -> torch.Tensor:
    """X / (1 + |x|)."""
    return functional.softsign(x)


@implements("thresholded_relu", moves=True)
def thresholded_relu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """`x` from `alpha` on, else 0."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))


_BY_NAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": relu,
    "sigmoid": sigmoid,
    "sigmoid_hard": sigmoid_hard,
    "hard_sigmoid": sigmoid_hard,
    "scaled_tanh": torch.tanh,
    "tanh": torch.tanh,
}


def by_name(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation that recurrent ops name, with its default parameters.

    Those of the scaled tanh are 1 and 1 there, those of the hard sigmoid 0.2 and 0.5.
    """
    return _BY_NAME[name]
