"""Recovery training of a carved program: low-rank adapters or all weights, and load balance.

Source: CMoE, arXiv 2502.04416, fine-tuning recipe: Adam with betas 0.9 and 0.95, constant rate,
rank 8 and alpha 32, the gates' u at its own rate, and a balance bias moved by a fixed step against
the load after every batch. The published code never trains u (its adapter library freezes it);
here it is trained.

Adapters are added to the weights, W + alpha/r B A, because a captured graph calls no modules that
an adapter library could wrap; so there is no dropout in front of A. They are merged at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from resplice import checkpoints, weights
from resplice.api import Optimized
from resplice.context import Batch
from resplice.errors import UsageError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.moe_routing import expert_scores, route
from resplice.program import Program
from resplice.progress import Report, reporting
from resplice.training import Loss, next_token_loss, own

aten = torch.ops.aten
_MATRICES = {aten.linear.default: 1, aten.addmm.default: 2, aten.matmul.default: 1,
             aten.mm.default: 1}  # fmt: skip
_STACKS = (1, 3, 4, 6)
_ROUTER, _SCALE, _BALANCE, _ACTIVE = 8, 10, 11, 12


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        method: "lora" or "full".
        rate: Learning rate of weights.
        gate_rate: Learning rate of u.
        balance_step: Step of the balance bias, 0 to leave it alone.
        rank: Of the adapters.
        alpha: Their scale is alpha / rank.
        seed: Of the adapters' first values.
    """

    method: Literal["lora", "full"] = "lora"
    rate: float = 5.95e-5
    gate_rate: float = 1e-3
    balance_step: float = 1e-3
    rank: int = 8
    alpha: float = 32.0
    seed: int = 0


@dataclass
class Recovery:
    """What training did.

    Attributes:
        losses: One per step.
        loads: Tokens per expert in the last step, by layer.
    """

    losses: list[float] = field(default_factory=list)
    loads: dict[str, list[int]] = field(default_factory=dict)


def recover(
    model: Optimized | Program,
    batches: Sequence[Batch],
    *,
    recipe: Recipe | None = None,
    loss: Loss = next_token_loss,
    checkpoint: str | Path | None = None,
    every: int = 20,
    progress: Report | None = None,
) -> Recovery:
    """Train a carved program in place, one step per batch.

    Weights are copied before they are trained, so the caller's model stays as it is.

    Args:
        model: A program with at least one `moe_ffn`.
        batches: Flat named inputs, one step each.
        recipe: How to train.
        loss: What to minimise.
        checkpoint: A safetensors file to continue from if it exists, written every `every` steps.
        every: Steps between checkpoints.
        progress: Called with ("recovery", done, total); by default a bar is drawn on stderr.

    Raises:
        UsageError: The program has no carved layer, or the checkpoint is of another training.
    """
    program = model.program if isinstance(model, Optimized) else model
    trainer = _Trainer(program, recipe or Recipe(), loss)
    done = Recovery()
    first = trainer.load(Path(checkpoint), done) if checkpoint else 0
    with reporting(progress, "recovery") as report:
        for number in range(first, len(batches)):
            report("recovery", number, len(batches))
            done.losses.append(trainer.step(batches[number]))
            if checkpoint and ((number + 1) % every == 0 or number + 1 == len(batches)):
                trainer.save(Path(checkpoint), done)
        report("recovery", len(batches), len(batches))
    done.loads = {name: load.tolist() for name, load in trainer.loads.items()}
    trainer.merge()
    return done


def rebalanced(balance: Tensor, load: Tensor, step: float) -> Tensor:
    """The balance bias [R] after one step: down where the load is above its mean, up below."""
    return balance - step * (load - load.double().mean()).sign().to(balance.dtype)


