"""What a search has measured so far, on disk: a killed search goes on where it stopped.

A text file: one line that says what is searched, then one line per prompt and step, appended and
flushed as soon as it is measured. Numbers are written so that they read back bit by bit.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resplice.errors import ResourceError, UsageError

Losses = list[list[list[float]]]
"""[layer][head][candidate]."""


class Progress:
    """Losses by prompt and step."""

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        """Open or begin a file; None keeps everything in memory.

        Raises:
            UsageError: The file belongs to another search, or is none.
            ResourceError: The file can't be written.
        """
        self._path = Path(path) if path else None
        self._header = json.loads(json.dumps(header))
        self._known: dict[tuple[int, int], tuple[str, Losses]] = {}
        if self._path is not None and not self._read(self._path):
            self._append(self._header, "w")

    def get(self, prompt: int, step: int, digest: str) -> Losses | None:
        """What was measured there, if anything.

        Raises:
            UsageError: It was measured on other inputs.
        """
        known = self._known.get((prompt, step))
        if known is not None and known[0] != digest:
            raise UsageError(
                f"prompt {prompt}, step {step} was measured on other inputs",
                where=str(self._path), hint="delete the file to search anew",
            )  # fmt: skip
        return known[1] if known else None

    def put(self, prompt: int, step: int, digest: str, losses: Losses) -> None:
        """Remember, on disk first."""
        if self._path is not None:
            self._append({"at": [prompt, step], "inputs": digest, "losses": losses}, "a")
        self._known[prompt, step] = digest, losses

    def all(self) -> dict[tuple[int, int], Losses]:
        """Everything, by prompt and step, in that order."""
        return {key: self._known[key][1] for key in sorted(self._known)}

    def _append(self, line: Any, mode: str) -> None:
        assert self._path is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"can't write {self._path}: {error.strerror}") from error

    def _read(self, path: Path) -> bool:
        """Whether there was a header; a line that a killed search left unfinished is cut off."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            return False
        try:
            header, *lines = [dict(json.loads(line)) for line in whole.splitlines()]
            for line in lines:
                self._known[tuple(line["at"])] = line["inputs"], line["losses"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no progress of a search: {error}") from error
        keys = sorted(header.keys() | self._header.keys())
        other = [key for key in keys if header.get(key) != self._header.get(key)]
        if other:
            raise UsageError(
                f"{path} belongs to another search: {', '.join(other)} differ",
                hint="delete it, or give another folder",
            )
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        return True


def digest_of(tensors: Mapping[str, Tensor], *more: object) -> str:
    """A short checksum of named tensors and further values."""
    number = zlib.crc32(repr(more).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        number = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), number)
        number = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, number)
    return f"{number:08x}"
