"""Training weights with a fixed recipe: schedule, decay, clipping, accumulation, checkpoints.

A training is a function of its weights, data and recipe, and of torch's random state where the
model draws numbers. A checkpoint holds all of that but the data, so a training that was stopped
goes on bit by bit as if it had not been (same machine, same number of threads).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from resplice import checkpoints, weights
from resplice.context import Batch
from resplice.errors import UsageError
from resplice.program import Program
from resplice.progress import Report, reporting

Loss = Callable[[dict[str, Tensor], Batch], Tensor]
"""(outputs by name, batch) -> scalar."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of QuEST (arXiv 2502.05003, appendix and code).

    Attributes:
        rate: Highest learning rate. The paper's falls with size: 1.2e-3 for 30M parameters.
        warmup: Share of the steps in which the rate rises linearly from rate / 100.
        last: Share of the rate at the end of the cosine that follows.
        betas: Of AdamW.
        decay: Weight decay of the weights that decay.
        clip: Largest norm of all gradients together; 0 leaves them.
        accumulate: Batches per step; their mean loss is minimised.
        autocast: "bf16" runs products in bfloat16; weights and optimiser stay in float32.
    """

    rate: float = 1.2e-3
    warmup: float = 0.1
    last: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    autocast: Literal["off", "bf16"] = "off"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UsageError: A value is out of range.
        """
        within = {
            "rate": self.rate > 0, "warmup": 0 <= self.warmup <= 1, "last": 0 <= self.last <= 1,
            "decay": self.decay >= 0, "clip": self.clip >= 0, "accumulate": self.accumulate >= 1,
            "autocast": self.autocast in ("off", "bf16"),
        }  # fmt: skip
        wrong = [f"{name}={getattr(self, name)}" for name, good in within.items() if not good]
        if wrong:
            raise UsageError(f"recipe: out of range: {', '.join(wrong)}")

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of one of `steps` steps, counted from 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.rate * (0.01 + 0.99 * step / rising)
        done = (step - rising) / max(1, steps - 1 - rising)
        return self.rate * (self.last + (1 - self.last) * (1 + math.cos(math.pi * done)) / 2)


