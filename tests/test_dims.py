"""Named dimensions: their text, bounds, and how sizes of a call are solved for them."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resplice.capture import capture
from resplice.dims import Dim, expression, per_axis, same_shape, shape_text, size_text, solve
from resplice.errors import InputError, UsageError
from resplice.program import Program

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,6}", fullmatch=True)
DIMS = st.builds(
    lambda name, low, more, factor: Dim(name, low, None if more is None else low + more, factor),
    NAMES,
    st.integers(0, 99),
    st.none() | st.integers(0, 99),
    st.integers(1, 9),
)


@given(DIMS)
def test_text_reads_back(dim: Dim) -> None:
    assert Dim.parse(str(dim)) == dim


@pytest.mark.parametrize(
    ("text", "dim"),
    [
        ("seq", Dim("seq", 2, None)),
        (" seq ", Dim("seq")),
        ("seq=2:2048", Dim("seq", 2, 2048)),
        ("seq = 1 : 8", Dim("seq", 1, 8)),
        ("seq=4:", Dim("seq", 4, None)),
        ("seq=:8", Dim("seq", 2, 8)),
        ("seq=:", Dim("seq")),
        ("2*rows", Dim("rows", factor=2)),
        ("2 * rows=1:4", Dim("rows", 1, 4, 2)),
        ("frames*rows", Dim("frames*rows")),
        ("frames*rows*columns=6:", Dim("frames*rows*columns", 6)),
        ("_x1", Dim("_x1")),
    ],
)
def test_texts_that_name_a_dimension(text: str, dim: Dim) -> None:
    assert Dim.parse(text) == dim


@pytest.mark.parametrize(
    "value",
    ["", "2", "2*", "*rows", "seq=", "seq=8", "seq=a:b", "seq=-1:4", "a b", "a+b", "rows*2", 7,
     None, "seq=9:3"],
)  # fmt: skip
def test_other_values_name_none(value: object) -> None:
    with pytest.raises(UsageError) as caught:
        Dim.parse(value)
    assert str(value) in str(caught.value)


def test_bounds_the_wrong_way_round_are_refused_in_python_too() -> None:
    with pytest.raises(UsageError, match="seq=9:3"):
        Dim("seq", 9, 3)


def test_a_dim_is_read_as_itself() -> None:
    dim = Dim("seq", 3, 9)
    assert Dim.parse(dim) is dim


def test_torch_dims_are_read() -> None:
    assert Dim.parse(torch.export.Dim("seq", min=4, max=64)) == Dim("seq", 4, 64)
    assert Dim.parse(torch.export.Dim("seq")) == Dim("seq")


def test_torch_dims_below_two_start_at_two() -> None:
    """Export assumes that a dynamic size is neither 0 nor 1."""
    assert Dim.parse(torch.export.Dim("seq", min=1, max=8)) == Dim("seq", 2, 8)


def test_torch_multiples_are_read() -> None:
    rows = torch.export.Dim("rows", min=3, max=8)
    assert Dim.parse(2 * rows) == Dim("rows", 3, 8, factor=2)


@given(DIMS, st.integers(0, 2000))
def test_a_size_is_admitted_if_it_is_a_multiple_within_bounds(dim: Dim, size: int) -> None:
    low, high = dim.min * dim.factor, None if dim.max is None else dim.max * dim.factor
    expected = size % dim.factor == 0 and low <= size and (high is None or size <= high)
    assert dim.admits(size) == expected


def test_labels_carry_the_factor() -> None:
    assert Dim("rows").label == "rows"
    assert Dim("rows", 3, 4, factor=2).label == "2*rows"
    assert str(Dim("rows", 3, 4, factor=2)) == "2*rows=3:4"


def test_specs_per_axis() -> None:
    assert per_axis(None) == {}
    assert per_axis({0: "batch", -1: "seq=2:9"}) == {0: Dim("batch"), -1: Dim("seq", 2, 9)}
    assert per_axis((None, "seq")) == {1: Dim("seq")}
    assert per_axis({0: None, 1: "seq"}) == {1: Dim("seq")}


# ---- symbolic sizes ----------------------------------------------------------------------


class Pairs(nn.Module):
    """Takes [batch, 2*rows] and [rows + 1]."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both inputs, related."""
        return x.reshape(x.shape[0], -1, 2).sum(-1), y * 2


