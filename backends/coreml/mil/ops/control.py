"""Branches and loops; their blocks arrive as functions from block inputs to block outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resplice.backends.coreml.mil.registry import implements

RunBlock = Callable[..., tuple[Any, ...]]


@implements("cond", moves=True)
def cond(pred: torch.Tensor, blocks: tuple[RunBlock, RunBlock]) -> tuple[Any, ...]:
    """The outputs of the first block if the condition holds, else of the second."""
    return blocks[0 if bool(pred) else 1]()


@implements("while_loop", moves=True)
def while_loop(loop_vars: list[Any], blocks: tuple[RunBlock, RunBlock]) -> tuple[Any, ...]:
    """The second block over and over, as long as the first says so."""
    condition, body = blocks
    current: tuple[Any, ...] = tuple(loop_vars)
    while bool(condition(*current)[0]):
        current = body(*current)
    return current
