"""The rule driver: what it rewrites, counts, refuses, names, remembers and releases."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from resplice import rules as rules_module
from resplice import weights
from resplice.build import Builder
from resplice.capture import capture
from resplice.change import Change
from resplice.context import Context
from resplice.errors import PassError
from resplice.origin import origin
from resplice.pattern import Match, Var, aten, either, shared
from resplice.program import Program
from resplice.rules import Rule, apply_rules, replace_node
from resplice.verify import verify

X, W, B = Var("x"), Var("w"), Var("b")
ops = torch.ops.aten


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Keep the function."""
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        """Call it."""
        return self.function(*tensors)


class Swap(Rule):
    """Replace one op by another of the same shape."""

    def __init__(self, old: str, new: Any, refuse: str = "") -> None:
        """Name the two ops; `refuse` makes `check` refuse every match."""
        self.name = old  # type: ignore[misc]  # one class, many rules
        self.old, self.new, self.refuse = old, new, refuse

    def pattern(self) -> Any:
        """One op of one argument."""
        return getattr(aten, self.old)(X)

    def check(self, found: Match) -> None:
        """Refuse if told to."""
        found.require(not self.refuse, self.refuse)

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        """The other op."""
        return build(self.new, found.node("x"))


def program_of(function: Callable[..., Any], count: int = 1) -> Program:
    """Capture a function of vectors."""
    return capture(Plain(function), tuple(torch.randn(4) for _ in range(count)))


def apply(program: Program, *rules: Rule, limit: int | None = None) -> Change:
    """Apply rules and verify the result."""
    change = apply_rules(program, rules, Context(limit=limit), "test")
    verify(program)
    return change


def targets(program: Program) -> list[str]:
    """Names of the ops in order."""
    return [n.target.__name__ for n in program.graph.nodes if n.op == "call_function"]


def test_every_match_is_rewritten_and_counted() -> None:
    program = program_of(lambda x: x.relu() + x.neg().relu())
    change = apply(program, Swap("relu", ops.sigmoid.default))
    assert change.count == change.rules["relu"].hits == 2
    assert targets(program) == ["sigmoid.default", "neg.default", "sigmoid.default", "add.Tensor"]


def test_the_rewritten_program_computes_the_replacement() -> None:
    program = program_of(lambda x: x.relu().exp())
    apply(program, Swap("relu", ops.neg.default))
    x = torch.randn(4)
    assert torch.equal(program(x), x.neg().exp())


def test_nothing_to_match_changes_nothing() -> None:
    program = program_of(lambda x: x.relu())
    change = apply(program, Swap("exp", ops.neg.default))
    assert change.count == 0
    assert not change.refusals
    assert change.rules["exp"].tried == 1
    assert not list(change.near_misses())
    assert targets(program) == ["relu.default"]


def test_the_replacement_keeps_the_name_of_what_it_replaces() -> None:
    program = program_of(lambda x: x.neg().relu().exp())
    names = [node.name for node in program.graph.nodes]
    change = apply(program, Swap("relu", ops.sigmoid.default))
    assert [node.name for node in program.graph.nodes] == names
    assert [site.node for site in change.sites] == ["relu"]


def test_the_replacement_keeps_where_it_came_from_and_says_who_made_it() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    program = capture(nn.Sequential(nn.Identity(), Inner()), (torch.randn(4),))
    before = origin(program.output_nodes[0])
    change = apply(program, Swap("relu", ops.neg.default))
    after = origin(program.output_nodes[0])
    assert before.module == "1"
    assert before.source.startswith("test_rules.py:")
    assert (after.module, after.source) == (before.module, before.source)
    assert (before.made_by, after.made_by) == ("", "test")
    assert change.sites[0].origin == before


def test_a_site_shows_itself_before_and_after() -> None:
    program = program_of(lambda x: x.relu())
    (site,) = apply(program, Swap("relu", ops.neg.default)).sites
    assert site.before == "%relu = aten.relu(%tensors_0): f32[4]"
    assert site.after == "%relu = aten.neg(%tensors_0): f32[4]"


def test_metrics_of_a_rewrite_are_kept() -> None:
    class Measured(Swap):
        def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:  # type: ignore[override]  # the other allowed form
            return build(self.new, found.node("x")), {"answer": 42}

    (site,) = apply(program_of(lambda x: x.relu()), Measured("relu", ops.neg.default)).sites
    assert site.metrics == {"answer": 42}


