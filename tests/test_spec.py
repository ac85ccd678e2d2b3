"""Pipeline text: it reads back what it prints, and points at what it can't read."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplice import registry
from resplice.change import Change
from resplice.context import Context
from resplice.errors import SpecError
from resplice.kernels.quant_linear import BITS
from resplice.pass_base import Pass, option
from resplice.passes.cse import Cse
from resplice.passes.fold import Fold
from resplice.passes.quest import Quest
from resplice.program import Program
from resplice.spec import convert, parse, print_pass, print_passes


@dataclass(frozen=True)
class Every(Pass):
    """One option of every type."""

    name = "every"

    count: int = option(1, "a whole number")
    ratio: float = option(0.5, "a number")
    fast_path: bool = option(False, "a switch")
    label: str = option("plain", "text")
    names: tuple[str, ...] = option((), "texts")
    sizes: tuple[int, ...] = option((1, 2), "numbers")
    tile: tuple[int, int, int] = option((6, 8, 8), "three numbers")
    mode: Literal["auto", "off", "on"] = option("auto", "a choice")
    block: Literal["auto", "off"] | int = option("auto", "a choice or a number")
    level: int | None = option(3, "a number or nothing")
    note: str | None = option(None, "text or nothing")
    chosen: int = option(4, "one of some", choices=(4, 8))

    def run(self, program: Program, context: Context) -> Change:
        """Nothing."""
        return Change()


@dataclass(frozen=True)
class Bare(Pass):
    """No options."""

    name = "bare"

    def run(self, program: Program, context: Context) -> Change:
        """Nothing."""
        return Change()


@pytest.fixture(autouse=True, scope="module")
def _local_passes() -> Iterator[None]:
    """Put the local passes into the table."""
    local = {"every": f"{__name__}:Every", "bare": f"{__name__}:Bare"}
    with pytest.MonkeyPatch.context() as patch:
        for name, place in local.items():
            patch.setitem(registry.PASSES, name, place)
        classes = {local["every"]: Every, local["bare"]: Bare}
        original = registry.load
        patch.setattr(registry, "load", lambda place: classes.get(place) or original(place))
        registry.pass_table.cache_clear()
        yield
    registry.pass_table.cache_clear()


INTS = st.integers(-(10**12), 10**12)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
TRICKY = st.sampled_from(
    ["", "none", "true", "1", "a b", 'say "hi"', "a\\b", "\\", "{x=1}", "a,b", "="]
)
WORDS = TEXT | TRICKY | st.text(string.printable, max_size=8)
EVERY = st.builds(
    Every,
    count=INTS,
    ratio=st.floats(allow_nan=False),
    fast_path=st.booleans(),
    label=WORDS,
    names=st.lists(WORDS, max_size=4).map(tuple),
    sizes=st.lists(INTS, max_size=4).map(tuple),
    tile=st.tuples(INTS, INTS, INTS),
    mode=st.sampled_from(["auto", "off", "on"]),
    block=st.sampled_from(["auto", "off"]) | INTS,
    level=st.none() | INTS,
    note=st.none() | WORDS,
    chosen=st.sampled_from([4, 8]),
)
QUEST = st.builds(
    Quest,
    weight_bits=st.sampled_from([*BITS, 16]),
    group=st.integers(0, 4096),
    hadamard=st.sampled_from(["auto", "off", 1, 2, 16, 128]),
    head=st.booleans(),
    skip=st.lists(WORDS, max_size=3).map(tuple),
)
REAL = st.one_of(QUEST, st.builds(Fold, max_kib=INTS), st.builds(Cse))


@given(EVERY)
def test_every_type_of_option_reads_back(item: Every) -> None:
    assert parse(print_pass(item)) == (item,)


@given(st.lists(REAL | EVERY, min_size=1, max_size=4).map(tuple))
def test_pipelines_read_back(passes: tuple[Pass, ...]) -> None:
    text = print_passes(passes)
    assert parse(text) == passes
    assert print_passes(parse(text)) == text


@given(EVERY)
def test_options_read_back_with_their_types(item: Every) -> None:
    (read,) = parse(print_pass(item))
    for name in Every.__dataclass_fields__:
        assert type(getattr(read, name)) is type(getattr(item, name)), name


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Every(), "every"),
        (Bare(), "bare"),
        (Every(count=-3), "every{count=-3}"),
        (Every(ratio=1e-9), "every{ratio=1e-09}"),
        (Every(fast_path=True), "every{fast-path=true}"),
        (Every(label="two words"), 'every{label="two words"}'),
        (Every(label='a "quote" and \\'), r'every{label="a \"quote\" and \\"}'),
        (Every(label=""), 'every{label=""}'),
        (Every(names=("*.down.*", "a,b")), 'every{names=*.down.*,"a,b"}'),
        (Every(sizes=(7,)), "every{sizes=7}"),
        (Every(sizes=()), "every{sizes=none}"),
        (Every(tile=(1, 2, 3), count=2), "every{count=2 tile=1,2,3}"),
        (Every(mode="off", block=64), "every{mode=off block=64}"),
        (Every(level=None), "every{level=none}"),
        (Every(note="none"), 'every{note="none"}'),
        (Quest(weight_bits=2, skip=("lm_head.*",)), "quest{weight-bits=2 skip=lm_head.*}"),
    ],
)
def test_canonical_text(item: Pass, text: str) -> None:
    assert print_pass(item) == str(item) == text
    assert parse(text) == (item,)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (" bare , bare ", (Bare(), Bare())),
        ("bare{}", (Bare(),)),
        ("every { count = 2 }", (Every(count=2),)),
        ("every{fast_path=true}", (Every(fast_path=True),)),
        ("every{tile=1 , 2 , 3 count=2}", (Every(tile=(1, 2, 3), count=2),)),
        ("every{mode=off},bare", (Every(mode="off"), Bare())),
        ('every{label="}"}', (Every(label="}"),)),
        ('every{block="auto"}', (Every(),)),
        ("every{note=none}", (Every(),)),
        ("every{label=none}", (Every(label="none"),)),
        ("bare\n,every{\n  count=2\n}\n", (Bare(), Every(count=2))),
    ],
)
def test_other_spellings_are_read(text: str, passes: tuple[Pass, ...]) -> None:
    assert parse(text) == passes


def error_of(text: str) -> SpecError:
    """The error that a text raises."""
    with pytest.raises(SpecError) as caught:
        parse(text)
    return caught.value


ERRORS = [
    # text, text up to the caret, message, hint
    ("quset", "", "there is no pass 'quset'", "did you mean quest?"),
    ("bare,quset{head=true}", "bare,", "there is no pass 'quset'", "did you mean quest?"),
    ("xyzzy", "", "there is no pass 'xyzzy'", "passes are bare, "),
    ("every{cuont=1}", "every{", "every has no option 'cuont'", "did you mean count?"),
    (
        "every{count=2 zzz=1}",
        "every{count=2 ",
        "every has no option 'zzz'",
        "options are count, ratio",
    ),
    ("bare{zzz=1}", "bare{", "bare has no option 'zzz'", "options are none"),
    ("every{count=x}", "every{count=", "every: count must be a whole number, not 'x'", ""),
    ("every{count=1.5}", "every{count=", "every: count must be a whole number, not '1.5'", ""),
    ("every{ratio=fast}", "every{ratio=", "every: ratio must be a number, not 'fast'", ""),
    (
        "every{fast-path=1}",
        "every{fast-path=",
        "every: fast-path must be true or false, not '1'",
        "",
    ),
    ("every{fast-path=True}", "every{fast-path=", "must be true or false, not 'True'", ""),
    ("every{count=1,2}", "every{count=", "every: count takes one value, got 2", ""),
    ("every{tile=1,2}", "every{tile=", "every: tile takes 3 items, got 2", ""),
    ("every{tile=none}", "every{tile=", "every: tile takes 3 items, got 1", ""),
    ("every{tile=1,2,x}", "every{tile=", "every: tile must be a whole number, not 'x'", ""),
    (
        "every{mode=maybe}",
        "every{mode=",
        "every: mode must be one of auto, off, on, not 'maybe'",
        "",
    ),
    ("every{block=maybe}", "every{block=", "every: block can't be 'maybe'", ""),
    ("every{level=x}", "every{level=", "every: level can't be 'x'", ""),
    ("bare,every{chosen=5}", "bare,", "every: chosen=5 is not one of 4, 8", ""),
    ("every{count}", "every{count", "expected '=' after count, found '}'", ""),
    ("every{count 3}", "every{count ", "expected '=' after count, found '3'", ""),
    ("every{count", "every{count", "expected '=' after count, found the end", ""),
    ("every{count=", "every{count=", "expected a value, found the end", ""),
    ("every{count=}", "every{count=", "expected a value, found '}'", ""),
    ("every{names=a,,b}", "every{names=a,", "expected a value, found ','", ""),
    ("every{", "every{", "expected '}', found the end", ""),
    ("every{count=2", "every{count=2", "expected '}', found the end", ""),
    ("every{count=2,}", "every{count=2", "expected an option, found ','", ""),
    ("every{=2}", "every{", "expected an option, found '='", ""),
    ('every{"count"=2}', "every{", "expected an option, found '\"count\"'", ""),
    ("bare bare", "bare ", "expected ',' between passes, found 'bare'", ""),
    ("bare}", "bare", "expected ',' between passes, found '}'", ""),
    ("bare{}}", "bare{}", "expected ',' between passes, found '}'", ""),
    ("bare,", "bare,", "expected a pass name, found the end", ""),
    (",bare", "", "expected a pass name, found ','", ""),
    ("bare,,bare", "bare,", "expected a pass name, found ','", ""),
    ("every{count=1 ratio=2 count=3}", "every{count=1 ratio=2 ", "every: count is given twice", ""),
    (
        "every{fast-path=true fast_path=true}",
        "every{fast-path=true ",
        "fast-path is given twice",
        "",
    ),
    ('every{label="open}', "every{label=", "unfinished quoted text", ""),
]


@pytest.mark.parametrize(("text", "before", "message", "hint"), ERRORS, ids=[e[0] for e in ERRORS])
def test_errors_point_a_caret_at_the_column(
    text: str, before: str, message: str, hint: str
) -> None:
    error = error_of(text)
    first, shown, caret, *rest = str(error).splitlines()
    assert message in first
    assert (error.text, error.column) == (text, len(before))
    assert shown == f"  {text}"
    assert caret == f"  {' ' * len(before)}^"
    assert "\n".join(rest).startswith(f"  try: {hint}" if hint else "")
    assert bool(rest) == bool(hint)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text_is_refused(text: str) -> None:
    error = error_of(text)
    assert error.what == "the pipeline is empty"
    assert error.hint == "name at least one pass, such as quest"
    assert "^" not in str(error)


def test_a_spec_error_is_a_usage_error() -> None:
    assert error_of("zzz").exit_code == 2
    assert isinstance(error_of("zzz"), ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, "weight-bits=5 is not one of 1, 2, 3, 4, 8, 16"),
        ({"group": -1}, "group=-1 must be 0 or positive"),
        ({"hadamard": 0}, "hadamard=0 is not a power of two"),
        ({"hadamard": 12}, "hadamard=12 is not a power of two"),
        ({"hadamard": -4}, "hadamard=-4 is not a power of two"),
    ],
)
def test_passes_made_in_python_are_validated_alike(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Quest(**options)
    text = " ".join(f"{key}={value}" for key, value in options.items())
    error = error_of(f"bare,quest{{{text}}}")
    assert message in error.what
    assert error.column == len("bare,")


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        passes = parse(text)
    except SpecError as error:
        assert 0 <= error.column <= len(text)  # noqa: PT017  # both outcomes are fine
    else:
        assert parse(print_passes(passes)) == passes


@given(st.text('{}=," \\abcount1', max_size=20))
def test_any_options_are_read_or_refused(text: str) -> None:
    test_any_text_is_read_or_refused.hypothesis.inner_test(f"every{{{text}")  # type: ignore[attr-defined]  # hypothesis keeps the function


def test_a_tuple_of_choices_converts() -> None:
    assert convert(["a", "b"], tuple[Literal["a", "b"], ...]) == ("a", "b")
    with pytest.raises(ValueError, match="must be one of a, b, not 'c'"):
        convert(["a", "c"], tuple[Literal["a", "b"], ...])


def test_an_optional_tuple_converts() -> None:
    assert convert(["1", "2"], tuple[int, ...] | None) == (1, 2)
    assert convert(["none"], tuple[int, ...] | None) is None
