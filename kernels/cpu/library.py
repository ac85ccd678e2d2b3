"""The C files of this folder as one shared library, compiled once per machine and checked.

The file's name holds a digest of source, flags, compiler and processor, and one of its own bytes:
a damaged file is not loaded but built again. It appears by one rename, so processes may build at
the same time. Without a compiler, or where a result is wrong, ops run in plain torch.

`RESPLICE_KERNELS=off` (read on first use) switches compiled kernels off, `RESPLICE_CACHE` moves the
cache (`$XDG_CACHE_HOME/resplice`, `~/.cache/resplice`), `CC` names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from resplice.kernels.cpu.selfcheck import first_fault

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMMON = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno",
          "-fno-trapping-math", "-w", "-Wno-psabi")  # fmt: skip
VARIANTS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""Flags tried in this order; without OpenMP a kernel runs on one thread."""
_SECONDS = 120
_POINTER, _LONG, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
_SIGNATURES = {
    "resplice_linear": (_POINTER, _LONG, _LONG, _INT, _POINTER, _LONG, _INT, _POINTER, _LONG,
                        _POINTER, _POINTER, _INT),
    "resplice_linear_bfloat16": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _POINTER, _LONG,
                                 _POINTER, _POINTER, _INT),
    "resplice_dots_bytes": (),
    "resplice_code_linear": (_POINTER, _POINTER, _INT, _LONG, _LONG, _POINTER, _LONG, _INT,
                             _POINTER, _LONG, _POINTER, _POINTER, _INT),
    "resplice_dequantize": (_POINTER, _LONG, _LONG, _INT, _POINTER, _LONG, _POINTER, _INT),
    "resplice_hadamard": (_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT),
    "resplice_quest_codes": (_POINTER, _LONG, _LONG, _INT, _LONG, _DOUBLE, _DOUBLE, _DOUBLE,
                             _POINTER, _POINTER, _INT),
    "resplice_moe_one_token": (*[_POINTER] * 14, *[_LONG] * 7, *[_INT] * 4),
}  # fmt: skip
_enabled: ContextVar[bool] = ContextVar("resplice_kernels", default=True)
_lock = threading.Lock()


class _State:
    """What became of the library in this process."""

    library: ctypes.CDLL | None = None
    status: str = ""


_state = _State()


def kernels() -> ctypes.CDLL | None:
    """The library; None where ops are to run in plain torch."""
    if not _enabled.get():
        return None
    if not _state.status:
        with _lock:
            if not _state.status:
                _state.library, _state.status = _opened()
    return _state.library


def kernels_status() -> str:
    """Whether compiled kernels run, and why not: `compiled: -march=native -fopenmp`."""
    if not _enabled.get():
        return "plain torch: switched off"
    kernels()
    return _state.status


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Within the block (of this thread), run compiled kernels or plain torch."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def forget() -> None:
    """Look for the library anew on next use, for tests."""
    _state.library, _state.status = None, ""


def _opened() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("RESPLICE_KERNELS") == "off":
        return None, "plain torch: switched off"
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None, "plain torch: no C compiler (cc, gcc or $CC)"
    problem = ""
    try:
        folder = _folder()
        for extra in VARIANTS:
            file, problem = _built(folder, compiler, (*COMMON, *extra))
            if file is not None:
                return _checked(file, " ".join(extra) or "portable")
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    return None, f"plain torch: {problem.strip()}"


def _checked(file: Path, flags: str) -> tuple[ctypes.CDLL | None, str]:
    library = ctypes.CDLL(str(file))
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    fault = first_fault(library)
    return (None, f"plain torch: {fault}") if fault else (library, f"compiled: {flags}")


def _folder() -> Path:
    """The cache; a private temporary folder where it can't be written or is another user's."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("RESPLICE_CACHE") or Path(base, "resplice"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if mine and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="resplice-"))


def _built(folder: Path, compiler: str, flags: tuple[str, ...]) -> tuple[Path | None, str]:
    """A library from the cache, or compiled now; else what the compiler said."""
    key = _digest(
        *(f.read_bytes() for f in SOURCES + HEADERS),
        " ".join(flags).encode(),
        _version(compiler),
        _processor(),
    )
    for file in sorted(folder.glob(f"kernels-{key}-*.so")):
        if file.stem.endswith(_digest(file.read_bytes())):
            return file, ""
        file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place, "kernels.so")
        run = subprocess.run(
            [compiler, *flags, *map(str, SOURCES), "-o", str(made), "-lm"],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if run.returncode:
            return None, f"{compiler}: {run.stderr[-400:]}"
        final = folder / f"kernels-{key}-{_digest(made.read_bytes())}.so"
        made.replace(final)
    return final, ""


def _version(compiler: str) -> bytes:
    run = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_SECONDS, check=False
    )
    return compiler.encode() + run.stdout


def _processor() -> bytes:
    """What the processor can do, so that a cache shared by machines holds one library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        named = [x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))]
    except OSError:
        named = []
    return "\n".join(sorted(set(named)) or [platform.machine(), platform.processor()]).encode()


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:24]
