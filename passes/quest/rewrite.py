"""quest: linear layers in 1, 2, 3, 4 or 8 bits, after training or trained with the rounding.

Source: Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
arXiv 2502.05003: block Hadamard, root-mean-square scale, Gaussian-optimal mid-rise grid.

    %3 = weight("mlp.up.weight"): f32[N,K]
    %4 = aten.linear(%2, %3)
      ->
    %3 = resplice.hadamard(%2, 128)                       (shared by every reader of %2)
    %4 = weight("mlp.up.weight_codes"): u8[N,K/2]
    %5 = weight("mlp.up.weight_step"): f32[N,1]
    %6 = resplice.quant_linear(%3, %4, %5, None, 4, 0)

With `act-bits`, %3 is rounded as well: resplice.quest_quantize(%2, act-bits, 128, ...). With
`mode=qat` the weight stays, and is rounded on the way: linear(%3, quest_quantize(weight, ...)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, fx

from resplice.build import Builder
from resplice.change import Change
from resplice.context import Context
from resplice.errors import SpecError
from resplice.facts import Canonical, FloatWeights
from resplice.kernels.gaussian_grid import expected_error
from resplice.kernels.level_sets import bits_of
from resplice.kernels.pruning import UNITS
from resplice.kernels.quant_linear import BITS
from resplice.pass_base import Approx, Exact, Meaning, Pass, option
from resplice.passes.quest.convolutions import QuantizeConvolution
from resplice.passes.quest.experts import QuantizeExperts, QuantizeStack, refuse_stacks
from resplice.passes.quest.inputs import flipped, once
from resplice.passes.quest.packed import Form, PackedWeight, pack_weight
from resplice.passes.quest.quality import OutputErrors, sum_up, weight_metrics
from resplice.passes.quest.roles import feeds_embedding, follows_activation, role_of
from resplice.passes.quest.site import QuestRule
from resplice.passes.quest.weights import Block, QuantizedWeight, hadamard_block, quantize_weight
from resplice.pattern import Match, Var, aten, either
from resplice.program import Program
from resplice.rules import Rule, apply_rules

_NEEDS_TRAINING = 0.35
"""Expected relative error of a layer past which rounding after training is worth a warning."""


@dataclass(frozen=True)
class Quest(Pass):
    """Linear layers in few bits: weights, and activations if asked for.

    Finds `linear`, `addmm` (GPT-2's Conv1D), `matmul` by constant matrices or stacks of them, the
    experts of `moe_ffn`, and convolutions if asked. Left alone, with the reason in the report: the
    output head (a linear layer whose result is returned), routers (whose result is ranked), weights
    tied to an embedding, and names matching `skip`. A block that does not divide a layer's inputs
    is refused there; `auto` takes the largest one that does.
    """

    name = "quest"
    needs = (Canonical, FloatWeights)
    destroys = (FloatWeights,)

    weight_bits: int = option(4, "bits per weight; 16 changes nothing", choices=(*BITS, 16))
    act_bits: int = option(16, "bits per activation; 16 leaves them", choices=(*BITS, 16))
    mode: Literal["ptq", "qat"] = option(
        "ptq", "packed weights, or weights that train with the rounding", choices=("ptq", "qat")
    )
    signs: bool = option(
        False, "flip inputs that follow an un-gated activation by random signs before the rotation"
    )
    clip: float = option(
        0.0, "gradients pass up to this multiple of the outermost level (qat); 0: the paper's"
    )
    group: int = option(
        0, "weights per scale along the input axis; 0: one scale per output channel"
    )
    sparse: Literal["off", "2:4", "4:8"] = option(
        "off",
        "prune half of the weights: the smaller of four, or of four pairs",
        choices=tuple(UNITS),
    )
    format: Literal["int", "fp4"] = option(
        "int",
        "levels of 4-bit operands: the integer grid, or those of E2M1",
        choices=("int", "fp4"),
    )
    hadamard: Block = option("auto", "input-side rotation: auto, off, or a block size")
    head: bool = option(False, "also quantise the head, routers and readers of tied embeddings")
    convs: bool = option(False, "also convolutions, folded to matrices of inputs times kernel")
    outliers: Literal["auto", "clip", "keep"] = option(
        "auto",
        "rows of activations that reach past 1.25 times the clip: clip them as the paper does, or "
        "keep them by a wider grid; auto keeps them at 8 bits after training",
        choices=("auto", "clip", "keep"),
    )
    skip: tuple[str, ...] = option((), "weight-name patterns to leave alone, such as *.down_proj.*")

    @property
    def meaning(self) -> Meaning:
        """At most twice the error of Gaussian theory; half its dB where rotation is off.

        Measured on SmolLM2-135M at 4 bits: 16.2 to 19.4 dB per site, theory 19.4.
        """
        if self.weight_bits == self.act_bits == 16:
            return Exact()
        forms = [self.form(self.weight_bits), self.operand(self.act_bits)]
        kept = math.prod(1 - 10 ** (-form.expected_db / 10) for form in forms if form is not None)
        theory = -10 * math.log10(1 - kept)
        return Approx(theory / 2 if self.hadamard == "off" else theory - 20 * math.log10(2))

    def __post_init__(self) -> None:
        """Validate what needs no model.

        Raises:
            SpecError: The group is negative, or the block is no power of two.
        """
        super().__post_init__()
        block = self.hadamard
        if self.group < 0:
            raise SpecError(f"quest: group={self.group} must be 0 or positive")
        if self.group and self.mode == "qat":
            raise SpecError("quest: mode=qat has one scale per row, group must be 0")
        if self.sparse != "off" and self.weight_bits == 16:
            raise SpecError(f"quest: sparse={self.sparse} prunes weights of few bits, not of 16")
        widths = (self.weight_bits, self.act_bits)
        if self.format == "fp4" and (4 not in widths or self.weight_bits not in (4, 16)):
            raise SpecError("quest: format=fp4 has 4 bits, so weight-bits must be 4")
        if self.clip < 0:
            raise SpecError(f"quest: clip={self.clip} must be 0 or positive")
        if isinstance(block, int) and (block < 1 or block & (block - 1)):
            raise SpecError(f"quest: hadamard={block} is not a power of two")

    @property
    def packs(self) -> bool:
        """Whether weights become codes."""
        return self.mode == "ptq" and self.weight_bits < 16

    @property
    def widens(self) -> bool:
        """Whether rows of activations with outliers get a wider grid."""
        auto = self.act_bits == 8 and self.mode == "ptq"
        return auto if self.outliers == "auto" else self.outliers == "keep"

    def form(self, bits: int) -> Form | None:
        """How weights of that many bits are stored; None at 16."""
        found = self.operand(bits)
        return found and replace(found, unit=UNITS[self.sparse], group=self.group)

    def operand(self, bits: int) -> Form | None:
        """How activations of that many bits are rounded; None at 16."""
        if bits == 16:
            return None
        return Form("fp4" if self.format == "fp4" and bits == 4 else f"int{bits}")

    def bound(self, bits: int) -> tuple[float, str]:
        """The gradient's clip and estimator: trust, at one bit the narrower bound of the paper."""
        if self.clip:
            return self.clip, "clip"
        if bits > 1:
            return 0.0, "trust"
        return (1.25 if self.hadamard == "off" else 1.30), "clip"

    @classmethod
    def identity(cls) -> Self:
        """16 bits."""
        return cls(weight_bits=16)

    def run(self, program: Program, context: Context) -> Change:
        """Replace weights one at a time; a replaced weight is released at once."""
        if self.weight_bits == self.act_bits == 16:
            return Change(notes=["16 bits: nothing to do"])
        errors = OutputErrors(program, context.calibration)
        rules: list[Rule] = [
            _QuantizeLinear(self, context, errors),
            _QuantizeMatmul(self, context, errors),
            QuantizeExperts(self, context),
            QuantizeStack(self, context),
        ]
        rules += [QuantizeConvolution(self, context)] if self.convs else []
        change = apply_rules(program, rules, context, self.name)
        if self.weight_bits < 16:
            refuse_stacks(program, change)
        sum_up(change)
        error = expected_error(self.weight_bits, self.act_bits)
        if self.mode == "ptq" and error > _NEEDS_TRAINING and change.count:
            change.notes.insert(
                0,
                f"WARNING: expect a relative error of {error:.2f} in every layer from "
                f"W{self.weight_bits}A{self.act_bits} after training; train it with mode=qat",
            )
        return change


def _constant_matrix(value: Any) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return "it is computed, not a constant of the program"
    weight = value.meta["val"]
    return None if weight.dim() == 2 and weight.is_floating_point() else "it is no float matrix"


_X, _W, _B = Var("x"), Var("weight", _constant_matrix), Var("bias")


class _QuantizeLinear(QuestRule):
    """`linear(x, W, bias)` with W [N, K]."""

    name = "linear"
    transposed = False

    def __init__(self, options: Quest, context: Context, errors: OutputErrors) -> None:
        super().__init__(options, context)
        self.errors = errors

    def pattern(self) -> Any:
        return aten.linear(_X, _W, _B)

    def check(self, found: Match) -> None:
        weight = found.node("weight")
        self.require_untouched(found, found.node("x"))
        outputs, size = weight.meta["val"].shape[:: -1 if self.transposed else 1]
        bias = found["bias"]
        plain = bias is None or tuple(bias.meta["val"].shape) == (outputs,)
        found.require(plain, "what it adds is no bias of one value per output")
        self.require_weight(found, weight, size)
        if not self.options.head:
            role = role_of(found.root)
            found.require(role is None, f"it is {role} (head=true includes it)")
            found.require(not feeds_embedding(weight), "its weight is an embedding table")

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        return self._packed(found, build) if self.options.packs else self._trained(found, build)

    def _packed(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        node, options = found.node("weight"), self.options
        original, name = build.program.weight(node), str(node.target)
        weight = original.t() if self.transposed else original
        signs, form = self._signs(found, weight.shape[1]), options.form(options.weight_bits)
        assert form is not None, "packed below 16 bits"
        pack = self._fused if form.plain else self._unfused
        quantized = self.context.once(
            weight,
            (form, options.hadamard, signs is None),
            lambda: pack(weight if signs is None else weight * signs, form),
        )
        x = flipped(build, found.node("x"), signs)
        turned = weight if signs is None else weight * signs
        if form.plain:
            metrics = weight_metrics(turned, quantized, form.expected_db) | self.errors.of(
                found.root, found.node("x"), weight, quantized, options.act_bits, quantized.block,
                options.widens, signs,
            )  # fmt: skip
            packed = (
                build.weight(f"{name}_codes", quantized.codes),
                build.weight(f"{name}_step", quantized.step),
                found["bias"], quantized.bits, quantized.group,
            )  # fmt: skip
            return self.fused(build, x, packed), metrics
        held = quantized.emit(build, name, weight.dtype)
        new = build(torch.ops.aten.linear.default, self.input(build, x), held, found["bias"])
        return new, quantized.metrics(turned)

    def _fused(self, weight: Tensor, form: Form) -> QuantizedWeight:
        bits, block = bits_of(form.levels), self.options.hadamard
        return quantize_weight(weight, bits, group=form.group, hadamard=block)

    def _unfused(self, weight: Tensor, form: Form) -> PackedWeight:
        block = hadamard_block(int(weight.shape[1]), self.options.hadamard)
        return pack_weight(weight, form, block)

    def _signs(self, found: Match, size: int) -> Tensor | None:
        """Random signs [K], the same for every layer of that width; None where not wanted."""
        if not self.options.signs or not follows_activation(found.node("x")):
            return None
        draws = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size))
        return (draws * 2 - 1).to(found.node("weight").meta["val"].dtype)

    def _trained(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """linear(x, W) -> linear(round(x), round(W)), both in the rotated domain."""
        options, weight = self.options, found.node("weight")
        if options.weight_bits == 16:
            return self._narrowed(found, build)
        if self.transposed:
            weight = once(build, torch.ops.aten.transpose.int, (weight, -1, -2))
        size = int(weight.meta["val"].shape[-1])
        block, signs = hadamard_block(size, options.hadamard), self._signs(found, size)
        form = options.form(options.weight_bits)
        weight = flipped(build, weight, signs)
        weight = self.round(build, weight, form, options.weight_bits, False)
        x = self.input(build, flipped(build, found.node("x"), signs))
        return build(torch.ops.aten.linear.default, x, weight, found["bias"]), {"block": block}

    def _narrowed(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """The same operator on rounded activations, the weight as it is."""
        x, options = found.node("x"), self.options
        block = hadamard_block(int(x.meta["val"].shape[-1]), options.hadamard)
        narrow = self.input(build, x, back=True)
        args = [narrow if arg is x else arg for arg in found.root.args]
        new = build(found.root.target, *args, **found.root.kwargs)
        if options.format == "fp4":  # theory is that of the integer grids
            return new, {"block": block}
        original = build.program.weight(found.node("weight"))
        weight = original.t() if self.transposed else original
        errors = self.errors.of(
            found.root, x, weight, None, options.act_bits, block, options.widens
        )
        return new, {"block": block} | errors


class _QuantizeMatmul(_QuantizeLinear):
    """`addmm(bias, x, W)`, `matmul(x, W)` and `mm(x, W)` with W [K, N]."""

    name = "matmul"
    transposed = True

    def pattern(self) -> Any:
        return either(aten.addmm(_B, _X, _W), aten.matmul(_X, _W), aten.mm(_X, _W))
