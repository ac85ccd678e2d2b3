"""Reading `.pt2` archives without running what they hold.

torch's own loader falls back to unpickling anything, evaluates size expressions as Python and
resolves operator names anywhere in torch. `check_archive` refuses an archive that would need it.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resplice.errors import CaptureError

_TARGET = re.compile(
    r"(torch\.ops\.\w+(\.\w+)*|_operator\.\w+|math\.\w+|torch\.(_?sym_\w+|_check))$"
)
_FUNCTIONS = frozenset(
    {"Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "ToFloat",
     "Max", "Min", "Eq", "Ne", "Le", "Lt", "Ge", "Gt", "Where", "Abs", "And", "Or", "Not",
     "TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "PowByNatural", "FloatPow", "Identity",
     "ModularIndexing", "Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "positive", "integer",
     "nonnegative", "oo", "int_oo", "True", "False", "Piecewise", "floor", "ceiling"}
)  # fmt: skip
_SYMBOL = re.compile(r"[suz]\w*\d+$")
_HINT = "load only files you trust with allow_pickle=True (--allow-pickle)"


def check_archive(path: Path) -> None:
    """Refuse a `.pt2` file whose loading could run code.

    Raises:
        CaptureError: The file is no archive, or needs unpickling, or names something that is not
            an operator.
    """
    if not zipfile.is_zipfile(path):
        raise CaptureError(f"{path} is not a .pt2 archive", hint="save it with torch.export.save")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            problem = _problem(name, archive)
            if problem:
                raise CaptureError(f"{path.name} could run code when loaded: {problem}",
                                   where=name, hint=_HINT)  # fmt: skip


def _problem(name: str, archive: zipfile.ZipFile) -> str | None:
    if name.endswith("_config.json") and ("/weights/" in name or "/constants/" in name):
        entries = json.loads(archive.read(name)).get("config", {})
        pickled = [key for key, entry in entries.items() if entry.get("use_pickle")]
        return f"{', '.join(pickled[:3])} is pickled" if pickled else None
    if "/sample_inputs/" in name:
        return _pickle_problem(archive.read(name))
    if "/models/" in name and name.endswith(".json"):
        return next(_foreign_names(json.loads(archive.read(name))), None)
    if name.endswith((".pkl", ".pickle", ".py")) or "serialized_exported_program" in name:
        return "it holds pickled objects or code"
    return None


def _pickle_problem(data: bytes) -> str | None:
    if not data:
        return None
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        return f"its sample inputs hold more than tensors ({str(error).splitlines()[0][:80]})"
    return None


def _foreign_names(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _foreign_names(item)
    if not isinstance(value, dict):
        return
    target = value.get("target")
    if isinstance(target, str) and "inputs" in value and not _TARGET.match(target):
        yield f"{target!r} is not an operator"
    expression = value.get("expr_str")
    if isinstance(expression, str) and not _is_arithmetic(expression):
        yield f"{expression[:60]!r} is not a size expression"
    for item in value.values():
        yield from _foreign_names(item)


def _is_arithmetic(text: str) -> bool:
    words = re.findall(r"[A-Za-z_]\w*", text)
    plain = re.fullmatch(r"[\w\s+\-*/(),<>=!&|~.']*", text) and "__" not in text
    attributes = re.search(r"[A-Za-z_)]\w*\s*\.", text)
    return (
        bool(plain) and not attributes and all(w in _FUNCTIONS or _SYMBOL.match(w) for w in words)
    )
