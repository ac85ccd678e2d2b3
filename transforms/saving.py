"""Saving programs as `.pt2` with our metadata, and loading them without running foreign code."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from resplice.artifact import staged
from resplice.calling import CallSpec
from resplice.dims import Dim
from resplice.errors import CaptureError, UsageError
from resplice.exported import lift, unlift
from resplice.facts import Facts
from resplice.program import Program
from resplice.registry import load_ops

SCHEMA = 1
_EXTRA = "resplice.json"


def program_metadata(program: Program) -> dict[str, Any]:
    """Everything a later tool needs to know besides graph and weights; JSON-able."""
    return {
        "schema": SCHEMA,
        "pipeline": ",".join(program.history),
        "facts": program.facts.to_json(),
        "dims": [str(dim) for dim in program.dims.values()],
        "symbols": program.symbols,
        "call": program.call.to_json(),
        "inputs": [str(port) for port in program.inputs],
        "outputs": [str(port) for port in program.outputs],
        "notes": program.metadata,
        "training": program.training,
    }
