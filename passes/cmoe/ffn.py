"""A feed-forward layer seen neuron by neuron, whatever the model spells it like."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from resplice.errors import OpError
from resplice.kernels.moe_routing import ACTIVATIONS


@dataclass(frozen=True)
class Ffn:
    """y = down(act(first x + b1) * (second x + b2)) + b; without `second` only the first factor.

    Neuron i is row i of `first` and `second` and column i of `down`.

    Attributes:
        first: [f, d], the rows behind the activation (the gate, or the only projection).
        second: [f, d] ("up"), or None where there is no gate.
        down: [o, f].
        first_bias: [f] or None.
        second_bias: [f] or None.
        down_bias: [o] or None.
        activation: A key of `moe_routing.ACTIVATIONS`.
    """

    first: Tensor
    second: Tensor | None
    down: Tensor
    first_bias: Tensor | None = None
    second_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        """Validate shapes.

        Raises:
            OpError: The matrices do not fit together.
        """
        shape = tuple(self.first.shape)
        _require(self.first.dim() == 2 and self.down.dim() == 2, "gate", "must be a matrix")
        size = shape[0]
        if self.second is not None:
            self._matches("up", self.second, shape)
        fits = self.down.shape[1] == size
        _require(fits, "down", f"has {self.down.shape[1]} columns, there are {size} neurons")
        for name in ("first_bias", "second_bias"):
            self._matches(name, getattr(self, name), (size,))
        self._matches("down_bias", self.down_bias, (int(self.down.shape[0]),))
        known = self.activation in ACTIVATIONS
        _require(known, "activation", f"is {self.activation!r}, not one of {list(ACTIVATIONS)}")

    @staticmethod
    def _matches(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        fits = value is None or tuple(value.shape) == shape
        _require(fits, name, f"has shape {list(getattr(value, 'shape', ()))}, not {list(shape)}")

    @property
    def size(self) -> int:
        """Number of neurons f."""
        return int(self.first.shape[0])

    @property
    def gated(self) -> bool:
        """Whether there are two projections."""
        return self.second is not None

    def hidden(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Neurons (all, or the given rows) of tokens [q, d]: [q, rows]."""
        h = ACTIVATIONS[self.activation](self._project(x, self.first, self.first_bias, rows))
        if self.second is None:
            return h
        return h * self._project(x, self.second, self.second_bias, rows)

    @staticmethod
    def _project(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        if rows is None:
            return linear(x, weight, bias)
        return linear(x, weight[rows], None if bias is None else bias[rows])

    def unit(self) -> Ffn:
        """The layer with input rows of length one, biases on the same scale."""
        first, b1 = _unit(self.first, self.first_bias)
        second, b2 = (None, None)
        if self.second is not None:
            second, b2 = _unit(self.second, self.second_bias)
        return replace(self, first=first, second=second, first_bias=b1, second_bias=b2)

    def hidden_of_directions(self, x: Tensor) -> Tensor:
        """Neurons of tokens scaled to length one; after `unit`, what the published code profiles.

        A bias takes part in the same scale: act((w x + b) / (|w| |x|)).
        """
        length = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        h = ACTIVATIONS[self.activation](_scaled(x, length, self.first, self.first_bias))
        if self.second is None:
            return h
        return h * _scaled(x, length, self.second, self.second_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The dense layer: [..., d] -> [..., o]."""
        return linear(self.hidden(x), self.down, self.down_bias)

    def to(self, kind: torch.dtype) -> Ffn:
        """The layer in another dtype."""
        values: dict[str, Any] = {
            f.name: value.to(kind)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **values)

    def rows(self, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input rows of some neurons, first and second projection in a row, and their biases."""
        parts = [self.first[neurons]] + ([] if self.second is None else [self.second[neurons]])
        weight = torch.cat(parts)
        if self.first_bias is None and self.second_bias is None:
            return weight, None
        zeros = weight.new_zeros(len(neurons))
        biases = [zeros if self.first_bias is None else self.first_bias[neurons]]
        if self.second is not None:
            biases.append(zeros if self.second_bias is None else self.second_bias[neurons])
        return weight, torch.cat(biases)


def _unit(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    length = weight.norm(dim=-1).clamp_min(1e-12)
    return weight / length.unsqueeze(-1), None if bias is None else bias / length


def _scaled(x: Tensor, length: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = linear(x / length, weight)
    return z if bias is None else z + bias / length


def _require(condition: bool, argument: str, what: str) -> None:
    if not condition:
        raise OpError("carve", argument, what)
