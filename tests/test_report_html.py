"""The HTML report: complete, safe and readable from any report JSON."""

# the names of the tests say it
from __future__ import annotations

import math
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from resplice.report import graphs, plots
from resplice.report.html import error_text, figure_text, metric_text, render, size_text

HOSTILE = '<script>alert("x")</script> & $\\frac{ </svg> "\' {{ 7 * 7 }}'
TIMES = "\u00d7"
BEFORE = '%w = weight("a.b: c"): f32[8,4]\n%linear_1 = aten.linear(%x, %w): f32[batch,8]'
AFTER = (
    "%hadamard = resplice.hadamard(%x, 4): f32[batch,4]\n"
    '%codes = weight("a.b_codes"): u8[8,2]\n'
    "%linear_1 = resplice.quant_linear(%hadamard, %codes, None, 4): f32[batch,8]"
)


def difference(sqnr: float | None = 20.0, **changes: Any) -> dict[str, Any]:
    error = 0.0 if sqnr is None else 0.5
    return {"sqnr_db": sqnr, "max_abs": error, "relative": error, "finite": True, **changes}


def origin(module: str = "layers.0.mlp") -> dict[str, Any]:
    return {"module": module, "source": "model.py:7", "made_by": ""}


def site(node: str = "linear_1", before: str = BEFORE, after: str = AFTER) -> dict[str, Any]:
    metrics = {"sqnr_db": 19.9, "theory_db": 19.4, "bytes_before": 4096, "bytes_after": 1024}
    return {
        "node": node, "origin": origin(), "before": before, "after": after, "metrics": metrics,
    }  # fmt: skip


def refusal(reason: str, module: str = "layers.0.mlp", node: str = "linear_2") -> dict[str, Any]:
    return {"node": node, "origin": origin(module), "reason": reason}


def change(**parts: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"sites": [], "refusals": [], "rules": {}, "notes": [], "seconds": 0.0}
    return {"text": "quest", "function": "main", **empty, **parts}


def step(*changes: dict[str, Any], ledger: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "pass": "quest", "meaning": "approximate", "seconds": 0.2, "changes": list(changes),
        "ledger": ledger,
    }  # fmt: skip


def report(*steps: dict[str, Any], **parts: Any) -> dict[str, Any]:
    size = {"flops": 2000, "bytes_moved": 4000, "weight_bytes": 8192, "parameters": 9, "nodes": 4}
    return {
        "schema": "resplice-report/1",
        "environment": {"python": "3.11", "created": "2026-01-01"},
        "model": {"inputs": ["x: f32[batch,4]"], "outputs": ["y: f32[batch,8]"], "dims": ["batch"]},
        "pipeline": "quest", "before": size, "after": {**size, "weight_bytes": 2048},
        "steps": list(steps), "artifacts": [], "measurements": [], **parts,
    }  # fmt: skip


class _Tags(HTMLParser):
    """Fails on tags that are closed in the wrong order."""

    empty = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.empty:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.empty:
            assert self.open.pop() == tag


def well_formed(page: str) -> str:
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    return page


