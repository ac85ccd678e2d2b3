"""Harvest coremltools' own op tests and run their models through our interpreter.

coremltools ships tests of its MIL ops that build a small model, and on a Mac compare what Core ML
predicts with expected values. Here the comparison is replaced: the converted model is run by our
interpreter instead. `python tests/mil_harvest.py [CAP]` prints a table of agreements by op.

Only float32 models for the CPU are taken. CAP limits the parametrisations of each test function
(chosen at even distances), because there are tens of thousands.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import types
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("PYMIL_TEST_TARGETS", "mlprogram")
os.environ.setdefault("INCLUDE_MIL_FP32_UNIT_TESTS", "1")

from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.plan import _all_ops
from resplice.backends.coreml.mil.tools import coremltools, silent

OPSETS = ("iOS14", "iOS15", "iOS16", "iOS17", "iOS18")
PLUMBING = {"const", "cast", "identity"}


@dataclass
class Harvest:
    """A pytest plugin that replaces the comparison and counts agreements.

    Attributes:
        cap: Parametrisations kept of each test function.
        agreed: Models whose outputs all agreed, by op type.
        total: Models run, by op type.
        failures: One line a disagreement, by op type.
        models: Agreed and all models, each counted once.
    """

    cap: int
    agreed: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    models: list[int] = field(default_factory=lambda: [0, 0])
    tests: Counter[str] = field(default_factory=Counter)
    item: str = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_function: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            if _wanted(getattr(item, "callspec", None)):
                by_function[item.nodeid.partition("[")[0]].append(item)
        items[:] = [item for group in by_function.values() for item in _spaced(group, self.cap)]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.item = item.nodeid.partition("ops/tests/")[2]
        np.random.seed(0)
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.outcome] += 1
            if report.failed:
                line = str(report.longrepr).strip().splitlines()[-1][:160]
                self.tests[f"failed: {line}"] += 1

    def compare(
        self,
        mlmodel: Any,
        input_key_values: dict[str, Any],
        expected_outputs: dict[str, Any],
        dtype: str = "fp32",
        atol: float = 1e-4,
        rtol: float = 1e-5,
        also_compare_shapes: bool = True,
        state: Any = None,
        allow_mismatch_ratio: float = 0.0,
    ) -> None:
        """Stands in for coremltools' `compare_backend`."""
        if dtype != "fp32" or not expected_outputs:
            return
        ops, error = {"?"}, ""
        try:
            package = MilPackage.open(mlmodel.package_path)
            ops = op_types(package)
            found = predict(package, input_key_values, state)
            error = disagreement(found, expected_outputs, atol, rtol, allow_mismatch_ratio)
        except Exception as problem:  # a crash on any of their models is a finding
            error = f"{type(problem).__name__}: {str(problem).splitlines()[0:3]}"
        self._count(ops, error)

    def _count(self, ops: set[str], error: str) -> None:
        self.models[1] += 1
        self.models[0] += not error
        for op in ops:
            self.total[op] += 1
            self.agreed[op] += not error
            if error:
                self.failures[op].append(f"{self.item}: {error}"[:400])

    def table(self) -> str:
        """One line an op: agreed / total, then the first disagreements."""
        lines = [f"models: {self.models[0]}/{self.models[1]} agree"]
        for op in sorted(self.total):
            lines.append(f"{op:40} {self.agreed[op]:5}/{self.total[op]}")
            lines += [f"    {failure}" for failure in self.failures[op][:3]]
        return "\n".join(lines)


def op_types(package: MilPackage) -> set[str]:
    """What a model is about: its op types, plumbing aside."""
    found = {op.op_type for f in package.program.functions.values() for op in _all_ops(f)}
    return found - PLUMBING or (found - {"const"}) or {"const"}


