"""Training: the recipe against plain torch, going on bit by bit, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resplice
from resplice import checkpoints
from resplice.errors import UsageError
from resplice.passes.quest import Quest, freeze, quantized_weights, train
from resplice.program import Program
from resplice.training import Recipe, fit, next_token_loss, own

STEPS = 12


class Reader(nn.Module):
    """Tokens to logits: embedding, two layers with dropout between them, a head tied to it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.dropout = nn.LayerNorm(32), nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, 24]."""
        x = self.table(input_ids)
        x = x + self.down(self.dropout(nn.functional.silu(self.up(self.norm(x)))))
        return nn.functional.linear(x, self.table.weight)


def reader(dropout: float = 0.0) -> Reader:
    """Seeded; in train mode if there is dropout."""
    torch.manual_seed(0)
    return Reader(dropout).train(dropout > 0)


def program_of(bits: int = 2, dropout: float = 0.0) -> Program:
    """The reader with rounded layers."""
    item = Quest(weight_bits=bits, act_bits=bits, mode="qat")
    example = {"input_ids": torch.zeros(3, 8).long()}
    return resplice.optimize(reader(dropout), [item], example_inputs=example, check=False).program


def batches(count: int = STEPS, seed: int = 1) -> list[dict[str, Tensor]]:
    """Counting sequences, which a bigram model learns."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(24, (count, 3, 1), generator=draw)
    return [{"input_ids": (start + torch.arange(8)) % 24} for start in starts]


def quiet(*_: Any) -> None:
    """No bar."""


