"""Checkpoints of a training as one safetensors file: no code runs when they are read.

A file holds tensors by name and notes that say which training it belongs to; it appears under its
name only when complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resplice.artifact import staged
from resplice.errors import UsageError

_NOTES = "resplice"


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able notes.

    Raises:
        ResourceError: The disk is full; what was there before is still there.
    """
    from safetensors.torch import save_file

    stored = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    with staged(path) as stage:
        save_file(stored, stage / path.name, metadata={_NOTES: json.dumps(notes)})


def read(path: Path, notes: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint, or None if there is no such file.

    Raises:
        UsageError: The file is no checkpoint, or its notes are others: says which.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(_NOTES, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise UsageError(f"{path} is no checkpoint: {error}") from error
    wanted = json.loads(json.dumps(notes))
    keys = sorted(found.keys() | wanted.keys())
    other = [key for key in keys if found.get(key) != wanted.get(key)]
    if other:
        raise UsageError(
            f"{path} is the checkpoint of another training: {', '.join(other)} differ",
            hint="name another file, or give the same recipe, data and program",
        )
    return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The state of an optimiser as named tensors: `optimizer.INDEX.KEY`."""
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            yield f"optimizer.{index}.{key}", torch.as_tensor(value)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; the groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
