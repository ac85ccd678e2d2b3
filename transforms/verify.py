"""What every program must obey; run after capture and after every pass.

Each check yields one sentence per problem. They are cheap: no weights are read, no data is run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from resplice import weights
from resplice.dims import same_shape
from resplice.errors import VerifyError
from resplice.infer import KEEP, evaluate
from resplice.origin import where
from resplice.program import Program

aten = torch.ops.aten


def verify(program: Program, *, shapes: bool = True) -> None:
    """Check a program and all its functions.

    Args:
        program: The program.
        shapes: Also re-infer every node and compare with what is recorded.

    Raises:
        VerifyError: Lists every problem with node and source line.
    """
    for name, function in program.all_functions():
        problems = [*_structure(function), *_facts(function)]
        if not problems and shapes:
            problems = list(_recorded_shapes(function))
        if problems:
            raise VerifyError(f"{name} is not well formed:\n  - " + "\n  - ".join(problems[:20]))


def same_signature(before: Program, after: Program) -> None:
    """Refuse a change of inputs or outputs.

    Raises:
        VerifyError: Says what it was and what it is.
    """
    for what in ("inputs", "outputs"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            raise VerifyError(
                f"{what} changed from ({', '.join(map(str, was))}) to ({', '.join(map(str, now))})"
            )


def _structure(program: Program) -> Iterator[str]:
    nodes = [problem for node in program.graph.nodes for problem in _node(program, node)]
    yield from nodes
    try:
        program.graph.lint()
    except RuntimeError as error:
        if not nodes:
            yield f"the graph is broken: {error}"
        return
    names = program.call.tensor_names
    if [node.name for node in program.placeholders] != list(names):
        found = ", ".join(node.name for node in program.placeholders)
        yield f"inputs are {found}, the calling convention says {', '.join(names)}"


def _has_value(node: fx.Node) -> bool:
    """Runtime assertions return nothing, so there is no shape to record."""
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
        return False
    return node.op in ("placeholder", "get_attr", "call_function")


def _node(program: Program, node: fx.Node) -> Iterator[str]:
    if _has_value(node) and "val" not in node.meta:
        yield f"no shape is recorded for {where(node)}"
    if node.op == "get_attr" and not weights.has(program.module, str(node.target)):
        yield f"there is no weight {node.target}, read by {where(node)}"
    if node.op in ("call_module", "call_method"):
        yield f"{node.op} is not allowed: {where(node)}"
    if node.op == "output" and not _returns_nodes(node):
        yield "an output is not a tensor of the graph"
    if _writes(node) and not _is_effect(node):
        yield f"it writes in place, which only trailing copy_ may do: {where(node)}"


def _returns_nodes(output: fx.Node) -> bool:
    items = output.args[0]
    return isinstance(items, tuple | list) and all(isinstance(item, fx.Node) for item in items)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_effect(node: fx.Node) -> bool:
    """A trailing `copy_` into an input or a weight, whose target nobody reads afterwards."""
    if node.target is not aten.copy_.default or node.users:
        return False
    target = node.args[0]
    if not isinstance(target, fx.Node) or target.op not in ("placeholder", "get_attr"):
        return False
    return all(user <= node for user in target.users)


def _recorded_shapes(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op != "call_function" or not _has_value(node):
            continue
        try:
            value, recorded = evaluate(program.fake_mode, node), node.meta["val"]
        except VerifyError as error:
            yield str(error)
            continue
        if value is KEEP or not isinstance(recorded, torch.Tensor):
            continue
        if value.dtype != recorded.dtype or not same_shape(value, recorded):
            yield (
                f"{where(node)} computes {value.dtype}{list(value.shape)}, "
                f"but {recorded.dtype}{list(recorded.shape)} is recorded"
            )


def _facts(program: Program) -> Iterator[str]:
    names = {node.name for node in program.graph.nodes}
    for fact in program.facts:
        for name in fact.nodes:
            if name not in names:
                yield f'the fact "{fact.title}" speaks of {name}, which is gone'
