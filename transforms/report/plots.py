"""Plots as inline SVG whose colours come from the page, so that they fit light and dark."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Placeholder colours: `_themed` swaps them for the page's CSS variables.
_INK, _LINE = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304")
_THEME = {_INK: "currentColor", _LINE: "var(--line)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(_SERIES, 1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}
_MARKERS = "osD^v"
_UNUSED = re.compile(r' id="(?:\w+|matplotlib\.axis)_\d+"')
_SPACES = re.compile(r' xmlns(?::xlink)?="[^"]*"')
_HEADER = re.compile(r"\s*<metadata>.*?</metadata>|\s*<defs>\s*<style.*?</defs>", re.DOTALL)
_FONT = re.compile(r" ?font-family: [^;\"]*;")
_LAYER = re.compile(r"(?:^|\.)([A-Za-z_]\w*\.\d+)(?:\.|$)")
_MOST_LABELS, _MOST_DOTS, _CHARACTERS = 12, 3000, 80


@dataclass(frozen=True)
class Point:
    """A node in the plot of errors: None where the value is identical or not finite."""

    module: str
    rewritten_by: str
    sqnr_db: float | None


@dataclass(frozen=True)
class Bar:
    """One bar, and what is written at its end; bars of one group have one colour."""

    label: str
    value: float
    text: str
    group: str = ""


@dataclass(frozen=True)
class Pair:
    """A figure before and after."""

    label: str
    before: Bar
    after: Bar


@dataclass(frozen=True)
class Dot:
    """One value, with its place on the horizontal axis; dots of one group look alike."""

    place: float
    value: float
    group: str


def errors(points: Sequence[Point]) -> str:
    """SQNR along the graph, rewritten nodes marked by pass."""
    return _svg(lambda axes: _errors(axes, points), "Error along the graph", 3.6)


def weights(measured: Sequence[float], theory: Sequence[float | None]) -> str:
    """SQNR of each site's weights, and what theory expects."""
    return _svg(lambda axes: _weights(axes, measured, theory), "Error of the weights", 3.2)


def curves(before: Sequence[float], after: Sequence[float], axis: str) -> str:
    """Two curves over the same steps, one before and one after a rewrite."""
    return _svg(lambda axes: _curves(axes, before, after, axis), axis, 3.0)


def pairs(rows: Sequence[Pair]) -> str:
    """Figures after the passes as a share of those before."""
    return _svg(lambda axes: _pairs(axes, rows), "Size and cost", 0.9 + 0.62 * len(rows))


def bars(rows: Sequence[Bar], axis: str) -> str:
    """Horizontal bars from zero."""
    return _svg(lambda axes: _bars(axes, rows, axis), axis, 0.8 + 0.36 * len(rows))


def dots(points: Sequence[Dot], across: str, up: str) -> str:
    """Values on a logarithmic axis, by group; values of zero are left out."""
    return _svg(lambda axes: _dots(axes, points, across, up), up, 3.6)


def shares(rows: Mapping[str, Mapping[str, float]], axis: str) -> str:
    """Horizontal bars made of parts: row -> part -> size."""
    return _svg(lambda axes: _shares(axes, rows, axis), axis, 1.1 + 0.3 * len(rows))


def _errors(axes: Axes, points: Sequence[Point]) -> None:
    values = [_or_gap(point.sqnr_db) for point in points]
    dots = "." if len(points) <= _MOST_DOTS else ""
    axes.plot(
        range(len(points)), values, dots + "-", color=_INK, alpha=0.45, linewidth=0.8,
        markersize=2.5, label="every compared node",
    )  # fmt: skip
    names = dict.fromkeys(point.rewritten_by for point in points if point.rewritten_by)
    for number, name in enumerate(names):
        chosen = [i for i, point in enumerate(points) if point.rewritten_by == name]
        axes.plot(
            chosen, [values[i] for i in chosen], "o", color=_SERIES[number % len(_SERIES)],
            markersize=3.5, label=f"rewritten by {_short(name)}",
        )  # fmt: skip
    ticks = _layers(points)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    if sum(len(name) for _, name in ticks) > _CHARACTERS:
        axes.tick_params("x", labelrotation=30)
    axes.set_xlim(-0.01 * len(points), 1.01 * len(points))
    axes.set_ylabel("SQNR (dB), higher is better")
    axes.figure.legend(loc="outside upper left", ncols=3)


