"""The compiled decoding step of `moe_ffn` against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resplice.kernels.cpu import kernels, use_kernels
from resplice.kernels.moe_ffn import moe_ffn, sample_arguments
from resplice.kernels.moe_one_token import one_token
from resplice.kernels.moe_routing import ACTIVATIONS

compiled = pytest.mark.skipif(kernels() is None, reason="there is no C compiler")


def layer(**changes: Any) -> tuple[Any, ...]:
    settings = {"shared": 37, "experts": 6, "size": 19, "active": 2, **changes}
    return sample_arguments((1, 1, 83), **settings)


CASES: list[dict[str, Any]] = [
    *({"activation": name, "gated": gated} for name in ACTIVATIONS for gated in (True, False)),
    {"bias": True, "trained": True, "out": 31},
    {"shared": 0, "active": 1, "bias": True},
    {"score": "signed", "representatives": 3},
    {"score": "linear", "trained": True},
    {"active": 6, "trained": True},
    {"active": 0, "bias": True},
    {"experts": 1, "active": 1},
]


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_equals_the_reference(changes: dict[str, Any], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed in range(5):
            args = layer(seed=seed, **changes)
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            expected, found = moe_ffn.reference(*wide), one_token(*args)
            assert found is not None
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    finally:
        torch.set_num_threads(before)


@compiled
def test_equal_scores_choose_the_lower_index() -> None:
    args = list(layer(activation="relu", active=2))
    args[0] = args[0] * 0 - 1
    args[8] = args[8].abs()  # no representative neuron fires: every expert scores zero
    expected, found = moe_ffn.reference(*args), one_token(*args)
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_what_it_leaves_to_plain_torch() -> None:
    args = layer()
    assert one_token(*[a.double() if isinstance(a, torch.Tensor) else a for a in args]) is None
    strided = args[3].t().contiguous().t()
    assert one_token(*args[:3], strided, *args[4:]) is None
    wanted = args[0].clone().requires_grad_()
    assert one_token(wanted, *args[1:]) is None
    with use_kernels(False):
        assert one_token(*args) is None
        torch.testing.assert_close(moe_ffn(*args), moe_ffn.reference(*args))


def test_gradients_of_one_token() -> None:
    args = list(layer(trained=True))
    leaves = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    moe_ffn(*leaves).square().sum().backward()
    others = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    moe_ffn.reference(*others).square().sum().backward()
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, torch.Tensor) and b.grad is not None and a is not leaves[11]:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
