"""An ONNX model on disk, executed with onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from resplice.artifact import Artifact
from resplice.compare import Difference
from resplice.errors import InputError, LoweringError
from resplice.marks import check_marks

EXACT_BAR = 1e-4


@dataclass
class OnnxArtifact(Artifact):
    """A `.onnx` file, with the files of further functions beside it.

    Attributes:
        threads: onnxruntime's threads; 0 leaves it to onnxruntime.
    """

    threads: int = 0
    _sessions: dict[str, Any] = field(default_factory=dict, repr=False)

    def error_of(self, found: Difference) -> float:
        """The largest error; of approximating operators, whose errors add up in power, the rms.

        A single value may be far off there: random tokens drive a language model to activations
        that magnify the noise of int8 operators.
        """
        return found.rms if self.bar > EXACT_BAR else found.relative

    @classmethod
    def open(cls, path: str | Path, *, bar: float | None = None, threads: int = 0) -> OnnxArtifact:
        """Open an existing model, with the bar it was made with unless another one is given."""
        artifact = cls(Path(path), EXACT_BAR if bar is None else bar, threads=threads)
        if bar is None:
            artifact.bar = artifact.metadata.get("bar", EXACT_BAR)
        return artifact

    def run(
        self, inputs: Mapping[str, torch.Tensor], *, function: str = "main"
    ) -> dict[str, torch.Tensor]:
        """Execute on named inputs.

        Raises:
            InputError: onnxruntime refuses the inputs, or positions have other semantics.
        """
        session = self.session(function)
        check_marks(self.metadata.get("notes", {}), inputs)
        wanted = [item.name for item in session.get_inputs()]
        missing = [name for name in wanted if name not in inputs]
        if missing:
            raise InputError(f"input {', '.join(missing)} is missing", where=str(self.path))
        feed = {name: inputs[name].detach().cpu().contiguous().numpy() for name in wanted}
        try:
            results = session.run(None, feed)
        except Exception as error:
            raise InputError(f"onnxruntime: {error}", where=str(self.path)) from error
        names = [item.name for item in session.get_outputs()]
        return {
            name: torch.from_numpy(np.asarray(r)) for name, r in zip(names, results, strict=True)
        }

    def session(self, function: str = "main") -> Any:
        """The onnxruntime session of one function, made on first use.

        Raises:
            LoweringError: onnxruntime does not accept the model.
        """
        if function not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = self.threads
            try:
                self._sessions[function] = onnxruntime.InferenceSession(
                    function_file(self.path, function), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise LoweringError("onnx", [f"onnxruntime refuses the model: {error}"]) from error
        return self._sessions[function]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What resplice stored in the model: pipeline text, facts, dims, signature."""
        stored = self.session().get_modelmeta().custom_metadata_map
        return {
            key.removeprefix("resplice."): json.loads(value)
            for key, value in stored.items()
            if key.startswith("resplice.")
        }


def function_file(path: Path, function: str) -> Path:
    """The file of one function: `model.onnx` for `main`, `model.other.onnx` for `other`."""
    return path if function == "main" else path.with_name(f"{path.stem}.{function}{path.suffix}")
