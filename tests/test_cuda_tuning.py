"""The choice among configurations, by a clock that is not one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from resplice.errors import UsageError
from resplice.kernels.cuda import launch
from resplice.kernels.cuda.hadamard import configs, hadamard
from resplice.kernels.cuda.launch import Config, current_arch
from resplice.kernels.cuda.moe_ffn import moe_ffn
from resplice.kernels.cuda.tuning import tune
from resplice.kernels.hadamard import hadamard as reference
from resplice.kernels.moe_ffn import moe_ffn as moe_op
from resplice.kernels.moe_ffn import sample_arguments

X = torch.randn(6, 256)


def seen() -> dict[str, Config]:
    """What the kernels would run with here."""
    return dict(launch._chosen.get() or {})


def test_every_candidate_runs_and_the_fastest_is_chosen() -> None:
    candidates = configs(current_arch(), torch.float32)
    assert len(candidates) > 1
    timed: list[Config] = []

    def clock(call: Callable[[], Any]) -> float:
        torch.testing.assert_close(call(), reference.reference(X, 128))
        timed.append(seen()["hadamard_blocks"])
        return 1.0 if timed[-1] == candidates[-1] else 2.0

    assert tune(lambda: hadamard(X, 128), clock=clock) == {"hadamard_blocks": candidates[-1]}
    assert timed == candidates
    assert not seen()


def test_kernels_of_one_call_are_chosen_one_after_the_other() -> None:
    """The second is timed with what was chosen for the first."""
    args = sample_arguments((5, 32), shared=16, experts=4, size=16, active=1)
    order: list[str] = []

    def clock(call: Callable[[], Any]) -> float:
        call()
        order.append(list(seen())[-1])
        return -float(len(order))  # the last one is the fastest

    best = tune(lambda: moe_ffn(*args), clock=clock)
    assert {"moe_route", "moe_in", "moe_out"} <= best.keys()
    assert list(dict.fromkeys(order)) == list(best)
    with launch.using(**best):
        found = moe_ffn(*args)
    torch.testing.assert_close(found, moe_op.reference(*args), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_passed_over() -> None:
    candidates = configs(current_arch(), torch.float32)

    def clock(call: Callable[[], Any]) -> float:
        if seen()["hadamard_blocks"] == candidates[0]:
            raise OutOfResources(1 << 20, 1 << 17, "shared memory")
        return 1.0

    assert tune(lambda: hadamard(X, 128), clock=clock) == {"hadamard_blocks": candidates[1]}

    def none(call: Callable[[], Any]) -> float:
        raise OutOfResources(1 << 20, 1 << 17, "shared memory")

    with pytest.raises(UsageError, match="none of its"):
        tune(lambda: hadamard(X, 128), clock=none)


def test_a_call_without_kernels_is_refused() -> None:
    with pytest.raises(UsageError, match="no Triton kernel"):
        tune(lambda: X + 1, clock=lambda call: 1.0)
