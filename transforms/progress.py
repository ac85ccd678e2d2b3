"""A progress bar for what takes minutes, unless the caller reports progress itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]
"""(what, done, total)."""


@contextmanager
def reporting(progress: Report | None, what: str) -> Iterator[Report]:
    """The caller's function, or one that draws a bar on stderr."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as drawn:
        task = drawn.add_task(what, total=None)
        yield lambda _, done, total: drawn.update(task, completed=done, total=total)
