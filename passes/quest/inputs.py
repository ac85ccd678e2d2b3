"""What a product reads: its input with flipped signs, rotated and rounded; once for all readers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from resplice.build import Builder
from resplice.kernels.hadamard import hadamard
from resplice.kernels.quest_quantize import rounded
from resplice.kernels.round_to_levels import round_to_levels
from resplice.passes.quest.packed import Form

ROUNDINGS = (rounded.overload, round_to_levels.overload)


def flipped(build: Builder, x: fx.Node, signs: Tensor | None) -> fx.Node:
    """`x` with the signs [K] on its last axis, if there are any."""
    if signs is None:
        return x
    constant = build.constant(f"quest.signs_{len(signs)}", signs)
    return build(torch.ops.aten.mul.Tensor, x, constant)


def prepared(
    build: Builder, x: fx.Node, block: int, form: Form | None, bound: tuple[float, str],
    *, back: bool = False, widen: bool = False,
) -> fx.Node:  # fmt: skip
    """`x` rotated and, where it has a form, rounded; `back` in its own basis.

    Args:
        build: Where to insert.
        x: A value [..., K].
        block: Order of the transform; 1 is none.
        form: The levels; None leaves the precision.
        bound: Clip and estimator of the gradient.
        back: Whether the result is rotated back.
        widen: Whether a row with outliers gets a wider grid.
    """
    if form is None:
        return x if block == 1 or back else once(build, hadamard.overload, (x, block))
    if form.plain:
        bits = int(form.levels.removeprefix("int"))
        return once(
            build, rounded.overload, (x, bits, block, *bound, back, *([True] if widen else []))
        )
    args = (x, form.levels, form.unit, block, *bound, back)
    return once(build, round_to_levels.overload, args)


def once(build: Builder, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A call on a value, or the equal one that stands earlier."""
    users: list[fx.Node] = list(args[0].users)
    for user in users:
        if user.target is target and user.args == args and user < build.before:
            return user
    return build(target, *args)
