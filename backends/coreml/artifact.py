"""A Core ML package on disk, executed here by our own MIL interpreter."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from resplice.artifact import Artifact
from resplice.backends.coreml.compare import first_divergence
from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.state import State
from resplice.backends.coreml.stateful import buffers_of, fill
from resplice.cases import fresh_inputs
from resplice.compare import Difference, keep_worst
from resplice.errors import InputError, NumericsError
from resplice.marks import check_marks
from resplice.program import Program
from resplice.sensitivity import past_bar

FP32_BAR, FP16_BAR = 2e-5, 5e-3
_STEPS = 3
"""Consecutive calls that a program with state is checked on."""

Mode = Literal["declared", "fp32"]


@dataclass
class CoremlArtifact(Artifact):
    """An `.mlpackage`.

    Attributes:
        mode: `declared` rounds every value to its declared type, as a device that stores float16
            does; `fp32` does not, so that only faults of the lowering remain.
    """

    mode: Mode = "declared"
    _interpreters: dict[tuple[str, Mode], Interpreter] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls, path: str | Path, *, bar: float | None = None, mode: Mode = "declared"
    ) -> CoremlArtifact:
        """Open any package that holds an mlprogram, ours or not."""
        found = cls(Path(path), FP16_BAR if bar is None else bar, mode=mode)
        if bar is None and "bar" in found.metadata:
            found.bar = float(found.metadata["bar"])
        return found

    @cached_property
    def package(self) -> MilPackage:
        """The loaded package."""
        return MilPackage.open(self.path)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of its functions."""
        return self.package.functions

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What resplice stored: per function its signature and names; bar; origins of values."""
        prefix = "resplice."
        stored = self.package.metadata
        return {
            key.removeprefix(prefix): unpacked(value)
            for key, value in stored.items()
            if key.startswith(prefix)
        }

    def interpreter(self, function: str = "main", mode: Mode | None = None) -> Interpreter:
        """The interpreter of one function, made on first use."""
        key = (self.package.function_name(self._named(function)), mode or self.mode)
        if key not in self._interpreters:
            self._interpreters[key] = Interpreter(self.package, key[0], mode=key[1])
        return self._interpreters[key]

    def make_state(self, function: str = "main") -> State:
        """A fresh state, all zeros; hand the same one to consecutive runs."""
        return self.interpreter(function).make_state()

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        function: str = "main",
        state: State | None = None,
    ) -> dict[str, torch.Tensor]:
        """Execute on named inputs.

        Args:
            inputs: By the program's names, or by the package's where it was not made by resplice.
            function: Which function.
            state: From `make_state`; updated. None starts from zero and forgets.

        Raises:
            InputError: An input is missing, unknown, has the wrong kind or shape, or holds
                positions of other semantics.
        """
        interpreter = self.interpreter(function)
        known = self._border(function)
        check_marks(known.get("notes", {}), inputs)
        given = {known["inputs"].get(name, name): self._lowered(v) for name, v in inputs.items()}
        if state is None and self.package.states(interpreter.function):
            state = interpreter.make_state()
        results = interpreter.run(given, state)
        return {
            name: self._restored(results[stored], known, name)
            for name, stored in (known["outputs"] or {name: name for name in results}).items()
        }

    def check(
        self, program: Program, cases: list[dict[str, torch.Tensor]], *, function: str = "main"
    ) -> dict[str, Difference]:
        """Compare with the program on every case, state included; the worst difference per output.

        Raises:
            NumericsError: An output is past `bar`; names the first value that differs.
        """
        found: dict[str, Difference] = {}
        if self.package.states(self._named(function)):
            cases = [*cases, *(fresh_inputs(program, seed=100 + i) for i in range(_STEPS - 1))]
        reference, state = program.copy(), self._state(function)
        for case in cases:
            self._compare(found, reference, case, function, state)
        if state is not None:
            fill(reference, state)
            self._compare(found, reference, cases[0], function, state)
        for name, error, bar in past_bar(found, self.bar, self.error_of, program, cases):
            raise NumericsError(
                f"{self.path.name}: output {name} differs from the program",
                measured=error, bar=bar,
                where=first_divergence(self, program, cases[0], function=function),
                hint="precision fp32 tells rounding from a wrong translation; "
                "`resplice bisect` tries the passes",
            )  # fmt: skip
        return found

    def _compare(
        self, found: dict[str, Difference], reference: Program,
        case: dict[str, torch.Tensor], function: str, state: State | None,
    ) -> None:  # fmt: skip
        """One call of both: outputs, and what it left in the state."""
        expected = reference.run_fresh(case)
        keep_worst(found, expected, self.run(case, function=function, state=state))
        if state is not None:
            stored = {name: value.float() for name, value in state.tensors.items()}
            keep_worst(found, buffers_of(reference, stored), stored)

    def _state(self, function: str) -> State | None:
        return self.make_state(function) if self.package.states(self._named(function)) else None

    def _named(self, function: str) -> str | None:
        return function if function in self.package.functions else None

    def _border(self, function: str) -> dict[str, dict[str, str]]:
        empty: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}, "kinds": {}}
        found: dict[str, dict[str, str]] = self.metadata.get("functions", {}).get(function, empty)
        return found

    @staticmethod
    def _lowered(value: torch.Tensor) -> torch.Tensor:
        """As the package takes it: no scalars, booleans as int32."""
        value = value.reshape(1) if value.dim() == 0 else value
        if value.is_floating_point():
            return value.float() if value.dtype == torch.bfloat16 else value
        if not value.is_complex():
            return value.to(torch.int32)
        raise InputError("Core ML has no complex numbers")

    @staticmethod
    def _restored(
        value: torch.Tensor, known: Mapping[str, Mapping[str, str]], name: str
    ) -> torch.Tensor:
        kind = known["kinds"].get(name)
        if kind is None:
            return value
        dtype, _, scalar = kind.partition(" ")
        return value.to(getattr(torch, dtype)).reshape(() if scalar else value.shape)


def packed(value: Any) -> str:
    """JSON, compressed where it is long."""
    text = json.dumps(value)
    if len(text) < 4096:
        return text
    return "zlib:" + b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> Any:
    """Inverse of `packed`."""
    if text.startswith("zlib:"):
        text = zlib.decompress(b64decode(text.removeprefix("zlib:"))).decode()
    return json.loads(text)
