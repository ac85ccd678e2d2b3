"""What a repair is, and tools to write one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass
class Tally:
    """How often a repair that watches for something has met it."""

    hits: int = 0


@dataclass(frozen=True)
class Repair:
    """A named, reversible change around the capture of a model.

    Attributes:
        name: Kebab-case, printed in reports.
        what: What is different while tracing.
        why: The bug it works round.
        applies: Whether the model may show the bug.
        patch: Context manager that changes and restores; may yield a tally of what it met.
    """

    name: str
    what: str
    why: str
    applies: Callable[[nn.Module], bool]
    patch: Callable[[nn.Module], AbstractContextManager[Tally | None]]


class Intercept(TorchFunctionMode):
    """Sends calls of one torch function to a replacement, which may decline (NotImplemented)."""

    def __init__(self, function: Any, replacement: Callable[..., Any]) -> None:
        """Watch for `function`."""
        super().__init__()
        self._function, self._replacement = function, replacement
        self.tally = Tally()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Intercept one call."""
        kwargs = kwargs or {}
        if func == self._function:
            result = self._replacement(*args, **kwargs)
            if result is not NotImplemented:
                self.tally.hits += 1
                return result
        return func(*args, **kwargs)


def imported(module: str) -> ModuleType | None:
    """A module if something has imported it already; never imports anything."""
    return sys.modules.get(module)


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Set an attribute inside the block; on leaving, restore it or remove it again."""
    own = vars(owner)
    had, saved = attribute in own, own.get(attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, attribute, saved)
        else:
            delattr(owner, attribute)
