"""One float width: MIL programs are written in float32; the converter narrows them afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from resplice import weights
from resplice.infer import infer
from resplice.program import Program

_OTHERS = (torch.float16, torch.bfloat16, torch.float64)


def one_float_width(draft: Program) -> None:
    """Turn float16, bfloat16 and float64 weights, inputs and casts into float32, in place."""
    if not _has_others(draft):
        return
    for name, value in list(draft.named_weights()):
        if value.dtype in _OTHERS:
            wide = value.detach().float()
            parameter = isinstance(value, nn.Parameter)
            new = nn.Parameter(wide, requires_grad=False) if parameter else wide
            weights.put(draft.module, name, new)
    for node in draft.placeholders:
        if node.meta["val"].dtype in _OTHERS:
            with draft.fake_mode:
                node.meta["val"] = node.meta["val"].float()
    for node in draft.graph.nodes:
        node.args = _wide(node.args)
        node.kwargs = _wide(dict(node.kwargs))
    draft.samples = {
        name: value.float() if value.dtype in _OTHERS else value
        for name, value in draft.samples.items()
    }
    infer(draft)


def _has_others(draft: Program) -> bool:
    values = [node.meta.get("val") for node in draft.graph.nodes]
    return any(isinstance(v, torch.Tensor) and v.dtype in _OTHERS for v in values)


def _wide(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    if isinstance(value, list):
        return list(map(_wide, value))
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    return torch.float32 if value in _OTHERS else value
