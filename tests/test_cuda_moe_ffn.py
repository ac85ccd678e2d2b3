"""moe_ffn as Triton kernels: routing, lists of tokens, grouped products, sums in a fixed order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, cast, compiled, error, launches, meta, poison, wide

from resplice.kernels.cuda import moe_ffn as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.cuda.moe_routing import sent
from resplice.kernels.moe_ffn import moe_ffn, sample_arguments
from resplice.kernels.moe_routing import ACTIVATIONS, chosen_indices, expert_scores, route

SAMPLES = [sample for sample in moe_ffn.samples() if not sample.refused]


def holds(args: Any) -> bool:
    with poison():
        found = cuda.moe_ffn(*args)
    assert found.dtype == args[0].dtype
    return error(found, moe_ffn.reference(*wide(args))) <= bar(found.dtype)


def call(*shape: int, **changes: Any) -> tuple[Any, ...]:
    settings = {"shared": 20, "experts": 5, "size": 24, "active": 2, "trained": True, **changes}
    return sample_arguments(shape, **settings)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    assert holds(sample.args)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool) -> None:
    assert holds(call(21, 40, activation=activation, gated=gated, bias=True, seed=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype) -> None:
    """Scores are float32 sums of exact products in both, so that the choice is the same."""
    args = cast(call(70, 72, experts=6, active=3, bias=True, seed=4), dtype)
    found, exact = cuda.moe_ffn(*args), moe_ffn.reference(*wide(args))
    own = error(moe_ffn.reference(*args), exact)
    assert error(found, exact) <= max(own, bar(dtype))


@pytest.mark.parametrize(("experts", "active"), [(2, 1), (5, 4), (16, 3), (9, 8), (1, 1)])
def test_numbers_of_experts(experts: int, active: int) -> None:
    for tokens in (1, 11):
        assert holds(call(tokens, 24, experts=experts, active=active, seed=experts))


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 16, 64), (64, 64, 32)])
def test_block_sizes(block: tuple[int, int, int]) -> None:
    sizes = dict(zip(("block_m", "block_n", "block_k"), block, strict=True))
    config = Config(sizes, 4, 2)
    with using(moe_in=config, moe_out=config):
        assert holds(call(35, 40, experts=3, size=17, out=20, bias=True))


@pytest.mark.parametrize("score", ["absolute", "signed", "linear"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_choice_is_the_references(score: str, activation: str) -> None:
    """Slots are listed under their expert in the order of tokens; ReLU scores often tie."""
    experts, active = 6, 3
    args = call(
        50, 16, experts=experts, active=active, score=score, activation=activation, bias=True
    )
    x, router, bias, scale, balance = args[0], *args[8:12]
    for u, b in ((scale, balance), (None, None), (scale, None), (None, balance)):
        with poison():
            slots, loads, gates = sent(
                x, router, bias, u, b, experts, active, activation, True, score
            )
        scores = expert_scores(x, router, bias, experts, activation, True, score)
        mask, expected = route(scores, u, b, active)
        chosen = chosen_indices(mask, active)
        for expert in range(experts):
            token, rank = (chosen == expert).nonzero().t()
            assert slots[expert, : loads[expert]].tolist() == (token * active + rank).tolist()
        assert (gates is None) == (u is None)
        if gates is not None:
            assert error(gates, expected.gather(1, chosen)) <= bar(torch.float32)


def test_tokens_that_are_not_numbers_stay_alone() -> None:
    args = list(call(9, 16))
    expected = cuda.moe_ffn(*args)
    args[0][4, 3] = torch.nan
    with poison(), np.errstate(invalid="ignore"):
        found = cuda.moe_ffn(*args)
    assert bool(found[4].isnan().all())
    others = [row for row in range(9) if row != 4]
    assert error(found[others], expected[others]) <= bar(torch.float32)


def test_results_do_not_change_from_run_to_run() -> None:
    args = call(40, 24, bias=True)
    assert torch.equal(cuda.moe_ffn(*args), cuda.moe_ffn(*args))


def test_float64_is_left_to_the_reference() -> None:
    args = wide(call(5, 16))
    assert torch.equal(cuda.moe_ffn(*args), moe_ffn.reference(*args))


def heavy(tokens: int, dtype: torch.dtype, gated: bool = True, active: int = 2) -> list[Any]:
    """A layer of a 1B model carved into a quarter that is shared and six experts of eight."""
    d, size, double = 2048, 704, 1 + gated
    return [
        meta(tokens, d, dtype=dtype),
        meta(double * 1408, d, dtype=dtype), None, meta(d, 1408, dtype=dtype),
        meta(8, double * size, d, dtype=dtype), None, meta(8, d, size, dtype=dtype), None,
        meta(double * 8, d, dtype=dtype), None,
        meta(8, dtype=torch.float32), meta(8, dtype=torch.float32), active,
        "silu" if gated else "gelu", gated, "absolute",
    ]  # fmt: skip


def test_every_launch_is_known_without_numbers() -> None:
    names = [item.name for item in launches(cuda.moe_ffn, heavy(300, torch.bfloat16), "sm_90")]
    assert names == ["moe_route", "moe_dispatch", "moe_in", "moe_out", "moe_in", "moe_out"]
    routed = launches(cuda.moe_ffn, heavy(1, torch.bfloat16), "sm_90")[2]
    assert routed.grid[0] == 2, "one token reaches no more blocks than it has experts"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_code(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for tokens, gated in ((1, True), (4096, True), (4096, False)):
        for item in launches(cuda.moe_ffn, heavy(tokens, dtype, gated), arch):
            code = compiled(item, arch, tmp_path)
            assert code.spills == 0, (item.name, tokens, gated)
            assert code.tensor_core > 0 or item.name == "moe_dispatch", (item.name, tokens)
