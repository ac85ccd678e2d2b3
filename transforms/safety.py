"""Reading `.pt2` archives without running what they hold.

torch's own loader falls back to unpickling anything, loads compiled libraries, evaluates size
expressions and guards as Python, imports modules named in structures and resolves operator names
anywhere in torch. `check_archive` refuses an archive that would need it, or that holds a file of a
kind it does not know.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from resplice.errors import CaptureError

_HARMLESS = re.compile(  # raw bytes and text that is only ever read as such
    r"extra/.+|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version"
    r"|\.storage_alignment"
)
_CONFIG = re.compile(r"data/(weights|constants)/[^/]+_config\.json")
_TARGET = re.compile(
    r"torch\.ops\.(?!load_library\b|import_module\b|_)\w+(\.\w+)+"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|and_|or_|not_|xor"
    r"|lshift|rshift|lt|le|gt|ge|eq|ne|index|is_)"
    r"|math\.\w+|torch\.(_?sym_\w+|_check)"
)
_FUNCTIONS = frozenset(
    {"Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "ToFloat",
     "Max", "Min", "Eq", "Ne", "Le", "Lt", "Ge", "Gt", "Where", "Abs", "And", "Or", "Not",
     "TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "PowByNatural", "FloatPow", "Identity",
     "ModularIndexing", "Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "positive", "integer",
     "nonnegative", "oo", "int_oo", "True", "False", "Piecewise", "floor", "ceiling"}
)  # fmt: skip
_SYMBOL = re.compile(r"[suz]\w*\d+$")
_GUARD_NODES = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Constant,
    ast.Name, ast.Attribute, ast.Call, ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_GUARD_CALLS = ("size", "stride", "storage_offset", "dim", "numel")
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
        names = archive.namelist()
        twice = [n for n in names if [m.casefold() for m in names].count(n.casefold()) > 1]
        for name in names:
            problem = "it is there twice" if name in twice else _problem(name, archive)
            if problem:
                raise CaptureError(
                    f"{path.name} could run code when loaded: {problem}", where=name, hint=_HINT
                )
        if "models/model.json" not in (name.partition("/")[2] for name in names):
            raise CaptureError(f"{path.name} holds no program", hint="save it again")


def _problem(name: str, archive: zipfile.ZipFile) -> str | None:
    _, _, inner = name.partition("/")
    if _HARMLESS.fullmatch(inner):
        return None
    try:
        if _CONFIG.fullmatch(inner):
            return next(_unusual_payloads(json.loads(archive.read(name))), None)
        if inner.startswith("models/") and inner.endswith(".json"):
            return next(_foreign_names(json.loads(archive.read(name))), None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        return f"it can't be read ({type(error).__name__})"
    if inner.startswith("data/sample_inputs/"):
        return _pickle_problem(archive.read(name))
    return "it holds pickled objects or code"


def _unusual_payloads(config: Any) -> Iterator[str]:
    """Weights and constants that are not plain bytes."""
    for key, entry in config.get("config", {}).items():
        if entry.get("use_pickle"):
            yield f"{key} is pickled"
        if not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
            yield f"{key} is no plain tensor"


def _pickle_problem(data: bytes) -> str | None:
    if not data:
        return None
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        return f"its sample inputs hold more than tensors ({str(error).splitlines()[0][:80]})"
    return None


def _foreign_names(value: Any, key: str = "") -> Iterator[str]:
    """Everything in a stored graph that torch would evaluate, import or look up."""
    if isinstance(value, list):
        for item in value:
            yield from _foreign_names(item, key)
    if isinstance(value, str):
        yield from _foreign_text(value, key)
    if not isinstance(value, dict):
        return
    target = value.get("target")
    if isinstance(target, str) and "inputs" in value and not _TARGET.fullmatch(target):
        yield f"{target!r} is not an operator"
    for name, item in value.items():
        yield from _foreign_names(item, name)


def _foreign_text(text: str, key: str) -> Iterator[str]:
    if key == "as_operator" and not _TARGET.fullmatch(text):
        yield f"{text!r} is not an operator"
    if key == "expr_str" and not _is_arithmetic(text):
        yield f"{text[:60]!r} is not a size expression"
    if key == "guards_code" and not _is_guard(text):
        yield f"{text[:60]!r} is not a guard on sizes"
    if key in ("in_spec", "out_spec") and re.search(r"__enum__|default_factory|\\u", text):
        yield "a structure names a module to import"


def _is_arithmetic(text: str) -> bool:
    words = re.findall(r"[A-Za-z_]\w*", text)
    plain = re.fullmatch(r"[\w\s+\-*/(),<>=!&|~.']*", text, re.ASCII) and "__" not in text
    attributes = re.search(r"[A-Za-z_)']\w*\s*\.", text)
    return (
        bool(plain) and not attributes and all(w in _FUNCTIONS or _SYMBOL.match(w) for w in words)
    )


def _is_guard(text: str) -> bool:
    """Comparisons of sizes such as `L['x'].size()[0] >= 2`; torch runs them as Python."""
    if not re.fullmatch(r"[\w \[\]'\".()<>=!%*/+\-&|~,]*", text, re.ASCII):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    return all(isinstance(node, _GUARD_NODES) and _is_plain(node) for node in nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("L", "math")
    if isinstance(node, ast.Attribute):
        return node.attr in (*_GUARD_CALLS, "isnan", "inf")
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not node.keywords
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"[\w. /-]*", node.value) is not None
    return True
