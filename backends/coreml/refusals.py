"""What has no Core ML form, collected, so that a user sees all of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from resplice.backends.coreml.frontend import is_known
from resplice.backends.coreml.legalize.rank import LIMIT
from resplice.backends.coreml.options import CoremlOptions
from resplice.errors import LoweringError
from resplice.origin import describe_target, where
from resplice.program import Program

_FINE = {torch.ops.aten.copy_.default}


def refuse_impossible(program: Program, options: CoremlOptions, *, final: bool = False) -> None:
    """Raise for what can't be expressed.

    Args:
        program: The captured program or, `final`, the legalised one.
        options: The conversion's options.
        final: Also look at operators and ranks, which rules may still have mended before.

    Raises:
        LoweringError: Lists every offending node with its source line.
    """
    problems = list(_states(program, options)) + list(_kinds(program))
    if final:
        problems += list(_operators(program))
    if problems:
        raise LoweringError(
            "coreml", problems,
            hint="rewrite these lines, or capture the sub-module without them",
        )  # fmt: skip


def _states(program: Program, options: CoremlOptions) -> Iterator[str]:
    for node in program.effects:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if target.op == "placeholder":
            yield f"it writes its input {target.name} ({where(node)}); keep it in a buffer instead"
            continue
        value = program.weight(target)
        if options.generation < 18:
            yield f"it keeps state in {target.target}, which needs target iOS18 ({where(node)})"
        elif not value.is_floating_point():
            yield f"its state {target.target} is {value.dtype}: Core ML keeps float16 only"
        elif bool(value.any()):
            yield f"its state {target.target} does not start at zero, as Core ML's does"


def _kinds(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        for value in _tensors(node.meta.get("val")):
            if value.is_complex():
                yield f"{describe_target(node)} computes complex numbers ({where(node)})"
            elif node.op == "placeholder" and value.dim() > LIMIT:
                yield f"input {node.name} has {value.dim()} axes, at most {LIMIT} are possible"
            elif free_unbacked_symbols(value):
                yield f"{describe_target(node)} has a size that depends on values ({where(node)})"
            else:
                continue
            break


def _operators(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in _FINE:
            continue
        if not is_known(node):
            yield f"{describe_target(node)} has no Core ML form ({where(node)})"
        elif any(value.dim() > LIMIT for value in _tensors(node.meta.get("val"))):
            yield f"{describe_target(node)} has more than {LIMIT} axes ({where(node)})"


def _tensors(value: Any) -> list[torch.Tensor]:
    found = value if isinstance(value, list | tuple) else [value]
    return [item for item in found if isinstance(item, torch.Tensor)]
