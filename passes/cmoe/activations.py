"""Which activation a chain of pointwise operators computes, told by its values.

Models spell the same function in many ways (`gelu`, or eight operators for its tanh form), so the
chain is run on a grid in float64 and compared with every known activation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from resplice.kernels.moe_routing import ACTIVATIONS
from resplice.program import Program

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
_GRID = torch.cat(
    (torch.linspace(-8, 8, 641, dtype=torch.float64), torch.tensor([-30.0, 30.0]).double())
)
_CLOSE = 1e-5
IDENTITY = "identity"


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator treats every element alike and draws nothing at random."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return (torch.Tag.pointwise in target.tags and not random) or target in _CASTS


def name_activation(program: Program, result: fx.Node, chain: Sequence[fx.Node]) -> str | None:
    """The activation from the one input of a chain to its result.

    Args:
        program: The program, for constants of one element.
        result: The last node of the chain.
        chain: Pointwise and shape-keeping nodes in graph order; nodes outside that are no
            constants all stand for the one input.

    Returns:
        A key of `ACTIVATIONS`, "identity", or None for a function that is not known.
    """
    values: dict[fx.Node, Any] = {}
    for node in chain:
        values[node] = _evaluate(program, node, values)
    found = values.get(result, _GRID)
    if not isinstance(found, Tensor) or found.shape != _GRID.shape:
        return None
    known = {IDENTITY: _GRID, **{name: act(_GRID) for name, act in ACTIVATIONS.items()}}
    scale = 1 + found.abs()
    fits = {name: float(((found - value).abs() / scale).max()) for name, value in known.items()}
    best = min(fits, key=lambda name: fits[name])
    return best if fits[best] <= _CLOSE else None


def _evaluate(program: Program, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    def known(source: fx.Node) -> Any:
        if source in values:
            return values[source]
        if source.op == "get_attr":
            return program.weight(source).double().reshape(())
        return _GRID

    if node.target in _CASTS or not is_pointwise(node):
        return known(node.all_input_nodes[0])
    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    assert callable(node.target), node
    return node.target(*args, **kwargs)
