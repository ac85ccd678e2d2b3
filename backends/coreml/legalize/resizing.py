"""Interpolation that MIL has no operator for, as products with constant matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from resplice.backends.coreml.builder import CoremlBuilder as Builder
from resplice.backends.coreml.legalize.values import aten, rank, source
from resplice.backends.legal import Legalizer

_SEPARABLE = {
    aten.upsample_bicubic2d.vec: "bicubic", aten.upsample_bicubic2d.default: "bicubic",
    aten._upsample_bicubic2d_aa.vec: "bicubic", aten._upsample_bilinear2d_aa.vec: "bilinear",
    aten.upsample_trilinear3d.vec: "trilinear", aten.upsample_nearest3d.vec: "nearest",
    aten.upsample_linear1d.vec: "linear",
}  # fmt: skip


def resize_by_matrices(build: Builder, node: fx.Node) -> fx.Node | None:
    """upsample(x: [b,c,h,w]) -> A_h x A_w^T with constant matrices, for fixed sizes."""
    if node.target not in _SEPARABLE:
        return None
    x = source(node)
    before, after = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
    if not all(isinstance(size, int) for size in (*before, *after)):
        return None
    for axis in range(2, rank(x)):
        matrix = _matrix(node, axis, list(before))
        if matrix is None:
            continue
        name = f"coreml.{node.name}_{axis}"
        weight = build.constant(name, matrix.to(x.meta["val"].dtype).t().contiguous())
        moved = build(aten.transpose.int, x, axis, -1)
        x = build(aten.transpose.int, build(aten.matmul.default, moved, weight), axis, -1)
    return x if x is not node.args[0] else None


def _matrix(node: fx.Node, axis: int, sizes: list[int]) -> torch.Tensor | None:
    """What the operator does along one axis: its answer to unit vectors, [after, before]."""
    target: Any = node.target
    size = sizes[axis - 2]
    shape = [size, 1, *[s if at != axis - 2 else size for at, s in enumerate(sizes)]]
    probe = torch.zeros(shape, dtype=torch.float64)
    for position in range(size):
        probe[position].select(axis - 1, position).fill_(1.0)
    answer = target(probe, *node.args[1:], **node.kwargs)
    line = answer.movedim(axis, 1).flatten(2)[:, :, 0]
    matrix = line.t().contiguous()
    same = matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(size).double())
    return None if same else matrix


RULES: tuple[Legalizer, ...] = (resize_by_matrices,)
