"""Small drawings of rewritten sites: text lines become boxes and arrows.

A line reads `%name = op(arguments): type`. Names that no line defines are inputs of the site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

MOST_OPERATIONS = 40
_LINE = re.compile(r'^\s*%(?P<name>\w+) = (?P<expression>.+?)(?:: (?P<kind>[^:"]*))?$')
_CALL = re.compile(r"^(?P<op>[^\s(\[%]+)\((?P<arguments>.*)\)$")
_NAME, _QUOTED, _SIZES = re.compile(r"%(\w+)"), re.compile(r'"[^"]*"'), re.compile(r"\[[^\[\]]*\]")
_LONGEST, _CHARACTER, _MARGIN = 28, 6.7, 8.0
_HEIGHT, _GAP_X, _GAP_Y, _BEND = 38.0, 14.0, 30.0, 8.0


@dataclass(frozen=True)
class Operation:
    """One line of a site's text.

    Attributes:
        name: What the line defines.
        op: The operator, `weight`, `input` or `item` (of a tuple).
        inputs: Names it reads, each once.
        kind: The type of its value, "" if the line gives none.
        text: The line itself.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    kind: str
    text: str


@dataclass(frozen=True)
class Box:
    """A drawn node: `style` is `op`, `result`, `weight` or `input`."""

    x: float
    y: float
    width: float
    height: float
    style: str
    label: str
    detail: str
    title: str


@dataclass(frozen=True)
class Drawing:
    """Boxes, and arrows as SVG path data (curve, head)."""

    width: float
    height: float
    boxes: list[Box]
    arrows: list[tuple[str, str]]


def parse(text: str) -> list[Operation]:
    """Read a site's text; lines of another form are skipped."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [_operation(line) for line in found if line]


def shape_of(before: str, after: str) -> str:
    """The same text for sites that differ only in names and tensor sizes."""
    numbers: dict[str, str] = {}

    def number(name: re.Match[str]) -> str:
        return numbers.setdefault(name[1], f"%{len(numbers)}")

    lines = [_QUOTED.sub('""', line) for line in [*before.splitlines(), "=>", *after.splitlines()]]
    return "\n".join(_NAME.sub(number, _without_sizes(line)) for line in lines)


def draw(text: str, result: str = "") -> Drawing | None:
    """Lay out a site's text from top to bottom.

    Args:
        text: The site's `before` or `after`.
        result: The node whose value the site computes; it is marked.

    Returns:
        The drawing, or None where the text holds no graph or one too large to read.
    """
    operations = parse(text)
    if not 0 < len(operations) <= MOST_OPERATIONS:
        return None
    graph: nx.DiGraph[str] = nx.DiGraph()
    for operation in reversed(operations):  # so that inputs stand in the order they are read
        graph.add_nodes_from((operation.name, *operation.inputs))
        graph.add_edges_from((source, operation.name) for source in operation.inputs)
    if not nx.is_directed_acyclic_graph(graph):
        return None
    looks = {name: _input(name) for name in graph} | {
        operation.name: _look(operation, result) for operation in operations
    }
    return _place(graph, looks)


def _operation(line: re.Match[str]) -> Operation:
    expression = line["expression"].strip()
    call = _CALL.match(expression)
    op = call["op"] if call else "item" if "%" in expression else expression
    names = _NAME.findall(_QUOTED.sub("", expression))
    kind = (line["kind"] or "").strip()
    return Operation(line["name"], op, tuple(dict.fromkeys(names)), kind, line[0].strip())


def _without_sizes(line: str) -> str:
    found = _LINE.match(line)
    if not found or not found["kind"]:
        return line
    return f"%{found['name']} = {found['expression']}: {_SIZES.sub('[]', found['kind'])}"


def _input(name: str) -> Box:
    return _box("input", name, "from outside", name)


def _look(operation: Operation, result: str) -> Box:
    if operation.op == "weight":
        return _box("weight", operation.name, operation.kind, operation.text)
    style = "result" if operation.name == result else "op"
    return _box(style, operation.op, operation.kind, operation.text)


def _box(style: str, label: str, detail: str, title: str) -> Box:
    label, detail = _short(label), _short(detail)
    width = max(len(label), len(detail), 8) * _CHARACTER + 2 * _MARGIN
    return Box(0, 0, width, _HEIGHT, style, label, detail, title)


def _short(text: str) -> str:
    half = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"


def _place(graph: nx.DiGraph[str], looks: Mapping[str, Box]) -> Drawing:
    rows, paths = _rows(graph)
    widths = {name: looks[name].width if name in looks else _BEND for row in rows for name in row}
    spans = [sum(widths[n] for n in row) + _GAP_X * (len(row) - 1) for row in rows]
    centres: dict[str, tuple[float, float]] = {}
    for level, (row, span) in enumerate(zip(rows, spans, strict=True)):
        x = (max(spans) - span) / 2 + 2
        for name in row:
            centres[name] = (x + widths[name] / 2, level * (_HEIGHT + _GAP_Y) + _HEIGHT / 2 + 2)
            x += widths[name] + _GAP_X
    boxes = [_moved(box, *centres[name]) for name, box in looks.items()]
    height = len(rows) * (_HEIGHT + _GAP_Y) - _GAP_Y + 4
    return Drawing(max(spans) + 4, height, boxes, _arrows(paths, centres, widths))


def _moved(box: Box, x: float, y: float) -> Box:
    left, top = round(x - box.width / 2, 1), round(y - box.height / 2, 1)
    return Box(left, top, box.width, box.height, box.style, box.label, box.detail, box.title)


def _rows(graph: nx.DiGraph[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of names, each input just above its first reader, and one path of names per edge.

    An edge that skips rows gets a bend in each of them, so that it passes between the boxes.
    """
    generations = nx.topological_generations(graph.reverse())
    rows = [list(generation) for generation in generations][::-1]
    level = {name: depth for depth, row in enumerate(rows) for name in row}
    paths = []
    for source, target in graph.edges:
        bends = {d: f"{source}>{target}:{d}" for d in range(level[source] + 1, level[target])}
        for depth, bend in bends.items():
            rows[depth].append(bend)
        paths.append([source, *bends.values(), target])
    return _untangled(rows, paths), paths


