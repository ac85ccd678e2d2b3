"""Traced patterns: functions become terms that match at any size and at no other meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from resplice.capture import capture
from resplice.errors import UsageError
from resplice.normal import normalize
from resplice.pattern import Call, Match, NoMatch, Var, aten, match, shared
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


def graph_of(function: Callable[..., Any], *tensors: Tensor) -> fx.Graph:
    """Capture a function in normal form."""
    program = capture(Plain(function), tensors)
    normalize(program)
    return program.graph


def find(term: Any, function: Callable[..., Any], *shapes: tuple[int, ...]) -> Match:
    """Match a term with the result of a function of floats."""
    graph = graph_of(function, *(torch.randn(shape) for shape in shapes))
    (result,) = graph.output_node().args[0]  # type: ignore[misc]  # one node
    return match(term, result)  # type: ignore[arg-type]  # a node


def literals(term: Any) -> Iterator[Any]:
    """Every literal and free variable of a term."""
    for item in term.args if isinstance(term, Call) else term:
        if isinstance(item, Call | list):
            yield from literals(item)
        else:
            yield item


def rotate_half(x: Tensor) -> Tensor:
    """Rotary half turn."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention spelled out; the scale depends on the head size."""
    weights = torch.softmax(q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1])), dim=-1)
    return weights @ v


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm as Llama writes it."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("size", [2, 6, 128])
def test_a_slice_bound_becomes_a_variable(size: int) -> None:
    term = traced(rotate_half, x="b s d")(X)
    assert find(term, rotate_half, (1, 3, size))["x"].op == "placeholder"


def test_the_bound_is_one_variable_in_all_places() -> None:
    free = [item for item in literals(traced(rotate_half, x="b s d")(X)) if isinstance(item, Var)]
    bounds = [item for item in free if item != X]
    assert len(bounds) == 2
    assert len(set(bounds)) == 1


@pytest.mark.parametrize(("first", "second"), [(4, 3), (3, 4), (2, 6)])
def test_inconsistent_slice_bounds_are_refused(first: int, second: int) -> None:
    def uneven(x: Tensor) -> Tensor:
        return torch.cat((-x[..., first:], x[..., :second]), dim=-1)

    term = traced(rotate_half, x="b s d")(X)
    assert find(term, lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1), (2, 3, 8))
    with pytest.raises(NoMatch, match=f"is both {first} and {second}"):
        find(term, uneven, (2, 3, 8))


def test_a_traced_term_binds_one_bound_per_use() -> None:
    """Two uses of one builder have their own variables: two heads of different sizes."""

    def two(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((rotate_half(x), rotate_half(y)), -1)

    half = traced(rotate_half, x="b s d")
    term = aten.cat([half(X), half(Y)], -1)
    assert find(term, two, (2, 3, 8), (2, 3, 4))


def test_a_constant_that_does_not_vary_stays_a_literal() -> None:
    term = traced(lambda x: x * 0.5 + 1, x="a b")(X)
    assert list(literals(term)) == [X, 0.5, 1, 1]
    assert find(term, lambda x: x * 0.5 + 1, (3, 7))
    with pytest.raises(NoMatch, match=r"expected 0\.5, found 0\.25"):
        find(term, lambda x: x * 0.25 + 1, (3, 7))


def test_a_scale_that_varies_with_size_becomes_a_variable() -> None:
    shapes = {"q": "b h s d", "k": "b h t d", "v": "b h t d"}
    term = traced(softmax_attention, **shapes)(X, Y, Z)
    found = find(term, softmax_attention, (1, 2, 3, 9), (1, 2, 4, 9), (1, 2, 4, 9))
    assert [found[name].name for name in "xyz"] == ["tensors_0", "tensors_1", "tensors_2"]
    scales = [v for name, v in found.bindings.items() if name.startswith("_")]
    assert scales == [1 / math.sqrt(9)]


def test_attention_over_another_axis_is_refused() -> None:
    def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1])), dim=-2) @ v

    shapes = {"q": "b h s d", "k": "b h t d", "v": "b h t d"}
    with pytest.raises(NoMatch, match="expected -1, found -2"):
        find(traced(softmax_attention, **shapes)(X, Y, Z), transposed, *[(1, 2, 4, 8)] * 3)


def test_rms_norm_matches_with_either_operand_order_and_any_rank_of_its_weight() -> None:
    term = traced(rms_norm, x="b s d", weight="d")(shared_x := Var("x"), Var("w"))
    assert shared_x == X
    swapped = find(
        term, lambda x, w: (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x) * w,
        (2, 3, 10), (10,),
    )  # fmt: skip
    assert [swapped[name].name for name in "xw"] == ["tensors_0", "tensors_1"]


def test_rms_norm_with_another_epsilon_is_refused() -> None:
    def other(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    with pytest.raises(NoMatch, match="expected 1e-06, found 1e-05"):
        find(traced(rms_norm, x="b s d", weight="d")(X, Y), other, (2, 3, 10), (10,))


def test_terms_go_in_where_parameters_stand() -> None:
    half = traced(rotate_half, x="b s d")
    found = find(half(shared(aten.relu(X))), lambda x: rotate_half(x.relu()), (2, 3, 8))
    assert found["x"].op == "placeholder"
    with pytest.raises(NoMatch, match=r"expected aten\.relu, found placeholder"):
        find(half(shared(aten.relu(X))), rotate_half, (2, 3, 8))


def test_a_subgraph_used_twice_is_matched_once() -> None:
    term = traced(lambda x: x.sigmoid() * x, x="a")(aten.neg(X))
    found = find(term, lambda x: (n := x.neg()).sigmoid() * n, (4,))
    assert len(found.nodes) == 3


def test_two_copies_of_a_subgraph_are_not_one() -> None:
    """The function uses one value twice; a graph with two different values is another thing."""
    term = traced(lambda x: x.sigmoid() * x, x="a")(X)
    assert find(term, lambda x: x.sigmoid() * x, (4,))
    with pytest.raises(NoMatch, match="x is both"):
        find(term, lambda x, y: x.sigmoid() * y, (4,), (4,))


def test_several_outputs_are_unpacked_by_item() -> None:
    def gated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return nn.functional.silu(a) * b

    term = traced(gated, x="b d")(X)
    assert find(term, gated, (3, 20))["x"].op == "placeholder"
    with pytest.raises(NoMatch):
        find(term, lambda x: nn.functional.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0], (3, 20))


def test_equal_letters_are_equal_sizes() -> None:
    term = traced(lambda x, y: x @ y, x="a b", y="b a")(X, Y)
    assert find(term, lambda x, y: x @ y, (3, 5), (5, 3))


def test_a_tensor_constant_inside_is_refused() -> None:
    table = torch.arange(4.0)
    build = traced(lambda x: x + table.sum(), x="a b")
    with pytest.raises(UsageError, match="holds a tensor constant"):
        build(Var("x"))
