"""Patterns: what each term matches, what it refuses, and the reason a mismatch gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from resplice.capture import capture
from resplice.normal import normalize
from resplice.pattern import (
    ANY,
    Call,
    Match,
    NoMatch,
    Var,
    argument,
    aten,
    either,
    getitem,
    match,
    maybe,
    positional,
    shared,
    target_name,
)
from resplice.program import Program
from resplice.trace import traced

X, Y, Z = Var("x"), Var("y"), Var("z")


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Keep the function."""
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Call it."""
        return self.function(*tensors)


def program_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Program:
    """Capture a function of float tensors in normal form."""
    program = capture(Plain(function), tuple(torch.randn(shape) for shape in shapes))
    normalize(program)
    return program


def last(program: Program) -> fx.Node:
    """The node that is returned."""
    (node,) = program.output_nodes
    return node


def find(term: Any, function: Callable[..., Any], *shapes: tuple[int, ...]) -> Match:
    """Match a term with the result of a function."""
    return match(term, last(program_of(function, *shapes or ((2, 4), (2, 4), (2, 4)))))


def missed(term: Any, function: Callable[..., Any], *shapes: tuple[int, ...]) -> NoMatch:
    """The mismatch of a term with the result of a function."""
    with pytest.raises(NoMatch) as caught:
        find(term, function, *shapes)
    return caught.value


def all_matches(program: Program, term: Any) -> list[Match]:
    """Every node of a program that a term matches."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            try:
                found.append(match(term, node))
            except NoMatch:
                continue
    return found


# ---- variables and literals --------------------------------------------------------------


def test_a_variable_binds_a_node() -> None:
    found = find(aten.relu(X), lambda a, b, c: a.relu())
    assert found.node("x").op == "placeholder"
    assert found.bindings == {"x": found.root.args[0]}


def test_a_variable_binds_a_literal() -> None:
    assert find(aten.mul(X, Y), lambda a, b, c: a * 2.5)["y"] == 2.5


def test_a_literal_is_not_a_node() -> None:
    found = find(aten.mul(X, Y), lambda a, b, c: a * 2.5)
    with pytest.raises(NoMatch, match=r"y is the literal 2\.5, not a tensor"):
        found.node("y")


def test_an_untaken_variable_is_none() -> None:
    assert find(aten.relu(X), lambda a, b, c: a.relu())["nothing"] is None


def test_a_repeated_variable_must_meet_the_same_node() -> None:
    term = aten.div(aten.relu(X), aten.sigmoid(X))
    assert find(term, lambda a, b, c: a.relu() / a.sigmoid())
    assert "x is both" in missed(term, lambda a, b, c: a.relu() / b.sigmoid()).reason


def test_a_repeated_variable_must_meet_an_equal_literal() -> None:
    term = aten.div(aten.mul(X, Y), Y)
    assert find(term, lambda a, b, c: (a * 3.0) / 3.0)["y"] == 3.0
    assert missed(term, lambda a, b, c: (a * 3.0) / 4.0).reason == "y is both 3.0 and 4.0"


def test_two_reads_of_one_weight_are_one_value() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))
            self.v = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.w) / self.w

    program = capture(Twice(), (torch.randn(2, 4),))
    division = last(program)
    with program.graph.inserting_before(division):
        again = program.graph.get_attr("w")
    division.args = (division.args[0], again)
    assert match(aten.div(aten.add(X, Y), Y), division)
    again.target = "v"
    with pytest.raises(NoMatch, match="y is both"):
        match(aten.div(aten.add(X, Y), Y), division)


def test_a_variable_refuses_with_its_own_reason() -> None:
    term = aten.relu(Var("x", lambda value: None if value.op == "call_function" else "no call"))
    assert find(term, lambda a, b, c: a.neg().relu())
    assert missed(term, lambda a, b, c: a.relu()).reason == "x: no call"


def test_a_literal_must_be_equal() -> None:
    assert find(aten.mul(X, 2.0), lambda a, b, c: a * 2.0)
    assert missed(aten.mul(X, 2.0), lambda a, b, c: a * 3.0).reason == "expected 2.0, found 3.0"


def test_a_literal_does_not_match_a_node() -> None:
    assert missed(aten.relu(1), lambda a, b, c: a.relu()).reason.startswith("expected 1, found")