def _untangled(rows: list[list[str]], paths: Sequence[Sequence[str]]) -> list[list[str]]:
    links = [link for path in paths for link in pairwise(path)]
    for _ in range(3):
        for upward in (True, False):
            places = {n: (i + 0.5) / len(row) for row in rows for i, n in enumerate(row)}
            near: dict[str, list[float]] = {}
            for above, below in links:
                near.setdefault(above if upward else below, []).append(
                    places[below if upward else above]
                )
            mean = {name: sum(found) / len(found) for name, found in near.items()}
            rows = [sorted(row, key=lambda n: mean.get(n, places[n])) for row in rows]
    return rows


def _arrows(
    paths: Sequence[Sequence[str]],
    centres: Mapping[str, tuple[float, float]],
    widths: Mapping[str, float],
) -> list[tuple[str, str]]:
    entering: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda p: centres[p[-2]][0]):
        entering.setdefault(path[-1], []).append(path[0])
    arrows = []
    for path in paths:
        target, sources = path[-1], entering[path[-1]]
        share = (sources.index(path[0]) + 1) / (len(sources) + 1) - 0.5
        end = (centres[target][0] + share * widths[target], centres[target][1] - _HEIGHT / 2)
        start = (centres[path[0]][0], centres[path[0]][1] + _HEIGHT / 2)
        arrows.append(_arrow([start, *(centres[bend] for bend in path[1:-1]), end]))
    return arrows


def _arrow(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    (x, y), last = points[0], len(points) - 2
    curve = f"M{x:.0f} {y:.0f}"
    for index, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        stop, middle = (y1 - 6 if index == last else y1), (y0 + y1) / 2
        curve += f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {stop:.0f}"
    x, y = points[-1]
    return curve, f"M{x - 4:.0f} {y - 7:.0f}h8l-4 7z"
