"""Builder: inserts nodes with values and provenance filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from resplice import weights
from resplice.infer import fake_of, infer_node
from resplice.origin import inherit
from resplice.program import Program


class Builder:
    """Inserts nodes before one node; each inherits that node's provenance.

    `build(torch.ops.aten.add.Tensor, x, y)` adds a call; `build.weight(name, tensor)` a constant.
    """

    def __init__(
        self, program: Program, before: fx.Node, made_by: str = "", of: fx.Node | None = None
    ) -> None:
        """Build into `program`, right before `before`, for what `of` (by default it) computed."""
        self.program, self.before, self.made_by = program, before, made_by
        self.of = before if of is None else of
        self.made: list[fx.Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of an operator overload or a function such as `operator.getitem`."""
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.call_function(target, args, kwargs)
        return self._finish(node)

    def weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Register a tensor and insert the node that reads it; a taken name gets a number."""
        if hasattr(nn.Module, name.rpartition(".")[2]):
            name += "_value"  # modules have an attribute of that name, such as `to` or `half`
        unique, count = name, 1
        while weights.has(self.program.module, unique):
            if weights.key(self.program.weight(unique)) == weights.key(tensor):
                break
            unique, count = f"{name}_{count}", count + 1
        else:
            weights.put(self.program.module, unique, tensor)
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.get_attr(unique)
        node.meta["val"] = fake_of(self.program.fake_mode, tensor)
        return self._finish(node)

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Like `weight`, but an equal tensor already stored under that name is used again."""
        root = self.program.module
        if weights.has(root, name) and torch.equal(weights.get(root, name), tensor):
            tensor = weights.get(root, name)
        return self.weight(name, tensor)

    def size(self, node: fx.Node, axis: int) -> fx.Node | int:
        """A size of a value: an int where static, a `sym_size` node where dynamic."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        return self.shared(torch.ops.aten.sym_size.int, node, axis)

    def sizes(self, node: fx.Node) -> list[fx.Node | int]:
        """All sizes of a value."""
        return [self.size(node, axis) for axis in range(node.meta["val"].dim())]

    def shared(self, target: Any, *args: Any) -> fx.Node:
        """Like calling the builder, but an equal node that stands earlier is used again."""
        first = next(node for node in _flat(args) if isinstance(node, fx.Node))
        for user in first.users:
            if user.target is target and _plain(user.args) == _plain(args) and user < self.before:
                return user
        return self(target, *args)

    def reshape(self, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """`aten.reshape`."""
        return self(torch.ops.aten.reshape.default, node, list(sizes))

    def several(self, values: Sequence[fx.Node]) -> fx.Node:
        """Give one value per result to the readers of a node with several results.

        Returns:
            A node for `replace_node`, which then finds no reader left.
        """
        for user in list(self.before.users):
            user.replace_all_uses_with(values[int(user.args[1])])  # type: ignore[arg-type]  # getitem
            self.program.graph.erase_node(user)
        return values[-1]

    def _finish(self, node: fx.Node) -> fx.Node:
        infer_node(self.program, node)
        inherit(node, self.of, self.made_by)
        self.made.append(node)
        return node


def _plain(value: Any) -> Any:
    """Comparable arguments: lists as tuples, reads of a weight by its name."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    read = isinstance(value, fx.Node) and value.op == "get_attr"
    return ("weight", str(value.target)) if read else value


def _flat(values: Sequence[Any]) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list | tuple) else (value,))]
