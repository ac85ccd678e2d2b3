"""Verification: every invariant of a program has a broken program that shows its message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from resplice import weights
from resplice.errors import PassError, VerifyError
from resplice.facts import Fact
from resplice.program import Program
from resplice.verify import same_signature, verify

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Marked(Fact):
    """Speaks of one node."""

    title = "a node is marked"
    node: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)


def _silu(program: Program) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.target is ATEN.silu.default)


def _drop_value(program: Program) -> None:
    del _silu(program).meta["val"]


def _drop_weight(program: Program) -> None:
    weights.drop(program.module, "head.bias")


def _write_in_place(program: Program) -> None:
    node = _silu(program)
    node.target = ATEN.silu_.default


def _wrong_shape(program: Program) -> None:
    node = _silu(program)
    node.meta["val"] = node.meta["val"][:, :3]


def _wrong_dtype(program: Program) -> None:
    _silu(program).meta["val"] = _silu(program).meta["val"].half()


def _rename_input(program: Program) -> None:
    program.placeholders[0].name = "renamed"


def _constant_output(program: Program) -> None:
    program.graph.output_node().args = ((3,),)


def _use_before_definition(program: Program) -> None:
    node = _silu(program)
    program.placeholders[0].append(node)


def _stale_fact(program: Program) -> None:
    program.facts = program.facts.adding(Marked("gone"))


BREAK: dict[str, Callable[[Program], None]] = {
    "no shape is recorded for silu": _drop_value,
    r"there is no weight head\.bias, read by head_bias": _drop_weight,
    "it writes in place, which only trailing copy_ may do: silu": _write_in_place,
    r"silu.* computes torch\.float32": _wrong_shape,
    r"torch\.float16.* is recorded": _wrong_dtype,
    "inputs are renamed, the calling convention says x": _rename_input,
    "an output is not a tensor of the graph": _constant_output,
    "the graph is broken": _use_before_definition,
    'the fact "a node is marked" speaks of gone, which is gone': _stale_fact,
}


@pytest.mark.parametrize("message", BREAK)
def test_a_broken_program_is_refused(message: str, program: Program) -> None:
    draft = program.copy()
    BREAK[message](draft)
    with pytest.raises(VerifyError, match=message):
        verify(draft)
    verify(program)


def test_problems_come_all_at_once_with_node_and_line(program: Program) -> None:
    draft = program.copy()
    for node in draft.graph.nodes:
        if node.target is ATEN.silu.default:
            del node.meta["val"]
    with pytest.raises(VerifyError) as refused:
        verify(draft)
    assert str(refused.value).count("no shape is recorded") == 2
    assert "conftest.py" in str(refused.value)


def test_signatures_are_compared(program: Program) -> None:
    draft = program.copy()
    node = _silu(draft)
    draft.graph.output_node().args = ((node,),)
    with pytest.raises(VerifyError, match=r"outputs changed from \(output: f32\[2\*pairs,10\]\)"):
        same_signature(program, draft)
    same_signature(program, program.copy())


def test_shape_inference_names_the_node_that_cannot_run(program: Program) -> None:
    from resplice.infer import infer

    draft = program.copy()
    node = _silu(draft)
    node.target = ATEN.permute.default
    node.args = (node.args[0], [0, 1, 2])
    with pytest.raises(VerifyError, match=r"aten\.permute can't take") as refused:
        infer(draft)
    assert "silu" in refused.value.where


def test_a_pass_error_says_what_ran_before() -> None:
    error = PassError("third", "broke", ran=["first", "second"], where="here", hint="try this")
    assert str(error) == "pass third (after first, second): broke\n  at: here\n  try: try this"
