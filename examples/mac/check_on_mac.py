"""Run a Core ML package on a Mac, compare it with golden files and time it.

    pip install coremltools numpy
    python check_on_mac.py smollm2.mlpackage smollm2.golden.npz [--units ALL CPU_ONLY] [--repeat 10]

This file stands alone: copy it, the package and the golden files to a Mac (macOS 15 or later for
packages with state or several functions). The golden files are written on Linux by resplice's own
interpreter of the package, with every value rounded to its declared type. Core ML itself does not
exist on Linux, so this script has not been run there, and resplice claims no figure of a Mac or an
iPhone: the times are whatever this script prints on yours.

A golden file is one run of calls over one state. It holds, for call i, arrays `i/in/NAME` and
`i/out/NAME`, and `calls`, a JSON list of the functions called.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")


@dataclass(frozen=True)
class Call:
    """One call of the golden run: a function, its inputs and what it must return."""

    function: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def read_golden(path: Path) -> list[Call]:
    """The calls of a golden file, in order."""
    with np.load(path) as stored:
        arrays = dict(stored)
    names = json.loads(str(arrays.pop("calls")))
    return [
        Call(name, _part(arrays, f"{i}/in/"), _part(arrays, f"{i}/out/"))
        for i, name in enumerate(names)
    ]


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """Largest error over the largest expected value; infinite for a wrong shape or NaN."""
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return float("inf")
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    error, scale = np.abs(wide - actual).max(), np.abs(wide).max()
    return float(error / scale) if scale else float("inf") if error else 0.0


def problems(
    expected: dict[str, np.ndarray], actual: dict[str, np.ndarray], bar: float
) -> list[str]:
    """What is wrong with the results of one call, as sentences; empty if nothing is."""
    found = [f"output {name} is missing" for name in expected if name not in actual]
    for name in [name for name in expected if name in actual]:
        measured = relative_error(expected[name], np.asarray(actual[name]))
        if not measured <= bar:
            found.append(f"output {name} is off by {measured:.1e} of its scale, bar {bar:.0e}")
    return found


def main() -> int:
    """Check and time on every compute unit asked for; exit code 1 if anything differs."""
    options = arguments()
    if sys.platform != "darwin":
        print("Core ML runs on a Mac only; nothing was checked", file=sys.stderr)
        return 2
    import coremltools as ct

    start = time.perf_counter()
    compiled = ct.models.utils.compile_model(str(options.package))
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    good = [check(compiled, unit, options) for unit in options.units]
    print("all results agree" if all(good) else "SOME RESULTS DIFFER")
    return 0 if all(good) else 1


def arguments() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("package", type=Path, help="an .mlpackage")
    parser.add_argument("golden", type=Path, nargs="+", help="golden .npz files")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=UNITS, help="compute units")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of each golden file")
    parser.add_argument("--bar", type=float, default=0.02, help="largest error, of output scale")
    return parser.parse_args()


def check(compiled: str, unit: str, options: argparse.Namespace) -> bool:
    """Load on one compute unit, compare every call, then time the run; True if all agree."""
    import coremltools as ct

    runs = {path: read_golden(path) for path in options.golden}
    functions = {call.function for calls in runs.values() for call in calls}
    several = functions != {"main"}
    start = time.perf_counter()
    models = {
        name: ct.models.CompiledMLModel(
            compiled,
            compute_units=getattr(ct.ComputeUnit, unit),
            function_name=name if several else None,
        )
        for name in sorted(functions)
    }
    print(f"\n{unit}: loaded {len(models)} functions in {time.perf_counter() - start:.1f} s")
    good = True
    for path, calls in runs.items():
        wrong = compare_run(models, calls, options.bar)
        good = good and not wrong
        print(f"  {path.name}: {len(calls)} calls, {'agree' if not wrong else '; '.join(wrong)}")
        for function, milliseconds in times(models, calls, options.repeat).items():
            print(f"    {function}: median {milliseconds:.2f} ms")
    return good


def compare_run(models: dict, calls: list[Call], bar: float) -> list[str]:
    """Make all calls over one fresh state; what is wrong, as sentences."""
    state, found = new_state(models, calls), []
    for number, call in enumerate(calls):
        result = predict(models[call.function], call, state)
        found += [
            f"call {number} ({call.function}): {p}" for p in problems(call.outputs, result, bar)
        ]
    return found


def times(models: dict, calls: list[Call], repeat: int) -> dict[str, float]:
    """Median milliseconds of a call by function, over `repeat` runs from a fresh state."""
    taken: dict[str, list[float]] = {}
    for _ in range(repeat):
        state = new_state(models, calls)
        for call in calls:
            start = time.perf_counter()
            predict(models[call.function], call, state)
            taken.setdefault(call.function, []).append(1000 * (time.perf_counter() - start))
    return {function: statistics.median(each) for function, each in taken.items()}


def new_state(models: dict, calls: list[Call]) -> object:
    """A state of the first function, handed to all; None if the package keeps none."""
    try:
        return models[calls[0].function].make_state()
    except Exception as error:  # coremltools has no question to ask beforehand
        if "state" not in str(error).lower():
            raise
        return None


def predict(model: object, call: Call, state: object) -> dict[str, np.ndarray]:
    """One call."""
    return model.predict(call.inputs, state) if state is not None else model.predict(call.inputs)


if __name__ == "__main__":
    sys.exit(main())
