"""The op `moe_ffn`: strategies, gradients, costs and lowerings against its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops import program_of
from torch import Tensor

from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import FP32_BAR
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.compare import difference
from resplice.errors import LoweringError, NumericsError, UsageError
from resplice.kernels.moe_fast import Dispatch
from resplice.kernels.moe_ffn import moe_ffn, sample_arguments
from resplice.kernels.moe_routing import ACTIVATIONS, chosen_indices, route
from resplice.ops import OpSample

SIZES = {"shared": 12, "experts": 4, "size": 6, "active": 2}


def arguments(*shape: int, **changes: Any) -> tuple[Any, ...]:
    """Arguments of a small layer."""
    settings: dict[str, Any] = {**SIZES, **changes}
    return sample_arguments(shape, **settings)


def wide(args: tuple[Any, ...]) -> list[Any]:
    """In float64."""
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def by_hand(args: tuple[Any, ...]) -> Tensor:
    """Token by token and expert by expert, in float64, from the definition."""
    x, si, sib, so, ei, eib, eo, ob, r, rb, u, b, active, act, gated, score = wide(args)
    f = ACTIVATIONS[act]
    zero = lambda v, n: torch.zeros(n, dtype=torch.float64) if v is None else v  # noqa: E731

    def neurons(t: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        z = w @ t + bias
        half = len(z) // 2
        return f(z[:half]) * z[half:] if gated else f(z)

    rows = []
    for t in x.reshape(-1, x.shape[-1]):
        y = zero(ob, eo.shape[1]).clone()
        if si is not None:
            y += so @ neurons(t, si, zero(sib, len(si)))
        if score == "linear":
            s = r @ t + zero(rb, len(r))
        else:
            h = neurons(t, r, zero(rb, len(r)))
            s = (h.abs() if score == "absolute" else h).reshape(len(eo), -1).sum(-1)
        p = s.exp() / s.exp().sum()
        for e in (p + zero(b, len(eo))).argsort(descending=True)[:active].tolist():
            bias = zero(None if eib is None else eib[e], ei.shape[1])
            y += (1 + p[e] * zero(u, len(eo))[e]) * (eo[e] @ neurons(t, ei[e], bias))
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"trained": True}, {"bias": True, "shared": 0}, {"score": "signed"},
        {"score": "linear", "bias": True, "trained": True}, {"representatives": 3},
        {"gated": False, "activation": "gelu", "bias": True, "out": 20}, {"active": 1},
        {"active": 3, "trained": True, "shared": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_op_is_its_definition(tokens: int, changes: dict[str, Any]) -> None:
    args = arguments(tokens, 16, **changes)
    expected = by_hand(args)
    for found in (moe_ffn(*args), moe_ffn.reference(*args)):
        assert difference(expected, found).relative <= 1e-5


def test_one_token_is_a_row_of_many() -> None:
    args = arguments(9, 16, trained=True)
    whole = moe_ffn(*args)
    for i in range(9):
        row = moe_ffn(args[0][i : i + 1], *args[1:])
        assert difference(whole[i : i + 1], row).relative <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    args = [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments(9, 16)]
    found = moe_ffn(*args)
    assert found.dtype == dtype
    assert difference(by_hand(tuple(args)), found).relative <= 20 * torch.finfo(dtype).eps


def test_gates_and_balance() -> None:
    """p + b decides, p alone scales; softmax and both by hand."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    p = scores.softmax(-1)
    mask, gates = route(scores, torch.tensor([0.5, -2.0, 0.0, 1.0]), None, 2)
    assert chosen_indices(mask, 2).tolist() == [[1, 2]]
    torch.testing.assert_close(gates, 1 + p * torch.tensor([0.5, -2.0, 0.0, 1.0]))
    mask, _ = route(scores, None, torch.tensor([1.0, 0.0, 0.0, 0.9]), 2)
    assert chosen_indices(mask, 2).tolist() == [[0, 3]]


def test_equal_values_go_to_the_higher_score_then_to_the_lower_index() -> None:
    """Far apart, every softmax but one is zero; the scores still tell the rest apart."""
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-900.0, -500.0, 0.0, -700.0]])
    mask, _ = route(scores, None, None, 2)
    assert chosen_indices(mask, 2).tolist() == [[0, 1], [1, 2]]


def test_tokens_are_sorted_by_expert() -> None:
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1]])
    sent = Dispatch.of(chosen, 4)
    assert sent.ends == [2, 4, 6, 6]
    assert chosen.flatten()[sent.order].tolist() == [0, 0, 1, 1, 2, 2]


# ---- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"trained": True}, {"trained": True, "bias": True, "shared": 0, "score": "signed"},
        {"trained": True, "score": "linear", "gated": False, "activation": "gelu_tanh"},
        {"active": 4, "bias": True}, {"active": 0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 6])
def test_gradients_of_every_argument(tokens: int, changes: dict[str, Any]) -> None:
    args = wide(arguments(tokens, 8, **changes))
    places = [i for i in range(11) if isinstance(args[i], Tensor)]
    inputs = [args[i].requires_grad_() for i in places]

    def function(*values: Tensor) -> Tensor:
        full = list(args)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        result: Tensor = moe_ffn(*full)
        return result

    weights = torch.randn_like(function(*inputs))
    found = torch.autograd.grad((function(*inputs) * weights).sum(), inputs, allow_unused=True)
    reference = (moe_ffn.reference(*args) * weights).sum()
    expected = torch.autograd.grad(reference, inputs, allow_unused=True)
    for place, a, b in zip(places, expected, found, strict=True):
        a = torch.zeros_like(args[place]) if a is None else a
        assert b is not None, place
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), place
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