def test_a_refused_match_is_recorded_once_with_its_reason() -> None:
    program = program_of(lambda x: x.relu().neg())
    change = apply(
        program, Swap("relu", ops.exp.default, refuse="not here"), Swap("neg", ops.exp.default)
    )
    assert [(r.node, r.reason) for r in change.refusals] == [("relu", "not here")]
    assert change.rules["relu"].hits == 0
    assert change.count == 1
    assert "test_rules.py" in str(change.refusals[0])
    assert str(change.refusals[0]).endswith("not here")
    assert targets(program) == ["relu.default", "exp.default"]


def test_another_rule_may_take_what_one_refused() -> None:
    program = program_of(lambda x: x.relu())
    second = Swap("relu", ops.neg.default)
    second.name = "second"  # type: ignore[misc]  # a label
    change = apply(program, Swap("relu", ops.exp.default, refuse="no"), second)
    assert change.rules["second"].hits == 1
    assert len(change.refusals) == 1


def test_new_nodes_are_matched_again() -> None:
    program = program_of(lambda x: x.relu())
    change = apply(program, Swap("relu", ops.neg.default), Swap("neg", ops.exp.default))
    assert targets(program) == ["exp.default"]
    assert change.count == 2


def test_a_user_tried_too_early_is_tried_again() -> None:
    """relu becomes neg, neg becomes exp, and only then does the sigmoid above match."""

    class Pair(Swap):
        def pattern(self) -> Any:
            return aten.sigmoid(aten.exp(X))

    program = program_of(lambda x: x.relu().sigmoid())
    change = apply(
        program,
        Swap("relu", ops.neg.default),
        Swap("neg", ops.exp.default),
        Pair("pair", ops.tanh.default),
    )
    assert targets(program) == ["tanh.default"]
    assert change.count == 3


def test_a_match_freed_by_another_rewrite_is_found() -> None:
    """exp(neg) may not match while a later node also reads neg."""

    class Pair(Swap):
        def pattern(self) -> Any:
            return aten.exp(aten.neg(X))

    class Detach(Swap):
        def pattern(self) -> Any:
            return aten.tanh(shared(aten.neg(X)))

    def function(x: Tensor) -> Tensor:
        low = x.neg()
        return low.exp() + low.tanh()

    program = program_of(function)
    change = apply(program, Pair("pair", ops.relu.default), Detach("detach", ops.sigmoid.default))
    assert change.count == 2
    assert targets(program) == ["relu.default", "sigmoid.default", "add.Tensor"]


def test_rules_that_never_stop_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "_TOO_MANY", 50)
    program = program_of(lambda x: x.relu())
    with pytest.raises(PassError, match="pass test: its rules never stop matching"):
        apply(program, Swap("relu", ops.neg.default), Swap("neg", ops.relu.default))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_the_limit_counts_rewrites_over_the_whole_run(limit: int) -> None:
    program = program_of(lambda x: x.relu().relu().relu())
    context = Context(limit=limit)
    first = apply_rules(program, [Swap("relu", ops.neg.default)], context, "first")
    second = apply_rules(program, [Swap("neg", ops.exp.default)], context, "second")
    verify(program)
    assert first.count == min(limit, 3)
    assert second.count == min(max(limit - 3, 0), 3)
    assert context.taken[:1] == (["first:relu"] if limit else [])


def test_what_the_limit_leaves_is_no_refusal() -> None:
    change = apply(program_of(lambda x: x.relu()), Swap("relu", ops.neg.default), limit=0)
    assert not change.refusals
    assert change.count == 0


def test_the_deepest_near_miss_is_reported_when_nothing_matched() -> None:
    class Deep(Swap):
        def pattern(self) -> Any:
            return aten.relu(aten.neg(aten.exp(X)))

    program = program_of(lambda x: x.neg().relu() + x.tanh().neg().relu())
    change = apply(program, Deep("deep", ops.relu.default))
    (miss,) = change.near_misses()
    assert miss.startswith("deep: expected aten.exp, found placeholder (at tensors_0")
    assert change.rules["deep"].near_miss_depth == 2


def test_a_rule_that_hit_reports_no_near_miss() -> None:
    class Deep(Swap):
        def pattern(self) -> Any:
            return aten.relu(aten.neg(X))

    program = program_of(lambda x: x.neg().relu() + x.tanh().relu())
    assert not list(apply(program, Deep("deep", ops.relu.default)).near_misses())


def test_interior_nodes_without_further_users_are_erased() -> None:
    class Pair(Swap):
        def pattern(self) -> Any:
            return aten.relu(shared(aten.neg(X)))

    program = program_of(lambda x: x.neg().relu())
    apply(program, Pair("pair", ops.exp.default))
    assert targets(program) == ["exp.default"]

    kept = program_of(lambda x: (low := x.neg()).relu() + low)
    apply(kept, Pair("pair", ops.exp.default))
    assert targets(kept) == ["neg.default", "exp.default", "add.Tensor"]


