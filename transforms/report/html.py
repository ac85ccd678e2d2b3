"""Turns the JSON of a report into one self-contained page.

Every part of the JSON may be missing or None; the template says in words what is absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import ChainableUndefined, DictLoader, Environment
from markupsafe import Markup

from resplice.report import graphs, plots
from resplice.report.kernels import LABEL, kernel_table, site_table

Json = dict[str, Any]

MOST_PICTURES, MOST_ROWS, MOST_NAMED, MOST_BARS, WORST = 16, 1000, 200, 30, 20
_TEMPLATE = "report.html.j2"
_SIZES = {
    "weight_bytes": "Weights",
    "bytes_moved": "Bytes moved",
    "flops": "FLOPs",
    "nodes": "Graph nodes",
}
_TIMES = "\u00d7"
_BINARY, _DECIMAL = (
    ("B", "KiB", "MiB", "GiB", "TiB"),
    ("", "\u00a0k", "\u00a0M", "\u00a0G", "\u00a0T"),
)


def render(data: Json) -> str:
    """Draw a report.

    Args:
        data: The JSON of a report, as `Report.to_json` gives it.

    Returns:
        A complete HTML page that loads nothing: styles, plots and pictures are inside.
    """
    text = files("resplice.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=DictLoader({_TEMPLATE: text}),
    )  # fmt: skip
    environment.filters.update(
        size=size_text, amount=amount_text, figure=figure_text, error=error_text,
        metric=metric_text, dicts=dicts, strings=strings,
    )  # fmt: skip
    return environment.get_template(_TEMPLATE).render(**_page(data))


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of its own that looks like a report.

    Args:
        title: Its heading.
        lead: A sentence below it.
        sections: Headings and what is below them, as HTML.
    """
    text = files("resplice.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    body = Markup("\n").join(
        Markup("<section><h2>{}</h2>{}</section>").format(name, Markup(html))
        for name, html in sections
    )
    head = Markup(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><style>{}</style>'
        "</head><body><header><h1>{}</h1><p>{}</p></header><main>{}</main></body></html>\n"
    )
    return str(head.format(title, Markup(style), title, lead, body))


def figure(svg: str, note: str) -> str:
    """A plot with what it shows below it, as HTML."""
    shown = Markup('<figure><div class="wide">{}</div><figcaption>{}</figcaption></figure>')
    return str(shown.format(Markup(svg), note))


