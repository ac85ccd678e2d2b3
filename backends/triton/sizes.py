"""Dynamic sizes: expressions for the manifest, and the guards that would tie them down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from resplice.backends.triton.launcher import LauncherError, evaluate
from resplice.dims import expression
from resplice.errors import LoweringError
from resplice.program import Program
from resplice.repairs.base import replaced


@contextmanager
def guards_of(program: Program) -> Iterator[list[str]]:
    """Collect what is asked about dynamic sizes inside the block, instead of tying them down.

    Yields:
        One text per question whose answer does not hold for all sizes: "s0 <= 64 is false".
    """
    found: list[str] = []
    shape_env = program.fake_mode.shape_env
    if shape_env is None:
        yield found
        return

    def evaluated(orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        answer = ShapeEnv.evaluate_expr(shape_env, orig_expr, *args, **kwargs)
        if shape_env._maybe_evaluate_static(orig_expr) is None:
            found.append(f"{named(orig_expr, program)} is {answer}")
        return answer

    with shape_env.suppress_guards(), replaced(shape_env, "evaluate_expr", evaluated):
        yield found


def named(value: Any, program: Program) -> str:
    """An expression in the names of the dimensions; symbols that are none keep their own."""
    names = size_names(program)
    symbols = {s: sympy.Symbol(names.get(str(s), str(s))) for s in value.free_symbols}
    return str(value.xreplace(symbols))


def size_names(program: Program) -> dict[str, str]:
    """Symbol -> the name of its dimension, where the symbol is that dimension itself."""
    found = {}
    for symbol, label in program.symbols.items():
        dim = program.dims.get(label)
        if dim is not None and dim.label.isidentifier():
            found[symbol] = dim.label
    taken = list(found.values())
    return {symbol: name for symbol, name in found.items() if taken.count(name) == 1}


def plain_size(value: Any, program: Program) -> int | float | str:
    """A number, or a text that the launcher evaluates: "(batch*seq + 63)//64".

    Raises:
        LoweringError: The launcher's arithmetic does not have an operation of it.
    """
    if not isinstance(value, torch.SymInt):
        return int(value) if isinstance(value, int) else value
    wanted = expression(value)
    if not wanted.free_symbols:
        return int(wanted)
    text = named(wanted, program)
    names, known = size_names(program), value.node.shape_env.backed_var_to_val
    hints = {names.get(str(s), str(s)): int(known[s]) for s in wanted.free_symbols}
    try:
        if evaluate(text, hints) == value.node.hint:
            return text
    except LauncherError as error:
        raise LoweringError("triton", [f"{text} is no simple expression: {error}"]) from error
    raise LoweringError("triton", [f"{text} is no simple expression of sizes"])


def places_of_sizes(program: Program) -> dict[str, list[Any]]:
    """Name of each dynamic size -> [input, axis] where it can be read; [] if on no axis."""
    names = size_names(program)
    found: dict[str, list[Any]] = {}
    for node in program.placeholders:
        for axis, size in enumerate(node.meta["val"].shape):
            for symbol in expression(size).free_symbols:
                title = names.get(str(symbol), str(symbol))
                alone = expression(size) == symbol
                if alone or title not in found:
                    found[title] = [node.name, axis] if alone else found.get(title, [])
    return found
