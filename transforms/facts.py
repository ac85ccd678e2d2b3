"""Facts: typed knowledge about a program that passes need, keep, create or destroy.

A fact is a frozen dataclass. The pipeline decides legality by fact *types*; a pass reads the
fact's fields. Facts refer to nodes by name, so they survive copies and saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from resplice.errors import VerifyError

F = TypeVar("F", bound="Fact")
_KINDS: dict[str, type[Fact]] = {}


@dataclass(frozen=True)
class Fact:
    """Base of all facts. `title` is how messages name it."""

    title: ClassVar[str] = "fact"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the kind under its class name, so that saved facts can be read back."""
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes this fact speaks of; each must exist while the fact holds."""
        return ()


@dataclass(frozen=True)
class FloatWeights(Fact):
    """Every matrix a linear layer multiplies by is a floating-point constant of the program."""

    title = "weights are float constants"


@dataclass(frozen=True)
class Canonical(Fact):
    """The graph is in normal form (`normal.py`), so patterns need one spelling only."""

    title = "the graph is in normal form"


class Facts:
    """An immutable set with at most one fact of each type."""

    def __init__(self, *facts: Fact) -> None:
        """Collect the facts; a later one of the same type wins."""
        self._facts: dict[type[Fact], Fact] = {type(fact): fact for fact in facts}

    def __contains__(self, kind: object) -> bool:
        """Whether a fact of that type holds."""
        return kind in self._facts

    def __iter__(self) -> Iterator[Fact]:
        """All facts that hold."""
        return iter(self._facts.values())

    def get(self, kind: type[F]) -> F:
        """The fact of that type.

        Raises:
            VerifyError: It does not hold.
        """
        fact = self._facts.get(kind)
        if not isinstance(fact, kind):
            raise VerifyError(f'the fact "{kind.title}" does not hold for this program')
        return fact

    def adding(self, *facts: Fact) -> Facts:
        """These facts and the given ones."""
        return Facts(*self, *facts)

    def without(self, *kinds: type[Fact]) -> Facts:
        """These facts less the given types."""
        return Facts(*(fact for fact in self if type(fact) not in kinds))

    def to_json(self) -> list[Any]:
        """A JSON-able form."""
        return [{"kind": type(fact).__name__, **asdict(fact)} for fact in self]

    @classmethod
    def from_json(cls, data: list[Any]) -> Facts:
        """Read what `to_json` wrote; kinds unknown to this installation are dropped."""
        return cls(*(_read(dict(item)) for item in data if item["kind"] in _KINDS))


def _read(item: dict[str, Any]) -> Fact:
    kind = _KINDS[item.pop("kind")]
    known = {f.name for f in fields(kind)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items() if k in known}
    return kind(**values)