def rows_of(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, as HTML."""
    line = Markup("<tr>{}</tr>")
    head = line.format(Markup("").join(Markup("<th>{}</th>").format(cell) for cell in header))
    body = [
        line.format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
        for row in rows
    ]
    whole = Markup('<div class="wide"><table><thead>{}</thead><tbody>{}</tbody></table></div>')
    return str(whole.format(head, Markup("").join(body)))


# Reading: whatever is not of the expected kind counts as absent.


def mapping(value: Any) -> Json:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def dicts(value: Any) -> list[Json]:
    """The objects in a JSON list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def strings(value: Any) -> list[str]:
    """The items of a JSON list as text."""
    return [str(item) for item in value] if isinstance(value, list) else []


def real(value: Any) -> float | None:
    """A finite number, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return value if usable and math.isfinite(value) else None


# Text of numbers.


def size_text(value: Any) -> str:
    """`305.3 KiB`, on one line."""
    return _scaled(value, 1024, _BINARY, "\u00a0")


def amount_text(value: Any) -> str:
    """`2.05 M`."""
    return _scaled(value, 1000, _DECIMAL, "")


def figure_text(value: Any) -> str:
    """Four digits, or the number as it is if it is whole and short."""
    number = real(value)
    if number is None:
        return "—" if value is None else str(value)
    if isinstance(number, int) and abs(number) < 10**6:
        return str(number)
    return f"{number:,.0f}" if 10**4 <= abs(number) < 10**9 else f"{number:.4g}"


def error_text(difference: Any) -> str:
    """The SQNR of a difference, or the reason why it has none."""
    found = mapping(difference)
    if not found:
        return "not measured"
    if found.get("finite") is False:
        return "not finite"
    if (sqnr := real(found.get("sqnr_db"))) is not None:
        return f"{sqnr:.1f} dB"
    return "identical" if not real(found.get("max_abs")) else "reference is zero"


def metric_text(value: Any, name: str) -> str:
    """A site's metric, by what its name says it is."""
    if name.endswith("_db"):
        number = real(value)
        return "identical" if number is None else f"{number:.2f} dB"
    return size_text(value) if name.startswith("bytes") else figure_text(value)


def _scaled(value: Any, base: int, units: Sequence[str], space: str) -> str:
    number = real(value)
    if number is None:
        return "not recorded"
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return (
        f"{number:.{2 if power and abs(number) < 10 else 1 if power else 0}f}{space}{units[power]}"
    )


def _ratio(before: Any, after: Any) -> str:
    old, new = real(before), real(after)
    if not old or not new or old < 0 or new < 0:
        return ""
    if old == new:
        return "unchanged"
    return f"{old / new:.2f}{_TIMES} less" if new < old else f"{new / old:.2f}{_TIMES} more"


# Parts of the page.


@dataclass(frozen=True)
class Found:
    """A site or a refusal, with the pass (`quest #2`) and the function where it was found."""

    step: str
    function: str
    item: Json

    @property
    def place(self) -> Json:
        """Module and source line."""
        return mapping(self.item.get("origin"))

    @property
    def label(self) -> str:
        """`linear_3 in layers.0.mlp (model.py:12)`."""
        source = self.place.get("source")
        return f"{self.item.get('node', '')} in {self.place.get('module') or 'model'}" + (
            f" ({source})" if source else ""
        )


def _page(data: Json) -> Json:
    steps = dicts(data.get("steps"))
    sites, refusals = _found(steps, "sites"), _found(steps, "refusals")
    checked = [step for step in steps if mapping(step.get("ledger"))]
    ledger = mapping(checked[-1]["ledger"]) if checked else {}
    nodes = dicts(ledger.get("nodes"))
    return {
        "data": data,
        "sizes": _sizes(data),
        "cards": _cards(data, sites, refusals, ledger),
        "size_plot": _size_plot(data),
        "steps": [_step(step) for step in steps],
        "measurements": _measurements(data),
        "artifacts": [_artifact(item) for item in dicts(data.get("artifacts"))],
        "computed": LABEL,
        "ledger": ledger,
        "outputs": mapping(ledger.get("outputs")),
        "unchecked": strings([s.get("pass") for s in _after(steps, checked)]),
        "nodes": nodes,
        "node_counts": _node_counts(nodes),
        "error_plot": _error_plot(nodes),
        "worst": sorted(filter(_differs, nodes), key=_badness)[:WORST],
        "weight_plot": _weight_plot(sites),
        "bands": list(_bands(sites)),
        "pictures": _pictures(sites),
        "sites": _site_tables(sites),
        "refusals": _refusals(refusals),
        "rules": list(_rules(steps)),
        "limits": {"rows": MOST_ROWS, "pictures": MOST_PICTURES, "named": MOST_NAMED},
    }


def _after(steps: Sequence[Json], checked: Sequence[Json]) -> Sequence[Json]:
    return steps[steps.index(checked[-1]) + 1 :] if checked else steps


def _changes(step: Json) -> list[Json]:
    return dicts(step.get("changes"))


def _found(steps: Iterable[Json], key: str) -> list[Found]:
    return [
        Found(_title(step, number), str(change.get("function") or "main"), item)
        for number, step in enumerate(steps, 1)
        for change in _changes(step)
        for item in dicts(change.get(key))
    ]


def _title(step: Json, number: int) -> str:
    """The name without options, and the place in the table of passes."""
    return f"{str(step.get('pass') or 'unnamed').split('{')[0]} #{number}"


def _sizes(data: Json) -> list[Json]:
    before, after = mapping(data.get("before")), mapping(data.get("after"))
    shown = [*_SIZES.items(), ("parameters", "Elements in weights")]
    rows = []
    for key, label in shown:
        old, new = before.get(key), after.get(key)
        text = size_text if "bytes" in key else amount_text
        rows.append(
            {"label": label, "before": text(old), "after": text(new), "ratio": _ratio(old, new)}
        )
    return rows


def _cards(
    data: Json, sites: Sequence[Found], refusals: Sequence[Found], ledger: Json
) -> list[tuple[str, str, str]]:
    cards = [(r["label"], f"{r['before']} → {r['after']}", r["ratio"]) for r in _sizes(data)[:3]]
    worst = _worst_output(ledger)
    absolute = [real(mapping(d).get("max_abs")) for d in mapping(ledger.get("outputs")).values()]
    largest = max((value for value in absolute if value is not None), default=None)
    after = f"after {ledger['after']}" if ledger.get("after") else "no pass was checked"
    return [
        *cards,
        ("Rewritten sites", str(len(sites)), "places in the graph"),
        ("Refusals", str(len(refusals)), "left alone, with reasons"),
        ("End-to-end SQNR", error_text(worst), after),
        ("Max abs error", "not measured" if largest is None else figure_text(largest), after),
    ]


def _worst_output(ledger: Json) -> Json:
    outputs = [mapping(item) for item in mapping(ledger.get("outputs")).values()]
    return min(outputs, key=_badness, default={})


def _badness(entry: Json) -> tuple[int, float]:
    """Sorts the worst first; where the reference is zero a ratio says little."""
    sqnr = real(entry.get("sqnr_db"))
    if entry.get("finite") is False:
        return 0, 0.0
    return (1, sqnr) if sqnr is not None else (2, -(real(entry.get("max_abs")) or 0.0))


def _differs(entry: Json) -> bool:
    return error_text(entry) != "identical"


def _step(step: Json) -> Json:
    changes, ledger = _changes(step), mapping(step.get("ledger"))
    counts = {str(c.get("function") or "main"): len(dicts(c.get("sites"))) for c in changes}
    return {
        "pass": step.get("pass"),
        "meaning": step.get("meaning"),
        "sites": sum(counts.values()),
        "per_function": ", ".join(f"{name}\u00a0{n}" for name, n in counts.items())
        if len(counts) > 1
        else "",
        "refusals": sum(len(dicts(change.get("refusals"))) for change in changes),
        "seconds": step.get("seconds"),
        "notes": [
            f"{change.get('function') or 'main'}: {note}" if len(counts) > 1 else note
            for change in changes
            for note in strings(change.get("notes"))
        ],
        "error": _worst_output(ledger),
    }


def _node_counts(nodes: Sequence[Json]) -> dict[str, int]:
    texts = [error_text(node) for node in nodes]
    named = ("identical", "not finite", "reference is zero")
    return {name: texts.count(name) for name in named if name in texts}


def _measurements(data: Json) -> list[Json]:
    items = dicts(data.get("measurements"))
    names = dict.fromkeys((str(m.get("name")), str(m.get("unit") or "")) for m in items)
    groups = []
    for name, unit in names:
        rows = [m for m in items if (str(m.get("name")), str(m.get("unit") or "")) == (name, unit)]
        first = real(rows[0].get("value"))
        shown = [_measurement(row, unit, first) for row in rows]
        groups.append(
            {"name": name, "unit": unit, "rows": shown, "plot": _bar_plot(shown, name, unit)}
        )
    return groups


def _measurement(row: Json, unit: str, first: float | None) -> Json:
    detail, value = mapping(row.get("detail")), real(row.get("value"))
    others = ", ".join(f"{key}: {item}" for key, item in detail.items() if key != "model")
    text = size_text if unit.lower() in ("b", "byte", "bytes") else figure_text
    return {
        "model": str(detail.get("model") or ""),
        "others": others,
        "value": value,
        "text": "no value" if value is None else text(value),
        "ratio": f"{value / first:.2f}{_TIMES}" if first and value is not None else "—",
    }


def _artifact(item: Json) -> Json:
    notes = mapping(item.get("notes"))
    checks = [
        (function, output, difference)
        for function, outputs in mapping(notes.get("check")).items()
        for output, difference in mapping(outputs).items()
    ]
    ways = [
        (f"{function}: {kind}", _counts(found))
        for function, note in notes.items()
        if function not in ("check", "performance")
        for kind, found in (mapping(note) or {"note": note}).items()
        if found
    ]
    tables = [
        (target, str(mapping(found).get("product") or ""), table)
        for target, found in mapping(notes.get("performance")).items()
        for table in (
            kernel_table(mapping(mapping(found).get("kernels"))),
            site_table(dicts(mapping(found).get("sites"))),
        )
        if len(table) > 1
    ]
    return {
        **item, "sha256": str(item.get("sha256") or ""), "checks": checks, "ways": ways,
        "tables": tables,
    }  # fmt: skip


def _counts(found: Any) -> list[str]:
    return [f"{way} {_TIMES} {n}" for way, n in mapping(found).items()] or [str(found)]


def _pictures(sites: Sequence[Found]) -> list[Json]:
    """One picture per kind of rewrite, drawn from its first site."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for site in sites:
        before, after = _texts(site)
        if before or after:
            groups.setdefault((site.step, graphs.shape_of(before, after)), []).append(site)
    return [_picture(group, drawn=i < MOST_PICTURES) for i, group in enumerate(groups.values())]


def _picture(group: Sequence[Found], *, drawn: bool) -> Json:
    first = group[0]
    texts, node = _texts(first), str(first.item.get("node", ""))
    sides = [
        {"name": name, "text": text, "drawing": graphs.draw(text, node)}
        for name, text in zip(("before", "after"), texts, strict=True)
    ]
    return {"first": first, "alike": len(group) - 1, "sides": sides if drawn else []}


def _texts(site: Found) -> tuple[str, str]:
    return str(site.item.get("before") or ""), str(site.item.get("after") or "")


_PLOTTED = ("curves", "oscillation", "axis_map_before", "axis_map_after")
"""Metrics too long for a cell; they are drawn or summed up elsewhere."""


def _site_tables(sites: Sequence[Found]) -> list[Json]:
    tables = []
    for (step, function), group in groupby(sites, key=lambda site: (site.step, site.function)):
        rows = list(group)
        found = dict.fromkeys(key for row in rows for key in mapping(row.item.get("metrics")))
        keys = [key for key in found if key not in _PLOTTED]
        tables.append(
            {
                "pass": step,
                "function": function,
                "keys": keys,
                "rows": rows[:MOST_ROWS],
                "count": len(rows),
            }
        )
    return tables


def _refusals(refusals: Sequence[Found]) -> list[Json]:
    """Grouped by pass and reason; a reason that names its own module counts as the same."""
    groups: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        reason, module = (
            str(refusal.item.get("reason") or "no reason given"),
            refusal.place.get("module"),
        )
        if module:
            reason = reason.replace(str(module), "[module]")
        groups.setdefault((refusal.step, reason), []).append(refusal.label)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        {"pass": step, "reason": reason, "labels": labels} for (step, reason), labels in ordered
    ]


def _rules(steps: Iterable[Json]) -> Iterable[Json]:
    for number, step in enumerate(steps, 1):
        for change in _changes(step):
            for name, stats in mapping(change.get("rules")).items():
                where = {"pass": _title(step, number), "function": change.get("function") or "main"}
                yield {**where, "rule": name, **mapping(stats)}


# Plots: an empty string where there is nothing to draw.


def _size_plot(data: Json) -> str:
    before, after = mapping(data.get("before")), mapping(data.get("after"))
    rows = []
    for key, label in _SIZES.items():
        text = size_text if "bytes" in key else amount_text
        old, new = real(before.get(key)), real(after.get(key))
        if old and new is not None:
            bars = (plots.Bar(label, value, text(value)) for value in (old, new))
            rows.append(plots.Pair(label, *bars))
    return Markup(plots.pairs(rows)) if rows else ""  # our own SVG, text escaped


def _error_plot(nodes: Sequence[Json]) -> str:
    points = [
        plots.Point(
            str(node.get("module") or ""),
            str(node.get("rewritten_by") or ""),
            real(node.get("sqnr_db")),
        )
        for node in nodes
    ]
    known = any(point.sqnr_db is not None for point in points)
    return Markup(plots.errors(points)) if known else ""  # as above


def _weight_plot(sites: Sequence[Found]) -> str:
    metrics = [mapping(site.item.get("metrics")) for site in sites]
    pairs = [(real(m.get("sqnr_db")), real(m.get("theory_db"))) for m in metrics]
    known = [(measured, theory) for measured, theory in pairs if measured is not None]
    if not known:
        return ""
    return Markup(plots.weights(*zip(*known, strict=True)))  # as above


def _bands(sites: Sequence[Found]) -> Iterator[Json]:
    """Score curves of rotary sites, one plot per different pair of curves."""
    seen: list[Any] = []
    for site in sites:
        metrics = mapping(site.item.get("metrics"))
        both = metrics.get("curves")
        if not isinstance(both, list) or len(both) != 2 or both in seen:
            continue
        seen.append(both)
        before, after = ([real(value) or 0.0 for value in curve] for curve in both)
        yield {
            "node": str(site.item.get("node")),
            "summary": str(metrics.get("summary") or ""),
            "plot": Markup(plots.curves(before, after, "score of the temporal band")),  # as above
        }


def _bar_plot(rows: Sequence[Json], name: str, unit: str) -> str:
    models = [row["model"] for row in rows]
    bars = []
    for number, row in enumerate(rows[:MOST_BARS], 1):
        model, others = row["model"], row["others"]
        label = model if models.count(model) == 1 else ", ".join(filter(None, (model, others)))
        if row["value"] is not None:
            bars.append(plots.Bar(label or f"run {number}", row["value"], row["text"], model))
    axis = f"{name} ({unit})" if unit else name
    return Markup(plots.bars(bars, axis)) if len(bars) > 1 else ""  # as above
