"""Capture: any module, its inputs as given, dims by name, and refusals that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resplice
from resplice.errors import CaptureError, InputError, UsageError
from resplice.verify import verify


class Structured(nn.Module):
    """Nested inputs, a flag, and a dict of outputs."""

    def forward(
        self, x: Any, pair: Any, *, double: bool = False, extra: Any = None
    ) -> dict[str, Any]:
        total = x["a"] + pair[0] * 3 - x["b"][0]
        return {
            "total": total * 2 if double else total,
            "both": (pair[0], [pair[1]]),
            "none": extra,
        }


def _structured_inputs() -> tuple[Any, ...]:
    a, b, c, d = (torch.randn(2, 3) for _ in range(4))
    return {"a": a, "b": [b]}, (c, d)


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model, args = Structured(), _structured_inputs()
    program = resplice.capture(model, resplice.Sample(args, {"double": True}))
    verify(program)
    fresh = _structured_inputs()
    expected, actual = model(*fresh, double=True), program(*fresh, double=True)
    assert actual.keys() == expected.keys()
    assert isinstance(actual["both"], tuple)
    assert isinstance(actual["both"][1], list)
    assert actual["none"] is None
    torch.testing.assert_close(actual["total"], expected["total"], rtol=0, atol=0)
    assert [port.name for port in program.inputs] == ["x_a", "x_b_0", "pair_0", "pair_1"]


def test_a_bound_constant_must_not_change() -> None:
    args = _structured_inputs()
    program = resplice.capture(Structured(), resplice.Sample(args, {"double": True}))
    program(*args)  # left out means as captured
    with pytest.raises(InputError, match="double=False, but it was captured as True"):
        program(*args, double=False)
    with pytest.raises(InputError, match="no input other"):
        program(*args, other=torch.ones(1))
    with pytest.raises(InputError, match="is given twice"):
        program(*args, x=args[0])


def test_two_inputs_that_are_one_object_stay_two_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + 2 * b

    same = torch.ones(3)
    program = resplice.capture(Sum(), (same, same))
    assert program(torch.ones(3), torch.zeros(3)).tolist() == [1, 1, 1]


def test_the_callers_model_and_samples_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sample = torch.randn(6, 4)
    kept = sample.clone()
    program = resplice.capture(model, (sample,))
    program(torch.randn(6, 4))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(sample, kept)
    assert all(p.requires_grad for p in model.parameters())


def test_train_mode_is_captured_as_train_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    program = resplice.capture(model, (torch.randn(6, 4),))
    before = program.weight("0.running_mean").clone()
    outputs = program(torch.randn(6, 4) + 5)
    assert program.training
    assert (outputs == 0).any()
    assert not torch.equal(program.weight("0.running_mean"), before)
    assert [str(n.args[0].target) for n in program.effects] == [
        "0.running_mean", "0.running_var", "0.num_batches_tracked",
    ]  # fmt: skip


def test_unchanged_weights_are_shared_not_copied(mlp: nn.Module) -> None:
    program = resplice.capture(mlp, (torch.randn(4, 32),))
    names = dict(mlp.named_parameters())
    for name, value in program.named_weights():
        assert value.data_ptr() == names[name].data_ptr()
        assert value is not names[name]


def test_dims_are_named_bounded_and_checked() -> None:
    class Scores(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return q @ k.transpose(-1, -2)

    program = resplice.capture(
        Scores(),
        (torch.randn(2, 5, 4), torch.randn(2, 6, 4)),
        dynamic_shapes={"q": {0: "batch", 1: "q_len=2:16"}, "k": ("batch", "k_len", None)},
    )
    assert str(program.inputs[0]) == "q: f32[batch,q_len,4]"
    assert str(program.outputs[0]) == "output: f32[batch,q_len,k_len]"
    assert program(torch.randn(7, 3, 4), torch.randn(7, 9, 4)).shape == (7, 3, 9)
    with pytest.raises(InputError, match="size 6 on axis 0, expected batch"):
        program(torch.randn(7, 3, 4), torch.randn(6, 9, 4))
    with pytest.raises(InputError, match="dimension q_len is 17, must be 2 to 16"):
        program(torch.randn(7, 17, 4), torch.randn(7, 9, 4))
    with pytest.raises(InputError, match="size 5 on axis 2, expected 4"):
        program(torch.randn(7, 3, 5), torch.randn(7, 9, 5))
    with pytest.raises(InputError, match="has 2 axes, expected 3"):
        program(torch.randn(7, 3), torch.randn(7, 9, 4))
    with pytest.raises(InputError, match=r"dtype f64.*\n.*\n.*q\.to"):
        program(torch.randn(7, 3, 4).double(), torch.randn(7, 9, 4))
    with pytest.raises(InputError, match="input k is missing"):
        program(torch.randn(7, 3, 4))


def test_a_derived_dim_is_found_and_used() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1, 2, 3).sum(1)

    program = resplice.capture(Halves(), (torch.randn(8, 3),), dynamic_shapes={"x": {0: "2*n"}})
    assert str(program.inputs[0]) == "x: f32[2*n,3]"
    assert program(torch.randn(12, 3)).shape == (6, 3)
    with pytest.raises(InputError, match="expected 2\\*n|multiple of 2"):
        program(torch.randn(7, 3))


def test_one_name_is_one_size_also_where_torch_has_two_symbols() -> None:
    class Outer(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return a.sum() + b.sum() + c.sum()

    samples = (torch.randn(4), torch.randn(6), torch.randn(24))
    program = resplice.capture(
        Outer(), samples, dynamic_shapes={"a": {0: "n"}, "b": {0: "m"}, "c": {0: "n*m"}}
    )
    program(torch.randn(3), torch.randn(5), torch.randn(15))
    with pytest.raises(InputError, match=r"dimension n\*m is 16, not the product of \[3, 5\]"):
        program(torch.randn(3), torch.randn(5), torch.randn(16))
    program.symbols = {s: "n" if name == "m" else name for s, name in program.symbols.items()}
    with pytest.raises(InputError, match="dimension n is both 3 and 5"):
        program(torch.randn(3), torch.randn(5), torch.randn(15))


def test_a_fixed_dim_is_refused_with_the_reason() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, -1)

    with pytest.raises(CaptureError, match="can't keep these dimensions dynamic: n = 4") as refused:
        resplice.capture(Fixed(), (torch.randn(4, 3),), dynamic_shapes={"x": {0: "n"}})
    assert "test_capture.py" in refused.value.where


def test_key_value_caches_go_in_and_out() -> None:
    from zoo import ZOO

    model = ZOO["llama"].model()
    ids = torch.randint(0, 128, (2, 6))
    prefill = resplice.capture(model, {"input_ids": ids}, dynamic_shapes={"input_ids": ("b", "s")})
    expected, output = model(ids), prefill(ids)
    cache = output.past_key_values
    assert type(cache).__name__ == "DynamicCache"
    step = {"input_ids": ids[:, :1], "past_key_values": cache}
    decode = resplice.capture(model, step)
    cached = [f"past_key_values_{kind}_cache_{i}" for kind in ("key", "value") for i in (0, 1)]
    assert [port.name for port in decode.inputs] == ["input_ids", *cached]
    fresh = torch.randint(0, 128, (2, 1))
    actual = decode(input_ids=fresh, past_key_values=prefill(ids).past_key_values)
    reference = model(fresh, past_key_values=expected.past_key_values)
    torch.testing.assert_close(actual.logits, reference.logits, rtol=1e-5, atol=1e-5)
    assert actual.past_key_values.layers[1].keys.shape[2] == 7


def test_a_size_fixed_silently_is_found_by_the_second_size() -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.tensor([float(i) for i in range(10)])
            return x * table[: x.shape[0]].sum() + float(len(range(x.shape[0])) > 6)

    with pytest.raises(CaptureError, match="captured program (differs|fails)|can't keep"):
        resplice.capture(Baked(), (torch.randn(5, 3),), dynamic_shapes={"x": {0: "n=2:10"}})


def test_data_dependent_control_flow_is_refused_with_the_users_line() -> None:
    class Branchy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x  # this line

    with pytest.raises(CaptureError, match="data-dependent") as refused:
        resplice.capture(Branchy(), (torch.randn(3),))
    assert "test_capture.py" in refused.value.where
    assert "pass what is computed there as an input" in str(refused.value)


def test_malformed_requests_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(UsageError, match="dynamic_shapes names y"):
        resplice.capture(model, (torch.randn(2, 3),), dynamic_shapes={"y": {0: "n"}})
    with pytest.raises(UsageError, match="has no axis 5"):
        resplice.capture(model, (torch.randn(2, 3),), dynamic_shapes={"input": {5: "n"}})
    with pytest.raises(UsageError, match="hold no tensor"):
        resplice.capture(model, (3,))
    with pytest.raises(UsageError, match="give a tuple"):
        resplice.capture(model, 3)
    with pytest.raises(UsageError, match="is not a dynamic dimension"):
        resplice.capture(model, (torch.randn(2, 3),), dynamic_shapes={"input": {0: "2n!"}})
    with pytest.raises(CaptureError, match="which may hide tensors"):
        resplice.capture(Structured(), ({"a": torch.ones(1), "b": [object()]}, (torch.ones(1), 1)))


def test_a_model_that_fails_eagerly_says_so() -> None:
    with pytest.raises(CaptureError, match="torch.export failed"):
        resplice.capture(nn.Linear(3, 3), (torch.randn(2, 4),))


def test_control_flow_operators_are_refused_by_name() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    with pytest.raises(CaptureError, match="cond, a control-flow op"):
        resplice.capture(Cond(), (torch.randn(3),))


def test_in_place_writes_become_values() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.empty_like(x)
            y[..., 0::2] = x[..., 1::2]
            y[..., 1::2].copy_(-x[..., 0::2])
            return y.add_(1)

    program = resplice.capture(Writes(), (torch.randn(2, 6),))
    verify(program)
    x = torch.randn(2, 6)
    assert torch.equal(program(x), Writes()(x))
    calls = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not any(target._schema.is_mutable for target in calls)


def test_the_printed_form_is_stable(program: resplice.Program) -> None:
    text = resplice.show(program)
    assert text.startswith("program(x: f32[2*pairs,32]) where pairs=1:32\n")
    assert '%0 = weight("layers.0.gate.weight"): f32[64,32]' in text
    assert resplice.show(program.copy()) == text


def test_random_models_are_noted_not_refused() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    program = resplice.capture(Noise().eval(), (torch.randn(3),))
    assert program.metadata["notes"] == ["the model is random: capture not compared"]


def test_provenance_names_module_and_line(program: resplice.Program) -> None:
    from resplice.origin import origin

    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
    assert origin(node).source.startswith("conftest.py:")
    linear = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert origin(linear).module == "layers.0.gate"


class Counter(nn.Module):
    """Counts its calls, also in eval mode, in a submodule with an awkward name."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.code(x) * self.calls


def test_state_of_an_eval_model_is_neither_advanced_nor_shared_by_copies() -> None:
    model = Counter().eval()
    program = resplice.capture(model, (torch.randn(2, 3),), dynamic_shapes={"x": {0: "n"}})
    assert float(model.calls) == 0
    assert float(program.weight("calls")) == 0
    assert [n for n, _ in program.named_weights()] == [
        "model_code.weight", "model_code.bias", "calls",
    ]  # fmt: skip
    other = program.copy()
    x = torch.randn(2, 3)
    torch.testing.assert_close(other(x), model.code(x))
    torch.testing.assert_close(other(x), 2 * model.code(x))
    assert float(program.weight("calls")) == 0


def test_a_train_mode_model_with_dropout_and_batch_norm_is_checked_and_trains() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
    ).train()
    tuned = resplice.optimize(model, "canonicalize,cse", example_inputs=(torch.randn(6, 8),))
    tuned.trainable()
    tuned(torch.randn(6, 8)).square().sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())
    assert not torch.equal(tuned.program.weight("1.running_mean"), model[1].running_mean)
