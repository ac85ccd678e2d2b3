"""The memory bound, on a random Llama of about 1 B parameters; minutes and 10 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_capture_and_quest_stay_under_1_3_times_the_weights_and_4_gb_export(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--layers", "20", "--export", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    assert measured["parameters"] > 1e9
    assert measured["ratio"] < 1.3
    assert measured["export"]["bytes"] > 4e9
    assert measured["export"]["relative_error"] < 1e-4
