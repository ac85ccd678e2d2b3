"""The Triton backend: lower, record the launches, compile them, describe, save, check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resplice.artifact import staged
from resplice.backends.triton import launcher, manifest
from resplice.backends.triton.artifact import PROGRAM, TritonArtifact
from resplice.backends.triton.compile import Compiled, compile_variants
from resplice.backends.triton.lower import exact_bar, lower_program
from resplice.backends.triton.options import TritonOptions
from resplice.backends.triton.performance import FORMAT, markdown, performance
from resplice.backends.triton.record import Site, record
from resplice.backends.triton.targets import Target, targets
from resplice.backends.triton.variants import variant_of
from resplice.cases import fresh_cases
from resplice.errors import UsageError
from resplice.program import Program
from resplice.report.kernels import LABEL
from resplice.saving import save

Json = dict[str, Any]


class TritonBackend:
    """Lowers programs to folders of compiled kernels; no GPU is needed."""

    name = "triton"
    options = TritonOptions

    def lower(
        self,
        program: Program,
        path: str | Path,
        options: TritonOptions | None = None,
        *,
        check: bool = True,
    ) -> TritonArtifact:
        """Write the folder `path`.

        Args:
            program: What to lower; its sizes must be fixed where kernels depend on them.
            path: The folder; one that holds an earlier artefact is replaced.
            options: See `TritonOptions`.
            check: Run it on fresh random inputs, on the GPU where there is one, else in Triton's
                interpreter, before it appears under its final name.

        Raises:
            LoweringError: A target can't be compiled for, or launches can't be known ahead.
            NumericsError: The results differ from the program's; nothing is written.
            UsageError: `path` holds something else.
            ResourceError: The disk is full; nothing is left behind.
        """
        options, path = options or TritonOptions(), Path(path)
        _refuse_foreign(path)
        chosen = targets(tuple(options.arch))
        lowered, notes = lower_program(program)
        recorded = {t: _sites(lowered, t) for t in chosen}
        with staged(path) as stage:
            folder = stage / path.name
            folder.mkdir()
            entries, reports = _write_kernels(lowered, recorded, folder)
            _write_rest(lowered, reports, folder)
            bar = exact_bar(lowered)
            manifest.write(manifest.manifest(lowered, folder, entries, bar, notes), folder)
            artifact = TritonArtifact(folder, bar, {**notes, "performance": reports})
            if check:
                artifact.notes["check"] = {
                    name: artifact.check(function, fresh_cases(function), function=name)
                    for name, function in program.all_functions()
                }
        return TritonArtifact(path, bar, artifact.notes)


def _refuse_foreign(path: Path) -> None:
    """A folder of the user's is never replaced."""
    ours = (path / manifest.FILE).is_file()
    if path.is_file() or (path.is_dir() and not ours and any(path.iterdir())):
        raise UsageError(f"{path} exists and is no artefact of ours", hint="name another folder")


def _sites(program: Program, target: Target) -> dict[str, list[Site]]:
    return {name: record(function, target) for name, function in program.all_functions()}


def _write_kernels(
    program: Program, recorded: Mapping[Target, Mapping[str, Sequence[Site]]], folder: Path
) -> tuple[Json, Json]:
    """Compile everything, write the files; manifest entries and reports by target."""
    entries, reports = Json(), Json()
    for target, functions in recorded.items():
        variants = [
            variant_of(launch)
            for sites in functions.values()
            for site in sites
            for launch in site.launches
        ]
        compiled: dict[str, Compiled] = compile_variants(variants, target)
        kernels = {title: manifest.kernel_entry(item, folder) for title, item in compiled.items()}
        entries[target.name] = manifest.target_entry(target, kernels, program, functions)
        reports[target.name] = performance(target, compiled, functions)
    return entries, reports


def _write_rest(program: Program, reports: Json, folder: Path) -> None:
    save(program, folder / PROGRAM)
    shutil.copyfile(launcher.__file__, folder / "launcher.py")
    report = {"format": FORMAT, "label": LABEL, "targets": reports}
    (folder / "performance.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / "performance.md").write_text(markdown(report), encoding="utf-8")
