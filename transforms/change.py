"""What a pass did: sites rewritten, sites refused with reasons, near misses, rule statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from resplice.origin import Origin, origin


@dataclass(frozen=True)
class Site:
    """One rewritten site.

    Attributes:
        node: Name of the node whose value the rewrite computes (kept by the rewrite).
        origin: Module and source line.
        before: The replaced nodes as text; `after` the new ones.
        metrics: Numbers the pass measured here (`sqnr_db`, `bytes_before`, ...).
    """

    node: str
    origin: Origin
    before: str = ""
    after: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """One site that was left alone, and why."""

    node: str
    origin: Origin
    reason: str

    def __str__(self) -> str:
        """`linear_3 in layers.0.mlp (file.py:12): reason`."""
        return f"{self.node} in {self.origin}: {self.reason}"


class Refused(Exception):  # noqa: N818  # control flow inside a pass: the reason is a result
    """Why a candidate is left alone; whoever looks for sites turns it into a refusal."""


@dataclass
class RuleStats:
    """How often a rule was tried and hit, and the near miss that got deepest."""

    tried: int = 0
    hits: int = 0
    seconds: float = 0.0
    near_miss: str = ""
    near_miss_depth: int = 0


@dataclass
class Change:
    """The result of one pass.

    Attributes:
        text: Canonical text of the pass, `quest{weight-bits=2}`.
        function: Which function of the program was rewritten.
    """

    text: str = ""
    function: str = "main"
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    rules: dict[str, RuleStats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of rewritten sites."""
        return len(self.sites)

    @property
    def warnings(self) -> list[str]:
        """Notes that begin with "warning:": they are shown without being asked for."""
        kind = "warning:"
        return [n[len(kind) :].strip() for n in self.notes if n.lower().startswith(kind)]

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Record a site left alone."""
        self.refusals.append(Refusal(node.name, origin(node), reason))

    def near_misses(self) -> Iterable[str]:
        """`rule: reason` for every rule that hit nothing but came close."""
        for name, stats in self.rules.items():
            if not stats.hits and stats.near_miss:
                yield f"{name}: {stats.near_miss}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)