def words(page: str) -> str:
    """The page's text, without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


@pytest.fixture(scope="module")
def full() -> str:
    nodes = [
        {"node": f"n{i}", "module": f"layers.{i}", "source": "m.py:1",
         "rewritten_by": ("", "quest")[i % 2]}
        | difference(40.0 - i if i else None)
        for i in range(30)
    ]  # fmt: skip
    rules = {"linear": {"tried": 9, "hits": 1, "seconds": 0.1, "near_miss": "bias is computed"}}
    check = {"main": {"y": difference(42.0)}}
    notes = {"main": {"ops": {"quant_linear: lowered": 14}, "legalized": {}}, "check": check}
    artifact = {
        "backend": "onnx", "path": "m.onnx", "bytes": 2048, "sha256": "ab" * 32, "bar": 0.6,
        "notes": notes,
    }  # fmt: skip
    measured = [
        {"name": "perplexity", "value": v, "unit": "", "detail": {"model": m, "tokens": 512}}
        for m, v in (("fp32", 10.0), ("quest", 12.5))
    ]
    ledger = {"after": "quest", "outputs": {"y": difference(19.1)}, "nodes": nodes}
    done = change(sites=[site(), site("linear_3")], refusals=[refusal("no")], rules=rules)
    return render(report(step(done, ledger=ledger), artifacts=[artifact], measurements=measured))


def test_page_is_well_formed_and_loads_nothing(full: str) -> None:
    well_formed(full)
    assert not re.search(r"https?:|@import|<link|<img|<iframe|src=", full)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", full)


@pytest.mark.parametrize(
    "text",
    [
        "8.00 KiB → 2.00 KiB",
        f"4.00{TIMES} less",
        "19.1 dB",
        "bias is computed",
        "main, y: 42.0 dB",
        "abababababab",
        f"quant_linear: lowered {TIMES} 14",
        "12.5",
        f"1.25{TIMES}",
        "Worst 20 nodes",
        "identical: 1",
        "1 more site looks like this one",
        "from outside",
        "x: f32[batch,4]",
        "tokens: 512",
    ],
)
def test_page_says(full: str, text: str) -> None:
    assert text in words(full).replace("\u00a0", " ")


def test_page_has_every_plot(full: str) -> None:
    labels = re.findall(r'role="img" aria-label="([^"]*)"', full)
    assert {"Size and cost", "perplexity", "Error along the graph", "Error of the weights"} < set(
        labels
    )
    assert labels.count("graph") == 2


@pytest.mark.parametrize(
    "data",
    [
        {},
        dict.fromkeys(report()),
        report(),
        report(step()),
        report({"pass": None, "changes": None, "ledger": None}),
        report(step(change(sites=None, refusals=None, rules=None, notes=None))),
        report(
            step(change(sites=[{"node": "a", "origin": None, "before": None, "metrics": None}]))
        ),
        report(step(change(refusals=[{}]), ledger={"outputs": None, "nodes": None, "after": "x"})),
        report(step(ledger={"after": "x", "outputs": {"y": None}, "nodes": [{}]})),
        report(artifacts=[{}, {"notes": {"main": "text", "check": None}}], measurements=[{}]),
        report(before={"flops": 0, "weight_bytes": math.nan}, after={}),
    ],
    ids=range(11),
)
def test_absent_parts_are_said_in_words(data: dict[str, Any]) -> None:
    assert 'class="absent"' in well_formed(render(data))


def test_minimal_report_names_what_is_missing() -> None:
    text = words(render(report()))
    assert "No pass ran" in text
    assert "Nothing was lowered" in text
    assert "Not measured: the passes ran without checks" in text
    assert "Nothing was measured" in text
    assert "No site was refused" in text
    assert "No site was rewritten" in text


def test_hostile_text_is_escaped() -> None:
    node = {"node": HOSTILE, "module": HOSTILE, "source": HOSTILE, "rewritten_by": HOSTILE}
    hostile = change(
        function=HOSTILE,
        sites=[site(HOSTILE, f'%a = weight("{HOSTILE}"): f32[1]', HOSTILE)],
        refusals=[refusal(HOSTILE, HOSTILE)],
        rules={HOSTILE: {"near_miss": HOSTILE}},
        notes=[HOSTILE],
    )
    ledger = {"after": HOSTILE, "outputs": {HOSTILE: difference()}, "nodes": [node | difference()]}
    measured = [
        {"name": HOSTILE, "unit": HOSTILE, "value": n, "detail": {"model": HOSTILE}} for n in (1, 2)
    ]
    artifact = {
        "path": HOSTILE,
        "notes": {HOSTILE: {HOSTILE: {HOSTILE: 1}}, "check": {HOSTILE: {HOSTILE: {}}}},
    }
    page = render(
        report(
            step(hostile, ledger=ledger), pipeline=HOSTILE, measurements=measured,
            artifacts=[artifact], model={"inputs": [HOSTILE]}, environment={HOSTILE: HOSTILE},
        )
    )  # fmt: skip
    assert page.count("<script") == 1
    assert "alert(&#34;x&#34;)" in page
    assert "{{ 7 * 7 }}" in page
    well_formed(page)


def test_refusals_are_grouped_by_reason() -> None:
    skipped = [refusal(f"layers.{i}.mlp.weight is skipped", f"layers.{i}.mlp") for i in range(5)]
    page = render(report(step(change(refusals=[refusal("it is the head"), *skipped]))))
    counts = re.findall(rf"<summary>(\d+) {TIMES} (.*?) <span", page)
    assert counts == [("5", "[module].weight is skipped"), ("1", "it is the head")]


def test_passes_without_a_check_are_named() -> None:
    ledger = {"after": "quest", "outputs": {"y": difference()}, "nodes": []}
    page = words(render(report(step(ledger=ledger), {**step(), "pass": "late"})))
    assert "Later passes were not checked: late." in page
    assert "Single nodes were not compared." in page


def test_functions_are_told_apart() -> None:
    parts = [change(sites=[site()] * n, function=f) for f, n in (("main", 2), ("decode", 1))]
    page = words(render(report(step(*parts)))).replace("\u00a0", " ")
    assert "main 2, decode 1" in page
    assert "function decode: 1 site" in page


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (difference(19.14), "19.1 dB"),
        (difference(None), "identical"),
        (difference(None, max_abs=0.1), "reference is zero"),
        (difference(None, max_abs=None, finite=False), "not finite"),
        (None, "not measured"),
    ],
)
def test_error_text(entry: Any, text: str) -> None:
    assert error_text(entry) == text


def test_number_texts() -> None:
    assert [size_text(n).replace("\u00a0", " ") for n in (3, 2048, 3 << 20, None)] == [
        "3 B", "2.00 KiB", "3.00 MiB", "not recorded",
    ]  # fmt: skip
    assert [figure_text(n) for n in (64, 0.123456, 1e-9, 123456.7, None, "a")] == [
        "64", "0.1235", "1e-09", "123,457", "—", "a",
    ]  # fmt: skip
    assert metric_text(None, "sqnr_db") == "identical"
    assert metric_text(19.94, "sqnr_db") == "19.94 dB"


def test_parse_reads_names_types_and_inputs() -> None:
    text = f"{AFTER}\n%item = %split[1]: f32[2]\n%n = aten.sym_size(%x, 0): size = seq\nnonsense"
    found = {op.name: op for op in graphs.parse(text)}
    assert list(found) == ["hadamard", "codes", "linear_1", "item", "n"]
    assert found["linear_1"].inputs == ("hadamard", "codes")
    assert found["linear_1"].op == "resplice.quant_linear"
    assert found["codes"].kind == "u8[8,2]"
    assert (found["codes"].op, found["codes"].inputs) == ("weight", ())
    assert (found["item"].op, found["item"].inputs) == ("item", ("split",))
    assert found["n"].kind == "size = seq"


def test_parse_keeps_quoted_colons() -> None:
    first = graphs.parse(BEFORE)[0]
    assert (first.op, first.kind) == ("weight", "f32[8,4]")


def test_shape_ignores_names_and_sizes_but_not_options() -> None:
    renamed = AFTER.replace("linear_1", "other").replace("batch,8", "batch,99").replace("a.b", "c")
    assert graphs.shape_of(BEFORE, AFTER) == graphs.shape_of(
        BEFORE.replace("linear_1", "other"), renamed
    )
    assert graphs.shape_of(BEFORE, AFTER) != graphs.shape_of(BEFORE, AFTER.replace("4)", "2)"))
    assert graphs.shape_of("%b = f(%a, %a)", "") != graphs.shape_of("%b = f(%a, %c)", "")


def test_drawing_places_boxes_apart() -> None:
    drawing = graphs.draw(AFTER + "\n%y = aten.add(%linear_1, %x): f32[batch,8]", "linear_1")
    assert drawing is not None
    assert sorted(box.style for box in drawing.boxes) == ["input", "op", "op", "result", "weight"]
    assert len(drawing.arrows) == 5
    for box in drawing.boxes:
        assert 0 <= box.x <= drawing.width - box.width
        assert 0 <= box.y <= drawing.height - box.height
    corners = [(box.x, box.y) for box in drawing.boxes]
    assert len(set(corners)) == len(corners)


@pytest.mark.parametrize("text", ["", "nonsense", "%a = f(%b)\n%b = f(%a)", "%a = f(%a)"])
def test_drawing_of_no_graph_is_none(text: str) -> None:
    assert graphs.draw(text) is None


def test_drawing_of_a_huge_site_is_none() -> None:
    lines = [f"%a{i + 1} = f(%a{i})" for i in range(graphs.MOST_OPERATIONS + 1)]
    assert graphs.draw("\n".join(lines)) is None


def test_plot_colours_come_from_the_page() -> None:
    svg = plots.bars([plots.Bar("a", 1.0, "1"), plots.Bar("b", 2.0, "2")], "count")
    assert "var(--s1)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0[0-9a-f]{5}", svg)


def test_large_report_is_small_and_quick() -> None:
    sites = [site(f"linear_{i}", after=AFTER.replace("4)", f"{i})")) for i in range(210)]
    refusals = [refusal(f"reason {i % 7}", f"layers.{i}") for i in range(300)]
    nodes = [
        {"node": f"node_{i}", "module": f"model.layers.{i // 50}.mlp", "source": "m.py:1",
         "rewritten_by": "quest" if i % 7 == 0 else "", **difference(20 + math.sin(i))}
        for i in range(1500)
    ]  # fmt: skip
    ledger = {"after": "quest", "outputs": {"y": difference()}, "nodes": nodes}
    start = time.perf_counter()
    page = render(report(*[step(change(sites=sites, refusals=refusals), ledger=ledger)] * 3))
    assert time.perf_counter() - start < 10
    assert len(page.encode()) < 3_000_000
    assert "the first 16 are drawn" in page
    well_formed(page)
