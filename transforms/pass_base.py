"""Pass: a frozen dataclass whose fields are its options.

    @dataclass(frozen=True)
    class Quest(Pass):
        name = "quest"
        weight_bits: int = option(4, "bits per weight", choices=(1, 2, 3, 4, 8, 16))

Text form, CLI help, validation and saved metadata all derive from the fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from resplice.change import Change
from resplice.context import Context
from resplice.errors import SpecError
from resplice.facts import Fact
from resplice.program import Program


@dataclass(frozen=True)
class Exact:
    """The result must not change beyond rounding."""

    def __str__(self) -> str:
        """For reports."""
        return "exact"


@dataclass(frozen=True)
class Approx:
    """The result may change: each rewritten site keeps at least this signal-to-noise ratio.

    Attributes:
        sqnr_db: Lower bar on 10 log10(signal / error) of a site's value, in dB, on its own inputs.
    """

    sqnr_db: float

    def __str__(self) -> str:
        """For reports."""
        return f"approximate, at least {self.sqnr_db:.1f} dB per site"


@dataclass(frozen=True)
class Redefines:
    """The model means something else afterwards (new positions, say): nothing to compare with."""

    def __str__(self) -> str:
        """For reports."""
        return "redefines the model"


Meaning = Exact | Approx | Redefines


def option(default: Any, help: str, *, choices: tuple[Any, ...] = ()) -> Any:
    """A pass option: a dataclass field with a help line and, if closed, its choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; subclasses set the class attributes and `run`.

    Attributes:
        needs: Fact types that must hold before.
        creates: Fact types that hold afterwards.
        destroys: Fact types that hold no more afterwards.
        after: Names of passes that, if present, must have run before.
        before: Names of passes that, if present, must run later.
        changes_signature: Whether inputs or outputs may change.
        automatic: Whether the pipeline may insert it for the facts it creates.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[type[Fact], ...]] = ()
    creates: ClassVar[tuple[type[Fact], ...]] = ()
    destroys: ClassVar[tuple[type[Fact], ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    changes_signature: ClassVar[bool] = False
    automatic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate the choices of every option.

        Raises:
            SpecError: An option has a value it can't have.
        """
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                listed = ", ".join(map(str, choices))
                raise SpecError(
                    f"{self.name}: {option_name(f.name)}={value} is not one of {listed}"
                )

    @property
    def meaning(self) -> Meaning:
        """What the pass may do to the result; tests and checks take their bar from it."""
        return Exact()

    @classmethod
    def identity(cls) -> Self | None:
        """The setting at which the pass must not change the result; None if it never does."""
        return None

    @abstractmethod
    def run(self, program: Program, context: Context) -> Change:
        """Rewrite a draft in place; the pipeline has made the copy and verifies the result."""

    def __str__(self) -> str:
        """Canonical text: `quest{weight-bits=2}`; defaults are not printed."""
        from resplice.spec import print_pass  # the text form imports this base

        return print_pass(self)


def option_name(field_name: str) -> str:
    """`weight_bits` -> `weight-bits`."""
    return field_name.replace("_", "-")
