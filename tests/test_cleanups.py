"""Clean-ups: canonicalize, cse, fold and dce, rule by rule, and where each must not act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # its usual name

from resplice.capture import capture
from resplice.normal import normalize
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.show import show
from resplice.verify import verify


class Plain(nn.Module):
    """A function as a module, with some state to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, *tensors: Tensor) -> Any:
        """Call it with the module first."""
        return self.function(self, *tensors)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def program_of(function: Callable[..., Any], *inputs: Tensor, training: bool = False) -> Program:
    """Capture a function of a module and tensors."""
    return capture(Plain(function).train(training), inputs or (X,), check=False)


def body(program: Program) -> list[str]:
    """The printed program without its header."""
    return show(program).splitlines()[1:]


def run(program: Program, passes: str, *, check: bool = True) -> Program:
    """Run passes, checked, and compare the results bit for bit on the samples."""
    result, _ = Pipeline.of(passes).run(program, check=check)
    for before, after in zip(results(program), results(result), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert torch.equal(before.nan_to_num(), after.nan_to_num())
        if before.is_floating_point():
            assert torch.equal(before.signbit(), after.signbit()), "-0.0 is not 0.0"
    return result


def results(program: Program) -> tuple[Tensor, ...]:
    """Outputs on the sample inputs; random ops are seeded, state is put back afterwards."""
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in program.named_weights()}
    outputs = tuple(value.clone() for value in program.run(program.sample_tensors()))
    for name, value in program.named_weights():
        value.data.copy_(state[name])
    return outputs


# ---- normal form, rule by rule -----------------------------------------------------------


def weights_of_rank(rank: int) -> Tensor:
    """A tensor of some rank."""
    return torch.randn([2, 3, 4, 5][:rank])