def dynamic() -> Program:
    """A program with a named and a doubled size."""
    return capture(
        Pairs(),
        (torch.randn(3, 8), torch.randn(5)),
        dynamic_shapes={"x": {0: "batch=2:16", 1: "2*rows"}, "y": {0: "length"}},
    )


def test_symbols_print_as_names() -> None:
    program = dynamic()
    assert [str(port) for port in program.inputs] == ["x: f32[batch,2*rows]", "y: f32[length]"]
    assert program.outputs[0].shape == ("batch", "rows")
    assert {label: str(dim) for label, dim in program.dims.items()} == {
        "batch": "batch=2:16", "rows": "rows", "length": "length",
    }  # fmt: skip


def test_sizes_print() -> None:
    program = dynamic()
    sizes = program.placeholders[0].meta["val"].shape
    assert size_text(7, {}) == 7
    assert shape_text(sizes, program.symbols) == program.inputs[0].shape
    assert expression(7) == sympy.Integer(7)
    assert expression(sizes[0]).free_symbols == {expression(sizes[0])}


def test_solving_binds_a_symbol_once() -> None:
    sizes = dynamic().placeholders[0].meta["val"].shape
    bound: dict[sympy.Symbol, int] = {}
    assert solve(4, 4, bound)
    assert not solve(4, 5, bound)
    assert not bound
    assert solve(sizes[0], 9, bound)
    assert list(bound.values()) == [9]
    assert solve(sizes[0], 9, bound)
    assert not solve(sizes[0], 10, bound)


def test_solving_through_a_factor() -> None:
    (_, double) = dynamic().placeholders[0].meta["val"].shape
    bound: dict[sympy.Symbol, int] = {}
    if not expression(double).is_Symbol:
        assert not solve(double, 7, dict(bound))
    assert solve(double, 12, bound)


def test_equal_shapes_are_provably_equal() -> None:
    program = dynamic()
    x, y = (node.meta["val"] for node in program.placeholders)
    assert same_shape(x, x)
    assert same_shape(x, x * 2)
    assert not same_shape(x, y)
    assert not same_shape(x, x[:, :4])
    assert not same_shape(torch.empty(2, 3), torch.empty(2, 3, 1))
    guards = len(program.fake_mode.shape_env.guards)  # type: ignore[union-attr]  # it has one
    assert not same_shape(x[0], y)
    assert len(program.fake_mode.shape_env.guards) == guards  # type: ignore[union-attr]  # same


@pytest.mark.parametrize(("batch", "rows", "length"), [(2, 2, 2), (16, 9, 50), (3, 4, 5)])
def test_a_call_at_other_sizes_is_accepted(batch: int, rows: int, length: int) -> None:
    x, y = torch.randn(batch, 2 * rows), torch.randn(length)
    first, second = dynamic()(x, y)
    assert torch.equal(first, x.reshape(batch, rows, 2).sum(-1))
    assert torch.equal(second, y * 2)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((17, 8), (5,), r"dimension batch is 17, must be 2 to 16"),
        ((1, 8), (5,), r"dimension batch is 1, must be 2 to 16"),
        ((3, 7), (5,), r"x has size 7 on axis 1, expected 2\*rows"),
        ((3, 8), (1,), r"dimension length is 1, must be 2 to any"),
        ((3, 8, 1), (5,), r"input x has 3 axes, expected 2"),
    ],
)  # fmt: skip
def test_a_call_outside_the_bounds_is_refused(
    x: tuple[int, ...], y: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dynamic()(torch.randn(x), torch.randn(y))


def test_one_name_is_one_size() -> None:
    program = capture(
        Same(), (torch.randn(3, 4), torch.randn(3, 4)),
        dynamic_shapes={"a": {0: "n"}, "b": {0: "n"}},
    )  # fmt: skip
    assert program(torch.randn(7, 4), torch.randn(7, 4)).shape == (7, 4)
    with pytest.raises(InputError, match="input b has size 6 on axis 0, expected n"):
        program(torch.randn(7, 4), torch.randn(6, 4))


class Same(nn.Module):
    """Adds two inputs of one size."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        return a + b
