"""The manifest: what is in the folder, and everything a launcher needs to know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from resplice.backends.triton.compile import Compiled
from resplice.backends.triton.record import Site
from resplice.backends.triton.sizes import places_of_sizes, plain_size
from resplice.backends.triton.targets import Target
from resplice.backends.triton.variants import variant_of
from resplice.errors import VerifyError
from resplice.origin import origin
from resplice.program import Program
from resplice.registry import require
from resplice.show import dtype_text

Json = dict[str, Any]
FORMAT = "resplice-triton/1"
FILE = "manifest.json"


def kernel_entry(compiled: Compiled, folder: Path) -> Json:
    """Write a kernel's files and describe it."""
    variant = compiled.variant
    aligned = {variant.signature[place][0] for place in variant.divisible}
    return {
        "symbol": compiled.symbol,
        "source": variant.source,
        "constants": {name: _plain(value) for name, value in variant.constants},
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "block": [compiled.threads, 1, 1],
        "shared": compiled.shared,
        "parameters": [
            {"name": name, "type": kind, "multiple_of": 16 if name in aligned else 1}
            for name, kind in variant.parameters
        ],
        "scratch": [
            {"name": name, "bytes_per_block": size, "alignment": align}
            for name, (size, align) in compiled.scratch.items()
        ],
        "files": compiled.write(folder),
    }


def site_entries(program: Program, sites: Sequence[Site]) -> list[Json]:
    """Every launch of a function, in order."""
    return [
        {
            "node": site.node.name,
            "op": site.op,
            "origin": str(origin(site.node)),
            "kernel": variant_of(launch).title,
            "grid": _plain_all(launch.grid, program),
            "arguments": [
                {"name": name, **_argument(program, site, launch.arguments[name])}
                for name, _ in variant_of(launch).parameters
            ],
        }
        for site in sites
        for launch in site.launches
    ]


def target_entry(
    target: Target, kernels: Json, program: Program, functions: Mapping[str, Sequence[Site]]
) -> Json:
    """All of one target."""
    programs = dict(program.all_functions())
    return {
        "warp": target.warp,
        "kernels": kernels,
        "functions": {n: site_entries(programs[n], sites) for n, sites in functions.items()},
    }


def manifest(program: Program, folder: Path, targets: Json, bar: float, notes: Json) -> Json:
    """The whole of it; the other files are in the folder already."""
    return {
        "format": FORMAT,
        "made_by": {name: version(name) for name in ("resplice", "torch", "triton")},
        "pipeline": ",".join(program.history),
        "bar": bar,
        "lowering": notes,
        "functions": {
            name: {
                "inputs": [_port(port) for port in function.inputs],
                "outputs": [_port(port) for port in function.outputs],
                "sizes": places_of_sizes(function),
            }
            for name, function in program.all_functions()
        },
        "targets": targets,
        "files": {
            path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()
        },
    }  # fmt: skip


def write(content: Json, folder: Path) -> None:
    """Write the manifest, held to its schema."""
    validate(content)
    (folder / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read(folder: Path) -> Json:
    """The manifest of a folder, held to its schema and to the files' hashes.

    Raises:
        VerifyError: It is missing, no manifest of ours, or files are missing or changed.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{folder} has no readable {FILE}: {error}") from error
    validate(content, str(folder))
    wrong = [path for path, digest in _hashes(content) if _differs(folder, path, digest)]
    if wrong:
        raise VerifyError(
            f"{', '.join(wrong[:5])}: missing, or not what the manifest describes",
            where=str(folder), hint="convert the model again",
        )  # fmt: skip
    return dict(content)


def validate(content: Any, where: str = "") -> None:
    """Hold a manifest to the schema.

    Raises:
        VerifyError: Says the first place that does not fit.
    """
    jsonschema = require("jsonschema")
    checker = jsonschema.Draft202012Validator(schema())
    for error in checker.iter_errors(content):
        place = "/".join(map(str, error.absolute_path)) or "the manifest"
        raise VerifyError(f"{place}: {error.message[:300]}", where=where)


def schema() -> Json:
    """The JSON schema of a manifest."""
    text = files("resplice.backends.triton").joinpath("manifest.schema.json").read_text("utf-8")
    found: Json = json.loads(text)
    return found


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(content: Json) -> list[tuple[str, str]]:
    found = list(content["files"].items())
    for target in content["targets"].values():
        for kernel in target["kernels"].values():
            found += [(file["path"], file["sha256"]) for file in kernel["files"].values()]
    return found


def _differs(folder: Path, path: str, digest: str) -> bool:
    file = folder / path
    inside = file.resolve().is_relative_to(folder.resolve())
    return not (inside and file.is_file() and sha256(file) == digest)


def _argument(program: Program, site: Site, value: Any) -> Json:
    if not isinstance(value, Tensor):
        return {"role": "scalar", "value": plain_size(value, program)}
    return {
        **site.role(value),
        "dtype": dtype_text(value.dtype),
        "shape": _plain_all(value.shape, program),
        "strides": _plain_all(value.stride(), program),
    }


def _plain_all(sizes: Iterable[Any], program: Program) -> list[int | float | str]:
    return [plain_size(size, program) for size in sizes]


def _port(port: Any) -> Json:
    sizes = [size if isinstance(size, int) else str(size) for size in port.shape]
    return {"name": port.name, "dtype": dtype_text(port.dtype), "shape": sizes}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
