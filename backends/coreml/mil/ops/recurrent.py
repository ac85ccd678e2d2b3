"""Recurrent layers, step by step. Sequences are `[steps, batch, features]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from resplice.backends.coreml.mil.ops.activation import by_name
from resplice.backends.coreml.mil.registry import implements

Activation = Callable[[torch.Tensor], torch.Tensor]


@implements("rnn")
def rnn(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    direction: str,
    output_sequence: bool,
    activation: str,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """H = f(W x + R h + b); the hidden states and the last of them."""
    act, hidden, states = by_name(activation), initial_h, []
    for step in _steps(functional.linear(x, weight_ih, bias), direction):
        hidden = act(step + functional.linear(hidden, weight_hh))
        states.append(hidden)
    return _collect(states, output_sequence), hidden


@implements("gru")
def gru(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    direction: str,
    output_sequence: bool,
    recurrent_activation: str,
    activation: str,
    bias: torch.Tensor | None = None,
    reset_after: bool = False,
    input_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates in the order reset, output, update; the hidden states and the last of them.

    The reset gate acts on the hidden state, or with `reset_after` on its product with the
    recurrent weight (the bias of that product included, the input's bias apart).
    """
    gate, act = by_name(recurrent_activation), by_name(activation)
    reset_w, output_w, update_w = weight_hh.chunk(3)
    none = torch.zeros(3 * output_w.shape[0])
    reset_b, output_b, update_b = (none if bias is None else bias).chunk(3)
    hidden, states = initial_h, []
    for step in _steps(functional.linear(x, weight_ih, input_bias), direction):
        reset_x, output_x, update_x = step.chunk(3, -1)
        reset = gate(reset_x + functional.linear(hidden, reset_w, reset_b))
        update = gate(update_x + functional.linear(hidden, update_w, update_b))
        if reset_after:
            inner = reset * functional.linear(hidden, output_w, output_b)
        else:
            inner = functional.linear(reset * hidden, output_w, output_b)
        hidden = (1 - update) * act(output_x + inner) + update * hidden
        states.append(hidden)
    return _collect(states, output_sequence), hidden


@dataclass(frozen=True)
class _Lstm:
    """One direction of an LSTM."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    bias: torch.Tensor | None
    peephole: torch.Tensor | None
    gate: Activation
    cell: Activation
    out: Activation
    clip: float | None

    def run(
        self, x: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor, direction: str
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """All hidden states in the order computed, the last one, and the last memory."""
        size = hidden.shape[-1]
        peep = torch.zeros(3 * size) if self.peephole is None else self.peephole
        peep_input, peep_forget, peep_output = peep.chunk(3)
        states = []
        for step in _steps(functional.linear(x, self.weight_ih, self.bias), direction):
            parts = step + functional.linear(hidden, self.weight_hh)
            enter, forget, output, candidate = parts.chunk(4, -1)
            enter = self.gate(enter + peep_input * memory)
            forget = self.gate(forget + peep_forget * memory)
            memory = forget * memory + enter * self.cell(candidate)
            if self.clip is not None:
                memory = memory.clamp(-self.clip, self.clip)
            hidden = self.gate(output + peep_output * memory) * self.out(memory)
            states.append(hidden)
        return states, hidden, memory


@implements("lstm")
def lstm(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    initial_c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    direction: str,
    output_sequence: bool,
    recurrent_activation: str,
    cell_activation: str,
    activation: str,
    bias: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
    weight_ih_back: torch.Tensor | None = None,
    weight_hh_back: torch.Tensor | None = None,
    bias_back: torch.Tensor | None = None,
    peephole_back: torch.Tensor | None = None,
    clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates in the order input, forget, output, cell; states, last state and last memory.

    States come in the order computed, so backwards for direction `reverse`. With both directions,
    the states of the two lie side by side on the last axis, both in the order of the input.
    """
    shared = (by_name(recurrent_activation), by_name(cell_activation), by_name(activation), clip)
    if direction != "bidirectional":
        layer = _Lstm(weight_ih, weight_hh, bias, peephole, *shared)
        states, hidden, memory = layer.run(x, initial_h, initial_c, direction)
        return _collect(states, output_sequence), hidden, memory
    assert weight_ih_back is not None
    assert weight_hh_back is not None
    there = _Lstm(weight_ih, weight_hh, bias, peephole, *shared)
    back = _Lstm(weight_ih_back, weight_hh_back, bias_back, peephole_back, *shared)
    h, c = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    first = there.run(x, h[0], c[0], "forward")
    second = back.run(x, h[1], c[1], "reverse")
    sequences = _collect(first[0], output_sequence), _collect(second[0], output_sequence).flip(0)
    return (
        torch.cat(sequences, -1),
        torch.cat((first[1], second[1]), -1),
        torch.cat((first[2], second[2]), -1),
    )


def _steps(projected: torch.Tensor, direction: str) -> tuple[torch.Tensor, ...]:
    steps = projected.unbind(0)
    return steps[::-1] if direction == "reverse" else steps


def _collect(states: list[torch.Tensor], whole: bool) -> torch.Tensor:
    """All states in the order computed, or the last alone, along a first axis."""
    return torch.stack(states) if whole else states[-1].unsqueeze(0)