@pytest.mark.parametrize(
    ("function", "after"),
    [
        # casts
        (lambda m, x: x.to(torch.float32).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x.float().relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x.type_as(m.w).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (
            lambda m, x: x.double().relu(),
            ["%0 = aten.to(x, f64): f64[3,4]", "%1 = aten.relu(%0): f64[3,4]"],
        ),
        (
            lambda m, x: x.to(torch.empty(1, dtype=torch.float64)).relu(),
            ["%0 = aten.to(x, f64): f64[3,4]", "%1 = aten.relu(%0): f64[3,4]"],
        ),
        # copies
        (lambda m, x: x.clone().relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x.contiguous().relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x.relu().clone(), ["%0 = aten.relu(x): f32[3,4]"]),
        # dropout
        (lambda m, x: F.dropout(x, 0.5, training=False).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: F.dropout(x, 0.0, training=True).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        # slices
        (lambda m, x: x[:, 0:4].relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x[:, -9:].relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (
            lambda m, x: x[:, 1:].relu(),
            ["%0 = aten.slice(x, -1, 1, end): f32[3,3]", "%1 = aten.relu(%0): f32[3,3]"],
        ),
        (
            lambda m, x: x[:, 1:4].relu(),
            ["%0 = aten.slice(x, -1, 1, end): f32[3,3]", "%1 = aten.relu(%0): f32[3,3]"],
        ),
        (
            lambda m, x: x[:, -3:-1].relu(),
            ["%0 = aten.slice(x, -1, 1, 3): f32[3,2]", "%1 = aten.relu(%0): f32[3,2]"],
        ),
        (
            lambda m, x: x[:, ::2].relu(),
            ["%0 = aten.slice(x, -1, 0, end, 2): f32[3,2]", "%1 = aten.relu(%0): f32[3,2]"],
        ),
        (
            lambda m, x: x[:, -9:2].relu(),
            ["%0 = aten.slice(x, -1, 0, 2): f32[3,2]", "%1 = aten.relu(%0): f32[3,2]"],
        ),
        # views
        (lambda m, x: x.view(3, 4).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: x.expand(3, 4).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (
            lambda m, x: x.view(12).relu(),
            ["%0 = aten.reshape(x, [12]): f32[12]", "%1 = aten.relu(%0): f32[12]"],
        ),
        # neutral arithmetic
        (lambda m, x: (x * 1).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        (lambda m, x: (x * 1.0).relu(), ["%0 = aten.relu(x): f32[3,4]"]),
        # dims count from the end
        (lambda m, x: torch.cat([x, x], 1), ["%0 = aten.cat([x, x], -1): f32[3,8]"]),
        (lambda m, x: torch.stack([x, x], 0), ["%0 = aten.stack([x, x]): f32[2,3,4]"]),
        (lambda m, x: torch.stack([x, x], 1), ["%0 = aten.stack([x, x], -2): f32[3,2,4]"]),
        (lambda m, x: x.unsqueeze(1), ["%0 = aten.unsqueeze(x, -2): f32[3,1,4]"]),
        (lambda m, x: x.transpose(0, 1), ["%0 = aten.transpose(x, -2, -1): f32[4,3]"]),
        (lambda m, x: x.permute(1, 0), ["%0 = aten.permute(x, [-1, -2]): f32[4,3]"]),
        (lambda m, x: x.sum((0, 1)), ["%0 = aten.sum(x, [-2, -1]): f32[]"]),
        (lambda m, x: x.softmax(1), ["%0 = aten.softmax(x, -1): f32[3,4]"]),
        (
            lambda m, x: torch.diag_embed(x, 0, 0, 2),
            ["%0 = aten.diag_embed(x, 0, -3, 2): f32[4,3,4]"],
        ),
    ],
)  # fmt: skip
def test_normal_form(function: Callable[..., Any], after: list[str]) -> None:
    program = capture(Named(function), (X,))
    result = run(program, "canonicalize")
    assert body(result) == [*after, f"return %{len(after) - 1}"]


class Named(Plain):
    """The same with an input called x."""

    def forward(self, x: Tensor) -> Any:
        """Call it."""
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + 0.0,
        lambda m, x: x - 0.0 + 1,
        lambda m, x: x * 1.5,
        lambda m, x: x.long() * 1.0,
        lambda m, x: x.long() + 0.0,
        lambda m, x: x[1:],
        lambda m, x: x[::2],
        lambda m, x: x[:, :-9],
        lambda m, x: x[:, -2:-9],
        lambda m, x: x.expand(2, 3, 4),
        lambda m, x: x.reshape(4, 3),
        lambda m, x: x.half(),
        lambda m, x: x.double().float(),
    ],
)
def test_what_does_something_stays(function: Callable[..., Any]) -> None:
    program = program_of(function)
    assert len(body(run(program, "canonicalize"))) == len(body(program))


@pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf")])
def test_dropping_a_neutral_op_keeps_special_values(value: float) -> None:
    x = torch.full((3, 4), value)
    run(program_of(lambda m, x: (x * 1) + 0.0, x), "canonicalize")
    run(program_of(lambda m, x: (x + 0.0, x * 1.0), x), "canonicalize,cse")


def test_integer_arithmetic_with_zero_is_dropped() -> None:
    n = torch.arange(4)
    program = run(program_of(lambda m, n: ((n + 0) * 1 - 0).neg(), n), "canonicalize")
    assert body(program) == ["%0 = aten.neg(tensors_0): i64[4]", "return %0"]


def test_integer_times_a_float_one_is_a_cast() -> None:
    program = run(program_of(lambda m, n: n * 1.0, torch.arange(4)), "canonicalize")
    assert body(program)[0] == "%0 = aten.mul(tensors_0, 1.0): f32[4]"


@pytest.mark.parametrize("start", [None, -9, -8, -5, -4, -1, 0, 3, 4, 9])
@pytest.mark.parametrize("end", [-9, -5, -1, 2, 9])
def test_slice_bounds_mean_the_same_after_any_number_of_times(start: int | None, end: int) -> None:
    """Bounds below -size are clamped once; adding the size again would move them."""
    program = program_of(lambda m, x: x[:, start:end] * 2)
    expected = results(program)
    for _ in range(4):
        normalize(program)
        verify(program)
        assert torch.equal(results(program)[0], expected[0])


def test_normal_form_is_normal() -> None:
    def function(m: Plain, x: Tensor) -> Tensor:
        y = torch.cat([x[:, -3:].clone(), x.float()], 1).view(3, 7)[:, :7] * 1
        return F.dropout(y.transpose(0, 1), 0.1, training=False).contiguous() + m.w.t().sum()

    program = run(program_of(function), "canonicalize")
    once = show(program)
    assert normalize(program) == 0
    assert show(program) == once


def test_empty_legacy_tensors_do_not_set_the_rank_of_cat() -> None:
    empty = torch.empty(0)
    program = program_of(lambda m, x, e: torch.cat([e, x, x], 1), X, empty)
    assert "tensors_0], -1): f32[3,8]" in body(run(program, "canonicalize"))[0]
    (cat,) = (node for node in program.graph.nodes if node.op == "call_function")
    cat.args = (cat.args[0], 0)  # written out, where the default is also zero
    with program.fake_mode:
        cat.meta["val"] = torch.empty(6, 4)
    program.module.recompile()
    assert "tensors_0], -2): f32[6,4]" in body(run(program, "canonicalize"))[0]


def test_symbolic_sizes_are_dropped_where_provably_whole() -> None:
    class Sliced(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x[: x.shape[0]].relu(), x[: y.shape[0]].relu()

    program = capture(
        Sliced(),
        (torch.randn(6, 2), torch.randn(5, 2)),
        dynamic_shapes={"x": {0: "n"}, "y": {0: "m"}},
    )
    result, _ = Pipeline.of("canonicalize").run(program, check=True)
    slices = [line for line in body(result) if "slice" in line]
    assert len(slices) == 1, "x[:n] is x, but x[:m] may not be"
    for n, m in ((6, 5), (4, 3)):
        x, y = torch.randn(n, 2), torch.randn(m, 2)
        for a, b in zip(program(x, y), result(x, y), strict=True):
            assert torch.equal(a, b)


# ---- aliasing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clone(),
        lambda m, x: m.w.clone(),
        lambda m, x: m.table.contiguous().clone(),
        lambda m, x: (x.relu(), m.w.float().clone()),
        lambda m, x: x.clone().view(12),
        lambda m, x: x.view(12).clone(),
        lambda m, x: m.w.clone().transpose(0, 1),
        lambda m, x: x.clone().split(2, 1)[0],
        lambda m, x: (x * 1).view(4, 3),
    ],
)
def test_returned_copies_of_inputs_and_weights_stay_copies(function: Callable[..., Any]) -> None:
    """A caller who writes into the result must not change an input or a weight."""
    result = run(program_of(function), "canonicalize")
    stored = {t.untyped_storage().data_ptr() for _, t in result.named_weights()}
    inputs = result.sample_tensors()
    stored |= {t.untyped_storage().data_ptr() for t in inputs.values()}
    for output in result.run(inputs):
        assert output.untyped_storage().data_ptr() not in stored


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.count.clone(),
        lambda m: m.count.clone().view(2, 2),
        lambda m: m.count.view(2, 2).clone(),
        lambda m: (m.count * 1).reshape(4, 1),
        lambda m: m.count.clone().split(2)[1],
    ],
)
def test_state_read_before_a_write_keeps_its_old_value(read: Callable[[Plain], Tensor]) -> None:
    def function(m: Plain, x: Tensor) -> Tensor:
        old = read(m)
        m.count.add_(1)
        return old

    program = program_of(function)
    result = run(program, "canonicalize,cse,fold,dce")
    first, second, third = (result(X) for _ in range(3))
    assert (float(first.sum()), float(second.sum())) == (0.0, float(torch.ones_like(first).sum()))
    assert torch.equal(third, torch.full_like(first, 2.0))


