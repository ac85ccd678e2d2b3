"""Error measures: the formula, and everything that is not a finite number."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from resplice.compare import Difference, difference, sqnr_db, worst
from resplice.errors import NumericsError

INF, NAN = math.inf, math.nan
EXACT = Difference(None, 0.0, 0.0)
BROKEN = Difference(-INF, INF, INF, finite=False)


def vector(*values: float) -> torch.Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def test_identical_tensors_have_no_ratio() -> None:
    x = torch.randn(3, 4)
    assert difference(x, x.clone()) == EXACT
    assert sqnr_db(x, x) == INF


def test_the_formula() -> None:
    """Signal 3**2 + 4**2, error 0.3**2 + 0.4**2: 20 dB; the largest error is 0.4 of 4."""
    found = difference(vector(3, 4), vector(3.3, 3.6))
    assert found.sqnr_db == pytest.approx(20, rel=1e-12)
    assert found.max_abs == pytest.approx(0.4, rel=1e-12)
    assert found.relative == pytest.approx(0.1, rel=1e-12)
    assert found.finite


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1))
@example([(5e-324, 0.0), (5e-324, 1.0)])
def test_the_formula_agrees_with_fractions(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    found = difference(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()))
    signal, error = (sum(Fraction(float(x)) ** 2 for x in values) for values in (a, a - b))
    assert found.max_abs == np.max(np.abs(a - b))
    if error == 0:
        assert found.sqnr_db is None
    elif signal == 0:
        assert found.sqnr_db == -INF
    else:
        ratio = Fraction(signal) / Fraction(error)  # of subnormal numbers, too
        expected = 10 * (math.log10(ratio.numerator) - math.log10(ratio.denominator))
        assert found.sqnr_db == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_scaling_both_changes_no_ratio() -> None:
    a, b = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    once, scaled = difference(a, b), difference(a * 1024, b * 1024)
    assert (once.sqnr_db, once.relative) == (scaled.sqnr_db, scaled.relative)
    assert scaled.max_abs == once.max_abs * 1024


def test_measures_are_taken_in_float64() -> None:
    """In float32 the squares of 1e-30 vanish."""
    a = torch.tensor([2.0**-100])
    assert difference(a, 2 * a).sqnr_db == 0


def test_a_zero_reference_has_no_scale() -> None:
    assert difference(vector(0, 0), vector(0, 0)) == EXACT
    assert difference(vector(0, 0), vector(0, 1)) == Difference(-INF, 1.0, INF)


def test_empty_tensors_are_identical() -> None:
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == EXACT


def test_equal_masks_do_not_count() -> None:
    a, b = vector(3, -INF, 4, INF), vector(3.3, -INF, 3.6, INF)
    assert difference(a, b) == difference(vector(3, 4), vector(3.3, 3.6))
    assert difference(a, a.clone()) == EXACT
    assert difference(vector(-INF), vector(-INF)) == EXACT


@pytest.mark.parametrize(
    ("reference", "result"),
    [
        (-INF, INF), (INF, -INF), (-INF, -1e30), (INF, torch.finfo(torch.float64).max),
        (-INF, torch.finfo(torch.float64).min), (INF, NAN), (-INF, 0.0),
        (NAN, 0.0), (NAN, INF), (0.0, NAN), (1.0, INF), (1.0, -INF),
    ],
)  # fmt: skip
def test_a_value_that_is_not_finite_must_be_the_same(reference: float, result: float) -> None:
    assert difference(vector(1, reference), vector(1, result)) == BROKEN


def test_nan_where_the_reference_is_nan_does_not_count() -> None:
    assert difference(vector(NAN, 1), vector(NAN, 1)) == EXACT
    assert difference(vector(NAN, 3, 4), vector(NAN, 3.3, 3.6)).sqnr_db == pytest.approx(20)


def test_shapes_must_agree() -> None:
    with pytest.raises(NumericsError, match=r"shapes differ: \[2, 3\] and \[3, 2\]") as caught:
        difference(torch.zeros(2, 3), torch.zeros(3, 2))
    assert caught.value.measured == INF


def test_broadcastable_shapes_do_not_agree() -> None:
    with pytest.raises(NumericsError):
        difference(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_any_dtype_can_be_compared(dtype: torch.dtype) -> None:
    a = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert difference(a, a.clone()) == EXACT
    assert difference(a, 1 - a.long()).max_abs == 1


def test_complex_values_count_with_both_parts() -> None:
    a, b = torch.tensor([3 + 4j]), torch.tensor([3 + 4.5j])
    assert difference(a, b).max_abs == 0.5
    assert difference(a, b).sqnr_db == pytest.approx(20)
    assert difference(a, a.conj().resolve_conj().conj()) == EXACT


def test_gradients_are_left_out() -> None:
    x = torch.randn(3, requires_grad=True)
    assert difference(x, x * 1) == EXACT


def test_the_worst_is_the_largest_relative_error() -> None:
    small, large = Difference(10.0, 9.0, 0.1), Difference(50.0, 1.0, 0.2)
    assert worst([small, large]) is large
    assert worst([small, BROKEN, large]) is BROKEN
    assert worst([]) == EXACT


def test_text_and_json() -> None:
    assert str(EXACT).startswith("identical")
    assert str(Difference(42.04, 0.0012, 0.0004)) == "42.0 dB, max abs 1.20e-03 (4.00e-04 of scale)"
    assert EXACT.to_json() == {"sqnr_db": None, "max_abs": 0.0, "relative": 0.0, "finite": True}


def test_errors_too_small_to_square_are_errors() -> None:
    """The square of 1e-200 is zero in float64."""
    a, b = vector(2e-200, 0, 0), vector(2e-200, 2e-200, 0)
    assert difference(a, b).sqnr_db == pytest.approx(0, abs=1e-9)
    assert difference(vector(0, 0), vector(0, 1e-200)).sqnr_db == -INF