def weights_of(program: Program) -> dict[str, Tensor]:
    """All parameters."""
    return {name: value.detach().clone() for name, value in program.named_weights()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# ---- the recipe --------------------------------------------------------------------------


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    recipe, steps = Recipe(rate=2.0), 201
    rates = [recipe.rate_at(step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(2.0 / 100)
    assert rates[10] == pytest.approx((rates[0] + 2.0) / 2)
    assert rates[20] == pytest.approx(2.0)
    assert rates[110] == pytest.approx((2.0 + 0.2) / 2, rel=1e-2)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_short_trainings_have_a_rate(steps: int) -> None:
    rates = [Recipe(rate=1.0).rate_at(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_plain_torch(accumulate: int) -> None:
    """The same loop by hand: two groups, schedule, accumulation, clipping."""
    recipe = Recipe(rate=0.05, clip=0.3, accumulate=accumulate)
    given, program, data = reader(), program_of(), batches(STEPS)
    done = train(program, data, recipe=recipe, progress=quiet)
    model = resplice.optimize(program_of()).trainable()
    named = dict(model.program.module.named_parameters())
    heavy = [named["up.weight"], named["down.weight"]]
    light = [v for v in named.values() if all(v is not h for h in heavy)]
    optimizer = torch.optim.AdamW(
        [{"params": heavy, "weight_decay": 0.1}, {"params": light, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    steps, losses = STEPS // accumulate, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step, steps)
        optimizer.zero_grad()
        part = data[step * accumulate : (step + 1) * accumulate]
        loss = torch.stack([next_token_loss({"y": model(**b)}, b) for b in part]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 0.3)
        optimizer.step()
        losses.append(loss.item())
    assert done.losses == pytest.approx(losses, rel=1e-5)
    for name, value in weights_of(program).items():
        torch.testing.assert_close(value, named[name].detach(), rtol=1e-3, atol=1e-5)
    assert sorted(done.decayed) == ["down.weight", "up.weight"]
    assert same(dict(given.state_dict()), dict(reader().state_dict()))


def test_training_helps_and_freezes() -> None:
    program, data = program_of(bits=4), batches(60)
    given = weights_of(program)
    done = train(program, data, recipe=Recipe(rate=0.02), progress=quiet)
    assert done.losses[-1] < 0.3 * done.losses[0]
    assert not any(value.requires_grad for value in program.module.parameters())
    packed, change = freeze(program)
    assert change.count == 2
    tokens = batches(1, seed=9)[0]
    assert torch.equal(packed(**tokens), program(**tokens))
    assert all(not torch.equal(given[n], v) for n, v in weights_of(program).items())


def test_tied_weights_stay_tied() -> None:
    program = program_of()
    names = [n for n, v in program.named_weights() if v.shape == (24, 32)]
    train(program, batches(3), progress=quiet)
    assert len({program.weight(name).data_ptr() for name in names}) == 1


def test_a_choice_of_weights_is_trained() -> None:
    program = program_of()
    before = weights_of(program)
    done = train(program, batches(4), only=["*.bias"], progress=quiet)
    assert sorted(done.trained) == ["down.bias", "norm.bias", "up.bias"]
    after = weights_of(program)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == set(done.trained)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 16), (16, 4), (4, 4)])
def test_quantised_weights_are_found_by_dataflow(weight_bits: int, act_bits: int) -> None:
    item = Quest(weight_bits=weight_bits, act_bits=act_bits, mode="qat")
    example = {"input_ids": torch.zeros(3, 8).long()}
    model = resplice.optimize(reader(), [item], example_inputs=example, check=False)
    assert sorted(quantized_weights(model)) == ["down.weight", "up.weight"]


def test_autocast_keeps_float_weights() -> None:
    program = program_of(bits=4)
    done = train(program, batches(40), recipe=Recipe(rate=0.02, autocast="bf16"), progress=quiet)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert {value.dtype for value in program.module.parameters()} == {torch.float32}


def test_recomputed_segments_change_nothing() -> None:
    results = []
    for segments in (0, 1, 4, 50):
        program = program_of()
        losses = train(program, batches(), segments=segments, progress=quiet).losses
        results.append((losses, weights_of(program)))
    for losses, found in results[1:]:
        assert losses == results[0][0]
        assert same(found, results[0][1])


# ---- going on ----------------------------------------------------------------------------


class Stopped(Exception):
    """The process was killed."""


def stopping(at: int) -> Any:
    """Progress that ends the training at one step."""

    def progress(_: str, done: int, total: int) -> None:
        if done == at:
            raise Stopped

    return progress


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["exact", "random"])
def test_a_stopped_training_goes_on_bit_by_bit(dropout: float, tmp_path: Path) -> None:
    file, recipe = tmp_path / "run.safetensors", Recipe(rate=0.02, accumulate=2)
    data = batches(2 * STEPS)
    whole = program_of(dropout=dropout)
    torch.manual_seed(3)
    straight = train(whole, data, recipe=recipe, progress=quiet)
    first = program_of(dropout=dropout)
    torch.manual_seed(3)
    with pytest.raises(Stopped):
        train(first, data, recipe=recipe, checkpoint=file, every=5, progress=stopping(8))
    torch.manual_seed(77)
    again = program_of(dropout=dropout)
    done = train(again, data, recipe=recipe, checkpoint=file, every=5, progress=quiet)
    assert done.losses == straight.losses
    assert same(weights_of(again), weights_of(whole))
    finished = program_of(dropout=dropout)
    assert train(finished, data, recipe=recipe, checkpoint=file, progress=quiet) == done
    assert same(weights_of(finished), weights_of(whole))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file, data = tmp_path / "deep" / "run.safetensors", batches()
    train(program_of(), data, checkpoint=file, progress=quiet)
    with pytest.raises(UsageError, match="recipe differ"):
        train(program_of(), data, recipe=Recipe(rate=1.0), checkpoint=file, progress=quiet)
    with pytest.raises(UsageError, match="weights differ"):
        train(program_of(), data, only=["up.*"], decayed=["up.weight", "down.weight"],
              checkpoint=file, progress=quiet)  # fmt: skip
    with pytest.raises(UsageError, match="other batches"):
        train(program_of(), batches(seed=5), checkpoint=file, progress=quiet)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="is no checkpoint"):
        train(program_of(), data, checkpoint=file, progress=quiet)


def test_checkpoints_keep_every_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(math.pi), "c": torch.arange(3)}
    checkpoints.write(tmp_path / "x.safetensors", tensors, {"step": 3})
    found = checkpoints.read(tmp_path / "x.safetensors", {"step": 3})
    assert found is not None
    assert same(found, tensors)
    assert checkpoints.read(tmp_path / "none.safetensors", {}) is None
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


# ---- refused -----------------------------------------------------------------------------


def refusals() -> Iterator[Any]:
    """What can't be trained, and what is said."""
    example = {"input_ids": torch.zeros(3, 8).long()}
    yield pytest.param(
        lambda: train(resplice.capture(reader(), example), batches()), "no weight of this program",
        id="plain",
    )  # fmt: skip
    yield pytest.param(lambda: train(program_of(), []), "make no step", id="no batches")
    yield pytest.param(
        lambda: train(program_of(), batches(2), recipe=Recipe(accumulate=3), progress=quiet),
        "make no step of 3", id="too few",
    )  # fmt: skip
    yield pytest.param(
        lambda: train(program_of(), batches(), only=["nothing*"]), "no weight matches", id="names"
    )
    wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    yield pytest.param(
        lambda: fit({"w": wide}, lambda _: wide.sum(), [{}], Recipe()), "must be float32", id="f64"
    )
    yield pytest.param(
        lambda: train(
            program_of(), batches(), progress=quiet,
            loss=lambda outputs, _: next(iter(outputs.values())).sum() * math.inf,
        ), "the loss is", id="not finite",
    )  # fmt: skip
    yield pytest.param(lambda: Recipe(rate=-1.0), "rate=-1.0", id="rate")
    yield pytest.param(lambda: Recipe(autocast="fp8"), "autocast=fp8", id="autocast")  # type: ignore[arg-type]  # on purpose
    yield pytest.param(
        lambda: train(program_of(), batches(), segments=-1), "at least 1", id="segments"
    )


@pytest.mark.parametrize(("act", "reason"), list(refusals()))
def test_what_can_not_be_trained_is_refused(act: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        act()


def test_own_copies_are_shared_by_all_functions() -> None:
    program = program_of()
    program.functions["again"] = program.copy()
    copies = own(program, ["up.weight"])
    assert program.functions["again"].weight("up.weight") is copies["up.weight"]
