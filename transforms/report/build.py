"""Collects a report and writes it as JSON (for machines) and HTML (for people)."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resplice import weights
from resplice.artifact import Artifact, staged
from resplice.cost import Cost, parameter_count, program_cost
from resplice.pipeline import Step
from resplice.program import Program

SCHEMA = "resplice-report/1"
_PACKAGES = ("resplice", "torch", "onnx", "onnxruntime", "transformers", "diffusers")


@dataclass
class Report:
    """One run.

    Attributes:
        model: Signature and size of the captured model.
        pipeline: Canonical text of the passes that ran.
        before: Cost, parameters and bytes of the captured program; `after` of the result.
        steps: One entry per pass: sites, refusals, rule statistics, ledger.
        artifacts: What was lowered, with sizes, hashes and checks.
        measurements: Further figures, such as perplexity or tokens per second.
    """

    model: dict[str, Any]
    pipeline: str
    before: dict[str, Any]
    after: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, original: Program, result: Program, steps: Sequence[Step]) -> Report:
        """Build from a finished run."""
        return cls(
            model={
                "inputs": [str(port) for port in original.inputs],
                "outputs": [str(port) for port in original.outputs],
                "dims": [str(dim) for dim in original.dims.values()],
                "repairs": original.metadata.get("repairs", []),
            },
            pipeline=",".join(str(step.item) for step in steps),
            before=_size(original),
            after=_size(result),
            steps=[_step(step) for step in steps],
        )

    def add_artifact(self, backend: str, artifact: Artifact) -> None:
        """Add a lowered artefact: size, hash, how it was lowered, what its check measured."""
        self.artifacts.append(
            {
                "backend": backend,
                "path": str(artifact.path),
                "bytes": artifact.nbytes,
                "sha256": _hash(artifact.path),
                "bar": artifact.bar,
                "notes": artifact.notes,
            }
        )

    def measure(self, name: str, value: float, unit: str = "", **detail: Any) -> None:
        """Add a figure that the caller measured.

        Args:
            name: What it is, "perplexity".
            value: The figure.
            unit: Its unit.
            detail: What tells it apart from others of that name (`model="fp32 ONNX"`).
        """
        self.measurements.append({"name": name, "value": value, "unit": unit, "detail": detail})

    def to_json(self) -> dict[str, Any]:
        """The whole report, JSON-able."""
        return {"schema": SCHEMA, "environment": environment(), **jsonable(asdict(self))}

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and, if jinja2 and matplotlib are installed, `report.html`.

        Returns:
            The path of the HTML report, or of the JSON one without the `report` extra.
        """
        target = Path(folder)
        data = self.to_json()
        with staged(target / "report.json") as stage:
            (stage / "report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
            page = _html(data)
            if page is not None:
                (stage / "report.html").write_text(page, encoding="utf-8")
        return target / ("report.json" if page is None else "report.html")


def environment() -> dict[str, str]:
    """Versions, machine and time."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def _html(data: dict[str, Any]) -> str | None:
    try:
        from resplice.report.html import render  # needs the `report` extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("jinja2", "markupsafe", "matplotlib"):
            return None
        raise
    return render(data)


def _size(program: Program) -> dict[str, Any]:
    cost: Cost = program_cost(program)
    return {
        "flops": cost.flops,
        "bytes_moved": cost.bytes,
        "weight_bytes": weights.total_bytes(program.module),
        "parameters": parameter_count(program),
        "nodes": len(program.graph.nodes),
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "pass": str(step.item),
        "meaning": str(step.item.meaning),
        "seconds": step.seconds,
        "changes": [change.to_json() for change in step.changes],
        "ledger": step.ledger.to_json() if step.ledger else None,
    }


def _hash(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def jsonable(value: Any) -> Any:
    """JSON has no infinity, NaN or dataclasses."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
