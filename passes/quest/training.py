"""Training a program whose weights are rounded on the way.

Source: Panferov et al., arXiv 2502.05003: AdamW with betas 0.9 and 0.95, weight decay 0.1 on the
quantised layers' weights only, gradients clipped to norm 1, a tenth of the steps as warm-up, then a
cosine to a tenth of the rate. The weights stay in float32; the rounding is in the graph.

    trained = resplice.optimize(model, "quest{weight-bits=1 act-bits=1 mode=qat}", ...)
    train(trained, batches, recipe=Recipe(rate=1e-3), checkpoint="run.safetensors")
    packed, _ = freeze(trained.program)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor, fx, nn

from resplice.api import Optimized
from resplice.context import Batch
from resplice.errors import UsageError
from resplice.kernels.quest_quantize import rounded
from resplice.passes.quest.freeze import stored_weight
from resplice.program import Program
from resplice.progress import Report
from resplice.recompute import in_segments
from resplice.training import Loss, Recipe, fit, next_token_loss, own


@dataclass
class Training:
    """What training did.

    Attributes:
        losses: One per step.
        trained: Names of the weights that were trained.
        decayed: Names of those that decayed: the quantised layers' weights.
    """

    losses: list[float] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    decayed: list[str] = field(default_factory=list)


def train(
    model: Optimized | Program,
    batches: Sequence[Batch],
    *,
    recipe: Recipe | None = None,
    loss: Loss = next_token_loss,
    only: Sequence[str] = ("*",),
    decayed: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    segments: int = 0,
    progress: Report | None = None,
) -> Training:
    """Train a program in place, one step per `recipe.accumulate` batches.

    Weights are copied before they are trained, so the caller's model stays as it is, and are
    frozen again afterwards.

    Args:
        model: Rewritten by `quest{mode=qat}`.
        batches: Flat named inputs; anything with a length that can be indexed.
        recipe: How to train.
        loss: What to minimise.
        only: Patterns of the names of weights to train.
        decayed: Names of the weights that decay; by default `quantized_weights(model)`.
        checkpoint: A safetensors file to go on from if it exists.
        every: Steps between checkpoints.
        segments: Keep activations only between this many parts of the graph, and compute the rest
            again in the backward pass; 0 keeps all. The result is the same.
        progress: Called with ("training", done, steps); by default a bar is drawn on stderr.

    Raises:
        UsageError: Nothing is quantised (and `decayed` not given), nothing matches, a weight is
            not float32, a loss is not finite, or the checkpoint is of another training.
    """
    program = model.program if isinstance(model, Optimized) else model
    decaying = quantized_weights(program) if decayed is None else list(decayed)
    if decayed is None and not decaying:
        raise UsageError(
            "no weight of this program is rounded", hint="rewrite it with quest{mode=qat} first"
        )
    run = in_segments(program, segments) if segments else program.run
    parameters = own(program, _chosen(program, only))
    quantized = {id(program.weight(name)) for name in decaying}
    decaying = [name for name, value in parameters.items() if id(value) in quantized]

    def loss_of(batch: Batch) -> Tensor:
        program.check_inputs(batch)
        names = [port.name for port in program.outputs]
        return loss(dict(zip(names, run(batch), strict=True)), batch)

    losses = fit(
        parameters, loss_of, batches, recipe or Recipe(), decayed=decaying,
        checkpoint=checkpoint, every=every, progress=progress,
    )  # fmt: skip
    for value in parameters.values():
        value.requires_grad_(False)
        value.grad = None
    return Training(losses, list(parameters), decaying)


def quantized_weights(model: Optimized | Program) -> list[str]:
    """Names of the matrices that are rounded, or multiplied with rounded activations."""
    program = model.program if isinstance(model, Optimized) else model
    found: dict[str, None] = {}
    for node in program.graph.find_nodes(op="call_function", target=rounded.overload):
        stored = stored_weight(node)
        sources = [stored] if stored else [s for user in node.users for s in user.all_input_nodes]
        found |= {str(source.target): None for source in sources if _is_matrix(source)}
    return list(found)


def _is_matrix(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.meta["val"].dim() >= 2


def _chosen(program: Program, patterns: Sequence[str]) -> list[str]:
    parameters = [
        name for name, value in program.named_weights()
        if isinstance(value, nn.Parameter) and value.is_floating_point()
    ]  # fmt: skip
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in parameters):
            raise UsageError(f"no weight matches {pattern!r}")
    return [name for name in parameters if any(fnmatch(name, p) for p in patterns)]
