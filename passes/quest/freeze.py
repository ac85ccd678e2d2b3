"""Packed inference weights in the place of trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from resplice.build import Builder
from resplice.change import Change
from resplice.context import Context
from resplice.errors import PassError
from resplice.kernels.quant_linear import BITS, quant_linear
from resplice.kernels.quest_quantize import rounded
from resplice.passes.canonicalize import remove_dead
from resplice.passes.quest.integers import code_product
from resplice.passes.quest.packed import Form, PackedWeight, pack_rows
from resplice.passes.quest.weights import codes_of_rows
from resplice.pattern import Match, Var, aten, resplice
from resplice.program import Program
from resplice.rules import Rule, apply_rules
from resplice.walk import run_node


def freeze(program: Program, *, integer: bool = False) -> tuple[Program, Change]:
    """Turn the weights of a program trained with `quest{mode=qat}` into packed codes.

    linear(x, quest_quantize(weight, bits, ...)) -> quant_linear(x, codes, step, bias, bits, 0)
    round_to_levels(weight, levels, unit, ...) -> quant_weight(step, codes, places, levels, ...)

    The result computes bit for bit what the trained program computes, but for layers of 2**15
    weights and more, whose CPU kernel sums in another order.

    Args:
        program: Rewritten by `quest{mode=qat}`, trained or not; it is not changed.
        integer: Multiply codes of activations by codes of weights, exactly, where both are
            rounded: faster; equal up to the rounding of float32 sums.

    Returns:
        The packed program and what was done to it.

    Raises:
        PassError: The program holds no weight that is rounded on the way.
    """
    draft = program.copy()
    change = apply_rules(draft, [_Pack(integer)], Context(), "freeze")
    remove_dead(draft)
    others = apply_rules(draft, [_PackGrid(), _PackLevels()], Context(), "freeze")
    change.sites += others.sites
    remove_dead(draft)
    draft.module.recompile()
    if not change.count:
        raise PassError(
            "freeze", "no weight of this program is rounded; rewrite it with quest{mode=qat} first"
        )
    return draft, change


def _rounded_constant(value: Any) -> str | None:
    if not isinstance(value, fx.Node) or value.target is not rounded.overload:
        return "it is not rounded"
    bits, rotate_back = value.args[1], value.args[5]
    if rotate_back or bits not in BITS:
        return "its codes can't be packed"
    return None if stored_weight(value) else "it is computed, not a constant of the program"


def stored_weight(value: fx.Node) -> fx.Node | None:
    """The weight that a node rounds, seen through what prepares it: constants only."""
    source = value
    while source.op == "call_function":
        source, *others = source.all_input_nodes
        if any(other.op != "get_attr" for other in others):
            return None
    return source if source.op == "get_attr" else None


def _value(program: Program, node: fx.Node) -> Tensor:
    """What constants compute."""
    if node.op == "get_attr":
        return program.weight(node).detach()
    env = {source: _value(program, source) for source in node.all_input_nodes}
    found: Tensor = run_node(program, node, env, {})
    return found


class _Pack(Rule):
    """`linear(x, quest_quantize(W), bias)`."""

    name = "pack"

    def __init__(self, integer: bool) -> None:
        self.integer = integer

    def pattern(self) -> Any:
        return aten.linear(Var("x"), Var("weight", _rounded_constant), Var("bias"))

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        weight = found.node("weight")
        stored = stored_weight(weight)
        assert stored is not None
        bits, block = int(weight.args[1]), int(weight.args[2])  # type: ignore[arg-type]  # ints by schema
        with torch.no_grad():
            values = _value(build.program, weight.all_input_nodes[0])
            codes, step = codes_of_rows(values, bits, 0, block)
        packed = (
            build.weight(f"{stored.target}_codes", codes),
            build.weight(f"{stored.target}_step", step), found["bias"], bits, 0,
        )  # fmt: skip
        x = found.node("x")
        if self.integer and x.target is rounded.overload:
            act_bits, widen = int(x.args[1]), len(x.args) > 6 and bool(x.args[6])  # type: ignore[arg-type]  # int by schema
            return code_product(build, x.all_input_nodes[0], block, act_bits, widen, packed)
        return build(quant_linear.overload, x, *packed)


def _is_constant(value: Any) -> str | None:
    stored = isinstance(value, fx.Node) and (
        value.op == "get_attr" or (value.op == "call_function" and stored_weight(value) is not None)
    )
    return None if stored else "it is computed, not a constant of the program"


_OPTIONS = ("block", "clip", "estimator", "back")


class _PackGrid(Rule):
    """`quest_quantize(W)` that no linear layer reads as it is: stacks, kernels."""

    name = "pack-grid"

    def pattern(self) -> Any:
        rest = map(Var, _OPTIONS)
        return resplice.quest_quantize(Var("weight", _is_constant), Var("bits"), *rest)

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return _emit(found, build, Form(f"int{found['bits']}"))


class _PackLevels(Rule):
    """`round_to_levels(W)`: FP4, or pruned."""

    name = "pack-levels"

    def pattern(self) -> Any:
        rest = map(Var, _OPTIONS)
        weight = Var("weight", _is_constant)
        return resplice.round_to_levels(weight, Var("levels"), Var("unit"), *rest)

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return _emit(found, build, Form(found["levels"], found["unit"]))


def _emit(found: Match, build: Builder, form: Form) -> fx.Node:
    weight, block = found.node("weight"), int(found["block"])
    with torch.no_grad():
        values = _value(build.program, weight)
        packed = PackedWeight(*pack_rows(values, form, block), form, block, values.shape[-1])
    stored = weight if weight.op == "get_attr" else stored_weight(weight)
    assert stored is not None
    kind = weight.meta["val"].dtype
    return packed.emit(build, str(stored.target), kind, back=bool(found["back"]))
