"""The stable text form of a program: our own, because FX's printing changes between versions.

program(input_ids: i64[batch,seq]) where batch=1:8, seq
%0 = weight("model.embed_tokens.weight"): f32[128,64]
%1 = aten.embedding(%0, input_ids): f32[batch,seq,64]
return %1
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from resplice.dims import shape_text, size_text
from resplice.origin import describe_target, origin

if TYPE_CHECKING:
    from resplice.program import Program

_DTYPES = {
    torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_TO_THE_END = torch.iinfo(torch.int64).max


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `i64`, ..."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def show(program: Program, *, origins: bool = False) -> str:
    """Print a program; `origins` appends each node's module and source line."""
    return "\n\n".join(
        _function(name, function, origins) for name, function in program.all_functions()
    )


def show_nodes(program: Program, nodes: list[fx.Node]) -> str:
    """Print some nodes only, by their own names: the text of a rewritten site."""
    names = {node: f"%{node.name}" for node in program.graph.nodes}
    return "\n".join(_line(node, names, program.symbols) for node in nodes)


def _function(name: str, program: Program, origins: bool) -> str:
    names: dict[fx.Node, str] = {}
    dims = ", ".join(map(str, program.dims.values()))
    header = f"{'program' if name == 'main' else name}({', '.join(map(str, program.inputs))})"
    lines = [header + (f" where {dims}" if dims else "")]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "output":
            lines.append("return " + ", ".join(names[n] for n in program.output_nodes))
        else:
            names[node] = f"%{len(names) - len(program.placeholders)}"
            tail = f"  # {origin(node)}" if origins else ""
            lines.append(_line(node, names, program.symbols) + tail)
    return "\n".join(lines)


def _line(node: fx.Node, names: Mapping[fx.Node, str], symbols: Mapping[str, str]) -> str:
    kind = value_text(node.meta.get("val"), symbols)
    return f"{names[node]} = {_expression(node, names)}" + (f": {kind}" if kind else "")


def _expression(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return f'weight("{node.target}")'
    if node.op == "placeholder":
        return "input"
    if node.target is operator.getitem:
        return f"{_argument(node.args[0], names)}[{_argument(node.args[1], names)}]"
    arguments = [_argument(a, names) for a in node.args]
    arguments += [f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items())]
    return f"{describe_target(node)}({', '.join(arguments)})"


def _argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, float):
        return repr(value)
    return "end" if value == _TO_THE_END and not isinstance(value, bool) else str(value)


def value_text(value: Any, symbols: Mapping[str, str]) -> str:
    """The type of a node's value: `f32[2,seq]`, `size = seq`, or a tuple of those."""
    if isinstance(value, torch.Tensor):
        sizes = ",".join(map(str, shape_text(value.shape, symbols)))
        return f"{dtype_text(value.dtype)}[{sizes}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(value_text(item, symbols) for item in value)})"
    if isinstance(value, torch.SymInt):
        return f"size = {size_text(value, symbols)}"
    return "" if value is None else type(value).__name__