def predict(package: MilPackage, values: dict[str, Any], state: Any) -> dict[str, torch.Tensor]:
    """Run a model on arrays, converted to what it declares as Core ML does."""
    inputs = {}
    for each in package.inputs():
        value = torch.from_numpy(np.array(values[each.name], dtype=np.float64))
        inputs[each.name] = (value.reshape(1) if value.dim() == 0 else value).to(each.dtype)
    interpreter = Interpreter(package)
    if state is not None and not state.tensors:
        state.tensors.update(interpreter.make_state().tensors)
    return interpreter.run(inputs, state)


def disagreement(
    found: dict[str, torch.Tensor],
    expected: dict[str, Any],
    atol: float,
    rtol: float,
    allowed: float,
) -> str:
    """What differs, empty if nothing."""
    positional = list(found.values())
    for at, (name, value) in enumerate(expected.items()):
        mine = found.get(name, positional[min(at, len(positional) - 1)]).numpy()
        wanted = np.asarray(value)
        if wanted.shape != mine.shape and (wanted.shape, mine.shape) != ((), (1,)):
            return f"{name} has shape {mine.shape}, expected {wanted.shape}"
        wrong = ~np.isclose(mine, wanted, atol=atol, rtol=rtol, equal_nan=True)
        if wrong.mean() > allowed:
            worst = np.abs(mine.astype(np.float64) - wanted).max()
            return f"{name} differs at {int(wrong.sum())} of {wrong.size}, at most by {worst:.3g}"
    return ""


def run(cap: int, opsets: tuple[str, ...] = OPSETS, select: str = "") -> Harvest:
    """Run coremltools' op tests of some opsets, at most `cap` of each test function."""
    _stand_in_for_scipy()
    with silent():
        from coremltools.converters.mil import testing_utils as shared
        from coremltools.converters.mil.mil.ops.tests import testing_utils as for_ops

        from resplice.backends.coreml.mil.state import State

    harvest = Harvest(cap)
    shared.compare_backend = for_ops.compare_backend = harvest.compare
    coremltools.models.MLModel.make_state = lambda _: State()
    root = Path(for_ops.__file__).parent
    arguments = [str(root / opset) for opset in opsets]
    if select:
        arguments += ["-k", select]
    with tempfile.TemporaryDirectory() as place:
        pytest.main(
            [*arguments, "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-o",
             "addopts=", "-W", "ignore", f"--rootdir={place}", "-c", os.devnull],
            plugins=[harvest],
        )  # fmt: skip
    return harvest


def _wanted(callspec: Any) -> bool:
    parameters = {} if callspec is None else callspec.params
    backend = parameters.get("backend")
    unit = parameters.get("compute_unit", parameters.get("compute_units"))
    precision = getattr(backend, "precision", backend[1] if isinstance(backend, tuple) else "fp32")
    return precision == "fp32" and unit in {None, coremltools.ComputeUnit.CPU_ONLY}


def _spaced(items: list[pytest.Item], cap: int) -> list[pytest.Item]:
    if len(items) <= cap:
        return items
    return [items[(at * len(items)) // cap] for at in range(cap)]


def _stand_in_for_scipy() -> None:
    """Their expected values use three functions of scipy; torch has the same ones."""
    if importlib.util.find_spec("scipy") is not None:
        return
    special = types.ModuleType("scipy.special")
    special.erf = lambda x: torch.erf(torch.as_tensor(x)).numpy()
    special.softmax = lambda x, axis=-1: torch.softmax(torch.as_tensor(x), axis).numpy()
    special.logsumexp = _logsumexp
    scipy = types.ModuleType("scipy")
    scipy.special = special
    sys.modules |= {"scipy": scipy, "scipy.special": special}


def _logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    value = torch.as_tensor(x)
    axes = tuple(range(value.dim())) if axis is None else axis
    return torch.logsumexp(value, axes, keepdim=keepdims).numpy()


if __name__ == "__main__":
    result = run(
        int(sys.argv[1]) if len(sys.argv) > 1 else 4,
        tuple(sys.argv[2].split(",")) if len(sys.argv) > 2 else OPSETS,
        sys.argv[3] if len(sys.argv) > 3 else "",
    )
    print(result.table())
    print(json.dumps(result.tests, indent=1))
