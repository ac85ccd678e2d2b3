"""The ledger and the stream: pairing by name, freeing values, order of visits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resplice
from resplice.bisect import bisect
from resplice.errors import PassError, UsageError
from resplice.ledger import compare_programs
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.stream import Stream


def test_every_common_float_node_is_compared(program: Program) -> None:
    small, _ = Pipeline.of("quest{weight-bits=4}").run(program)
    ledger = compare_programs(program, small, program.sample_tensors(), after="quest")
    names = [entry.node for entry in ledger.entries]
    assert names == [n for n in names if n in {m.name for m in program.graph.nodes}]
    assert {"linear", "silu", "layer_norm", "linear_6"} <= set(names)
    by_name = {entry.node: entry for entry in ledger.entries}
    assert by_name["linear"].rewritten_by == "quest"
    assert by_name["silu"].rewritten_by == ""
    assert by_name["linear"].difference.sqnr_db is not None
    assert ledger.outputs["output"] == by_name["linear_6"].difference


def test_errors_are_those_of_a_direct_computation(program: Program, mlp: nn.Module) -> None:
    small, _ = Pipeline.of("quest{weight-bits=2}").run(program)
    ledger = compare_programs(program, small, program.sample_tensors())
    x = program.samples["x"]
    with torch.no_grad():
        error = small(x).double() - mlp(x).double()
        sqnr = 10 * torch.log10(mlp(x).double().square().sum() / error.square().sum())
    found = ledger.worst_output
    assert found.sqnr_db == pytest.approx(float(sqnr), abs=1e-6)
    assert found.max_abs == pytest.approx(float(error.abs().max()), rel=1e-9)


def test_an_unchanged_program_is_identical_everywhere(program: Program) -> None:
    ledger = compare_programs(program, program.copy(), program.sample_tensors())
    assert all(entry.difference.sqnr_db is None for entry in ledger.entries)
    assert len(ledger.entries) > 10


def test_comparing_does_not_advance_state() -> None:
    program = resplice.capture(nn.BatchNorm1d(4).train(), (torch.randn(3, 4),))
    before = program.weight("running_mean").clone()
    compare_programs(program, program.copy(), program.sample_tensors())
    assert torch.equal(program.weight("running_mean"), before)


def test_a_stream_is_visited_in_graph_order(program: Program) -> None:
    stream = Stream(program, [{"x": torch.randn(4, 32)}, {"x": torch.randn(2, 32)}])
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    (first, *_), (second, *_) = stream.inputs_of(linears[2])
    assert first.shape == (4, 64)
    assert second.shape == (2, 64)
    with pytest.raises(PassError, match="is behind the stream"):
        stream.inputs_of(linears[0])


def test_bisection_finds_the_first_rewrite_past_the_bar(program: Program) -> None:
    pipeline = Pipeline.of("quest{weight-bits=2}")
    seen: dict[int, float] = {}
    found = bisect(program, pipeline, bar=0.02, on_try=lambda n, d: seen.__setitem__(n, d.relative))
    assert found is not None
    assert found.before.relative <= 0.02 < found.after.relative
    assert found.label == f"quest:{_site(program, found.index)}"
    assert len(seen) <= 2 + found.total.bit_length()
    assert bisect(program, Pipeline.of("cse"), bar=0.0) is None
    with pytest.raises(UsageError, match="must not be negative"):
        bisect(program, pipeline, bar=-1.0)


def _site(program: Program, index: int) -> str:
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    return str(linears[index - 1].name)
