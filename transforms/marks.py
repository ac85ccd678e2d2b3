"""What a tensor of positions was built for, remembered on the tensor and required by a program.

A program whose positions were redefined notes `metadata["positions"]`: the input's name and the
semantics it requires, as text. Builders mark what they return; any operation on a tensor loses the
mark, and a tensor without a mark is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from resplice.errors import InputError

_MARK = "resplice_positions"
ANY = "text"
"""The mark of positions of text alone, which mean the same in every scheme."""


def mark(tensor: torch.Tensor, semantics: str) -> torch.Tensor:
    """Remember on a tensor which position semantics it was built for."""
    setattr(tensor, _MARK, semantics)
    return tensor


def marked(tensor: object) -> str | None:
    """The semantics a tensor was built for, if that is known."""
    found: str | None = getattr(tensor, _MARK, None)
    return found


def check_marks(metadata: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse positions that were built for other semantics than a program requires.

    Args:
        metadata: A program's notes.
        inputs: Its inputs by name.

    Raises:
        InputError: Says which semantics were given and which are required.
    """
    required = metadata.get("positions")
    if not required:
        return
    name = required["input"]
    given = marked(inputs.get(name))
    if given is None or given in (ANY, required["semantics"]):
        return
    raise InputError(
        f"input {name} holds positions of {given}, this program requires {required['semantics']}",
        where=name,
        hint=f"build them with {required['build']}",
    )