# ---- cse ---------------------------------------------------------------------------------


def test_equal_computations_are_done_once() -> None:
    program = program_of(lambda m, x: x.cos().exp() + x.cos().exp())
    assert body(run(program, "cse")) == [
        "%0 = aten.cos(tensors_0): f32[3,4]",
        "%1 = aten.exp(%0): f32[3,4]",
        "%2 = aten.add(%1, %1): f32[3,4]",
        "return %2",
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.sum(0) + x.sum(0, keepdim=True),
        lambda m, x: x.cos() + x.sin(),
        lambda m, x: (x + 1) * (x + 1.0),
        lambda m, x: (x * 0.0) / (x * -0.0),
        lambda m, x: x.sum(0, dtype=torch.float64) + x.sum(0),
        lambda m, x: (x - 1) / (1 - x),
        lambda m, x: x.softmax(0) + x.softmax(1),
        lambda m, x: x[:1] + x[1:2],
    ],
)
def test_different_computations_stay_apart(function: Callable[..., Any]) -> None:
    program = program_of(function)
    assert body(run(program, "cse")) == body(program)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.rand_like(x) - torch.rand_like(x),
        lambda m, x: torch.bernoulli(x.sigmoid()) - torch.bernoulli(x.sigmoid()),
        lambda m, x: F.dropout(x, 0.5) - F.dropout(x, 0.5),
        lambda m, x: torch.randn(3) - torch.randn(3),
        lambda m, x: torch.randperm(3) - torch.randperm(3),
        lambda m, x: (
            F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
            - F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
        ),
        lambda m, x: F.rrelu(x, 0.1, 0.9, training=True) - F.rrelu(x, 0.1, 0.9, training=True),
        lambda m, x: x.sigmoid().multinomial(2) - x.sigmoid().multinomial(2),
    ],
    ids=[
        "rand_like",
        "bernoulli",
        "dropout",
        "randn",
        "randperm",
        "attention",
        "rrelu",
        "multinomial",
    ],
)
def test_random_ops_are_never_merged_or_folded(function: Callable[..., Any]) -> None:
    program = program_of(function, training=True)
    result = run(program, "canonicalize,cse,fold,dce", check=False)
    torch.manual_seed(1)
    first = result(X)
    torch.manual_seed(2)
    assert first.any(), "two draws differ"
    assert not torch.equal(first, result(X)), "and are drawn anew in every call"


