"""`passes`, `show` and `explain`: look, write nothing."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from typing import Annotated, Any, get_type_hints

import typer

from resplice.cli.options import AllowPickle, Dynamic, Json, Model, Spec, open_model
from resplice.cli.output import emit, table, working
from resplice.context import Context
from resplice.cost import program_cost
from resplice.pass_base import Pass, option_name
from resplice.pipeline import Pipeline, Step
from resplice.program import Program
from resplice.registry import pass_class, pass_table
from resplice.saving import program_metadata
from resplice.show import show as show_program


def passes(
    name: Annotated[str | None, typer.Argument(help="one pass, with its options")] = None,
    json: Json = False,
) -> None:
    """List the passes, or one pass with its options."""
    chosen = [name] if name else sorted(pass_table())
    found = [_describe(pass_class(item)) for item in chosen]
    if name:
        emit(found[0], lambda: _pass_text(found[0]), as_json=json)
        return
    rows = [(item["name"], item["meaning"], item["summary"]) for item in found]
    emit(found, lambda: table(rows, ("pass", "meaning", "what it does")), as_json=json)


def show(
    model: Model,
    origins: Annotated[
        bool, typer.Option("--origins", help="append module and source line")
    ] = False,
    dynamic: Dynamic = None,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Print a captured program as text."""
    program = open_model(model, dynamic, allow_pickle=allow_pickle)
    data = {**program_metadata(program), "text": show_program(program, origins=origins)}
    emit(data, lambda: str(data["text"]), as_json=json)


def explain(
    model: Model, passes: Spec, dynamic: Dynamic = None, allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Say what passes would rewrite, refuse and miss, and what it would save; writes nothing."""
    pipeline = Pipeline.of(passes)
    with working(f"capturing {model}") as step:
        program = open_model(model, dynamic, allow_pickle=allow_pickle)
        step(f"matching {pipeline}")
        result, steps = pipeline.run(program, Context())
    costs = {"before": asdict(program_cost(program)), "after": asdict(program_cost(result))}
    data = {"pipeline": str(pipeline), "cost": costs, "steps": [_step(s) for s in steps]}
    emit(data, lambda: _explanation(steps, program, result), as_json=json)


def _describe(cls: type[Pass]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    options = [
        {
            "name": option_name(f.name),
            "type": _type_text(hints[f.name]),
            "default": f.default,
            "choices": list(f.metadata.get("choices", ())),
            "help": f.metadata.get("help", ""),
        }
        for f in fields(cls)
    ]
    doc = inspect.getdoc(cls) or ""
    identity = cls.identity()
    return {
        "name": cls.name, "summary": doc.splitlines()[0], "doc": doc, "meaning": str(cls().meaning),
        "options": options, "needs": [k.title for k in cls.needs],
        "destroys": [k.title for k in cls.destroys], "creates": [k.title for k in cls.creates],
        "identity": str(identity) if identity else None,
    }  # fmt: skip


def _type_text(kind: Any) -> str:
    return str(kind).replace("typing.", "") if not isinstance(kind, type) else kind.__name__


def _pass_text(item: dict[str, Any]) -> str:
    lines = [f"{item['name']}: {item['doc']}", "", f"meaning: {item['meaning']}"]
    for key in ("needs", "creates", "destroys"):
        lines += [f"{key}: {', '.join(item[key])}"] if item[key] else []
    lines += [f"identity setting: {item['identity']}"] if item["identity"] else []
    rows = [
        (o["name"], str(o["default"]), ", ".join(map(str, o["choices"])) or o["type"], o["help"])
        for o in item["options"]
    ]
    return "\n".join(lines) + (
        "\n\n" + table(rows, ("option", "default", "values", "")) if rows else ""
    )


def _step(step: Step) -> dict[str, Any]:
    return {
        "pass": str(step.item),
        "meaning": str(step.item.meaning),
        "changes": [change.to_json() for change in step.changes],
    }


def _explanation(steps: list[Step], before: Program, after: Program) -> str:
    lines: list[str] = []
    for step in steps:
        for change in step.changes:
            lines.append(
                f"{step.item} on {change.function}: {change.count} sites, {step.item.meaning}"
            )
            lines += [f"  + {s.node} in {s.origin}{_metrics(s.metrics)}" for s in change.sites]
            lines += [f"  - {refusal}" for refusal in change.refusals]
            lines += [f"  ? {miss}" for miss in change.near_misses()]
            lines += [f"  {note}" for note in change.notes]
    was, now = program_cost(before), program_cost(after)
    lines.append(
        f"FLOPs {was.flops:,} -> {now.flops:,}; bytes moved {was.bytes:,} -> {now.bytes:,}"
    )
    return "\n".join(lines)


def _metrics(metrics: dict[str, Any]) -> str:
    if metrics.get("summary"):
        return f": {metrics['summary']}"
    if metrics.get("sqnr_db") is None:
        return ""
    return f": {metrics['sqnr_db']:.1f} dB"
