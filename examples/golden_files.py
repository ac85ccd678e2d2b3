"""Golden files: inputs and the interpreter's results, for `examples/mac/check_on_mac.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write(
    path: Path, artifact: Any, calls: Sequence[tuple[str, Mapping[str, torch.Tensor]]]
) -> Path:
    """Make calls over one state and store them under the package's names.

    Args:
        path: Ends in `.npz`.
        artifact: A Core ML artefact; its results are rounded to the declared types.
        calls: (function, inputs by the program's names), in order.
    """
    stored: dict[str, np.ndarray] = {"calls": np.array(json.dumps([name for name, _ in calls]))}
    state = artifact.make_state(calls[0][0])
    for number, (function, inputs) in enumerate(calls):
        known = artifact.metadata["functions"][function]
        results = artifact.run(inputs, function=function, state=state)
        for kind, values in (("in", inputs), ("out", results)):
            names = known[f"{kind}puts"]
            for name, value in values.items():
                stored[f"{number}/{kind}/{names[name]}"] = _plain(value)
    np.savez_compressed(path, **stored)
    return path


def _plain(value: torch.Tensor) -> np.ndarray:
    """As Core ML takes and returns it: no scalars, floats or int32."""
    value = value.reshape(1) if value.dim() == 0 else value
    return (value.float() if value.is_floating_point() else value.to(torch.int32)).numpy()
