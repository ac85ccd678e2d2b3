"""Sites and their canonical form: which kind, which positions, which axis map.

rows     positions of several rows, [3 or 4, B, S]: M-RoPE of any layout
single   one row of positions, an input or an `arange`: plain RoPE
axial    positions counted in the graph along t, h and w of a video: video transformers
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from resplice.cases import fresh_inputs
from resplice.passes.videorope.axial import Lines, lines_of
from resplice.passes.videorope.follow import Runner, depends_on_inputs, fresh_labels, roots
from resplice.passes.videorope.maps import AxisMap
from resplice.passes.videorope.sites import (
    Tables,
    Term,
    find_tables,
    frequencies_of,
    position_index,
)
from resplice.pattern import NoMatch
from resplice.program import Program


@dataclass(frozen=True)
class RotarySite:
    """One rotary site.

    Attributes:
        kind: See the top of this file.
        tables: Its tables and rotations.
        inv_freq: Angle per position, float32 or float64 [N].
        before: Row per angle, 0 = t, 1 = h, 2 = w.
        source: The positions: [R, B or 1, S] (`rows`), or any shape with one value per token.
        rows: Rows of `source` that hold t, h and w (`rows`).
        lines: Grid and offsets (`axial`).
    """

    kind: Literal["rows", "single", "axial"]
    tables: Tables
    inv_freq: Tensor
    before: AxisMap
    source: fx.Node | None = None
    rows: tuple[int, ...] = (0, 1, 2)
    lines: Lines | None = None

    @property
    def node(self) -> fx.Node:
        """The node that stands for the site in reports: its cosines."""
        return self.tables.key[0]


@dataclass
class Sites:
    """What `find_sites` found.

    Attributes:
        found: Sites in graph order.
        refused: Other rotations, each with the reason.
    """

    found: list[RotarySite] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


def find_sites(program: Program) -> Sites:
    """Every rotary site of a program in normal form (`canonicalize`)."""
    runner, result = Runner(program, program.samples), Sites()
    for tables in find_tables(program, runner):
        try:
            result.found.append(_site(program, runner, tables))
        except NoMatch as miss:
            result.refused.append((tables.first.root, miss.reason))
    result.found.sort(key=lambda site: site.tables.first.root)
    return result


def _site(program: Program, runner: Runner, tables: Tables) -> RotarySite:
    if not tables.terms and not tables.origin:
        raise NoMatch(tables.reason, tables.first.root)
    if any(depends_on_inputs(term.positions) for term in tables.terms):
        return _batched(_language(runner, tables))
    if tables.terms and _one_count(tables):
        try:
            return _batched(_language(runner, tables))
        except NoMatch:  # several axes of a grid may share one count
            pass
    lines = lines_of(program, runner, tables)
    _same_at_another_size(program, tables, lines)
    return RotarySite("axial", tables, lines.rates, lines.axes, lines=lines)


def _same_at_another_size(program: Program, tables: Tables, lines: Lines) -> None:
    """Frequencies that depend on the size of the video are none."""
    if not program.dims or not lines.computed:
        return
    other = Runner(program, fresh_inputs(program, seed=1, second_size=True))
    again = next((t for t in find_tables(program, other) if t.key == tables.key), None)
    found = lines_of(program, other, again) if again is not None else None
    scale = lines.rates.abs().clamp_min(1e-6)
    if (
        found is None
        or found.axes != lines.axes
        or bool(((found.rates - lines.rates).abs() > 1e-3 * scale).any())
    ):
        raise NoMatch("its frequencies change with the size of the video", tables.first.cos)


# ---- language models -------------------------------------------------------------------------


def _one_count(tables: Tables) -> bool:
    """Whether all positions come from one value of one or two axes, such as an `arange`."""
    found = {node for term in tables.terms for node in roots(term.positions, lambda _: False)}
    return len(found) == 1 and next(iter(found)).meta["val"].dim() <= 2


def _batched(site: RotarySite) -> RotarySite:
    """The site, if what it rotates has a batch axis before its tokens."""
    root = site.tables.first.root
    if -site.tables.token_axis >= root.meta["val"].dim():
        raise NoMatch("what it rotates has no batch axis before its tokens", root)
    return site


def _language(runner: Runner, tables: Tables) -> RotarySite:
    source = _source(tables)
    assert tables.choice is not None
    shape = runner.shape(source)
    index = torch.zeros((*tables.choice.shape, len(shape)), dtype=torch.int64)
    before = torch.zeros(tables.choice.shape[-1], dtype=torch.int64)
    for term, mask, flat in position_index(runner, tables):
        labels = runner.labels(term.positions, {source: fresh_labels(shape)})
        own = labels.reshape(-1)[flat] - 1
        index[:, :, mask] = torch.stack(torch.unravel_index(own, shape), -1)
        before[mask] = _expanded_row(runner, term, flat)
    if len(shape) == 3 and shape[0] > 1:
        return _rows_site(runner, tables, source, index)
    if not _counts_tokens(index, shape):
        raise NoMatch(_not_one_row(index), source)
    axis_map = tuple(int(row) for row in before)
    return RotarySite("single", tables, frequencies_of(runner, tables), axis_map, source)


def _source(tables: Tables) -> fx.Node:
    found = {node for term in tables.terms for node in roots(term.positions, lambda _: False)}
    if len(found) != 1:
        names = ", ".join(sorted(node.name for node in found))
        raise NoMatch(f"its positions come from several places ({names})", tables.first.cos)
    return found.pop()


def _rows_site(runner: Runner, tables: Tables, source: fx.Node, index: Tensor) -> RotarySite:
    """Positions [R, B, S]: which row each angle follows, in order t, h, w."""
    count = runner.shape(source)[0]
    row = index[:1, :1, :, 0]
    if (index[..., 0] != row).any() or not _counts_tokens(index[..., 1:], runner.shape(source)[1:]):
        raise NoMatch("its positions are not one per row, batch item and token", source)
    if count not in (3, 4):
        raise NoMatch(_rows_reason(count), source)
    rows = (0, 1, 2) if count == 3 else (1, 2, 3)
    picked = [int(r) for r in row.flatten()]
    if not set(picked) <= set(rows):
        raise NoMatch(f"its angles follow row {min(picked)} of four, the row of plain text", source)
    before = tuple(rows.index(r) for r in picked)
    inv_freq = frequencies_of(runner, tables)
    return RotarySite("rows", tables, inv_freq, before, source, rows)


def _counts_tokens(index: Tensor, shape: Any) -> bool:
    """Whether element [b, s] belongs to item b and token s (or there is one item for all)."""
    batch, tokens = index.shape[:2]
    ok = bool((index[..., -1] == torch.arange(tokens)[None, :, None]).all())
    if len(shape) == 1:
        return ok and shape[0] == tokens
    lead = index[..., -2]
    items = torch.arange(batch)[:, None, None]
    return ok and shape[-1] == tokens and bool(((lead == items) | (shape[-2] == 1)).all())


def _not_one_row(index: Tensor) -> str:
    varying = [a for a in range(index.shape[-1]) if (index[..., a] != index[..., :1, a]).any()]
    if len(varying) == 1:
        return _rows_reason(int(index[..., varying[0]].unique().numel()))
    return "its positions are not one per batch item and token"


def _rows_reason(count: int) -> str:
    if count == 2:
        return (
            "its positions have two rows, the height and width of an image (a vision tower); "
            "VideoRoPE needs t, h and w"
        )
    return f"its positions have {count} rows, not t, h and w"


def _expanded_row(runner: Runner, term: Term, flat: Tensor) -> Tensor:
    """The row an angle would follow, where one row of positions was spread to three."""
    shape = runner.shape(term.positions)
    lead = torch.unravel_index(flat[0, 0], shape)[0]
    return lead if len(shape) == 4 and shape[0] == 3 else torch.zeros_like(lead)