def test_true_is_not_one() -> None:
    mean = aten.mean(X, [-1], ...)
    assert find(aten.mean(X, [-1], True), lambda a, b, c: a.mean(-1, keepdim=True))
    assert missed(aten.mean(X, [-1], 1), lambda a, b, c: a.mean(-1, keepdim=True))
    assert find(mean, lambda a, b, c: a.mean(-1, keepdim=True))


def test_anything_matches_nodes_and_literals() -> None:
    assert find(aten.mul(ANY, ANY), lambda a, b, c: a * b)
    assert find(aten.mul(X, ANY), lambda a, b, c: a * 2)


# ---- commutation -------------------------------------------------------------------------


@pytest.mark.parametrize("function", [lambda a, b, c: a.relu() + b, lambda a, b, c: b + a.relu()])
def test_addition_commutes(function: Callable[..., Any]) -> None:
    found = find(aten.add(aten.relu(X), Y), function)
    assert found.node("x").name != found.node("y").name
    assert [found.node(n).op for n in "xy"] == ["placeholder"] * 2


def test_subtraction_does_not_commute() -> None:
    term = aten.sub(aten.relu(X), Y)
    assert find(term, lambda a, b, c: a.relu() - b)
    assert missed(term, lambda a, b, c: b - a.relu())


def test_the_first_order_that_fits_is_undone_when_a_later_argument_refuses() -> None:
    """x = relu(a) fits first; only the swapped order also satisfies the second use of x."""
    term = aten.sub(aten.add(X, Y), X)
    found = find(term, lambda a, b, c: (a.relu() + b) - b)
    assert found.node("x").op == "placeholder"
    assert found.node("y").target is torch.ops.aten.relu.default


def test_backtracking_crosses_several_commuting_ops() -> None:
    term = aten.sub(aten.mul(aten.add(X, Y), aten.add(Y, Z)), aten.neg(Z))
    swapped = find(term, lambda a, b, c: (c + b) * (a + b) - a.neg())
    assert [swapped[n].name for n in "xyz"] == ["tensors_2", "tensors_1", "tensors_0"]
    assert missed(term, lambda a, b, c: (c + b) * (a + b) - b.neg())


def test_a_third_argument_stays_in_place_when_two_commute() -> None:
    def scaled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.add(a.relu(), b, alpha=2)

    assert find(aten.add(aten.relu(X), Y, alpha=2), scaled)
    assert missed(aten.add(aten.relu(X), Y), scaled).reason == "aten.add has an extra argument 2"


# ---- lists, defaults, keywords, the rest ---------------------------------------------------


def test_a_list_matches_item_by_item() -> None:
    found = find(aten.cat([X, aten.relu(Y)], -1), lambda a, b, c: torch.cat([a, b.relu()], -1))
    assert found.node("x") is not found.node("y")


def test_a_list_of_another_length_does_not_match() -> None:
    miss = missed(aten.cat([X, Y], -1), lambda a, b, c: torch.cat([a, b, c], -1))
    assert miss.reason.startswith("expected a list of 2, found [")


def test_a_list_does_not_match_a_scalar() -> None:
    assert "expected a list" in missed(aten.relu([X]), lambda a, b, c: a.relu()).reason


def test_a_default_matches_whether_written_or_not() -> None:
    for function in (lambda a, b, c: a.mean(-1), lambda a, b, c: a.mean(-1, keepdim=False)):
        assert find(aten.mean(X, [-1]), function)
        assert find(aten.mean(X, [-1], False), function)
        assert find(aten.mean(X, [-1], keepdim=False), function)


def test_an_argument_that_is_not_the_default_does_not_match_silence() -> None:
    miss = missed(aten.mean(X, [-1]), lambda a, b, c: a.mean(-1, keepdim=True))
    assert miss.reason == "aten.mean has an extra argument True"


