"""Recovery training: it helps, balances, resumes, merges and leaves the caller's weights alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Mlp
from test_cmoe_carve import VECTORS, Vector
from torch import Tensor, nn

import resplice
from resplice.context import Context
from resplice.errors import UsageError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.passes.cmoe.recovery import Recipe, rebalanced, recover
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.training import next_token_loss


def task(steps: int = 40) -> tuple[nn.Module, Program, list[dict[str, Tensor]], Any]:
    """A layer stack carved to half of its neurons, to be trained to imitate the dense one."""
    torch.manual_seed(0)
    model = Mlp().eval()
    program = resplice.capture(model, (torch.randn(64, 32),), dynamic_shapes={"x": {0: "rows"}})
    batches = [{"x": torch.randn(64, 32)} for _ in range(steps)]
    carved, _ = Pipeline.of("cmoe{layout=S2A2E8 k-act=5}").run(
        program, Context(calibration=batches[:4])
    )

    def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = model(batch["x"])
        return (outputs["output"] - target).square().mean()

    return model, carved, batches, loss


def error(model: nn.Module, program: Program) -> float:
    """On inputs not trained on."""
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((program(x) - model(x)).square().mean())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_brings_the_result_back(method: Any) -> None:
    model, carved, batches, loss = task(150)
    before, state = error(model, carved), {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Recipe(method=method, rate=1e-2)
    calls: list[tuple[str, int, int]] = []
    done = recover(carved, batches, recipe=recipe, loss=loss, progress=lambda *a: calls.append(a))
    assert error(model, carved) < 0.95 * before
    assert len(done.losses) == 150
    assert calls[-1] == ("recovery", 150, 150)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in carved.module.parameters())
    assert not any("lora" in name for name, _ in carved.named_weights())
    for node in carved.graph.find_nodes(op="call_function", target=moe_ffn.overload):
        assert bool(carved.weight(node.args[10]).any()), "the gates' scales were trained"
        assert sum(done.loads[node.name]) == 2 * 64


def test_the_balance_moves_against_the_load() -> None:
    _, carved, batches, loss = task(1)
    done = recover(
        carved, batches, recipe=Recipe(rate=0.0, balance_step=1e-3), loss=loss,
        progress=lambda *_: None,
    )  # fmt: skip
    for node in carved.graph.find_nodes(op="call_function", target=moe_ffn.overload):
        load = torch.tensor(done.loads[node.name]).double()
        expected = -1e-3 * (load - load.mean()).sign().float()
        assert torch.equal(carved.weight(node.args[11]), expected)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_balance_steps_are_those_of_the_vectors(path: Path) -> None:
    vector = Vector(path)
    given = vector.given()
    balance = torch.zeros(len(given.experts))
    for expected in vector["bias_steps"]:
        chosen = replace(given, balance=balance).route(vector.x)
        load = torch.bincount(chosen.flatten(), minlength=len(balance))
        balance = rebalanced(balance, load, 1e-3)
        torch.testing.assert_close(balance, expected)


def test_training_continues_where_it_stopped(tmp_path: Path) -> None:
    quiet = {"progress": lambda *_: None, "recipe": Recipe(rate=3e-3)}
    model, whole, batches, loss = task(20)
    straight = recover(whole, batches, loss=loss, **quiet)
    _, first, _, _ = task(20)
    file = tmp_path / "state.safetensors"
    recover(first, batches[:12], loss=loss, checkpoint=file, every=5, **quiet)
    _, second, _, _ = task(20)
    done = recover(second, batches, loss=loss, checkpoint=file, **quiet)
    assert done.losses == pytest.approx(straight.losses, rel=1e-5)
    assert error(model, second) == pytest.approx(error(model, whole), rel=1e-4)
    with pytest.raises(UsageError, match="another training"):
        recover(second, batches, loss=loss, checkpoint=file, recipe=Recipe(rank=4))


def test_what_can_not_be_trained_is_refused() -> None:
    program = resplice.capture(Mlp().eval(), (torch.randn(4, 32),))
    with pytest.raises(UsageError, match="no carved layer"):
        recover(program, [])


def test_next_token_loss() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = next_token_loss({"logits": logits}, {"input_ids": ids, "attention_mask": mask})
    log = logits.log_softmax(-1)
    by_hand = [-log[b, t, ids[b, t + 1]] for b in range(2) for t in range(4) if mask[b, t + 1]]
    assert float(found) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
