"""Convolutions in few bits: rows are output channels, folded to inputs times kernel.

QuEST does not cover them. Where kernel and stride are equal (patch embeddings, 1x1) the layer is a
linear one over patches, so it gets everything a linear layer gets:

    %2 = aten.conv2d(%1, weight, bias, [p, p])
      ->
    %2 = patches of %1: [b,h,w,c*p*p];  %3 = resplice.quant_linear(hadamard(%2), ...);  %4 = permute

Elsewhere patches overlap, and rotating each of them would cost more than it saves: the weight alone
is rounded, along its folded rows, and rotated back; activations keep their precision.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.build import Builder
from resplice.kernels.level_sets import bits_of
from resplice.passes.quest.packed import PackedWeight, pack_weight
from resplice.passes.quest.site import QuestRule
from resplice.passes.quest.weights import hadamard_block
from resplice.pattern import ANY, Match, Var, argument, either
from resplice.pattern import aten as term

aten = torch.ops.aten
_FEWEST = 16
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _constant_kernel(value: Any) -> str | None:
    stored = isinstance(value, fx.Node) and value.op == "get_attr"
    return None if stored else "it is computed, not a constant of the program"


class QuantizeConvolution(QuestRule):
    """`conv1d`, `conv2d`, `conv3d` with a constant kernel [out, in/groups, ...]."""

    name = "convolution"

    def pattern(self) -> Any:
        """The calls, with their constants."""
        ends = (Var("x"), Var("weight", _constant_kernel), Var("bias"))
        plain = (term.conv1d, term.conv2d, term.conv3d)
        turned = [getattr(term, name)(*ends, *[ANY] * 5) for name in _TRANSPOSED]
        return either(*(one(*ends, *[ANY] * 4) for one in plain), *turned)

    def check(self, found: Match) -> None:
        """What is refused, with the reason."""
        weight, name = found.node("weight"), str(found.root.target)
        transposed = any(kind in name for kind in _TRANSPOSED)
        found.require(not transposed, "a transposed convolution has no row per output")
        self.require_untouched(found, found.node("x"))
        size = weight.meta["val"][0].numel()
        few = f"its rows have {size} weights: a step for each saves little"
        found.require(size >= _FEWEST, few)
        self.require_weight(found, weight, size)
        rounds = self.options.weight_bits < 16 or _is_patchwise(found.root)
        found.require(rounds, "activations of overlapping patches keep their precision")

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """The same on few bits."""
        if _is_patchwise(found.root):
            return self._over_patches(found, build)
        weight, packed = found.node("weight"), self._packed(found, build)
        if packed is None:
            form, bits = self.options.form(self.options.weight_bits), self.options.weight_bits
            held, metrics = self.round(build, self._rows(build, weight), form, bits, True), {}
        else:
            held = packed.emit(build, str(weight.target), weight.meta["val"].dtype, back=True)
            metrics = packed.metrics(build.program.weight(weight).flatten(1))
        held = build.reshape(held, list(weight.meta["val"].shape))
        args = [held if arg is weight else arg for arg in found.root.args]
        return build(found.root.target, *args, **found.root.kwargs), metrics

    def _over_patches(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """linear(patches, W) in place of the convolution."""
        weight, bias, packed = found.node("weight"), found["bias"], self._packed(found, build)
        patches, metrics = _patches(build, found.node("x"), weight), dict[str, Any]()
        bits = self.options.weight_bits
        if packed is None:
            held, form = self._rows(build, weight), self.options.form(bits)
            held = held if form is None else self.round(build, held, form, bits, False)
            x = self.input(build, patches, back=form is None)
            made = build(aten.linear.default, x, held, bias)
        else:
            made = self._product(build, patches, packed, weight, bias)
            metrics = packed.metrics(build.program.weight(weight).flatten(1))
        rank = made.meta["val"].dim()
        return build(aten.permute.default, made, [0, rank - 1, *range(1, rank - 1)]), metrics

    def _product(
        self, build: Builder, x: fx.Node, packed: PackedWeight, weight: fx.Node,
        bias: fx.Node | None,
    ) -> fx.Node:  # fmt: skip
        name, form = str(weight.target), packed.form
        if not form.plain:
            held = packed.emit(build, name, weight.meta["val"].dtype)
            return build(aten.linear.default, self.input(build, x), held, bias)
        codes = build.weight(f"{name}_codes", packed.codes)
        step = build.weight(f"{name}_step", packed.step)
        return self.fused(build, x, (codes, step, bias, bits_of(form.levels), form.group))

    def _packed(self, found: Match, build: Builder) -> PackedWeight | None:
        """The kernel's rows as codes; None where they stay."""
        form = self.options.form(self.options.weight_bits)
        if not self.options.packs or form is None:
            return None
        rows = build.program.weight(found.node("weight")).flatten(1)
        block = hadamard_block(int(rows.shape[1]), self.options.hadamard)
        made: PackedWeight = self.context.once(
            rows, (form, block), lambda: pack_weight(rows, form, block)
        )
        return made

    def _rows(self, build: Builder, weight: fx.Node) -> fx.Node:
        return build.shared(aten.flatten.using_ints, weight, 1)


def _is_patchwise(node: fx.Node) -> bool:
    """Whether every input value belongs to one patch, and all patches are whole."""
    x, weight = (arg.meta["val"] for arg in node.args[:2] if isinstance(arg, fx.Node))
    kernel = list(weight.shape[2:])
    if x.dim() != weight.dim() or argument(node, "groups") != 1:
        return False
    stride, padding, dilation = (
        _each(argument(node, name), len(kernel)) for name in ("stride", "padding", "dilation")
    )
    if isinstance(argument(node, "padding"), str) and argument(node, "padding") != "valid":
        return False
    plain = all(v == 0 for v in padding) and all(
        d == 1 or k == 1 for d, k in zip(dilation, kernel, strict=True)
    )
    whole = all(
        k == 1 or statically_known_true(size % k == 0)
        for size, k in zip(x.shape[2:], kernel, strict=True)
    )
    return stride == kernel and plain and whole


def _each(value: Any, count: int) -> list[Any]:
    if isinstance(value, str):
        return [0] * count
    items = list(value) if isinstance(value, list | tuple) else [value]
    return items * count if len(items) == 1 else items


def _patches(build: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
    """[b, c, s1, ...] -> [b, s1/p1, ..., c*p1*...], in the order of the kernel's rows."""
    channels, *kernel = weight.meta["val"].shape[1:]
    batch, _, *spatial = build.sizes(x)
    counts = [_whole(build, size, k) for size, k in zip(spatial, kernel, strict=True)]
    split, places, inner, axis = [batch, channels], [], [1], 2
    for count, k in zip(counts, kernel, strict=True):
        split.append(count)
        places.append(axis)
        axis += 1
        if k > 1:
            split.append(k)
            inner.append(axis)
            axis += 1
    cut = x if all(k == 1 for k in kernel) else build.reshape(x, split)
    turned = build(aten.permute.default, cut, [0, *places, *inner])
    return build.reshape(turned, [batch, *counts, weight.meta["val"][0].numel()])


def _whole(build: Builder, size: Any, k: int) -> Any:
    if k == 1 or isinstance(size, int):
        return size // k if isinstance(size, int) else size
    return build(operator.floordiv, size, k)
