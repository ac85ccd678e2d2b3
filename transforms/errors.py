"""Every error a user can meet: each says what happened, where, and what to do next.

`RespliceError` is the root and is never raised itself. The CLI maps each class to a documented
exit code (`exit_code`), so a script can tell a refused composition from a failed capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class RespliceError(Exception):
    """Root of all errors raised across the public boundary.

    Args:
        what: One sentence saying what went wrong.
        where: The place it went wrong: a node, a source line, an option, a file.
        hint: What the user can do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        """Store the three parts and join them into the message."""
        self.what, self.where, self.hint = what, where, hint
        parts = [what, f"  at: {where}" if where else "", f"  try: {hint}" if hint else ""]
        super().__init__("\n".join(part for part in parts if part))


class RespliceWarning(UserWarning):
    """A pass did what was asked, and the result will hardly be what is wanted."""


class UsageError(RespliceError, ValueError):
    """An argument of the Python API or of the command line is wrong."""

    exit_code = 2


class SpecError(UsageError):
    """Pipeline text or one of its options is wrong; carries the text and the column."""

    def __init__(self, what: str, *, text: str = "", column: int = 0, hint: str = "") -> None:
        """Point a caret at the offending column of the text."""
        self.text, self.column = text, column
        caret = f"\n  {text}\n  {' ' * column}^" if text else ""
        super().__init__(what + caret, hint=hint)


class InputError(UsageError):
    """A call's inputs do not fit the signature of the program."""


class BackendMissing(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing package and the extra that brings it."""
        self.package, self.extra = package, extra
        super().__init__(f"{package} is not installed", hint=f"pip install 'resplice[{extra}]'")


class CaptureError(RespliceError):
    """The model can't be captured as a graph."""

    exit_code = 3


class CompositionError(RespliceError):
    """A pipeline is illegal: a pass needs a fact that does not hold where it stands."""

    exit_code = 4


class LoweringError(RespliceError):
    """A backend can't express parts of the program; lists all of them at once."""

    exit_code = 5

    def __init__(
        self, backend: str, problems: Sequence[str], *, hint: str = "", where: str = ""
    ) -> None:
        """Join every unsupported node into one message."""
        self.backend, self.problems = backend, tuple(problems)
        listing = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{backend} can't express this program:{listing}", where=where, hint=hint)


class VerifyError(RespliceError):
    """A program is not well formed."""

    exit_code = 6


class NumericsError(RespliceError):
    """A result is outside the declared meaning: measured value, bar, first pass over it."""

    exit_code = 6

    def __init__(
        self, what: str, *, measured: float, bar: float, where: str = "", hint: str = ""
    ) -> None:
        """Keep the two numbers for callers that decide on them."""
        self.measured, self.bar = measured, bar
        super().__init__(f"{what}: measured {measured:.3g}, bar {bar:.3g}", where=where, hint=hint)


class PassError(RespliceError):
    """A pass failed or its post-condition did; names it and the passes already run."""

    exit_code = 6

    def __init__(
        self, name: str, what: str, *, ran: Sequence[str] = (), where: str = "", hint: str = ""
    ) -> None:
        """Name the pass and those before it."""
        self.name, self.ran = name, tuple(ran)
        before = f" (after {', '.join(ran)})" if ran else ""
        super().__init__(f"pass {name}{before}: {what}", where=where, hint=hint)


class OpError(UsageError):
    """An op of the dialect is used outside its domain."""

    def __init__(self, op: str, argument: str, what: str) -> None:
        """Name the op and the argument."""
        self.op, self.argument = op, argument
        super().__init__(f"{op}: {argument} {what}")


class ResourceError(RespliceError):
    """Disk or memory ran out; nothing was left half written."""

    exit_code = 7