def _weights(axes: Axes, measured: Sequence[float], theory: Sequence[float | None]) -> None:
    if any(value is not None for value in theory):
        axes.plot(
            range(len(theory)), [_or_gap(v) for v in theory], "--", color=_SERIES[1],
            drawstyle="steps-mid", label="theory for Gaussian weights",
        )  # fmt: skip
    axes.plot(range(len(measured)), measured, "o", color=_SERIES[0], markersize=3, label="measured")
    axes.set_xlabel("site, in graph order")
    axes.set_ylabel("weight SQNR (dB)")
    axes.figure.legend(loc="outside upper left", ncols=2)


def _curves(axes: Axes, before: Sequence[float], after: Sequence[float], axis: str) -> None:
    for values, colour, name in ((before, _SERIES[3], "before"), (after, _SERIES[0], "after")):
        axes.plot(range(len(values)), values, color=colour, linewidth=1.2, label=name)
    axes.set_xlabel("distance in frames")
    axes.set_ylabel(_short(axis, 80))
    axes.figure.legend(loc="outside upper left", ncols=2)


def _pairs(axes: Axes, rows: Sequence[Pair]) -> None:
    for shift, colour, name in ((-0.19, _SERIES[3], "before"), (0.19, _SERIES[0], "after")):
        found = [row.before if name == "before" else row.after for row in rows]
        shares = [100 * bar.value / row.before.value for bar, row in zip(found, rows, strict=True)]
        drawn = axes.barh(
            [place + shift for place in range(len(rows))], shares, 0.36, color=colour, label=name
        )
        axes.bar_label(drawn, [bar.text for bar in found], padding=4, fontsize=9)
    _horizontal(axes, [row.label for row in rows], "per cent of the captured model")
    axes.figure.legend(loc="outside upper left", ncols=2)


def _bars(axes: Axes, rows: Sequence[Bar], axis: str) -> None:
    groups = list(dict.fromkeys(row.group for row in rows))
    colours = [_SERIES[groups.index(row.group) % len(_SERIES)] for row in rows]
    drawn = axes.barh(range(len(rows)), [row.value for row in rows], 0.62, color=colours)
    axes.bar_label(drawn, [row.text for row in rows], padding=4, fontsize=9)
    _horizontal(axes, [row.label for row in rows], axis)


def _dots(axes: Axes, points: Sequence[Dot], across: str, up: str) -> None:
    for number, group in enumerate(dict.fromkeys(point.group for point in points)):
        chosen = [point for point in points if point.group == group and point.value > 0]
        axes.plot(
            [point.place for point in chosen], [point.value for point in chosen],
            _MARKERS[number // len(_SERIES) % len(_MARKERS)],
            color=_SERIES[number % len(_SERIES)], markersize=4, label=_short(group),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.legend(loc="outside upper left", ncols=6)


def _shares(axes: Axes, rows: Mapping[str, Mapping[str, float]], axis: str) -> None:
    parts = dict.fromkeys(part for row in rows.values() for part in row)
    starts = [0.0] * len(rows)
    for number, part in enumerate(parts):
        sizes = [row.get(part, 0.0) for row in rows.values()]
        axes.barh(
            range(len(rows)), sizes, 0.7, starts, color=_SERIES[number % len(_SERIES)],
            alpha=1 / (1 + number // len(_SERIES)), label=_short(part),
        )  # fmt: skip
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    _horizontal(axes, list(rows), axis)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.legend(loc="outside upper left", ncols=6)


def _horizontal(axes: Axes, labels: Sequence[str], axis: str) -> None:
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(_short(axis, 80))


def _layers(points: Sequence[Point]) -> list[tuple[int, str]]:
    """Where each numbered block (`layers.3`) starts, thinned to a readable number."""
    first: dict[str, int] = {}
    for place, point in enumerate(points):
        if found := _LAYER.search(point.module):
            first.setdefault(found[1], place)
    starts = [(place, _short(name, 20)) for name, place in first.items()]
    return starts[:: max(1, -(-len(starts) // _MOST_LABELS))]


def _or_gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(text: str, longest: int = 44) -> str:
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _svg(paint: Callable[[Axes], None], title: str, height: float) -> str:
    with warnings.catch_warnings(), mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks; browsers have them
        figure = Figure(figsize=(9, height), layout="constrained")
        paint(figure.add_subplot())
        target = StringIO()
        figure.savefig(target, format="svg", transparent=True)
    return _themed(target.getvalue(), title)


def _themed(svg: str, title: str) -> str:
    """Fit for a page: no prolog, addresses or unused ids; the page's colours and font."""
    svg = _HEADER.sub("", svg[svg.index("<svg") :], count=2)
    svg = _FONT.sub("", _UNUSED.sub("", _SPACES.sub("", svg)))
    for placeholder, colour in _THEME.items():
        svg = svg.replace(placeholder, colour)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