def test_keywords_are_compared_by_schema_position() -> None:
    def gelu(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return nn.functional.gelu(a, approximate="tanh")

    assert find(aten.gelu(X, approximate="tanh"), gelu)
    assert find(aten.gelu(X, "tanh"), gelu)
    assert missed(aten.gelu(X, approximate="none"), gelu)
    assert missed(aten.gelu(X), gelu)


@pytest.mark.parametrize("order", [("dim", "keepdim"), ("keepdim", "dim")])
def test_keywords_may_come_in_any_order(order: tuple[str, str]) -> None:
    values = {"dim": [-1], "keepdim": True}
    term = aten.mean(X, **{name: values[name] for name in order})
    assert find(term, lambda a, b, c: a.mean(-1, keepdim=True))
    assert missed(term, lambda a, b, c: a.mean(0, keepdim=True))
    assert missed(term, lambda a, b, c: a.mean(-1, keepdim=False))


def test_a_keyword_of_the_graph_is_found_too() -> None:
    program = program_of(lambda a, b: torch.add(a, b, alpha=3), (2,), (2,))
    node = last(program)
    assert dict(node.kwargs) == {"alpha": 3}
    assert positional(node)[2] == 3
    assert argument(node, "alpha") == 3
    assert match(aten.add(X, Y, 3), node)


def test_an_unknown_keyword_is_named() -> None:
    miss = missed(aten.relu(X, speed=1), lambda a, b, c: a.relu())
    assert "aten.relu has no argument speed" in miss.reason


def test_more_arguments_than_the_op_has_do_not_match() -> None:
    miss = missed(aten.relu(X, Y), lambda a, b, c: a.relu())
    assert miss.reason == "aten.relu takes 1 arguments, the pattern has 2"
    assert find(aten.relu(X, ...), lambda a, b, c: a.relu()), "the rest may be nothing"


def test_dots_leave_the_rest_free() -> None:
    term = aten.mean(X, ...)
    for function in (lambda a, b, c: a.mean(0), lambda a, b, c: a.mean(-1, keepdim=True)):
        assert find(term, function)
    assert missed(aten.mean(X, [0], ...), lambda a, b, c: a.mean(-1, keepdim=True))


def test_an_omitted_argument_between_keywords_has_its_default() -> None:
    term = aten.mean(X, [-1], dtype=torch.float64)
    assert find(term, lambda a, b, c: a.mean(-1, dtype=torch.float64))
    assert missed(term, lambda a, b, c: a.mean(-1, keepdim=True, dtype=torch.float64))


# ---- sharing -----------------------------------------------------------------------------


def used_twice(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """relu(a) has a user outside sigmoid(relu(a))."""
    inner = a.relu()
    return inner.sigmoid(), inner.neg()


def test_an_interior_node_with_an_outside_user_refuses() -> None:
    program = program_of(used_twice, (2,), (2,), (2,))
    sigmoid, neg = program.output_nodes
    with pytest.raises(NoMatch) as caught:
        match(aten.sigmoid(aten.relu(X)), sigmoid)
    assert caught.value.reason == f"relu is used outside the pattern, by {neg.name}"
    assert caught.value.node is not None
    assert caught.value.node.name == "relu"
    assert caught.value.depth == 2


def test_shared_allows_an_outside_user() -> None:
    program = program_of(used_twice, (2,), (2,), (2,))
    found = match(aten.sigmoid(shared(aten.relu(X))), program.output_nodes[0])
    assert [node.name for node in found.nodes] == ["sigmoid", "relu"]


def test_shared_covers_its_own_node_only() -> None:
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        low = a.neg()
        return low.relu().sigmoid(), low.exp()

    program = program_of(function, (2,))
    root = program.output_nodes[0]
    assert match(aten.sigmoid(aten.relu(shared(aten.neg(X)))), root)
    with pytest.raises(NoMatch, match="neg is used outside the pattern, by exp"):
        match(aten.sigmoid(shared(aten.relu(aten.neg(X)))), root)


def test_an_interior_value_that_is_returned_counts_as_used_outside() -> None:
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        inner = a.relu()
        return inner.sigmoid(), inner

    sigmoid, _ = program_of(function, (2,)).output_nodes
    with pytest.raises(NoMatch, match="relu is used outside the pattern, by output"):
        match(aten.sigmoid(aten.relu(X)), sigmoid)


def test_two_users_inside_the_match_are_fine() -> None:
    def silu(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        inner = a.relu()
        return inner * inner.sigmoid()

    inner = aten.relu(X)
    found = find(aten.mul(inner, aten.sigmoid(inner)), silu)
    assert len(found.nodes) == 3, "a node met twice is listed once"


def test_the_root_may_have_any_number_of_users() -> None:
    program = program_of(used_twice, (2,), (2,), (2,))
    relu = program.output_nodes[0].args[0]
    assert match(aten.relu(X), relu)


# ---- alternatives ------------------------------------------------------------------------


def test_either_takes_the_first_that_fits() -> None:
    term = either(aten.relu(X), aten.sigmoid(Y))
    relu, sigmoid = (find(term, f) for f in (lambda a, b, c: a.relu(), lambda a, b, c: a.sigmoid()))
    assert set(relu.bindings) == {"x"}
    assert set(sigmoid.bindings) == {"y"}
    assert missed(term, lambda a, b, c: a.neg())


def test_either_backtracks_into_its_second_branch() -> None:
    """relu(neg(x)) fits the first branch as x = neg(a), but then sigmoid(x) refuses."""
    term = aten.sub(either(aten.relu(X), aten.relu(aten.neg(X))), aten.sigmoid(X))
    assert find(term, lambda a, b, c: a.neg().relu() - a.sigmoid())["x"].name == "tensors_0"


def test_maybe_looks_through_an_optional_op() -> None:
    term = aten.relu(maybe(aten.to, X))
    direct = find(term, lambda a, b, c: a.relu())
    cast = find(term, lambda a, b, c: a.double().relu())
    assert direct["x"].op == "placeholder"
    assert cast["x"].op == "placeholder"
    assert len(cast.nodes) == len(direct.nodes) + 1


def test_maybe_with_arguments_demands_them_where_the_op_is_there() -> None:
    term = aten.relu(maybe(aten.mul, aten.neg(X), 2.0))
    assert find(term, lambda a, b, c: a.neg().relu())
    assert find(term, lambda a, b, c: (a.neg() * 2.0).relu())
    assert missed(term, lambda a, b, c: (a.neg() * 3.0).relu())


def test_getitem_takes_one_result() -> None:
    first = aten.relu(getitem(shared(aten.split(X, ...)), 0))

    def split(index: int) -> Callable[..., Tensor]:
        return lambda a: a.split(2, -1)[index].relu()

    assert find(first, split(0), (2, 4))["x"].op == "placeholder"
    assert missed(first, split(1), (2, 4)).reason == "expected 0, found 1"


def test_overloads_of_one_op_share_a_name() -> None:
    assert find(aten.add(X, Y), lambda a, b, c: a + b)
    assert find(aten.add(X, Y), lambda a, b, c: a + 1.0)
    assert (
        missed(aten.add(X, Y), lambda a, b, c: a - b).reason == "expected aten.add, found aten.sub"
    )


def test_kinds_of_nodes_have_names() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).split(2)[0]

    program = capture(Weighted(), (torch.randn(4),))
    names = [target_name(node) for node in program.graph.nodes]
    assert names == ["placeholder", "weight", "aten.mul", "aten.split", "getitem", "output"]


def test_a_call_does_not_match_a_weight_or_an_input() -> None:
    assert missed(aten.relu(aten.neg(X)), lambda a, b, c: a.relu()).reason == (
        "expected aten.neg, found placeholder"
    )


# ---- reasons -----------------------------------------------------------------------------


def test_the_deepest_attempt_is_reported_with_node_and_source_line() -> None:
    class Inner(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return a.neg().sigmoid().relu()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a) + b

    term = aten.add(aten.relu(aten.sigmoid(aten.exp(X))), Y)
    program = capture(Outer(), (torch.randn(2), torch.randn(2)))
    with pytest.raises(NoMatch) as caught:
        match(term, last(program))
    miss, line = caught.value, inspect.getsourcelines(Inner.forward)[1] + 1
    assert miss.reason == "expected aten.exp, found aten.neg"
    assert miss.node is not None
    assert miss.node.name == "neg"
    assert miss.depth == 3, "add, relu and sigmoid had matched"
    assert str(miss).endswith(f"(at neg in inner (test_pattern.py:{line}))")


def test_a_shallow_failure_of_the_other_order_does_not_hide_the_deep_one() -> None:
    term = aten.mul(aten.relu(aten.exp(X)), Y)
    for function in (lambda a, b, c: a.neg().relu() * b, lambda a, b, c: b * a.neg().relu()):
        miss = missed(term, function)
        assert (miss.reason, miss.depth) == ("expected aten.exp, found aten.neg", 2)


def test_a_match_that_only_fails_by_sharing_is_the_deepest() -> None:
    program = program_of(used_twice, (2,), (2,), (2,))
    term = either(aten.sigmoid(aten.relu(X)), aten.sigmoid(aten.exp(X)))
    with pytest.raises(NoMatch, match="used outside the pattern"):
        match(term, program.output_nodes[0])


def test_a_wrong_root_is_depth_zero() -> None:
    assert missed(aten.relu(X), lambda a, b, c: a.neg()).depth == 0


def test_require_refuses_with_reason_node_and_depth() -> None:
    found = find(aten.sigmoid(aten.relu(X)), lambda a, b, c: a.relu().sigmoid())
    found.require(True, "never said")
    with pytest.raises(NoMatch) as caught:
        found.require(0, "too small", found.node("x"))
    assert caught.value == NoMatch("too small", found.node("x"), 2)
    with pytest.raises(NoMatch) as caught:
        found.require(None, "gone")
    assert caught.value.node is found.root


def test_a_mismatch_without_a_node_prints_its_reason_alone() -> None:
    assert str(NoMatch("why")) == "why"


def test_terms_are_plain_values() -> None:
    assert aten.relu(X) == Call("aten.relu", (X,))
    assert aten.relu(X) == aten.relu(Var("x"))


# ---- whole techniques --------------------------------------------------------------------


class SwiGLU(nn.Module):
    """A gated feed-forward block; `swapped` writes the product the other way round."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.down, self.swapped = nn.Linear(10, 6, bias=False), swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.silu(self.gate(x)), self.up(x)
        return self.down(up * gate if self.swapped else gate * up)


SWIGLU = aten.linear(
    aten.mul(aten.silu(aten.linear(X, Var("gate"))), aten.linear(X, Var("up"))), Var("down")
)


@pytest.mark.parametrize("swapped", [False, True])
def test_swiglu_is_found_in_both_operand_orders(swapped: bool) -> None:
    program = capture(SwiGLU(swapped), (torch.randn(2, 6),))
    found = match(SWIGLU, last(program))
    names = {name: found.node(name).target for name in ("gate", "up", "down")}
    assert names == {"gate": "gate.weight", "up": "up.weight", "down": "down.weight"}
    assert len(found.nodes) == 5


def test_swiglu_over_two_inputs_is_refused() -> None:
    class Crossed(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x.neg()))

    program = capture(Crossed(False), (torch.randn(2, 6),))
    with pytest.raises(NoMatch, match="x is both"):
        match(SWIGLU, last(program))


def rotate_half(x: Tensor) -> Tensor:
    """Rotary half turn, as transformers writes it."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of one tensor."""
    return (x * cos) + (rotate_half(x) * sin)


ROPE_SHAPES = {"x": "b h s d", "cos": "s d", "sin": "s d"}


@pytest.mark.parametrize(
    "written",
    [
        rope,
        lambda x, cos, sin: rotate_half(x) * sin + x * cos,
        lambda x, cos, sin: cos * x + sin * rotate_half(x),
    ],
    ids=["as traced", "sum swapped", "products swapped"],
)
@pytest.mark.parametrize("head", [4, 10, 64])
def test_rope_is_found_at_any_head_size_and_order(written: Callable[..., Any], head: int) -> None:
    term = traced(rope, **ROPE_SHAPES)(X, Y, Z)
    found = find(term, written, (1, 3, 5, head), (5, head), (5, head))
    assert [found[name].name for name in "xyz"] == ["tensors_0", "tensors_1", "tensors_2"]


def test_interleaved_rotary_is_not_rotate_half() -> None:
    def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    term = traced(rope, **ROPE_SHAPES)(X, Y, Z)
    assert missed(term, interleaved, (1, 3, 5, 8), (5, 8), (5, 8)).depth >= 1


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, spelled out as GPT-2 does."""
    inner = 0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def test_unfused_gelu_is_found() -> None:
    term = traced(gelu_tanh, x="a b")(X)
    found = find(term, gelu_tanh, (3, 5))
    assert found["x"].op == "placeholder"
    assert len(found.nodes) == 8


def test_gelu_with_another_constant_is_refused() -> None:
    def close(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044 * torch.pow(x, 3.0))))

    miss = missed(traced(gelu_tanh, x="a b")(X), close, (3, 5))
    assert miss.reason == "expected 0.044715, found 0.044"


def test_gelu_of_two_values_is_refused() -> None:
    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x.pow(3.0))))

    assert "x is both" in missed(traced(gelu_tanh, x="a b")(X), mixed, (3, 5), (3, 5)).reason


def test_every_silu_of_a_program_is_found_once() -> None:
    program = program_of(
        lambda a: (a * a.sigmoid()).neg() * (a * a.sigmoid()).neg().sigmoid(), (3,)
    )
    silu = aten.mul(X, aten.sigmoid(X))
    assert len(all_matches(program, silu)) == 2
