"""Running a program in segments whose activations are computed again in the backward pass.

Gradient checkpointing, Chen et al. 2016 (arXiv 1604.06174): only what crosses from one segment into
the next is kept. The graph has no layers any more; cuts are made where the fewest values cross.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from resplice.errors import UsageError
from resplice.program import Program

Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


def in_segments(program: Program, count: int) -> Run:
    """A function like `program.run` that keeps few activations for the backward pass.

    Args:
        program: What to run; its weights are read at every call.
        count: Number of segments. Memory is least near the square root of the number of layers;
            time grows by about one forward pass, whatever the count.

    Raises:
        UsageError: The count is not positive, or the program writes state, which would be written
            twice.
    """
    if count < 1:
        raise UsageError(f"{count} segments: must be at least 1")
    if program.effects:
        raise UsageError("a program that writes state can't be computed twice")
    segments = _segments(program, count)
    outputs = program.output_nodes

    def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        known: dict[fx.Node, Any] = {n: tensors[n.name] for n in program.placeholders}
        for segment in segments:
            given = [known[node] for node in segment.needed]
            made = checkpoint(segment.run, program, *given, use_reentrant=False)
            known |= dict(zip(segment.made, made, strict=True))
        return tuple(_value(program, known, node) for node in outputs)

    return run


@dataclass(frozen=True)
class _Segment:
    """Calls in a row, the values they take from before, and those that later ones take."""

    nodes: Sequence[fx.Node]
    needed: Sequence[fx.Node]
    made: Sequence[fx.Node]

    def run(self, program: Program, *given: Any) -> tuple[Any, ...]:
        known = dict(zip(self.needed, given, strict=True))
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(program, known, n))
            assert callable(node.target), node
            known[node] = node.target(*args, **kwargs)
        return tuple(known[node] for node in self.made)


def _value(program: Program, known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    return program.weight(node) if node.op == "get_attr" else known[node]


def _segments(program: Program, count: int) -> list[_Segment]:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    borders = [0, *_cuts(calls, count), len(calls)]
    return [_segment(calls[start:end]) for start, end in pairwise(borders) if end > start]


def _segment(nodes: Sequence[fx.Node]) -> _Segment:
    inside = set(nodes)
    needed = {
        source: None
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    }
    made = [node for node in nodes if any(user not in inside for user in node.users)]
    return _Segment(nodes, list(needed), made)


def _cuts(calls: Sequence[fx.Node], count: int) -> list[int]:
    """Places to cut: near equal parts, where the fewest values cross."""
    crossing, place = [0] * (len(calls) + 1), {node: i for i, node in enumerate(calls)}
    for index, node in enumerate(calls):
        last = max((place.get(user, len(calls)) for user in node.users), default=index)
        for between in range(index + 1, last + 1):
            crossing[between] += 1
    reach = len(calls) // (2 * count)
    cuts = []
    for part in range(1, count):
        middle = part * len(calls) // count
        near = range(max(1, middle - reach), min(len(calls), middle + reach + 1))
        if near:
            cuts.append(min(near, key=lambda i: (crossing[i], abs(i - middle))))
    return sorted(set(cuts))
