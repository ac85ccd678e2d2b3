"""Positions of a video that are counted in the graph: [3, 1, T*H*W], at any size.

t' = delta t      h' = t' + h - (H-1)//2      w' = t' + w - (W-1)//2        (diagonal layout)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.dims import expression
from resplice.passes.videorope.axial import Lines
from resplice.passes.videorope.positions import Semantics, block_positions

aten = torch.ops.aten


def grid_positions(build: Builder, lines: Lines, meaning: Semantics) -> fx.Node:
    """Insert the positions of a site's tokens: a constant where the grid is fixed.

    Args:
        build: Inserts before the site's first rotation.
        lines: The site's grid and offset.
        meaning: Which positions.
    """
    if all(isinstance(size, int) for size in lines.sizes):
        found, _ = block_positions(lines.sizes, 0.0, meaning)
        value = torch.from_numpy(found + lines.offset).to(lines.dtype)
        name = "_".join(map(str, lines.sizes))
        return build.constant(f"videorope.positions_{name}", value[:, None].contiguous())
    sizes = [_size(build, size) for size in lines.sizes]
    t, h, w = (_axis(build, size, place, lines) for place, size in enumerate(sizes))
    if meaning.scheme == "videorope" and meaning.delta != 1.0:
        t = build(aten.mul.Tensor, t, meaning.delta)
    if meaning.scheme == "videorope" and meaning.dl:
        h, w = (build(aten.add.Tensor, t, _centred(build, x, meaning)) for x in (h, w))
    whole = [build(aten.expand.default, x, sizes) for x in (t, h, w)]
    count = build(operator.mul, build(operator.mul, sizes[0], sizes[1]), sizes[2])
    stacked = build(aten.stack.default, whole)
    rows = build.reshape(stacked, [3, 1, count])
    return rows if lines.offset == 0 else build(aten.add.Tensor, rows, lines.offset)


def _axis(build: Builder, size: Any, place: int, lines: Lines) -> fx.Node:
    """0 .. size-1 along one of three axes."""
    line = build(aten.arange.default, size, dtype=lines.dtype, device=torch.device("cpu"))
    shape = [1, 1, 1]
    shape[place] = size
    return build.reshape(line, shape)


def _centred(build: Builder, line: fx.Node, meaning: Semantics) -> fx.Node:
    """Less the middle: (size-1)//2, or size/2 with the paper's centre."""
    middle = build(aten.mean.dim, line, [-3, -2, -1], True)
    if meaning.centre == "paper":
        return build(aten.sub.Tensor, build(aten.sub.Tensor, line, middle), 0.5)
    return build(aten.sub.Tensor, line, build(aten.floor.default, middle))


def _size(build: Builder, size: Any) -> Any:
    """A size as an int, or a node: of an input where it is one, else of any earlier value."""
    if isinstance(size, int):
        return size
    wanted = expression(size)
    nodes = [*build.program.placeholders, *build.program.graph.nodes]
    for node in nodes:
        value = node.meta.get("val")
        if node is build.before:
            break
        if not isinstance(value, torch.Tensor):
            continue
        for axis, own in enumerate(value.shape):
            if expression(own) == wanted:
                return build.size(node, axis)
    raise AssertionError(size)  # the grid was read from a value of this graph
