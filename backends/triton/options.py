"""Options of the Triton backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resplice.backends.triton.targets import DEFAULT
from resplice.errors import UsageError


@dataclass(frozen=True)
class TritonOptions:
    """What to compile for.

    Attributes:
        arch: Targets, "sm_90" or "gfx942"; a text has them with commas between.
    """

    arch: Sequence[str] | str = DEFAULT

    def __post_init__(self) -> None:
        """Bring the targets into one form.

        Raises:
            UsageError: There is none.
        """
        names = self.arch.split(",") if isinstance(self.arch, str) else self.arch
        found = tuple(name.strip() for name in names if name.strip())
        if not found:
            raise UsageError("triton: arch names no target", hint=f"arch={','.join(DEFAULT)}")
        object.__setattr__(self, "arch", found)
