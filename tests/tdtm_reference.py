"""Temporal token merging in plain PyTorch, written from its description: what the pass must equal.

`merging(...)` makes eager models merge. STDiT3 has its merged forward here in full; diffusers'
models get their attention modules wrapped, with tables and masks of the merged tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from models.stdit3 import STDiT3
from torch import Tensor


def merge(x: Tensor, axis: int = 1, pair: int = 2) -> Tensor:
    """Mean of neighbouring frames; the last one is repeated until the groups are full."""
    frames = list(x.unbind(axis))
    while len(frames) % pair:
        frames.append(frames[-1])
    groups = [frames[i : i + pair] for i in range(0, len(frames), pair)]
    return torch.stack([sum(group) / pair for group in groups], axis)  # type: ignore[arg-type]


def unmerge(y: Tensor, frames: int, axis: int = 1, pair: int = 2) -> Tensor:
    """Every frame gets the value of its group."""
    return torch.stack([y.select(axis, t // pair) for t in range(frames)], axis)


def stdit3(
    model: STDiT3, inputs: dict[str, Tensor], which: set[str], pair: int = 2, layers: Any = None
) -> Tensor:
    """The forward pass of the subject, its blocks written out with merging.

    Args:
        model: The subject.
        inputs: Of `models.stdit3.inputs`.
        which: Of "spatial", "temporal", "cross".
        pair: Frames of a group.
        layers: Numbers within each kind that merge; None: all.
    """
    seen = {"spatial": 0, "temporal": 0, "cross": 0}

    def taken(kind: str) -> int:
        number = seen[kind]
        seen[kind] += 1
        return pair if kind in which and (layers is None or number in layers) else 1

    def block(module: Any) -> Any:
        def forward(x: Tensor, y: Tensor, mask: Tensor | None, parts: list[Tensor]) -> Tensor:
            frames = x.shape[1]
            sh1, sc1, g1, sh2, sc2, g2 = parts
            h = module.norm(x) * (1 + sc1) + sh1
            group = taken("temporal" if module.temporal else "spatial")
            h = merge(h, pair=group)
            few, (b, m, s, c) = h, h.shape
            if module.temporal:
                rows = few.transpose(1, 2).reshape(b * s, m, c)
                out = module.attn(rows).reshape(b, s, m, c).transpose(1, 2)
            else:
                out = module.attn(few.reshape(b * m, s, c)).reshape(b, m, s, c)
            x = x + g1 * unmerge(out, frames, pair=group)
            group = taken("cross")
            few = merge(x, pair=group)
            b, m, s, c = few.shape
            out = module.cross_attn(few.reshape(b, m * s, c), y, mask).reshape(b, m, s, c)
            x = x + unmerge(out, frames, pair=group)
            return x + g2 * module.mlp(module.norm(x) * (1 + sc2) + sh2)

        return forward

    blocks = [m for m in model.modules() if type(m).__name__ == "Block"]
    try:
        for module in blocks:
            module.forward = block(module)
        with torch.no_grad():
            return model(**inputs)
    finally:
        for module in blocks:
            del module.forward
