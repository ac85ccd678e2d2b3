"""Composition of passes: which orders are legal, why not, and which order would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from resplice import legality
from resplice.capture import capture
from resplice.change import Change
from resplice.context import Context
from resplice.errors import CompositionError
from resplice.facts import Canonical, Fact, Facts, FloatWeights
from resplice.pass_base import Pass
from resplice.passes.canonicalize import Canonicalize
from resplice.passes.quest import Quest
from resplice.pipeline import Pipeline
from resplice.program import Program


@dataclass(frozen=True)
class Grid(Fact):
    """A fact of this test."""

    title = "the token grid is known"


@dataclass(frozen=True)
class Order(Fact):
    """Another fact of this test."""

    title = "tokens are in raster order"


def fake(
    name: str,
    *,
    needs: Sequence[type[Fact]] = (),
    destroys: Sequence[type[Fact]] = (),
    creates: Sequence[type[Fact]] = (),
    after: Sequence[str] = (),
    before: Sequence[str] = (),
) -> Pass:
    """A pass that does nothing and declares what it is told."""
    body: dict[str, Any] = {
        "name": name, "needs": tuple(needs), "destroys": tuple(destroys),
        "creates": tuple(creates), "after": tuple(after), "before": tuple(before),
        "run": lambda self, program, context: Change(),
    }  # fmt: skip
    made: Callable[[], Pass] = dataclass(frozen=True)(type(name, (Pass,), body))
    return made()


HELD = Facts(Grid(), Order())
PLAIN = fake("plain")
READER = fake("reader", needs=[Grid])
BREAKER = fake("breaker", destroys=[Grid])
MAKER = fake("maker", creates=[Grid])
BOTH = fake("both", needs=[Grid], destroys=[Grid])


def refusal(passes: Sequence[Pass], facts: Facts) -> CompositionError:
    """The error that an order raises."""
    with pytest.raises(CompositionError) as caught:
        legality.check(passes, facts)
    return caught.value


def test_a_held_fact_makes_a_pass_legal() -> None:
    legality.check([READER, PLAIN, READER], HELD)
    legality.check([], Facts())


def test_a_fact_that_does_not_hold_is_named() -> None:
    error = refusal([PLAIN, READER], Facts(Order()))
    assert error.what == (
        'reader needs "the token grid is known", which does not hold for this model'
    )
    assert error.where == "plain,reader"
    assert error.hint == "no order of these passes is legal"
    assert error.exit_code == 4


def test_the_pass_that_broke_the_fact_is_named_and_a_legal_order_given() -> None:
    error = refusal([BREAKER, PLAIN, READER], HELD)
    assert error.what == 'reader needs "the token grid is known", which breaker broke'
    assert error.hint == "a legal order is plain,reader,breaker"


def test_the_last_one_to_break_a_fact_is_named() -> None:
    again = fake("again", destroys=[Grid])
    assert "which again broke" in refusal([BREAKER, again, READER], HELD).what


def test_a_fact_made_again_holds_again() -> None:
    legality.check([BREAKER, MAKER, READER], HELD)
    assert "which breaker broke" in refusal([MAKER, BREAKER, READER], HELD).what


def test_a_fact_holds_only_after_the_pass_that_creates_it() -> None:
    legality.check([MAKER, READER], Facts())
    error = refusal([READER, MAKER], Facts())
    assert "which does not hold for this model" in error.what
    assert error.hint == "a legal order is maker,reader"


def test_a_pass_that_breaks_what_it_needs_runs_once() -> None:
    legality.check([BOTH], HELD)
    error = refusal([BOTH, BOTH], HELD)
    assert error.what == 'both needs "the token grid is known", which both broke'
    assert error.hint == "no order of these passes is legal"


def test_a_pass_that_breaks_and_creates_a_fact_leaves_it_held() -> None:
    respell = fake("respell", needs=[Grid], destroys=[Grid], creates=[Grid])
    legality.check([respell, respell, READER], HELD)


def test_other_facts_stay() -> None:
    other = fake("other", needs=[Order])
    legality.check([BREAKER, other], HELD)


def test_declared_order_is_kept() -> None:
    late = fake("late", after=["plain"])
    legality.check([PLAIN, late], Facts())
    error = refusal([late, PLAIN], Facts())
    assert error.what == "late must run after plain"
    assert error.hint == "a legal order is plain,late"
    early = fake("early", before=["plain"])
    legality.check([early, PLAIN], Facts())
    error = refusal([PLAIN, early], Facts())
    assert error.what == "early must run before plain"
    assert error.hint == "a legal order is early,plain"


def test_declared_order_binds_only_if_the_other_pass_is_there() -> None:
    legality.check([fake("late", after=["absent"]), fake("early", before=["absent"])], Facts())


def test_contradicting_declarations_have_no_legal_order() -> None:
    first, second = fake("first", after=["second"]), fake("second", after=["first"])
    for order in ([first, second], [second, first]):
        assert refusal(order, Facts()).hint == "no order of these passes is legal"


def test_facts_against_declarations_have_no_legal_order() -> None:
    late = fake("late", needs=[Grid], after=["breaker"])
    assert refusal([late, BREAKER], HELD).hint == "no order of these passes is legal"
    assert legality.legal_order([late, BREAKER], HELD) is None


def test_the_first_problem_is_the_one_reported() -> None:
    needs_order = fake("needs_order", needs=[Order])
    breaks_order = fake("breaks_order", destroys=[Order])
    error = refusal([BREAKER, breaks_order, needs_order, READER], HELD)
    assert error.what.startswith("needs_order needs")


def test_a_legal_order_is_proposed_from_every_order_and_is_legal() -> None:
    passes = [
        BREAKER,
        READER,
        PLAIN,
        fake("late", after=["breaker"]),
        fake("early", before=["reader"]),
    ]
    for order in permutations(passes):
        found = legality.legal_order(order, HELD)
        assert found is not None
        legality.check(found, HELD)
        assert sorted(map(str, found)) == sorted(map(str, order))


def test_a_legal_order_is_proposed_unchanged() -> None:
    order = (READER, PLAIN, BREAKER, fake("late", after=["reader"]))
    assert legality.legal_order(order, HELD) == order


def test_only_what_must_move_moves() -> None:
    one, two = fake("one"), fake("two")
    assert refusal([one, BREAKER, two, READER], HELD).hint == (
        "a legal order is one,two,reader,breaker"
    )


# ---- automatic passes --------------------------------------------------------------------


def test_canonicalize_is_inserted_where_its_fact_is_needed() -> None:
    user = fake("user", needs=[Canonical])
    assert legality.complete([PLAIN, user], Facts()) == (PLAIN, Canonicalize(), user)


def test_canonicalize_is_inserted_once() -> None:
    user = fake("user", needs=[Canonical])
    assert legality.complete([user, user], Facts()) == (Canonicalize(), user, user)
    assert legality.complete([user], Facts(Canonical())) == (user,)
    assert legality.complete([Canonicalize(), user], Facts()) == (Canonicalize(), user)


def test_canonicalize_is_inserted_again_after_the_form_was_broken() -> None:
    user = fake("user", needs=[Canonical])
    messy = fake("messy", destroys=[Canonical])
    expected = (Canonicalize(), user, messy, Canonicalize(), user)
    assert legality.complete([user, messy, user], Facts()) == expected
    legality.check(expected, Facts())


def test_a_pass_that_is_not_automatic_is_not_inserted() -> None:
    assert legality.complete([READER], Facts()) == (READER,)


def test_a_pass_without_needs_gets_nothing_inserted() -> None:
    assert legality.complete([PLAIN, BREAKER], Facts()) == (PLAIN, BREAKER)


def test_an_order_with_automatic_passes_is_proposed_completely() -> None:
    breaker = fake("breaker", destroys=[FloatWeights])
    passes = legality.complete([breaker, Quest()], Facts(FloatWeights()))
    error = refusal(passes, Facts(FloatWeights()))
    assert error.what == 'quest needs "weights are float constants", which breaker broke'
    assert error.hint == "a legal order is canonicalize,quest,breaker"


# ---- through the pipeline ----------------------------------------------------------------


def program() -> Program:
    """A tiny captured model."""
    return capture(nn.Linear(4, 4), (torch.randn(2, 4),))


def test_the_pipeline_refuses_before_anything_runs() -> None:
    ran: list[str] = []

    class Spy(type(PLAIN)):  # type: ignore[misc]  # a class made at run time
        def run(self, program: Program, context: Context) -> Change:
            ran.append("spy")
            return Change()

    with pytest.raises(CompositionError):
        Pipeline((Spy(), READER)).run(program())
    assert not ran


def test_the_pipeline_runs_what_completion_inserted() -> None:
    user = fake("user", needs=[Canonical])
    result, steps = Pipeline((user,)).run(program())
    assert [str(step.item) for step in steps] == ["canonicalize", "user"]
    assert result.history == ("canonicalize", "user")
    assert Canonical in result.facts


def test_facts_of_a_program_follow_the_passes_that_ran() -> None:
    result, _ = Pipeline((MAKER,)).run(program())
    assert Grid in result.facts
    broken, _ = Pipeline((BREAKER,)).run(result)
    assert Grid not in broken.facts
    assert Grid in result.facts, "the given program stays as it is"
    with pytest.raises(CompositionError, match="which does not hold for this model"):
        Pipeline((READER,)).run(broken)


def test_quest_twice_is_refused() -> None:
    with pytest.raises(CompositionError) as caught:
        Pipeline.of("quest,quest").run(program())
    assert caught.value.what == 'quest needs "weights are float constants", which quest broke'
    assert caught.value.hint == "no order of these passes is legal"
    quantised, _ = Pipeline.of("quest").run(program())
    with pytest.raises(CompositionError, match="which does not hold for this model"):
        Pipeline.of("quest").run(quantised)
