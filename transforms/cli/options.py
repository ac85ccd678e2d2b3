"""Options that several commands take, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from resplice.errors import UsageError
from resplice.program import Program
from resplice.sources import load_model

Model = Annotated[str, typer.Argument(help="a .pt2 file, module:factory, or hf:FOLDER_OR_GGUF")]
Spec = Annotated[str, typer.Option("--passes", "-p", help="pipeline text: quest{weight-bits=4}")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic", help="make an axis dynamic: input_ids:1=seq or input_ids:1=seq=2:512"
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="load .pt2 files that can run code; trusted files only"),
]

Function = Annotated[str, typer.Option(help="which function of an artefact of several")]
Mode = Annotated[
    str,
    typer.Option(help="Core ML: `declared` rounds every value to its type, `fp32` does not"),
]


def open_model(
    text: str, dynamic: list[str] | None = None, *, allow_pickle: bool = False
) -> Program:
    """Load or capture MODEL."""
    return load_model(text, dynamic_shapes=dynamic_shapes(dynamic or []), allow_pickle=allow_pickle)


def dynamic_shapes(items: list[str]) -> dict[str, dict[int, str]] | None:
    """Read `name:axis=dim` items.

    Raises:
        UsageError: An item has another form.
    """
    found: dict[str, dict[int, str]] = {}
    for item in items:
        place, _, dim = item.partition("=")
        name, _, axis = place.rpartition(":")
        if not name or not axis.lstrip("-").isdigit() or not dim:
            raise UsageError(f"--dynamic {item!r} is not NAME:AXIS=DIM", hint="input_ids:1=seq")
        found.setdefault(name, {})[int(axis)] = dim
    return found or None


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """Named input tensors from an `.npz` file.

    Raises:
        UsageError: The file can't be read.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read inputs from {path}: {error}") from error


def batches_from(folder: Path | None, program: Program) -> list[dict[str, torch.Tensor]]:
    """Calibration batches: every `.npz` file of a folder, checked against the signature."""
    files = sorted(folder.glob("*.npz")) if folder else []
    if folder and not files:
        raise UsageError(f"there is no .npz file in {folder}")
    batches = [read_npz(file) for file in files]
    for batch in batches:
        program.check_inputs(batch)
    return batches


def is_folder_of_kernels(path: str | Path) -> bool:
    """Whether a path is an artefact of the Triton backend."""
    return (Path(path) / "manifest.json").is_file()


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Read `NAME=VALUE` items.

    Raises:
        UsageError: An item has another form.
    """
    found = dict[str, str]()
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals or not value:
            raise UsageError(f"{option} {item!r} is not NAME=VALUE")
        found[name] = value
    return found


def numbers(text: str, option: str, count: int | None = None) -> tuple[int, ...]:
    """Read `6,8,8`; an empty text has none.

    Args:
        text: Whole numbers, none of them negative, with commas between.
        option: The option, for messages.
        count: How many there must be; None: any number.

    Raises:
        UsageError: The text has another form.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdigit() for part in parts) or count not in (None, len(parts)):
        wanted = "whole numbers" if count is None else f"{count} whole numbers"
        raise UsageError(f"{option} {text!r} is not {wanted}", hint="write them like 6,8,8")
    return tuple(int(part) for part in parts)


def shape_lists(items: list[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Read `x=1x16,1x32` items: the shapes an input may have.

    Raises:
        UsageError: An item has another form.
    """
    found = dict[str, tuple[tuple[int, ...], ...]]()
    for name, text in pairs(items, "--shapes").items():
        try:
            shapes = [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
        except ValueError as error:
            raise UsageError(f"--shapes {name}={text!r} is not NAME=1x16,1x32") from error
        found[name] = tuple(shapes)
    return found


def as_options(**values: Any) -> dict[str, Any]:
    """Backend options that were given; an empty list or table was not."""
    return {key: value for key, value in values.items() if value not in (None, {}, [])}
