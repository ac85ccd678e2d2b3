"""Video transformers: angles that grow evenly along one axis of a grid of tokens.

    angle[t, h, w, n] = (offset[a] + index along a) * rate[n]        a = axes[n]

Three sources are read: products of positions and frequencies in the graph; constant tables with one
row per position, whose frequencies are recovered from the table; and tables that are inputs, whose
frequencies are recovered from the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resplice.axes import axes_of
from resplice.passes.videorope.follow import Runner, fresh_labels
from resplice.passes.videorope.maps import AxisMap
from resplice.passes.videorope.sites import (
    Tables,
    by_angle,
    frequencies_of,
    position_index,
    token_axis,
)
from resplice.pattern import NoMatch
from resplice.program import Program

_STILL = 2e-6
"""Angles that change by less along an axis, in radians, do not follow it (tables are float32)."""


@dataclass(frozen=True)
class Lines:
    """Angles of a video transformer in canonical form.

    Attributes:
        rates: Angle per step along its axis, [N]; 0 for an angle that is always 0.
        axes: Axis of each angle, 0 = t, 1 = h, 2 = w.
        offset: Position of the first token on all three axes, in steps; 0 where the axes differ,
            which moves all tokens alike.
        sizes: Sizes T, H, W as the graph has them, ints or symbols.
        computed: Whether the graph computes the angles, at any size.
        dtype: In which angles are to be computed.
    """

    rates: Tensor
    axes: AxisMap
    offset: float
    sizes: tuple[Any, Any, Any]
    computed: bool
    dtype: torch.dtype


def lines_of(program: Program, runner: Runner, tables: Tables) -> Lines:
    """Read the angles of a site as lines over a grid.

    Raises:
        NoMatch: Its tokens are no grid of three axes, or its angles are no lines along one.
    """
    kinds = {node.op for node in tables.origin}
    if not kinds <= {"get_attr"} and not kinds <= {"placeholder"}:
        names = ", ".join(node.name for node in tables.origin)
        raise NoMatch(f"its tables are computed by {names}, not from angles", tables.first.cos)
    if tables.origin:
        tables.token_axis = token_axis(runner, tables.first)
    sizes = _grid(program, runner, tables)
    shape = tuple(runner._size(size) for size in sizes)
    if tables.terms:
        where, factors = _from_products(runner, tables)
    elif kinds == {"get_attr"}:
        where, factors = _from_rows(runner, tables)
    else:
        return _from_values(runner, tables, sizes, shape)
    if where.shape[0] != math.prod(shape):
        raise NoMatch("its angles are not one per token of the video", tables.first.cos)
    return _lines(where.reshape(*shape, -1), factors, sizes, tables.first.cos)


def _grid(program: Program, runner: Runner, tables: Tables) -> tuple[Any, Any, Any]:
    """T, H, W of the tokens that are rotated."""
    root = tables.first.root
    axis = axes_of(program)[root][tables.token_axis]
    if len(axis) != 1 or len(axis[0]) != 3 or any(a.origin == "unknown" for a in axis[0]):
        told = " and ".join(f"axis {a.axis} of {a.source} ({a.size})" for s in axis for a in s)
        raise NoMatch(f"its tokens are {told or 'one'}, not the three axes of a video", root)
    t, h, w = (atom.size for atom in axis[0])
    return t, h, w


def _from_products(runner: Runner, tables: Tables) -> tuple[Tensor, Tensor]:
    """Positions [tokens, N] and frequencies [N]."""
    factors = frequencies_of(runner, tables)
    assert tables.choice is not None
    where = torch.zeros(tables.choice.shape[1:], dtype=torch.float64)
    for term, mask, flat in position_index(runner, tables):
        values = runner.value(term.positions).double().reshape(-1)[flat]
        if (values != values[:1]).any():
            raise NoMatch("its positions differ between batch items", term.positions)
        where[:, mask] = values[0]
    return where, factors


def _from_rows(runner: Runner, tables: Tables) -> tuple[Tensor, Tensor]:
    """Row r of a constant table is position r; frequencies from all of its rows."""
    first, picked = tables.first, list[tuple[Tensor, Tensor, Tensor]]()
    for table in (first.cos, first.sin):
        values = [runner.value(node) for node in tables.origin]
        if any(value.dim() != 2 for value in values):
            raise NoMatch("its constant tables are not [positions, channels]", table)
        start, labels = 1, dict[fx.Node, Tensor]()
        for node, value in zip(tables.origin, values, strict=True):
            labels[node] = fresh_labels(tuple(value.shape), start)
            start += value.numel()
        found = by_angle_first(runner, table, labels, tables)
        owner = next((n for n, own in labels.items() if bool(torch.isin(found, own).all())), None)
        if owner is None:
            raise NoMatch("its tables are joined from several constants", table)
        row, column = torch.unravel_index(found - int(labels[owner].min()), labels[owner].shape)
        picked.append((row, column[0], runner.value(owner)[:, column[0]].double()))
    (rows, _, cos), (sin_rows, _, sin) = picked
    if not torch.equal(rows, sin_rows):
        raise NoMatch("its cosines and sines are of different positions", first.cos)
    factors = slopes(torch.atan2(sin, cos))
    tables.scaling = float(torch.hypot(cos[0], sin[0]).mean().round(decimals=5))
    predicted = torch.outer(torch.arange(len(cos), dtype=torch.float64), factors)
    if float((predicted.cos() * tables.scaling - cos).abs().max()) > 1e-4:
        raise NoMatch("its constant tables are no cosines of evenly spaced angles", first.cos)
    kind = torch.promote_types(torch.float32, runner.value(tables.origin[0]).dtype)
    return rows.double(), factors.to(kind)


def by_angle_first(
    runner: Runner, table: fx.Node, labels: dict[fx.Node, Tensor], tables: Tables
) -> Tensor:
    """[tokens, N] labels of a table; the two channels of a pair may be copies of each other."""
    found = runner.labels(table, labels)
    while found.dim() < len(runner.shape(tables.first.root)):
        found = found.unsqueeze(0)
    flat = found.transpose(1, tables.token_axis).flatten(1, -2)[0]
    angles = runner.shape(tables.first.root)[-1] // 2
    if flat.shape[-1] == angles:
        return flat
    return flat[:, 0::2] if tables.first.pairs else flat[:, :angles]


def slopes(phases: Tensor) -> Tensor:
    """Angle per row of evenly spaced phases, known up to whole turns: float64 [L, N] -> [N].

    The first step gives a rate between -pi and pi; further rows, each twice as far, refine it.
    """
    found, step = _wrapped(phases[1] - phases[0]) if len(phases) > 1 else phases[0] * 0, 2
    while step < len(phases):
        found = found + _wrapped(phases[step] - phases[0] - step * found) / step
        step *= 2
    last = len(phases) - 1
    return found + _wrapped(phases[last] - phases[0] - last * found) / max(last, 1)


def _wrapped(angle: Tensor) -> Tensor:
    turn = 2 * math.pi
    return angle - turn * (angle / turn).round()


def _lines(where: Tensor, factors: Tensor, sizes: Any, at: fx.Node) -> Lines:
    """Positions [T, H, W, N] that grow evenly along one axis each."""
    count = where.shape[-1]
    axes, steps, starts = [0] * count, torch.zeros(count, dtype=torch.float64), [0.0] * count
    for n in range(count):
        if not factors[n]:
            continue
        axes[n], steps[n], first = _line(where[..., n], at)
        starts[n] = first / float(steps[n])
    offsets = {round(starts[n], 6) for n in range(count) if factors[n]}
    offset = offsets.pop() if len(offsets) == 1 else 0.0
    rates = (factors.double() * steps).to(factors.dtype)
    return Lines(rates, tuple(axes), offset, sizes, True, factors.dtype)


def _line(values: Tensor, at: fx.Node) -> tuple[int, float, float]:
    """Axis, step and first value of positions [T, H, W]."""
    moving = [
        axis for axis in range(3)
        if values.shape[axis] > 1 and bool((values.diff(dim=axis).abs() > 1e-9).any())
    ]  # fmt: skip
    if not moving and 1 in values.shape:
        raise NoMatch(
            "an axis of size 1 hides which angles follow it: capture at least 2 of each", at
        )
    if len(moving) != 1:
        raise NoMatch(f"its angles follow {len(moving)} axes at once, not one", at)
    axis = moving[0]
    line = values.movedim(axis, 0).reshape(values.shape[axis], -1)[:, 0]
    step = float(line[-1] - line[0]) / (len(line) - 1)
    even = line[0] + step * torch.arange(len(line), dtype=torch.float64)
    if float((line - even).abs().max()) > 1e-4 * abs(step):
        raise NoMatch("its positions are not evenly spaced", at)
    return axis, step, float(line[0])


def _from_values(runner: Runner, tables: Tables, sizes: Any, shape: tuple[int, ...]) -> Lines:
    """Lines in tables that are inputs, from the values of the sample."""
    first = tables.first
    cos, sin = (
        by_angle(runner, node, runner.value(node), tables)[0].double()
        for node in (first.cos, first.sin)
    )
    if cos.shape[0] != math.prod(shape):
        raise NoMatch("its tables are not one row per token of the video", first.cos)
    tables.scaling = float(torch.hypot(cos, sin).mean().round(decimals=5))
    phases = torch.atan2(sin, cos).reshape(*shape, -1)
    lines = [phases[:, 0, 0], phases[0, :, 0], phases[0, 0, :]]
    rates = torch.stack([slopes(line) for line in lines])  # [3, N]
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij"), -1
    )
    left = _wrapped(phases - phases[0, 0, 0] - grid @ rates)
    extent = torch.tensor([n - 1.0 for n in shape], dtype=torch.float64)[:, None]
    moving = (rates * extent).abs() > _STILL
    if float(left.abs().max()) > 1e-4 or (moving.sum(0) > 1).any():
        raise NoMatch("its tables are not angles that grow along one axis each", first.cos)
    if not moving.any(0).all() and 1 in shape:
        raise NoMatch(
            "an axis of size 1 hides which angles follow it: capture at least 2 of each", first.cos
        )
    axes = tuple(int(a) for a in moving.long().argmax(0))
    kept = rates.gather(0, torch.tensor(axes)[None])[0] * moving.any(0)
    kind = torch.promote_types(torch.float32, runner.value(tables.origin[0]).dtype)
    return Lines(kept.to(kind), axes, 0.0, sizes, False, kind)
