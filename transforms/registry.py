"""Names of passes, ops and backends -> where they live. Nothing is imported until asked for.

Plug-ins add passes through the entry-point group `resplice.passes`.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from resplice.errors import BackendMissing, SpecError, UsageError

if TYPE_CHECKING:
    from resplice.pass_base import Pass

PASSES = {
    "canonicalize": "resplice.passes.canonicalize:Canonicalize",
    "cmoe": "resplice.passes.cmoe:Cmoe",
    "cse": "resplice.passes.cse:Cse",
    "dce": "resplice.passes.dce:Dce",
    "fold": "resplice.passes.fold:Fold",
    "quest": "resplice.passes.quest:Quest",
    "sta": "resplice.passes.sta:Sta",
    "tdtm": "resplice.passes.tdtm:Tdtm",
    "videorope": "resplice.passes.videorope:VideoRope",
}
BACKENDS = {
    "coreml": "resplice.backends.coreml:CoremlBackend",
    "onnx": "resplice.backends.onnx:OnnxBackend",
    "triton": "resplice.backends.triton:TritonBackend",
}
EXTRAS = {
    "onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "onnx_ir": "onnx",
    "ml_dtypes": "onnx", "coremltools": "coreml", "triton": "triton", "jsonschema": "triton",
    "transformers": "models", "diffusers": "models", "gguf": "models", "accelerate": "models",
    "jinja2": "report", "matplotlib": "report",
}  # fmt: skip


@cache
def pass_table() -> dict[str, str]:
    """All known passes by name, plug-ins included."""
    found = {point.name: point.value for point in entry_points(group="resplice.passes")}
    return {**found, **PASSES}


def pass_class(name: str, *, text: str = "", column: int = 0) -> type[Pass]:
    """The class of a pass.

    Raises:
        SpecError: No such pass; suggests the nearest name.
    """
    table = pass_table()
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]}?" if near else f"passes are {', '.join(sorted(table))}"
        raise SpecError(f"there is no pass {name!r}", text=text, column=column, hint=hint)
    found: type[Pass] = load(table[name])
    return found


def backend(name: str) -> Any:
    """A backend by name.

    Raises:
        UsageError: No such backend.
        BackendMissing: Its packages are not installed.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no backend {name!r}", hint=f"backends are {', '.join(BACKENDS)}"
        )
    return load(BACKENDS[name])()


def load(place: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = place.partition(":")
    return getattr(require(module), attribute)


def require(module: str) -> Any:
    """Import a module.

    Raises:
        BackendMissing: It belongs to an extra that is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        if package in EXTRAS:
            raise BackendMissing(package, EXTRAS[package]) from error
        raise


def load_ops() -> None:
    """Register the dialect's ops with torch, so that saved programs can be read."""
    importlib.import_module("resplice.kernels")
