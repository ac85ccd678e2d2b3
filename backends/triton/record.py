"""The launches of a program: host functions run on fake tensors, and what they launch is noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from resplice.backends.triton.hosts import host_of
from resplice.backends.triton.sizes import guards_of
from resplice.backends.triton.targets import Target
from resplice.errors import LoweringError
from resplice.kernels.cuda.launch import Launch, recording, targeting
from resplice.ops import find_op
from resplice.origin import where
from resplice.program import Program

Json = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """One node whose op has a kernel.

    Attributes:
        node: The node.
        op: Name of the op.
        launches: In order.
        roles: What each tensor argument is, by `_key`: {"role": "input", "value": node name}.
    """

    node: fx.Node
    op: str
    launches: tuple[Launch, ...]
    roles: Mapping[Any, Json]

    def role(self, tensor: Tensor) -> Json:
        """What a tensor argument is: an input, an output, a table of the host's, or temporary."""
        exact = self.roles.get(_key(tensor)) or self.roles.get(_key(tensor)[0])
        if exact is not None:
            return exact
        content = tensor if type(tensor) is Tensor else getattr(tensor, "constant", None)
        if content is None:
            return {"role": "temporary"}
        return {"role": "table", "values": content.flatten().tolist()}


def record(program: Program, target: Target) -> list[Site]:
    """Every node with a kernel, with its launches for a target.

    Raises:
        LoweringError: Lists the nodes whose launches can't be known before the program runs.
    """
    found: list[Site] = []
    problems: list[str] = []
    for node in program.graph.nodes:
        if host_of(node) is None:
            continue
        try:
            found.append(_site(program, node, target))
        except LoweringError as error:
            problems += error.problems
    if problems:
        raise LoweringError("triton", problems, hint="capture the model with fixed sizes")
    return found


def _site(program: Program, node: fx.Node, target: Target) -> Site:
    host, op = host_of(node), find_op(node.target)
    assert host is not None
    assert op is not None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with (
            guards_of(program) as guards, targeting(target.name), program.fake_mode,
            torch.no_grad(), recording() as launches,
        ):  # fmt: skip
            result = host(*args, **kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LoweringError(
            "triton", [f"{op.name} on {target.name}: {reason[0]} ({where(node)})"]
        ) from error
    fixed = [f"{name}={value}" for launch in launches for name, value in _symbolic(launch)]
    if guards or fixed:
        asked = "; ".join(dict.fromkeys([*guards, *fixed]))
        raise LoweringError("triton", [f"{op.name}: its launches rely on {asked} ({where(node)})"])
    return Site(node, op.name, tuple(launches), dict(_roles(node, result)))


def _symbolic(launch: Launch) -> Iterator[tuple[str, Any]]:
    """Compile-time arguments that hang on a dynamic size."""
    kinds = (torch.SymInt, torch.SymBool, torch.SymFloat)
    return ((n, value) for n, value in launch.constants.items() if isinstance(value, kinds))


def _roles(node: fx.Node, result: Any) -> Iterator[tuple[Any, Json]]:
    """Later ones win: results over inputs, and exact matches are asked for first."""
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    pairs: list[tuple[Tensor, Json]] = [(n.meta["val"], _input(n)) for n in inputs]
    results = [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]
    pairs += [(r, {"role": "output", "index": i}) for i, r in enumerate(results)]
    for tensor, role in pairs:
        yield _key(tensor)[0], role
    for tensor, role in pairs:
        yield _key(tensor), role


def _input(node: fx.Node) -> Json:
    weight = {"weight": str(node.target)} if node.op == "get_attr" else {}
    return {"role": "input", "value": node.name, **weight}


def _key(tensor: Tensor) -> tuple[int, str, str, str]:
    """Storage, offset, shape and strides; the storage comes first."""
    storage = tensor.untyped_storage()._cdata
    return storage, str(tensor.storage_offset()), str(tensor.shape), str(tensor.stride())