def next_token_loss(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of the next token, from the first output [B, S, V] and `input_ids` [B, S]."""
    logits = next(iter(outputs.values()))[:, :-1]
    targets = batch["input_ids"][:, 1:]
    valid = batch.get("attention_mask")
    if valid is not None:
        targets = targets.masked_fill(valid[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def own(program: Program, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Copies of weights that can be trained, in every function; tied weights stay tied.

    Returns:
        The copies by name; a tied weight comes once, under its first name.
    """
    copies: dict[object, nn.Parameter] = {}
    result: dict[str, nn.Parameter] = {}
    for name in names:
        value = program.weight(name)
        key = weights.key(value)
        if key not in copies:
            result[name] = copies[key] = nn.Parameter(value.detach().clone())
        for _, function in program.all_functions():
            if weights.has(function.module, name):
                weights.put(function.module, name, copies[key])
    return result


def fit(
    trained: Mapping[str, nn.Parameter],
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    recipe: Recipe,
    *,
    decayed: Collection[str] = (),
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: Report | None = None,
) -> list[float]:
    """Train weights in place, one step per `recipe.accumulate` batches.

    Args:
        trained: The weights by name, float32.
        loss: Of one batch, a scalar that depends on the weights.
        batches: Anything with a length that can be indexed; a batch is read when it is needed.
        recipe: How to train.
        decayed: Names of the weights that decay.
        checkpoint: A safetensors file to go on from if it exists, written every `every` steps and
            at the end. Going on restores the random state of torch on the CPU as well.
        every: Steps between checkpoints.
        progress: Called with ("training", done, steps); by default a bar is drawn on stderr.

    Returns:
        The loss of every step.

    Raises:
        UsageError: A weight is not float32, the batches make no step, a loss is not finite, or the
            checkpoint is of another training.
    """
    steps = len(batches) // recipe.accumulate
    if steps == 0:
        raise UsageError(f"{len(batches)} batches make no step of {recipe.accumulate}")
    run = _Run(trained, loss, recipe, decayed, steps)
    file = Path(checkpoint) if checkpoint else None
    losses = run.restore(file, batches) if file else []
    with reporting(progress, "training") as report:
        for step in range(len(losses), steps):
            report("training", step, steps)
            first = step * recipe.accumulate
            parts = [batches[first + part] for part in range(recipe.accumulate)]
            losses.append(run.step(step, parts))
            if file and ((step + 1) % every == 0 or step + 1 == steps):
                run.save(file, losses, parts[-1])
        report("training", steps, steps)
    return losses


class _Run:
    """Weights, their optimiser and how one step is made."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        loss: Callable[[Batch], Tensor],
        recipe: Recipe,
        decayed: Collection[str],
        steps: int,
    ) -> None:
        self.trained, self.loss, self.recipe, self.steps = dict(trained), loss, recipe, steps
        narrow = [name for name, value in trained.items() if value.dtype != torch.float32]
        if narrow or not trained:
            raise UsageError(
                f"weights to train must be float32: {', '.join(narrow[:4]) or 'there are none'}",
                hint="capture the model in float32; autocast='bf16' computes in bfloat16",
            )
        groups = [
            {"params": [p for n, p in trained.items() if n in decayed], "decay": recipe.decay},
            {"params": [p for n, p in trained.items() if n not in decayed], "decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [{"params": g["params"], "weight_decay": g["decay"]} for g in groups if g["params"]],
            lr=recipe.rate, betas=recipe.betas,
        )  # fmt: skip
        self.notes = {
            "recipe": asdict(recipe), "steps": steps, "decayed": sorted(decayed),
            "weights": {name: list(value.shape) for name, value in trained.items()},
        }  # fmt: skip

    def step(self, step: int, batches: Sequence[Batch]) -> float:
        """Gradients of all batches, clipped, and one update; the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            total += self._backward(batch, 1 / len(batches))
        if not math.isfinite(total):
            raise UsageError(
                f"step {step}: the loss is {total}", hint="lower the rate, or look at the batch"
            )
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip)
        self.optimizer.step()
        return total

    def _backward(self, batch: Batch, share: float) -> float:
        device = next(iter(self.trained.values())).device.type
        wide = self.recipe.autocast == "off"
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=not wide):
            value = self.loss(batch) * share
        value.backward()
        return float(value.detach())

    def save(self, file: Path, losses: list[float], last: Batch) -> None:
        tensors: dict[str, Tensor] = {f"weight.{n}": value for n, value in self.trained.items()}
        tensors |= dict(checkpoints.optimizer_tensors(self.optimizer))
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        tensors["random"] = torch.get_rng_state()
        tensors["last_batch"] = torch.tensor(_digest(last))
        checkpoints.write(file, tensors, self.notes)

    @torch.no_grad()
    def restore(self, file: Path, batches: Sequence[Batch]) -> list[float]:
        """Go on from a checkpoint; the losses of the steps it has made."""
        tensors = checkpoints.read(file, self.notes)
        if tensors is None:
            return []
        losses: list[float] = tensors["losses"].tolist()
        last = batches[len(losses) * self.recipe.accumulate - 1]
        if int(tensors["last_batch"]) != _digest(last):
            raise UsageError(f"{file} was trained on other batches", hint="name another file")
        for name, value in self.trained.items():
            value.copy_(tensors[f"weight.{name}"])
        checkpoints.restore_optimizer(self.optimizer, tensors)
        torch.set_rng_state(tensors["random"])
        return losses


def _digest(batch: Batch) -> int:
    number = 0
    for name in sorted(batch):
        value = batch[name].detach().cpu().contiguous()
        number = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), number)
        number = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, number)
    return number
