"""Six small passes, one for each thing the engine must carry for the techniques to come."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import nn

from resplice.build import Builder
from resplice.change import Change, Site
from resplice.context import Context
from resplice.facts import Canonical, Fact, FloatWeights
from resplice.infer import infer
from resplice.origin import origin
from resplice.pass_base import Approx, Exact, Meaning, Pass, Redefines, option
from resplice.pattern import Match, Var, aten
from resplice.program import Program
from resplice.rules import Rule, apply_rules, replace_node
from resplice.stream import Stream

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Shifted(Fact):
    """The result depends on an added input."""

    title = "the model takes an offset"
    input: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.input,) if self.input else ()


@dataclass(frozen=True)
class FullRows(Fact):
    """Every linear layer sees all rows."""

    title = "linear layers see all rows"


class AddInput(Pass):
    """x -> x + offset, with `offset` a new input (as VideoRoPE adds positions)."""

    name = "add-input"
    creates = (Shifted,)
    changes_signature = True

    @property
    def meaning(self) -> Meaning:
        return Redefines()

    def run(self, program: Program, context: Context) -> Change:
        first = program.placeholders[0]
        users = list(first.users)
        value = first.meta["val"]
        sample = torch.zeros_like(program.samples[first.name])
        offset = program.add_input("offset", tuple(value.shape), value.dtype, sample)
        build = Builder(program, min(users), self.name)
        shifted = build(ATEN.add.Tensor, first, offset)
        for user in users:
            if user.target is not ATEN.sym_size.int:
                user.replace_input_with(first, shifted)
        program.facts = program.facts.adding(Shifted("offset"))
        return Change(sites=[Site(shifted.name, origin(shifted))])


class HalveRows(Pass):
    """Merge pairs of rows in front of each gated layer and repeat them behind it (as TDTM does)."""

    name = "halve-rows"
    needs = (Canonical,)
    destroys = (FullRows,)

    @property
    def meaning(self) -> Meaning:
        return Approx(-100.0)

    def run(self, program: Program, context: Context) -> Change:
        change = Change()
        for node in list(program.graph.nodes):
            if node.target is not ATEN.linear.default or node.meta["val"].shape[-1] != 32:
                continue
            source = _layer_input(node)
            if source is None or not context.take(f"{self.name}:{node.name}"):
                continue
            rows = source.meta["val"].shape[0]
            build = Builder(program, min(user for user in source.users), self.name)
            size = build.size(source, 0)
            half = (
                build(operator.floordiv, size, 2) if isinstance(rows, torch.SymInt) else rows // 2
            )
            pairs = build(ATEN.reshape.default, source, [half, 2, 32])
            merged = build(ATEN.mean.dim, pairs, [1])
            for user in [u for u in source.users if u.target is ATEN.linear.default]:
                user.replace_input_with(source, merged)
            infer(program, until=node)  # from the merge to here there are half the rows now
            after = Builder(program, node.next, self.name)
            spread = after(ATEN.repeat_interleave.self_int, node, 2, 0)
            node.replace_all_uses_with(spread, lambda user, keep=spread: user is not keep)
            infer(program)
            change.sites.append(Site(spread.name, origin(node)))
        return change


def _layer_input(down: torch.fx.Node) -> torch.fx.Node | None:
    product = down.args[0]
    if product.target is not ATEN.mul.Tensor:
        return None
    up = product.args[1]
    return up.args[0] if up.target is ATEN.linear.default else None


class _Round(Rule):
    name = "round-weight"

    def __init__(self, context: Context) -> None:
        self.context = context

    def pattern(self) -> object:
        return aten.linear(
            Var("x"), Var("w", lambda n: None if n.op == "get_attr" else "computed"), Var("b")
        )

    def check(self, found: Match) -> None:
        name = str(found.node("w").target)
        found.require(not name.endswith("_rounded"), "rounded already")

    def rewrite(self, found: Match, build: Builder) -> torch.fx.Node:
        node = found.node("w")
        old = build.program.weight(node)
        rounded = self.context.once(
            old, "round", lambda: nn.Parameter(old.half().float(), requires_grad=False)
        )
        new = build.weight(f"{node.target}_rounded", rounded)
        return build(ATEN.linear.default, found["x"], new, found["b"])


class RoundWeights(Pass):
    """Replace every linear weight, one at a time (as QuEST does)."""

    name = "round-weights"
    needs = (Canonical, FloatWeights)
    destroys = (FloatWeights,)

    @property
    def meaning(self) -> Meaning:
        return Approx(50.0)

    def run(self, program: Program, context: Context) -> Change:
        return apply_rules(program, [_Round(context)], context, self.name)


class ScaleToUnit(Pass):
    """Scale each down-projection so that its output has unit RMS on calibration data, as the
    already scaled layers before it make it (as CMoE profiles)."""

    name = "scale-to-unit"
    needs = (Canonical, FloatWeights)

    @property
    def meaning(self) -> Meaning:
        return Redefines()

    def run(self, program: Program, context: Context) -> Change:
        change, stream = Change(), Stream(program, context.calibration)
        sites = [n for n in program.graph.nodes if _is_down(n)]
        for site in context.track(self.name, sites):
            inputs = stream.inputs_of(site)
            name, bias = str(site.args[1].target), program.weight(site.args[2])
            weight = program.weight(name)
            outputs = torch.cat(
                [nn.functional.linear(values[0], weight, bias) for values in inputs]
            )
            gain = 1 / float(outputs.square().mean().sqrt())
            build = Builder(program, site, self.name)
            new = build(
                ATEN.linear.default,
                site.args[0],
                build.weight(f"{name}_unit", nn.Parameter(weight * gain, requires_grad=False)),
                build.weight(
                    f"{site.args[2].target}_unit", nn.Parameter(bias * gain, requires_grad=False)
                ),
            )
            replace_node(program, site, new, self.name)
            change.sites.append(
                Site(new.name, origin(new), metrics={"gain": gain, "live": stream.live})
            )
        program.graph.eliminate_dead_code()
        program.drop_unused_weights()
        return change


def _is_down(node: torch.fx.Node) -> bool:
    return node.target is ATEN.linear.default and _layer_input(node) is not None


class TwoFunctions(Pass):
    """Keep the program as `main` and add `negated` over the same weights (as TDTM's two phases)."""

    name = "two-functions"

    def run(self, program: Program, context: Context) -> Change:
        if "negated" in program.functions:
            return Change()
        other = program.copy()
        output = other.graph.output_node()
        build = Builder(other, output, self.name)
        output.args = (tuple(build(ATEN.neg.default, node) for node in other.output_nodes),)
        other.module.recompile()
        program.functions["negated"] = other
        return Change(notes=["one more function"])


@dataclass(frozen=True)
class AddScale(Pass):
    """Multiply the result of every gated layer by a new trainable scale (as QAT does)."""

    name = "add-scale"
    start: float = option(1.0, "initial value")

    @property
    def meaning(self) -> Meaning:
        return Exact() if self.start == 1.0 else Redefines()

    def run(self, program: Program, context: Context) -> Change:
        change = Change()
        for index, node in enumerate(n for n in list(program.graph.nodes) if _is_down(n)):
            build = Builder(program, node.next, self.name)
            scale = build.weight(f"scale.{index}", nn.Parameter(torch.tensor(self.start)))
            scaled = build(ATEN.mul.Tensor, node, scale)
            node.replace_all_uses_with(scaled, lambda user, keep=scaled: user is not keep)
            change.sites.append(Site(scaled.name, origin(node)))
        return change
