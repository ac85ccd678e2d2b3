"""The script for a GPU, walked through the interpreter: every way is compared, nothing is timed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resplice.kernels.cuda.hadamard import hadamard
from resplice.kernels.hadamard import hadamard_matrix

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "bench_gpu.py"))


def _run(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *given])
    script["main"]()


def test_every_subject_agrees_and_nothing_is_timed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "gpu.json"
    _run(script, monkeypatch, "--interpret", "--dtype", "fp32", "--json", str(out))
    found = json.loads(out.read_text())
    assert found["machine"] == "CPU, interpreted"
    assert {row["subject"] for row in found["rows"]} == set(script["SUBJECTS"])
    for row in found["rows"]:
        assert row["baseline"]["ms"] is None
        assert row["ways"]["ours"]["error"] <= row["bar"]
        assert "ms" not in row["ways"]["ours"]
    printed = capsys.readouterr().out
    assert "agrees" in printed
    assert " ms" not in printed


def test_a_wrong_way_is_named_and_not_timed(script: dict[str, Any]) -> None:
    way, row = script["Way"], script["Row"]
    found = script["measured"](
        row("subject", torch.ones(3), 1e-3, {"ours": way(lambda: torch.zeros(3))},
            ("dense", lambda: torch.ones(3)), 2.0),
        None,
    )  # fmt: skip
    assert found["ways"]["ours"] == {"error": 1.0, "wrong": True}
    assert "ours WRONG" in script["line"](found)


def test_ratios_are_the_baseline_over_the_way(script: dict[str, Any]) -> None:
    times = iter([6.0, 2.0])
    way, row = script["Way"], script["Row"]
    found = script["measured"](
        row("subject", torch.ones(3), 1e-3, {"ours": way(lambda: torch.ones(3))},
            ("dense", lambda: torch.ones(3)), 4.0),
        lambda call: next(times),
    )  # fmt: skip
    assert found["ways"]["ours"]["ratio"] == 3.0
    assert script["line"](found).split("   ")[-2:] == ["ours 2.000 ms (3.00x)", "ideal 4.00x"]


def test_tuned_kernels_are_compared_and_timed_again(script: dict[str, Any]) -> None:
    x = torch.randn(4, 128)
    expected = (x.double() @ hadamard_matrix(128)).float()
    calls: list[Any] = []

    def clock(call: Any) -> float:
        calls.append(call())
        return float(10 - len(calls))

    way, row = script["Way"], script["Row"]
    subject = row("subject", expected, 1e-3, {"ours": way(lambda: hadamard(x, 128))},
                  ("dense", lambda: expected), 4.0)  # fmt: skip
    found = script["measured"](subject, clock, True)["ways"]
    tuned = found["ours, tuned"]
    assert list(tuned["configurations"]) == ["hadamard_blocks"]
    assert tuned["error"] < 1e-3
    assert tuned["ms"] == 10 - len(calls) < found["ours"]["ms"]


def test_without_a_gpu_it_says_what_can_be_done(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        _run(script, monkeypatch)
    assert "--interpret" in capsys.readouterr().err
