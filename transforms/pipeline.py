"""Running passes: legality, a copy per pass, verification between passes, a ledger after each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from resplice import legality
from resplice.change import Change
from resplice.compare import EXACT_BARS
from resplice.context import Context
from resplice.errors import (
    NumericsError,
    OpError,
    PassError,
    RespliceError,
    RespliceWarning,
    VerifyError,
)
from resplice.ledger import Ledger, compare_programs
from resplice.pass_base import Approx, Exact, Pass
from resplice.program import Program
from resplice.spec import parse, print_passes
from resplice.verify import same_signature, verify


@dataclass
class Step:
    """One pass that ran: the pass, what it changed, and the ledger if one was kept."""

    item: Pass
    changes: list[Change]
    ledger: Ledger | None = None
    seconds: float = 0.0

    @property
    def sites(self) -> int:
        """Rewritten sites over all functions."""
        return sum(change.count for change in self.changes)


@dataclass
class Pipeline:
    """A sequence of passes.

    Attributes:
        passes: In the order they run; `Pipeline.of` reads text, passes or a mix.
    """

    passes: tuple[Pass, ...] = field(default=())

    @classmethod
    def of(cls, value: str | Pass | Iterable[Pass | str] | None) -> Pipeline:
        """Build from text, one pass, or several of either."""
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls(parse(value))
        if isinstance(value, Pass):
            return cls((value,))
        parts = [(item,) if isinstance(item, Pass) else parse(item) for item in value]
        return cls(tuple(item for part in parts for item in part))

    def __str__(self) -> str:
        """Canonical text."""
        return print_passes(self.passes)

    def check(self, program: Program) -> tuple[Pass, ...]:
        """The passes to run on this program, automatic ones inserted.

        Raises:
            CompositionError: The order is illegal; says which fact is broken by whom.
        """
        completed = legality.complete(self.passes, program.facts)
        legality.check(completed, program.facts)
        return completed

    def run(
        self,
        program: Program,
        context: Context | None = None,
        *,
        check: bool = False,
        on_step: Callable[[Step, Program], None] | None = None,
    ) -> tuple[Program, list[Step]]:
        """Apply all passes to copies; the given program stays as it is.

        Args:
            program: The captured program.
            context: Calibration data, rewrite limit, progress.
            check: Compare with `program` after every pass, on its sample inputs, and hold each
                pass to its declared meaning.
            on_step: Called after every pass with the step and the new program.

        Raises:
            CompositionError: The order is illegal.
            PassError: A pass failed or broke an invariant.
            NumericsError: A pass is outside its declared meaning (with `check`).
        """
        context = context or Context()
        current, steps = program, list[Step]()
        for item in self.check(program):
            start = time.perf_counter()
            current, changes = _apply(item, current, context, [str(s.item) for s in steps])
            step = Step(item, changes, seconds=time.perf_counter() - start)
            if check:
                step.ledger = _checked(program, current, item, changes, steps)
            steps.append(step)
            _warn(item, changes)
            if on_step:
                on_step(step, current)
        return current, steps


def _warn(item: Pass, changes: Sequence[Change]) -> None:
    for text in dict.fromkeys(text for change in changes for text in change.warnings):
        warnings.warn(f"{item}: {text}", RespliceWarning, stacklevel=3)


def _apply(
    item: Pass, program: Program, context: Context, ran: Sequence[str]
) -> tuple[Program, list[Change]]:
    draft, changes = program.copy(), []
    try:
        for name, function in draft.all_functions():
            change = item.run(function, context)
            change.text, change.function = str(item), name
            changes.append(change)
            function.facts = function.facts.without(*item.destroys).adding(
                *(kind() for kind in item.creates if kind not in function.facts)
            )
            function.history = (*function.history, str(item))
            function.settle_weights()
            function.module.recompile()
        verify(draft)
        _keeps_promises(item, program, draft)
    except (VerifyError, OpError) as error:
        raise PassError(
            item.name, error.what, ran=ran, where=error.where, hint=error.hint
        ) from error
    except RespliceError:
        raise
    except Exception as error:
        raise PassError(
            item.name, f"{type(error).__name__}: {error}", ran=ran,
            hint="this is a bug in the pass; `resplice bisect` finds the rewrite that triggers it",
        ) from error  # fmt: skip
    return draft, changes


def _keeps_promises(item: Pass, before: Program, after: Program) -> None:
    for name, function in before.all_functions():
        now = dict(after.all_functions())[name]
        if not item.changes_signature:
            same_signature(function, now)
        missing = [kind.title for kind in item.creates if kind not in now.facts]
        if missing:
            raise VerifyError(f"the promised fact does not hold: {', '.join(missing)}")


def _checked(
    original: Program,
    current: Program,
    item: Pass,
    changes: Sequence[Change],
    steps: Sequence[Step],
) -> Ledger:
    inputs = {**current.sample_tensors(), **original.sample_tensors()}
    ledger = compare_programs(original, current, inputs, after=str(item))
    before = steps[-1].ledger if steps else None
    hold_to_meaning(item, changes, ledger, before, original)
    return ledger


def hold_to_meaning(
    item: Pass, changes: Sequence[Change], ledger: Ledger, before: Ledger | None, original: Program
) -> None:
    """Raise unless a pass did what it declares.

    Raises:
        NumericsError: An exact pass moved the outputs, an approximate one fell below its bar at a
            site, or a finite output became infinite or NaN.
    """
    now, was = ledger.worst_output, before.worst_output if before else None
    if not now.finite:
        raise NumericsError(f"after {item} the output is not finite", measured=now.max_abs, bar=0.0)
    if isinstance(item.meaning, Exact):
        bar = exact_bar(original) + (was.relative if was else 0.0)
        if now.relative > bar:
            culprit = next((e for e in ledger.entries if e.difference.relative > bar), None)
            place = (
                f"first at {culprit.node} in {culprit.module} ({culprit.source})" if culprit else ""
            )
            raise NumericsError(
                f"{item.name} declares itself exact but moved the output",
                measured=now.relative, bar=bar, where=place,
            )  # fmt: skip
    if isinstance(item.meaning, Approx):
        for site in (site for change in changes for site in change.sites):
            measured = site.metrics.get("sqnr_db")
            if measured is not None and measured < item.meaning.sqnr_db:
                raise NumericsError(
                    f"{item.name} lost too much at one site (SQNR in dB)", measured=measured,
                    bar=item.meaning.sqnr_db, where=f"{site.node} in {site.origin}",
                    hint="skip this site or use more bits",
                )  # fmt: skip


def exact_bar(program: Program) -> float:
    """Largest relative error an exact rewrite may show, by the lowest precision of the outputs."""
    found = [EXACT_BARS.get(port.dtype, 0.0) for port in program.outputs]
    return max(found, default=0.0)


def with_limit(context: Context, limit: int | None) -> Context:
    """A fresh context with a rewrite limit (for bisection)."""
    return replace(context, limit=limit, taken=[], _memo={})
