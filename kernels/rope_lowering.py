"""rope3d in ATen operators: tables shared by all layers, a rotation per layer.

    positions -> float32 -> gather of rows -> times inv_freq -> cos, sin        once per model
    x         -> x cos + turned(x) sin                                          per call

Both backends have every operator here; Core ML keeps what leads to a cosine in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten


def lower(
    build: Any, x: Any, positions: Any, inv_freq: Any, axis_map: Sequence[int],
    scaling: float = 1.0, pairs: bool = False, token_axis: int = -2,
) -> Any:  # fmt: skip
    """Replace one rope3d; a table that an earlier call made is used again."""
    kind = x.meta["val"].dtype
    angles = _angles(build, positions, inv_freq, axis_map)
    tables = []
    for function in (aten.cos.default, aten.sin.default):
        table = build.shared(function, angles)
        table = table if scaling == 1.0 else build.shared(aten.mul.Tensor, table, scaling)
        tables.append(_placed(build, _cast(build, table, kind), x, pairs, token_axis))
    kept = build(aten.mul.Tensor, x, tables[0])
    other = build(aten.mul.Tensor, _turned(build, x, pairs), tables[1])
    return build(aten.add.Tensor, kept, other)


def _angles(build: Any, positions: Any, inv_freq: Any, axis_map: Sequence[int]) -> Any:
    """[batch, tokens, N] in the dtype of `inv_freq`."""
    value = _cast(build, positions, inv_freq.meta["val"].dtype)
    rows = build.constant(f"rope3d.rows_{_name(axis_map)}", torch.tensor(list(axis_map)))
    chosen = build.shared(aten.index_select.default, value, 0, rows)
    ordered = build.shared(aten.permute.default, chosen, [1, 2, 0])
    return build.shared(aten.mul.Tensor, ordered, inv_freq)


def _placed(build: Any, table: Any, x: Any, pairs: bool, token_axis: int) -> Any:
    """The table for both channels of each pair, with axes of size 1 where x has its heads."""
    if pairs:
        table = build.shared(aten.repeat_interleave.self_int, table, 2, -1)
    else:
        table = build.shared(aten.cat.default, [table, table], -1)
    for _ in range(-2 - token_axis):
        table = build.shared(aten.unsqueeze.default, table, -2)
    while table.meta["val"].dim() < x.meta["val"].dim():
        table = build.shared(aten.unsqueeze.default, table, 1)
    return table


def _turned(build: Any, x: Any, pairs: bool) -> Any:
    if not pairs:
        size = int(x.meta["val"].shape[-1]) // 2
        low = build(aten.slice.Tensor, x, -1, 0, size)
        high = build(aten.slice.Tensor, x, -1, size, 2 * size)
        return build(aten.cat.default, [build(aten.neg.default, high), low], -1)
    sizes = build.sizes(x)
    split = build.reshape(x, [*sizes[:-1], sizes[-1] // 2, 2])
    low, high = (build(aten.slice.Tensor, split, -1, i, i + 1) for i in (0, 1))
    joined = build(aten.cat.default, [build(aten.neg.default, high), low], -1)
    return build.reshape(joined, sizes)


def _cast(build: Any, node: Any, dtype: torch.dtype) -> Any:
    same = node.meta["val"].dtype == dtype
    return node if same else build.shared(aten.to.dtype, node, dtype)


def _name(axis_map: Sequence[int]) -> str:
    return "".join(map(str, axis_map))
