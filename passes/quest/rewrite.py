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

With `act-bits`, integers meet integers: %3 is resplice.quest_codes(%2, act-bits, 128), codes and
steps, and %6 resplice.code_linear. With `mode=qat` the weight stays and both are rounded on the
way: linear(quest_quantize(%2, ...), quest_quantize(weight, ...)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, Self

import torch
from torch import Tensor, fx

from resplice.build import Builder
from resplice.change import Change
from resplice.compare import sqnr_db
from resplice.context import Context
from resplice.errors import SpecError
from resplice.facts import Canonical, FloatWeights
from resplice.kernels.gaussian_grid import expected_error, expected_sqnr_db
from resplice.kernels.hadamard import hadamard
from resplice.kernels.quant_linear import BITS, quant_linear
from resplice.kernels.quest_quantize import rounded
from resplice.pass_base import Approx, Exact, Meaning, Pass, option
from resplice.passes.quest.integers import code_product
from resplice.passes.quest.roles import feeds_embedding, follows_activation, role_of
from resplice.passes.quest.weights import Block, QuantizedWeight, hadamard_block, quantize_weight
from resplice.pattern import Match, Var, aten, either
from resplice.program import Program
from resplice.rules import Rule, apply_rules

_FAR_OFF_DB = 2.0


@dataclass(frozen=True)
class Quest(Pass):
    """Linear layers in few bits: weights, and activations if asked for.

    Finds `linear`, `addmm` (GPT-2's Conv1D) and `matmul` by constant matrices. Left alone, with
    the reason in the report: the output head (a linear layer whose result is returned), routers
    (whose result is ranked), weights tied to an embedding, and names matching `skip`.
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
    hadamard: Block = option("auto", "input-side rotation: auto, off, or a block size")
    head: bool = option(False, "also quantise the head, routers and readers of tied embeddings")
    skip: tuple[str, ...] = option((), "weight-name patterns to leave alone, such as *.down_proj.*")

    @property
    def meaning(self) -> Meaning:
        """At most twice the error of Gaussian theory; half its dB where rotation is off.

        Measured on SmolLM2-135M at 4 bits: 16.2 to 19.4 dB per site, theory 19.4.
        """
        if self.weight_bits == self.act_bits == 16:
            return Exact()
        theory = expected_sqnr_db(min(self.weight_bits, self.act_bits))
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
        if self.clip < 0:
            raise SpecError(f"quest: clip={self.clip} must be 0 or positive")
        if isinstance(block, int) and (block < 1 or block & (block - 1)):
            raise SpecError(f"quest: hadamard={block} is not a power of two")

    @property
    def packs(self) -> bool:
        """Whether weights become codes."""
        return self.mode == "ptq" and self.weight_bits < 16

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
        rules = [_QuantizeLinear(self, context), _QuantizeMatmul(self, context)]
        change = apply_rules(program, rules, context, self.name)
        if self.packs:
            _sum_up(change)
        if self.packs and self.act_bits <= 2:
            error = expected_error(self.weight_bits, self.act_bits)
            change.notes.append(
                f"WARNING: expect a relative error of {error:.2f} in every layer from "
                f"W{self.weight_bits}A{self.act_bits} after training; train it with mode=qat"
            )
        return change


def _sum_up(change: Change) -> None:
    far = [s.node for s in change.sites if _is_far_off(s.metrics)]
    if far:
        change.notes.append(
            f"{len(far)} weights err {_FAR_OFF_DB:.0f} dB more than Gaussian theory: "
            f"{', '.join(far[:8])}"
        )
    saved = sum(s.metrics["bytes_before"] - s.metrics["bytes_after"] for s in change.sites)
    change.notes.append(f"{change.count} weights, {saved / 2**20:.1f} MiB saved")


def _is_far_off(metrics: dict[str, Any]) -> bool:
    measured, theory = float(metrics.get("sqnr_db", math.inf)), float(metrics["theory_db"])
    return measured < theory - _FAR_OFF_DB


def _constant_matrix(value: Any) -> str | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return "it is computed, not a constant of the program"
    weight = value.meta["val"]
    return None if weight.dim() == 2 and weight.is_floating_point() else "it is no float matrix"


_X, _W, _B = Var("x"), Var("weight", _constant_matrix), Var("bias")


class _QuantizeLinear(Rule):
    """`linear(x, W, bias)` with W [N, K]."""

    name = "linear"
    transposed = False

    def __init__(self, options: Quest, context: Context) -> None:
        self.options, self.context = options, context

    def pattern(self) -> Any:
        return aten.linear(_X, _W, _B)

    def check(self, found: Match) -> None:
        weight, options = found.node("weight"), self.options
        done = found.node("x").target is rounded.overload
        found.require(not done, "its input is rounded already")
        name = str(weight.target)
        outputs = weight.meta["val"].shape[1 if self.transposed else 0]
        bias = found["bias"]
        plain = bias is None or tuple(bias.meta["val"].shape) == (outputs,)
        found.require(plain, "what it adds is no bias of one value per output")
        for skipped in options.skip:
            found.require(not fnmatch(name, skipped), f"{name} matches skip={skipped}")
        if not options.head:
            role = role_of(found.root)
            found.require(role is None, f"it is {role} (head=true includes it)")
            found.require(not feeds_embedding(weight), "its weight is an embedding table")
        if isinstance(options.hadamard, int):
            size = weight.meta["val"].shape[0 if self.transposed else 1]
            found.require(
                size % options.hadamard == 0, f"hadamard={options.hadamard} does not divide {size}"
            )

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        return self._packed(found, build) if self.options.packs else self._trained(found, build)

    def _packed(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        node, options = found.node("weight"), self.options
        original, name = build.program.weight(node), str(node.target)
        weight = original.t() if self.transposed else original
        signs = self._signs(found, weight.shape[1])
        quantized = self.context.once(
            weight,
            (options.weight_bits, options.group, options.hadamard, signs is None),
            lambda: quantize_weight(
                weight if signs is None else weight * signs,
                options.weight_bits, group=options.group, hadamard=options.hadamard,
            ),
        )  # fmt: skip
        x = _flipped(build, found.node("x"), signs)
        packed = (
            build.weight(f"{name}_codes", quantized.codes),
            build.weight(f"{name}_step", quantized.step),
            found["bias"], quantized.bits, quantized.group,
        )  # fmt: skip
        if options.act_bits < 16:
            new = code_product(build, x, quantized.block, options.act_bits, packed)
        else:
            x = _prepared(build, x, quantized.block, 16, options)
            new = build(quant_linear.overload, x, *packed)
        return new, _metrics(weight if signs is None else weight * signs, quantized)

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
            weight = _once(build, torch.ops.aten.transpose.int, (weight, -1, -2))
        size = int(weight.meta["val"].shape[-1])
        block, signs = hadamard_block(size, options.hadamard), self._signs(found, size)
        weight = _flipped(build, weight, signs)
        weight = _prepared(build, weight, block, options.weight_bits, options)
        x = _flipped(build, found.node("x"), signs)
        x = _prepared(build, x, block, options.act_bits, options)
        return build(torch.ops.aten.linear.default, x, weight, found["bias"]), {"block": block}

    def _narrowed(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        """The same operator on rounded activations, the weight as it is."""
        x, options = found.node("x"), self.options
        block = hadamard_block(int(x.meta["val"].shape[-1]), options.hadamard)
        bits = options.act_bits
        narrow = _once(build, rounded.overload, (x, bits, block, *options.bound(bits), True))
        args = [narrow if arg is x else arg for arg in found.root.args]
        return build(found.root.target, *args, **found.root.kwargs), {"block": block}


class _QuantizeMatmul(_QuantizeLinear):
    """`addmm(bias, x, W)`, `matmul(x, W)` and `mm(x, W)` with W [K, N]."""

    name = "matmul"
    transposed = True

    def pattern(self) -> Any:
        return either(aten.addmm(_B, _X, _W), aten.matmul(_X, _W), aten.mm(_X, _W))


def _metrics(weight: Tensor, quantized: QuantizedWeight) -> dict[str, Any]:
    quality = sqnr_db(weight.float(), quantized.dequantize())
    measured = {"sqnr_db": quality} if math.isfinite(quality) else {"note": "the weight is zero"}
    return {
        **measured,
        "theory_db": expected_sqnr_db(quantized.bits),
        "bytes_before": weight.nbytes,
        "bytes_after": quantized.nbytes,
        "block": quantized.block,
    }


def _flipped(build: Builder, x: fx.Node, signs: Tensor | None) -> fx.Node:
    if signs is None:
        return x
    constant = build.constant(f"quest.signs_{len(signs)}", signs)
    return build(torch.ops.aten.mul.Tensor, x, constant)


def _prepared(build: Builder, x: fx.Node, block: int, bits: int, options: Quest) -> fx.Node:
    """`x` rotated and, below 16 bits, rounded; made once for all of its readers."""
    if bits < 16:
        return _once(build, rounded.overload, (x, bits, block, *options.bound(bits), False))
    return x if block == 1 else _once(build, hadamard.overload, (x, block))


def _once(build: Builder, target: Any, args: tuple[Any, ...]) -> fx.Node:
    users: list[fx.Node] = list(args[0].users)
    for user in users:
        if user.target is target and user.args == args and user < build.before:
            return user
    return build(target, *args)
