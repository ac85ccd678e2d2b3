"""Which ops have a Triton kernel, and programs in which these ops are replaced by their hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from resplice.kernels.cuda.register import host_functions
from resplice.ops import find_op
from resplice.program import Program


def host_of(node: fx.Node) -> Callable[..., Any] | None:
    """The host function of a node's op, if it has a kernel."""
    op = find_op(node.target)
    return None if op is None else host_functions().get(op.name)


def with_hosts(program: Program) -> Program:
    """A copy that calls host functions instead of ops.

    On CPU tensors a host function runs its kernels in Triton's interpreter.
    """
    draft = program.copy()
    for node in draft.graph.nodes:
        host = host_of(node)
        if host is not None:
            node.target = host
    draft.module.recompile()
    return draft