class _Counting(fx.Interpreter):
    """Runs a graph and counts the tokens that every expert is sent."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.loads: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is moe_ffn.overload:
            args, _ = self.fetch_args_kwargs_from_env(n)
            if args[_ROUTER] is not None:
                self.loads[n.name] = _load(args)
        return super().run_node(n)


def _load(args: Sequence[Any]) -> Tensor:
    x, experts = args[0].detach(), args[6].shape[0]
    with torch.no_grad():
        scores = expert_scores(
            x.reshape(-1, x.shape[-1]), args[_ROUTER], args[9], experts, *args[13:16]
        )
        return route(scores, None, args[_BALANCE], args[_ACTIVE])[0].sum(0)


class _Trainer:
    """Weights that are trained, their optimiser, and how they get into the graph."""

    def __init__(self, program: Program, recipe: Recipe, loss: Loss) -> None:
        self.program, self.recipe, self.loss = program, recipe, loss
        self.layers = list(program.graph.find_nodes(op="call_function", target=moe_ffn.overload))
        if not self.layers:
            raise UsageError("recovery: the program has no carved layer", hint="run cmoe first")
        self.loads: dict[str, Tensor] = {}
        self.balance = {name: program.weight(name).clone() for name in self._names(_BALANCE)}
        for name, value in self.balance.items():
            weights.put(program.module, name, value)
        scales = own(program, self._names(_SCALE))
        self.plain = dict(scales)
        self.low: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        generator = torch.Generator().manual_seed(recipe.seed)
        chosen = list(self._matrices())
        if recipe.method == "full":
            owned = own(program, chosen)
            self.plain |= owned
            trained = list(owned.values())
        else:
            self.low = {name: self._adapter(name, generator) for name in chosen}
            trained = [part for pair in self.low.values() for part in pair]
        self.base = {name: program.weight(name) for name in self.low}
        groups = [{"params": trained, "lr": recipe.rate}]
        if scales:
            groups.append({"params": list(scales.values()), "lr": recipe.gate_rate})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8)

    def _names(self, place: int) -> list[str]:
        nodes = [layer.args[place] for layer in self.layers]
        return list(dict.fromkeys(str(n.target) for n in nodes if isinstance(n, fx.Node)))

    def _matrices(self) -> Iterator[str]:
        """Matrices of linear layers, the output head left out, and stacks of experts."""
        seen, returned = set[str](), set(self.program.output_nodes)
        for node in self.program.graph.nodes:
            places = [_MATRICES[node.target]] if node.target in _MATRICES else []
            places = list(_STACKS) if node.target is moe_ffn.overload else places
            if node in returned:
                continue
            for source in [node.args[place] for place in places]:
                if not isinstance(source, fx.Node) or source.op != "get_attr":
                    continue
                name = str(source.target)
                if self.program.weight(name).dim() >= 2 and name not in seen:
                    seen.add(name)
                    yield name

    def _adapter(self, name: str, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
        *stack, rows, columns = self.program.weight(name).shape
        rank, kind = min(self.recipe.rank, rows, columns), self.program.weight(name).dtype
        bound = 1 / math.sqrt(columns)
        a = (torch.rand(*stack, rank, columns, generator=generator) * 2 - 1) * bound
        return nn.Parameter(torch.zeros(*stack, rows, rank, dtype=kind)), nn.Parameter(a.to(kind))

    def _put(self, *, merged: bool = False) -> None:
        """Put W + alpha/r B A where the graph reads W."""
        for name, (b, a) in self.low.items():
            value = self.base[name] + self.recipe.alpha / self.recipe.rank * (b @ a)
            if merged:
                value = nn.Parameter(value.detach(), requires_grad=False)
            for _, function in self.program.all_functions():
                if weights.has(function.module, name):
                    weights.put(function.module, name, value)

    def step(self, batch: Batch) -> float:
        self._put()
        runner = _Counting(self.program.module)
        inputs = [batch[node.name] for node in self.program.placeholders]
        with torch.enable_grad():
            results = runner.run(*inputs)
            names = [port.name for port in self.program.outputs]
            value = self.loss(dict(zip(names, results, strict=True)), batch)
            self.optimizer.zero_grad()
            value.backward()
        self.optimizer.step()
        self.loads = runner.loads
        self._rebalance()
        return float(value.detach())

    def _rebalance(self) -> None:
        """B goes down where an expert got more than the mean, up where less."""
        for layer in self.layers:
            load, node = self.loads.get(layer.name), layer.args[_BALANCE]
            if load is None or not isinstance(node, fx.Node):
                continue
            own = self.balance[str(node.target)]
            own.copy_(rebalanced(own, load, self.recipe.balance_step))

    def merge(self) -> None:
        """Leave plain frozen weights behind."""
        self._put(merged=True)
        for name, value in self.plain.items():
            value.requires_grad_(False)
            for _, function in self.program.all_functions():
                if weights.has(function.module, name):
                    weights.put(function.module, name, value)

    @property
    def _notes(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "recipe": asdict(self.recipe), "low": sorted(self.low), "plain": sorted(self.plain)
        }  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, apart from the optimiser's state."""
        found: dict[str, Tensor] = {f"plain.{name}": value for name, value in self.plain.items()}
        found |= {f"balance.{name}": value for name, value in self.balance.items()}
        for name, (b, a) in self.low.items():
            found |= {f"low_b.{name}": b, f"low_a.{name}": a}
        return found

    def save(self, path: Path, done: Recovery) -> None:
        tensors = self._tensors() | dict(checkpoints.optimizer_tensors(self.optimizer))
        tensors["losses"] = torch.tensor(done.losses, dtype=torch.float64)
        checkpoints.write(path, tensors, self._notes)

    @torch.no_grad()
    def load(self, path: Path, done: Recovery) -> int:
        """Continue from a checkpoint; returns the number of steps it has made."""
        tensors = checkpoints.read(path, self._notes)
        if tensors is None:
            return 0
        for name, value in self._tensors().items():
            value.copy_(tensors[name])
        checkpoints.restore_optimizer(self.optimizer, tensors)
        done.losses = tensors["losses"].tolist()
        return len(done.losses)
