"""Names of targets, `sm_90` or `gfx942`, and whether the installed Triton compiles for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from resplice.backends.triton.hardware import HARDWARE, Hardware
from resplice.errors import LoweringError

DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx942")
_NAME = re.compile(r"sm_(\d{2,3})|(gfx[0-9a-f]{3,4})")


@dataclass(frozen=True)
class Target:
    """One architecture to compile for.

    Attributes:
        name: "sm_90", "gfx942".
        warp: Threads of a warp (wavefront).
    """

    name: str
    warp: int

    @property
    def amd(self) -> bool:
        """Whether it is an AMD one."""
        return self.name.startswith("gfx")

    @property
    def binary(self) -> str:
        """Kind of the compiled file: "cubin" or "hsaco"."""
        return "hsaco" if self.amd else "cubin"

    @property
    def assembly(self) -> str:
        """Kind of the readable file: "ptx" or "amdgcn"."""
        return "amdgcn" if self.amd else "ptx"

    @property
    def hardware(self) -> Hardware | None:
        """Published limits, where the table has them."""
        return HARDWARE.get(self.name)

    @property
    def for_triton(self) -> tuple[str, int | str, int]:
        """Backend, architecture and warp size as Triton's `GPUTarget` takes them."""
        if self.amd:
            return "hip", self.name, self.warp
        return "cuda", int(self.name.removeprefix("sm_")), self.warp


def targets(names: Sequence[str]) -> tuple[Target, ...]:
    """The targets of these names, each tried on a small kernel, once per process.

    Raises:
        LoweringError: Names every one that is unknown or that the installed Triton can't compile.
    """
    unique = tuple(dict.fromkeys(names))
    found = tuple(Target(name, _warp(name)) for name in unique)
    known = tuple(target for target in found if _NAME.fullmatch(target.name))
    reasons = dict(_refused(known))
    problems = [
        f"target {target.name}: {reasons.get(target.name, 'no such architecture')}"
        for target in found
        if target.name in reasons or target not in known
    ]
    if problems:
        raise LoweringError("triton", problems, hint=f"targets look like {', '.join(DEFAULT)}")
    return found


def _warp(name: str) -> int:
    """Wavefronts have 64 threads on GCN and CDNA (gfx9 and older), 32 on RDNA (four digits)."""
    return 64 if name.startswith("gfx") and len(name) == len("gfx942") else 32


@cache
def _refused(wanted: tuple[Target, ...]) -> tuple[tuple[str, str], ...]:
    """Names with the reason why a small kernel does not compile for them.

    The compiler ends the process at some names, so the trial has a process of its own; where it
    ends, the next one goes on behind that name.
    """
    refused: dict[str, str] = {}
    left = list(wanted)
    while left:
        answers, last_words = _trial(left)
        refused.update(
            {target.name: reason for target, reason in zip(left, answers, strict=False) if reason}
        )
        left = left[len(answers) :]
        if left:
            refused[left.pop(0).name] = f"the compiler stopped: {last_words}"
    return tuple(refused.items())


def _trial(wanted: Sequence[Target]) -> tuple[list[str], str]:
    """The reasons (empty: it compiles) up to where the process ended, and its last words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    texts = [":".join(map(str, (*target.for_triton, target.binary))) for target in wanted]
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("trial.py")), *texts],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    answers = [json.loads(line)[1] for line in done.stdout.splitlines() if line[:1] == "["]
    words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return answers, words[-1][:300]
