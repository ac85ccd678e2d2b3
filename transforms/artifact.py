"""What backends return: an artefact on disk that can be run and checked here.

Nothing is written half: files are made under a temporary name beside the target and moved when
complete and, if asked for, checked.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from resplice.compare import Difference, keep_worst
from resplice.errors import NumericsError, ResourceError
from resplice.program import Program
from resplice.sensitivity import past_bar


@dataclass
class Artifact(ABC):
    """A lowered program on disk.

    Attributes:
        path: The file or folder.
        bar: Largest error against the program, relative to the output scale, that is acceptable.
        notes: How it was lowered (which op went which way), for the report.
    """

    path: Path
    bar: float
    notes: dict[str, Any] = field(default_factory=dict)
    hint: ClassVar[str] = "--portable avoids fused operators; `resplice bisect` tries the passes"

    @abstractmethod
    def run(
        self, inputs: Mapping[str, torch.Tensor], *, function: str = "main"
    ) -> dict[str, torch.Tensor]:
        """Execute on named inputs; returns outputs by name."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        files = [self.path] if self.path.is_file() else list(self.path.rglob("*"))
        files += self.path.parent.glob(self.path.name + ".*") if self.path.is_file() else []
        return sum(file.stat().st_size for file in files if file.is_file())

    def error_of(self, found: Difference) -> float:
        """What `bar` bounds: the largest error, relative to the output scale."""
        return found.relative

    def check(
        self, program: Program, cases: list[dict[str, torch.Tensor]], *, function: str = "main"
    ) -> dict[str, Difference]:
        """Compare with the program on every case; the worst difference per output.

        Raises:
            NumericsError: An output is past `bar`.
        """
        found: dict[str, Difference] = {}
        for case in cases:
            keep_worst(found, program.run_fresh(case), self.run(case, function=function))
        for name, error, bar in past_bar(found, self.bar, self.error_of, program, cases):
            raise NumericsError(
                f"{self.path.name}: output {name} differs from the program",
                measured=error, bar=bar, hint=self.hint,
            )  # fmt: skip
        return found


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`; its content is moved to `target`'s folder on success.

    Raises:
        ResourceError: The disk is full or not writable; nothing is left behind.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _resource(error, target) from error
    try:
        yield stage
        for item in sorted(stage.iterdir()):
            final = target.parent / item.name
            if final.is_dir() and not final.is_symlink():
                shutil.rmtree(final)
            os.replace(item, final)
    except OSError as error:
        raise _resource(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _resource(error: OSError, target: Path) -> ResourceError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ResourceError(
        f"can't write {target}: {'the disk is full' if full else error.strerror or error}",
        where=str(target.parent),
        hint="free some space or write elsewhere; nothing was left behind",
    )
