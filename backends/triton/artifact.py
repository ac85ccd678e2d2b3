"""A folder of compiled kernels and their program, run on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resplice.artifact import Artifact
from resplice.backends.triton import manifest
from resplice.backends.triton.hosts import with_hosts
from resplice.errors import InputError
from resplice.exported import lift
from resplice.kernels.cuda.register import register
from resplice.program import Program
from resplice.saving import load

PROGRAM = "program.pt2"


class TritonArtifact(Artifact):
    """A folder with `program.pt2`, kernels per target, `manifest.json` and `launcher.py`.

    `run` executes the program: its ops launch their kernels, compiled for the GPU where there is
    one, else block by block in Triton's interpreter, in this process.
    """

    hint = "`resplice check A B` compares without writing; `resplice bisect` tries the passes"

    @classmethod
    def open(cls, path: str | Path) -> TritonArtifact:
        """Open an existing folder.

        Raises:
            VerifyError: Files are missing, changed, or not what the manifest's schema says.
        """
        folder = Path(path)
        found = manifest.read(folder)
        return cls(folder, float(found["bar"]), dict(found["lowering"]))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest."""
        return manifest.read(self.path)

    @cached_property
    def program(self) -> Program:
        """The program, its ops in place."""
        return load(self.path / PROGRAM)

    def run(
        self, inputs: Mapping[str, torch.Tensor], *, function: str = "main"
    ) -> dict[str, torch.Tensor]:
        """Execute on named inputs.

        Raises:
            InputError: The inputs do not fit the signature, or there is no such function.
        """
        functions = dict(self.program.all_functions())
        if function not in functions:
            raise InputError(
                f"there is no function {function!r}", where=str(self.path),
                hint=f"there is {', '.join(functions)}",
            )  # fmt: skip
        program = functions[function]
        program.check_inputs(inputs)
        if torch.cuda.is_available():
            return run_on(program, inputs, "cuda")
        if function not in self._interpreted:
            self._interpreted[function] = with_hosts(program)
        return self._interpreted[function].run_fresh(inputs)

    @cached_property
    def _interpreted(self) -> dict[str, Program]:
        return {}


def run_on(
    program: Program, inputs: Mapping[str, torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """Run a program on a device; the outputs come back to the CPU."""
    from torch.export.passes import move_to_device_pass

    register()
    module = move_to_device_pass(lift(program), device).module()
    tensors = [inputs[node.name].to(device) for node in program.placeholders]
    with torch.no_grad():
        results = module(*tensors)
    names = [port.name for port in program.outputs]
    return {name: value.cpu() for name, value in zip(names, results, strict=True)}
