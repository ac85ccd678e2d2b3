"""Temporal token merging in plain PyTorch, written from its description: what the pass must equal.

`merging(...)` makes eager models merge. STDiT3 has its merged forward here in full; diffusers'
models get their attention modules wrapped, with tables and masks of the merged tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models.stdit3 import STDiT3
from torch import Tensor, nn


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


# ---- models of diffusers -----------------------------------------------------------------

ATTENTION = re.compile(r"blocks\.\d+\.(attn\d?)$")


class Wrapped:
    """An attention module of a diffusers model that sees merged frames.

    Its input is [B,T*S,C] (`joint`), [B*T,S,C] (`spatial`) or [B*S,T,C] (`temporal`).
    """

    def __init__(self, module: Any, frames: int, rest: int, form: str, pair: int) -> None:
        self.original, self.form, self.pair = module.forward, form, pair
        self.frames, self.rest, self.few = frames, rest, -(-frames // pair)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        args = tuple(self.given(i == 0, a) for i, a in enumerate(args))
        kwargs = {k: self.given(k == "hidden_states", v) for k, v in kwargs.items()}
        result = self.original(*args, **kwargs)
        if isinstance(result, tuple):
            return (self.spread(result[0]), *result[1:])
        return self.spread(result)

    def given(self, video: bool, value: Any) -> Any:
        """An argument for merged frames."""
        if isinstance(value, tuple | list):
            return type(value)(self.given(False, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if video:
            split = self.split(value, self.frames)
            return self.joined(merge(split, 2 if self.form == "temporal" else 1, self.pair))
        if self.form == "spatial":  # the text, repeated for each frame
            return value.unflatten(0, (-1, self.frames))[:, : self.few].flatten(0, 1)
        return self.rows(value)

    def rows(self, value: Tensor) -> Tensor:
        """A table or mask with an entry per token: the first frames and what is no video."""
        tokens, kept = self.frames * self.rest, self.few * self.rest
        for dim, size in enumerate(value.shape):
            if self.form == "joint" and size == tokens:
                value = value.narrow(dim, 0, kept)
            elif (
                value.dim() == 4 and dim == 3 and size > tokens
            ):  # a mask: the video comes first, then the text
                text = value.narrow(dim, tokens, size - tokens)
                value = torch.cat((value.narrow(dim, 0, kept), text), dim)
        return value

    def split(self, x: Tensor, frames: int) -> Tensor:
        """[B,T,S,C], or [B,S,T,C] where frames are the tokens."""
        if self.form == "joint":
            return x.unflatten(1, (frames, self.rest))
        return x.unflatten(0, (-1, frames if self.form == "spatial" else self.rest))

    def joined(self, x: Tensor) -> Tensor:
        """Inverse of `split`."""
        return x.flatten(1, 2) if self.form == "joint" else x.flatten(0, 1)

    def spread(self, y: Tensor) -> Tensor:
        """All frames again."""
        axis = 2 if self.form == "temporal" else 1
        split = self.split(y, self.few)
        return self.joined(unmerge(split, self.frames, axis, self.pair))


@contextmanager
def merging(
    model: nn.Module, frames: int, rest: int, pair: int = 2, chosen: Any = lambda name: True
) -> Iterator[list[Wrapped]]:
    """Let the attention modules of a model merge; `rest` is S, tokens per frame."""
    wrapped = []
    for name, module in model.named_modules():
        if not ATTENTION.search(name) or "refiner" in name or not chosen(name):
            continue
        form = "joint"
        if type(model).__name__ == "LatteTransformer3DModel":
            form = "temporal" if name.startswith("temporal") else "spatial"
        wrapped.append((module, Wrapped(module, frames, rest, form, pair)))
        module.forward = wrapped[-1][1]
    try:
        yield [item for _, item in wrapped]
    finally:
        for module, _ in wrapped:
            del module.forward
