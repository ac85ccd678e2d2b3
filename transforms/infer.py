"""Shape and dtype inference: run nodes on fake tensors, symbolic sizes included."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from resplice.errors import OpError, VerifyError
from resplice.origin import describe_target, where
from resplice.program import Program

KEEP = object()


def infer(program: Program, until: fx.Node | None = None) -> None:
    """Recompute every node's `meta["val"]` from the inputs onwards.

    Args:
        program: The program, edited in place.
        until: The last node to compute; by default all. A pass that changes an axis and restores
            it later infers up to the node it restores it after, then inserts, then infers all.

    Raises:
        VerifyError: A node can't run on the shapes it is given; names node and source line.
    """
    for node in program.graph.nodes:
        infer_node(program, node)
        if node is until:
            return


def infer_node(program: Program, node: fx.Node) -> None:
    """Compute one node's value from its inputs' values; placeholders and output stay."""
    if node.op in ("placeholder", "output"):
        return
    if node.op == "get_attr":
        node.meta["val"] = fake_of(program.fake_mode, program.weight(node))
        return
    value = evaluate(program.fake_mode, node)
    if value is not KEEP:
        node.meta["val"] = value


def fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the layout of a real one, sizes static."""
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def evaluate(mode: FakeTensorMode, node: fx.Node) -> Any:
    """The fake value a call node computes, or `KEEP` where it is data-dependent and known."""
    known = node.meta.get("val")
    if known is not None and free_unbacked_symbols(known):
        return KEEP
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target), node
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)
    except OpError:
        raise
    except RuntimeError as error:
        if known is not None and "concrete integers" in str(error):
            return KEEP  # a C++ kernel without symbolic sizes: what export recorded stands
        raise _refused(node, args, error) from error
    except Exception as error:
        raise _refused(node, args, error) from error


def _refused(node: fx.Node, args: Any, error: Exception) -> VerifyError:
    shapes = [str(getattr(a, "shape", a))[:80] for a in args]
    return VerifyError(
        f"{describe_target(node)} can't take {', '.join(shapes)}: {str(error).splitlines()[0]}",
        where=where(node),
    )