def test_dropout_in_training_is_kept_and_in_eval_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU())
    for training in (True, False):
        program = capture(model.train(training), (X,))
        result = run(program, "canonicalize,cse,fold,dce", check=not training)
        assert any("dropout" in line for line in body(result)) == training
        assert result.training == training


def test_tied_weights_are_read_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    result = run(capture(Tied(), (X,)), "cse")
    assert sum("linear" in line for line in body(result)) == 1
    assert len(list(result.named_weights())) == 1


def test_equal_weights_that_are_not_tied_stay_two() -> None:
    class Equal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.a + x * self.b

    result = run(capture(Equal(), (X,)), "cse")
    assert {name for name, _ in result.named_weights()} == {"a", "b"}


def test_the_limit_counts_merges() -> None:
    from resplice.context import Context

    program = program_of(lambda m, x: x.cos() + x.cos() + x.cos())
    result, _ = Pipeline.of("cse").run(program, Context(limit=1))
    assert sum("cos" in line for line in body(result)) == 2


# ---- fold --------------------------------------------------------------------------------


def test_constant_chains_become_one_weight() -> None:
    program = program_of(lambda m, x: x * (m.table.cos() + 1).exp())
    result = run(program, "fold")
    assert body(result) == [
        '%0 = weight("folded.exp"): f32[4]',
        "%1 = aten.mul(tensors_0, %0): f32[3,4]",
        "return %1",
    ]
    assert torch.equal(result.weight("folded.exp"), (torch.arange(4.0).cos() + 1).exp())


def test_constants_without_inputs_are_folded() -> None:
    program = program_of(lambda m, x: x + torch.arange(4) * torch.ones(4))
    assert [line.split(" = ")[1] for line in body(run(program, "fold"))[:-2]] == [
        'weight("folded.mul"): f32[4]'
    ]


def test_what_depends_on_an_input_stays() -> None:
    program = program_of(lambda m, x: (x + m.table).cos() + x.new_zeros(4))
    result = run(program, "fold")
    assert sum("cos" in line or "add" in line for line in body(result)) == 3


def test_weights_themselves_are_no_work() -> None:
    program = program_of(lambda m, x: x * m.table)
    assert body(run(program, "fold")) == body(program)


def nbytes(program: Program) -> int:
    """Bytes of all weights."""
    return sum(value.nbytes for _, value in program.named_weights())


def grown(m: Plain, x: Tensor) -> Tensor:
    """An outer product of 4 values: 64 times their size when expanded."""
    return x[0, 0] * m.table.expand(64, 64, 4).clone()


def widened(m: Plain, x: Tensor) -> Tensor:
    """Twice the bytes."""
    return x.double() @ m.w.double().t()


def kept_elsewhere(m: Plain, x: Tensor) -> Tensor:
    """Not larger than the weight, but the weight stays."""
    return x @ m.w.t() + x @ (m.w.t() * 2)


def branching(m: Plain, x: Tensor) -> Tensor:
    """Two results of one weight."""
    return (x * (m.w * 2)) @ (m.w * 3).t()


@pytest.mark.parametrize("function", [grown, widened, kept_elsewhere, branching])
def test_folding_never_swells_the_program(function: Callable[..., Any]) -> None:
    program = program_of(function)
    result = run(program, "fold{max-kib=0}")
    assert nbytes(result) <= nbytes(program)
    assert body(result) == body(program)


def test_folding_replaces_a_weight_of_any_size_by_as_much() -> None:
    program = program_of(lambda m, x: x @ (m.w * 2).t())
    result = run(program, "fold{max-kib=0}")
    assert nbytes(result) == nbytes(program)
    assert {name for name, _ in result.named_weights()} == {"folded.t"}


