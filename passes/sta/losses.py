"""Losses for fine-tuning a rewritten program with its original as the teacher.

Source: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507, section 3.3
("Training"): attention distillation, distillation of the output, and the flow-matching data loss,
weighted 0.5, 0.5 and 1. The paper does not say whether norms are sums or means; here they are
means over all elements.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resplice.errors import UsageError
from resplice.kernels.tile_attention import tile_attention
from resplice.program import Program


@dataclass(frozen=True)
class Losses:
    """The three losses, scalars, and their weighted sum.

    Attributes:
        data: Distance of the output from the target.
        final: Distance of the output from the teacher's.
        attention: Distance of the attention outputs from the teacher's, mean over the layers.
        total: alpha * data + beta * final + gamma * attention.
    """

    data: Tensor
    final: Tensor
    attention: Tensor
    total: Tensor


def flow_target(noise: Tensor, clean: Tensor) -> Tensor:
    """What a flow-matching model should predict: noise - clean, of the output's shape."""
    return noise - clean


def distillation_losses(
    student: Program,
    teacher: Program,
    inputs: Mapping[str, Tensor],
    target: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    gamma: float = 0.5,
) -> Losses:
    """Run both programs on the same inputs and compare outputs and attention outputs.

    Args:
        student: The rewritten program, with weights to train (see `Optimized.trainable`).
        teacher: The program before the rewrite; it gets no gradient.
        inputs: Flat named inputs, as `Program.call.bind` gives them.
        target: What the first output should be, such as `flow_target`; None leaves the data loss
            at zero.
        alpha: Weight of the data loss.
        beta: Weight of the final loss.
        gamma: Weight of the attention loss.

    Raises:
        UsageError: The student has no rewritten attention, or the teacher lacks one of them.
    """
    names = [n.name for n in student.graph.nodes if n.target is tile_attention.overload]
    known = {node.name for node in teacher.graph.nodes}
    missing = [name for name in names if name not in known]
    if not names or missing:
        what = f"has no {', '.join(missing)}" if names else "is no original of a rewritten program"
        raise UsageError(f"the teacher {what}", hint="give the program that `sta` was applied to")
    output, attentions = values_at(student, inputs, names)
    with torch.no_grad():
        wanted, originals = values_at(teacher, inputs, names)
    zero = output.new_zeros(())
    data = zero if target is None else (target - output).square().mean()
    final = (output - wanted).square().mean()
    each = [(attentions[name] - originals[name]).square().mean() for name in names]
    attention = torch.stack(each).mean()
    return Losses(data, final, attention, alpha * data + beta * final + gamma * attention)


def values_at(
    program: Program, inputs: Mapping[str, Tensor], names: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a program; returns its first output and the values of some nodes, with gradients."""
    run = _Recording(program.module, names)
    outputs = run.run(*(inputs[node.name] for node in program.placeholders))
    return outputs[0], run.values


class _Recording(fx.Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(module)
        self._names = set(names)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = result
        return result
