"""What the rules of `quest` have in common: their options, and what a weight must be."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from resplice.build import Builder
from resplice.context import Context
from resplice.kernels.pruning import UNITS, fits
from resplice.kernels.quant_linear import quant_linear
from resplice.passes.quest.inputs import ROUNDINGS, prepared
from resplice.passes.quest.integers import code_product
from resplice.passes.quest.packed import Form, PackedWeight, pack_weight
from resplice.passes.quest.weights import hadamard_block
from resplice.pattern import Match
from resplice.rules import Rule

if TYPE_CHECKING:
    from resplice.passes.quest.rewrite import Quest

aten = torch.ops.aten


class QuestRule(Rule):
    """A rule with the pass's options."""

    def __init__(self, options: Quest, context: Context) -> None:
        """Remember options and context."""
        self.options, self.context = options, context

    def require_weight(self, found: Match, weight: fx.Node, size: int) -> None:
        """Refuse a weight by name, or rows of `size` that the options do not fit."""
        options, name = self.options, str(weight.target)
        for skipped in options.skip:
            found.require(not fnmatch(name, skipped), f"{name} matches skip={skipped}")
        block, unit = options.hadamard, UNITS[options.sparse]
        if isinstance(block, int):
            found.require(size % block == 0, f"hadamard={block} does not divide {size}")
        reason = f"sparse={options.sparse} takes groups of {4 * unit}, it has {size} inputs"
        found.require(fits(size, unit), reason)

    def require_untouched(self, found: Match, x: fx.Node) -> None:
        """Refuse what a rewrite before made."""
        found.require(x.target not in ROUNDINGS, "its input is rounded already")

    def pack(self, build: Builder, weight: fx.Node, *, transposed: bool = False) -> PackedWeight:
        """A constant [..., N, K], or [..., K, N], as codes; once for all who share it."""
        value, form = build.program.weight(weight), self.options.form(self.options.weight_bits)
        assert form is not None, "asked for at 16 bits"
        value = value.transpose(-1, -2) if transposed else value
        block = hadamard_block(int(value.shape[-1]), self.options.hadamard)
        found: PackedWeight = self.context.once(
            value, (form, block), lambda: pack_weight(value, form, block)
        )
        return found

    def rewritten(
        self, build: Builder, weight: fx.Node, *, transposed: bool = False, back: bool = True
    ) -> tuple[fx.Node, dict[str, Any]]:
        """A weight [..., N, K] of few bits, packed or rounded on the way, and its metrics.

        Args:
            build: Where to insert.
            weight: A constant.
            transposed: It is [..., K, N]; the result is [..., N, K] all the same.
            back: In the original basis.
        """
        options = self.options
        if options.packs:
            packed = self.pack(build, weight, transposed=transposed)
            node = packed.emit(build, str(weight.target), weight.meta["val"].dtype, back=back)
            value = build.program.weight(weight)
            return node, packed.metrics(value.transpose(-1, -2) if transposed else value)
        if transposed:
            weight = build.shared(aten.transpose.int, weight, -1, -2)
        block = hadamard_block(int(weight.meta["val"].shape[-1]), options.hadamard)
        form = options.form(options.weight_bits)
        return self.round(build, weight, form, options.weight_bits, back), {"block": block}

    def round(
        self, build: Builder, x: fx.Node, form: Form | None, bits: int, back: bool,
        widen: bool = False,
    ) -> fx.Node:  # fmt: skip
        """A value [..., K] rotated and rounded; at 16 bits only rotated."""
        block = hadamard_block(int(x.meta["val"].shape[-1]), self.options.hadamard)
        return prepared(build, x, block, form, self.options.bound(bits), back=back, widen=widen)

    def fused(self, build: Builder, x: fx.Node, packed: tuple[Any, ...]) -> fx.Node:
        """The product of an input, not yet rotated, with codes, step, bias, bits and group."""
        options = self.options
        if options.act_bits == 16:
            return build(quant_linear.overload, self.input(build, x), *packed)
        block = hadamard_block(int(x.meta["val"].shape[-1]), options.hadamard)
        return code_product(build, x, block, options.act_bits, options.widens, packed)

    def input(self, build: Builder, x: fx.Node, *, back: bool = False) -> fx.Node:
        """What a product of rounded weights reads."""
        options, bits = self.options, self.options.act_bits
        return self.round(build, x, options.operand(bits), bits, back, options.widens)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of a site of several weights: bytes added up, the worst of the rest."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            before = found.get(key, value)
            if key.startswith("bytes"):
                found[key] = found.get(key, 0) + value
            else:
                found[key] = min(before, value) if isinstance(value, int | float) else value
    return found
