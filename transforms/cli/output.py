"""What commands share: stdout is the result, stderr is talk; bars only on a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from resplice.report.build import jsonable

talk = Console(stderr=True, highlight=False)


def emit(data: Any, text: str | Callable[[], str], *, as_json: bool) -> None:
    """Print the result: JSON for machines, text for people."""
    if as_json:
        print(json.dumps(jsonable(data), indent=1))
    else:
        print(text if isinstance(text, str) else text())


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with elapsed time on a terminal; yields a function that renames the step."""
    if not talk.is_terminal:
        talk.print(what, markup=False)
        yield lambda step: talk.print(step, markup=False)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=talk, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda step: progress.update(task, description=step)


def mebibytes(count: int) -> str:
    """`12.3 MiB`."""
    return f"{count / 2**20:.1f} MiB"


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns padded to equal width, without colours, so that it can be piped."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