class Drop(Swap):
    """Replace an op by its own input."""

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        """The input."""
        return found.node("x")


def test_a_rule_may_return_a_node_that_was_there_before() -> None:
    program = program_of(lambda x: x.exp().relu().neg())
    change = apply(program, Drop("relu", None))
    assert targets(program) == ["exp.default", "neg.default"]
    assert change.count == 1
    exp = program.output_nodes[0].args[0]
    assert isinstance(exp, fx.Node)
    assert exp.name == "exp", "the value under a name must not change"
    assert origin(exp).made_by == ""


def test_a_returned_value_may_be_replaced_by_an_input_of_the_graph() -> None:
    program = program_of(lambda x: (x.relu(), x.exp()))
    apply(program, Drop("relu", None))
    assert [node.name for node in program.output_nodes] == ["tensors_0", "exp"]


def test_replace_node_keeps_the_old_node_while_it_is_its_own_input() -> None:
    program = program_of(lambda x: x.relu())
    old = program.output_nodes[0]
    with program.graph.inserting_before(old):
        new = program.graph.call_function(ops.neg.default, (old.args[0],))
    new.meta["val"] = old.meta["val"]
    replace_node(program, old, new, "somebody")
    assert program.output_nodes == [new]
    assert new.name == "relu"
    assert origin(new).made_by == "somebody"
    assert old._erased


# ---- weights -----------------------------------------------------------------------------


class Halve(Rule):
    """Replace the weight of every linear layer by half of it."""

    name = "halve"

    def pattern(self) -> Any:
        """A linear layer with a constant weight not made here."""
        fresh = Var("w", lambda n: "made here" if "_half" in str(n.target) else None)
        return either(aten.linear(X, fresh, B))

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        """The same layer with a weight of our own."""
        node = found.node("w")
        half = build.weight(f"{node.target}_half", build.program.weight(node) / 2)
        return build(ops.linear.default, found.node("x"), half, found["b"])


def two_layers(tied: bool = False) -> nn.Sequential:
    """Two linear layers, possibly with one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if tied:
        model[2].weight = model[0].weight
    return model


def test_a_replaced_weight_is_forgotten_by_the_program_only() -> None:
    model = two_layers()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = capture(model, (torch.randn(2, 4),)).copy()
    apply(program, Halve())
    assert {name for name, _ in program.named_weights()} == {
        "0.weight_half", "0.bias", "2.weight_half", "2.bias",
    }  # fmt: skip
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_replaced_weight_is_released_before_the_next_one_is_made() -> None:
    program = capture(two_layers(), (torch.randn(2, 4),))
    first = weakref.ref(program.weight("0.weight"))
    alive: list[bool] = []

    class Watch(Halve):
        def rewrite(self, found: Match, build: Builder) -> fx.Node:
            gc.collect()
            alive.append(first() is not None)
            return super().rewrite(found, build)

    apply(program, Watch())
    assert alive == [True, False]


def test_a_weight_another_node_still_reads_is_kept() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w) + self.w.sum()

    program = capture(Shared(), (torch.randn(2, 4),))
    apply(program, Halve())
    assert {name for name, _ in program.named_weights()} == {"w", "w_half"}


def test_tied_weights_are_rewritten_at_both_readers_and_dropped() -> None:
    model = two_layers(tied=True)
    program = capture(model, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    change = apply(program, Halve())
    assert change.count == 2
    remaining = [name for name, _ in program.named_weights()]
    assert not any(name.endswith("weight") for name in remaining)
    half = model[0].weight / 2
    expected = nn.functional.linear(
        nn.functional.linear(x, half, model[0].bias).relu(), half, model[2].bias
    )
    assert torch.equal(program(x), expected)


def test_a_memo_gives_tied_weights_one_new_tensor() -> None:
    context = Context()

    class Once(Halve):
        def rewrite(self, found: Match, build: Builder) -> fx.Node:
            source = build.program.weight(found.node("w"))
            half = build.weight("shared_half", context.once(source, "half", lambda: source / 2))
            return build(ops.linear.default, found.node("x"), half, found["b"])

        def pattern(self) -> Any:
            fresh = Var("w", lambda n: "made here" if n.target == "shared_half" else None)
            return aten.linear(X, fresh, B)

    program = capture(two_layers(tied=True), (torch.randn(2, 4),))
    apply(program, Once())
    keys = {name: weights.key(value) for name, value in program.named_weights()}
    assert sorted(keys) == ["0.bias", "2.bias", "shared_half"]
