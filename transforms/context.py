"""What a pass may use besides the program: calibration data, a rewrite budget, a weight memo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resplice import weights

Batch = dict[str, torch.Tensor]


@dataclass
class Context:
    """Shared by all passes of one run.

    Attributes:
        calibration: Batches of flat named inputs, for passes that profile activations.
        limit: How many rewrites may still be made in total; None means no limit.
        progress: Called with (pass name, done, total) by passes that take long.
        taken: Labels of the rewrites made so far, in order (`quest:linear_3`).
    """

    calibration: Sequence[Batch] = ()
    limit: int | None = None
    progress: Callable[[str, int, int], None] = lambda *_: None
    taken: list[str] = field(default_factory=list)
    _memo: dict[Any, Any] = field(default_factory=dict)

    def take(self, label: str) -> bool:
        """Whether one more rewrite may be made; counts it if so."""
        if self.limit is not None and len(self.taken) >= self.limit:
            return False
        self.taken.append(label)
        return True

    def once(self, source: torch.Tensor, purpose: object, make: Callable[[], Any]) -> Any:
        """`make()` the first time for this weight and purpose, the same result afterwards.

        Tied weights and functions over shared weights thus get one new tensor, not several.
        """
        key = (weights.key(source), purpose)
        if key not in self._memo:
            self._memo[key] = (source, make())
        return self._memo[key][1]

    def track(self, name: str, items: Iterable[Any]) -> Iterable[Any]:
        """Iterate with progress reports."""
        listed = list(items)
        for done, item in enumerate(listed):
            self.progress(name, done, len(listed))
            yield item
        self.progress(name, len(listed), len(listed))
