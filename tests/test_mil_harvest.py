"""coremltools' own op tests, run by our interpreter; see `mil_harvest.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CAP = 2
"""Parametrisations taken of each of their test functions."""


@pytest.mark.slow
def test_their_models_agree_with_their_expected_values() -> None:
    tool = Path(__file__).with_name("mil_harvest.py")
    done = subprocess.run(
        [sys.executable, str(tool), str(CAP)], capture_output=True, text=True, check=True
    )
    table = done.stdout[done.stdout.index("models: ") :]
    print(table)
    found = re.match(r"models: (\d+)/(\d+) agree", table)
    assert found is not None
    agreed, total = map(int, found.groups())
    assert total > 300, table
    assert agreed / total >= 0.95, table
