"""The command-line application: commands, error messages, exit codes.

Exit codes: 0 ok, 1 internal error, 2 usage, 3 capture, 4 illegal composition, 5 lowering,
6 verification, 7 resource limit.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import TextIO

import typer

from resplice.cli import check, convert, inspect, measure, search
from resplice.cli import run as running
from resplice.cli.output import talk
from resplice.errors import ResourceError, RespliceError, RespliceWarning

app = typer.Typer(
    name="resplice", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Capture a PyTorch model, splice techniques into its graph, lower it, check it.",
    epilog="Exit codes: 0 ok, 1 internal error, 2 usage, 3 capture, 4 illegal composition, "
    "5 lowering, 6 verification, 7 resource limit.",
)  # fmt: skip
for command in (
    inspect.passes, inspect.show, inspect.explain, convert.convert, check.check, running.run,
    measure.bench, measure.bisect, search.search_windows,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of the `resplice` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        warnings.simplefilter("always", RespliceWarning)
        warnings.showwarning = _show_warning
        return _run(arguments)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """One line of talk instead of Python's two; ours in red."""
    ours = issubclass(category, RespliceWarning)
    kind = "WARNING" if ours else category.__name__
    talk.print(f"{kind}: {message}", markup=False, soft_wrap=True, style="bold red" if ours else "")


def _run(arguments: list[str]) -> int:
    try:
        result = app(arguments, standalone_mode=True)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except RespliceError as error:
        return _fail(error, "--json" in arguments)
    except MemoryError:
        return _fail(ResourceError("memory ran out", hint="use a smaller model or batch"), False)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("RESPLICE_DEBUG"):
            traceback.print_exc()
        talk.print(f"internal error: {type(error).__name__}: {error}", markup=False)
        talk.print("  try: RESPLICE_DEBUG=1 shows the traceback; please report it", markup=False)
        return 1
    return result if isinstance(result, int) else 0


def _fail(error: RespliceError, as_json: bool) -> int:
    if as_json:
        kind, message = type(error).__name__, str(error)
        print(json.dumps({"error": kind, "message": message, "exit_code": error.exit_code}))
    talk.print(f"error: {error}", markup=False, soft_wrap=True)
    return error.exit_code