# ---- cost --------------------------------------------------------------------------------


def test_cost_counts_what_runs() -> None:
    args = [
        torch.empty(a.shape, device="meta") if isinstance(a, Tensor) else a
        for a in arguments(100, 16)
    ]
    assert moe_ffn.cost_rule is not None
    cost = moe_ffn.cost_rule(*args)
    neurons = 12 + 2 * 6 + 4 * 2 / 3  # the router has two rows of d per expert, a neuron three
    assert cost.flops == pytest.approx(2 * 100 * 3 * 16 * neurons)
    one = moe_ffn.cost_rule(args[0][:1], *args[1:])
    assert one.flops * 100 == cost.flops
    whole = 4 * (3 * 16 * (12 + 24) + 8 * 16)
    assert cost.read == whole + 4 * 100 * 16
    assert one.read == whole - 4 * 3 * 16 * 12 + 4 * 16


# ---- lowerings ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["unrolled", "moe"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_onnx_strategies(strategy: str, tokens: int, tmp_path: Path) -> None:
    args = arguments(tokens, 16)
    program = program_of(moe_ffn, OpSample("", args))
    options = OnnxOptions(moe_strategy=strategy)
    artifact = OnnxBackend().lower(program, tmp_path / "m.onnx", options)
    (found,) = artifact.run({"inputs_0": args[0]}).values()
    assert difference(by_hand(args), found).relative <= 1e-5
    import onnx

    kinds = {node.op_type for node in onnx.load(artifact.path).graph.node}
    domains = {node.domain for node in onnx.load(artifact.path).graph.node}
    assert ("MoE" in kinds, "Split" in kinds) == (strategy == "moe", strategy == "unrolled")
    assert domains <= {"", "com.microsoft"}
    assert domains == {""} or strategy == "moe"


@pytest.mark.parametrize(
    "changes", [{"trained": True}, {"bias": True}, {"activation": "gelu"}, {"out": 24}], ids=str
)
def test_what_the_moe_operator_can_not_say(changes: dict[str, Any], tmp_path: Path) -> None:
    program = program_of(moe_ffn, OpSample("", arguments(5, 16, **changes)))
    with pytest.raises(LoweringError, match="can't express this layer"):
        OnnxBackend().lower(program, tmp_path / "m.onnx", OnnxOptions(moe_strategy="moe"))
    with pytest.raises(LoweringError, match="no standard operator"):
        OnnxBackend().lower(
            program_of(moe_ffn, OpSample("", arguments(5, 16))), tmp_path / "m.onnx",
            OnnxOptions(moe_strategy="moe", portable=True),
        )  # fmt: skip


def test_activations_unrolled(tmp_path: Path) -> None:
    """Every activation, gated and not, in one model, at two numbers of tokens."""
    samples = [
        OpSample(name, arguments(7, 16, activation=name, gated=gated, bias=gated, seed=i))
        for i, name in enumerate(ACTIVATIONS)
        for gated in (True, False)
    ]
    program = program_of(moe_ffn, *samples)
    artifact = OnnxBackend().lower(program, tmp_path / "m.onnx")
    found = artifact.run({f"inputs_{i}": s.args[0] for i, s in enumerate(samples)})
    for sample, value in zip(samples, found.values(), strict=True):
        assert difference(by_hand(sample.args), value).relative <= 1e-5, sample.label


@pytest.mark.parametrize(
    ("tokens", "strategy", "changes"),
    [
        (1, "auto", {"trained": True, "bias": True}), (1, "gather", {"shared": 0}),
        (6, "auto", {"trained": True}), (6, "capacity", {"trained": True, "bias": True}),
        (1, "auto", {"gated": False, "activation": "gelu_tanh", "out": 24}),
    ],
)  # fmt: skip
def test_core_ml_strategies(
    tokens: int, strategy: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    args = arguments(tokens, 16, **changes)
    program = program_of(moe_ffn, OpSample("", args))
    options = CoremlOptions(precision="fp32", moe_strategy=strategy, moe_capacity=2.0)
    artifact = CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    (found,) = artifact.run({"inputs_0": args[0]}).values()
    assert difference(by_hand(args), found).relative <= FP32_BAR


def test_an_overflow_is_not_handed_out(tmp_path: Path) -> None:
    program = program_of(moe_ffn, OpSample("", arguments(24, 16)))
    options = CoremlOptions(precision="fp32", moe_strategy="capacity", moe_capacity=0.5)
    with pytest.raises(NumericsError):
        CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    assert list(tmp_path.iterdir()) == []


def test_strategies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    program = program_of(moe_ffn, OpSample("", arguments(6, 16)))
    options = CoremlOptions(moe_strategy="gather")
    with pytest.raises(LoweringError, match="needs one token"):
        CoremlBackend().lower(program, tmp_path / "m.mlpackage", options)
    with pytest.raises(UsageError, match="moe_strategy"):
        CoremlOptions(moe_strategy="nonzero")
    with pytest.raises(UsageError, match="moe_strategy"):
        OnnxOptions(moe_strategy="gather")