def test_small_constants_may_grow_up_to_the_limit() -> None:
    """64 * 64 * 4 floats are 64 KiB exactly."""
    program = program_of(grown)
    assert nbytes(run(program, "fold{max-kib=64}")) == 64 * 1024
    assert nbytes(run(program, "fold{max-kib=63}")) == nbytes(program)


def test_state_that_is_written_is_no_constant() -> None:
    def function(m: Plain, x: Tensor) -> Tensor:
        m.count.add_(1)
        return x + m.count.cos()

    program = program_of(function)
    result = run(program, "cse,fold,dce")
    first, second = result(X), result(X)
    assert torch.equal(first, X + torch.ones(4).cos())
    assert torch.equal(second, X + torch.full((4,), 2.0).cos())


def test_sizes_of_dynamic_inputs_are_not_folded() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0])[:, None]

    program = capture(Positions(), (torch.randn(5, 2),), dynamic_shapes={"x": {0: "n"}})
    result, _ = Pipeline.of("canonicalize,cse,fold,dce").run(program, check=True)
    x = torch.randn(9, 2)
    assert torch.equal(result(x), x + torch.arange(9)[:, None])


def test_the_callers_weights_are_not_folded_into() -> None:
    model = Plain(lambda m, x: x * m.table.t())
    result = run(capture(model, (X,)), "fold")
    model.table.fill_(9)
    assert torch.equal(result(X), X * torch.arange(4.0))


# ---- dce ---------------------------------------------------------------------------------


def dead(m: Plain, x: Tensor) -> Tensor:
    """Much that nobody reads."""
    (x.cos() * m.w).sum()
    low, _ = x.split(2, 1)
    return low.neg()


def test_what_nobody_reads_is_dropped_with_its_weights() -> None:
    program = program_of(dead)
    with program.graph.inserting_before(program.graph.output_node()):
        extra = program.graph.call_function(torch.ops.aten.relu.default, (program.output_nodes[0],))
    extra.meta["val"] = program.output_nodes[0].meta["val"]
    result = run(program, "dce")
    assert body(result) == [
        "%0 = aten.split(tensors_0, 2, 1): (f32[3,2], f32[3,2])",
        "%1 = %0[0]: f32[3,2]",
        "%2 = aten.neg(%1): f32[3,2]",
        "return %2",
    ]
    assert not list(result.named_weights())


def test_inputs_stay_even_if_unused() -> None:
    program = program_of(lambda m, x, y: x.relu(), X, X.clone())
    assert run(program, "dce").inputs == program.inputs


def test_state_writes_stay() -> None:
    def function(m: Plain, x: Tensor) -> Tensor:
        m.count.add_(x[0])
        return x.relu()

    program = program_of(function)
    result = run(program, "canonicalize,cse,fold,dce")
    assert len(result.effects) == len(program.effects) == 1
    result(X)
    assert torch.equal(result.weight("count"), X[0])


# ---- all of them, on a model in both modes -------------------------------------------------


class Small(nn.Module):
    """Norms, dropout, attention, a table, a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.norm, self.batch = nn.LayerNorm(16), nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("frequencies", torch.arange(8.0) / 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A bit of everything."""
        angle = torch.cat((self.frequencies, self.frequencies)).cos()
        h = self.drop(self.inner(self.norm(x.float() * 1)).view(4, 16).contiguous()) * angle
        again = self.drop(h) + torch.cat((self.frequencies, self.frequencies)).cos()
        return self.batch(again[:, -16:].reshape(-1, 16)), x.clone()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "passes",
    [
        "canonicalize",
        "cse",
        "fold",
        "dce",
        "canonicalize,cse,fold,dce",
        "fold,cse,canonicalize,dce",
    ],
)
def test_every_order_is_exact_in_both_modes(passes: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Small().train(training)
    x = torch.randn(4, 16)
    program = capture(model, (x,))
    result = run(program, passes, check=not training)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    for a, b in zip(expected, result(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_stay_the_same(training: bool) -> None:
    torch.manual_seed(0)
    model = Small().train(training)
    model.batch.eval()
    program = capture(model, (torch.randn(4, 16),))
    result = run(program, "canonicalize,cse,dce", check=not training)
    gradients = []
    for one in (program, result):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).requires_grad_()
        torch.manual_seed(7)
        (one.copy()(x)[0] ** 3).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
