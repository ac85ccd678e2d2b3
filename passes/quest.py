"""quest: linear weights as packed 1, 2, 3, 4 or 8-bit codes, post-training.

Source: Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
arXiv 2502.05003: block Hadamard, root-mean-square scale, Gaussian-optimal mid-rise grid.

    %3 = weight("mlp.up.weight"): f32[N,K]
    %4 = aten.linear(%2, %3)
      ->
    %3 = resplice.hadamard(%2, 128)                       (shared by every reader of %2)
    %4 = weight("mlp.up.weight_codes"): u8[N,K/2]
    %5 = weight("mlp.up.weight_step"): f32[N,1]
    %6 = resplice.quant_linear(%3, %4, %5, None, 4, 0)
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
from resplice.errors import OpError, SpecError
from resplice.facts import Canonical, FloatWeights
from resplice.kernels.gaussian_grid import expected_sqnr_db, grid_step, to_codes
from resplice.kernels.hadamard import hadamard, largest_block
from resplice.kernels.packing import pack
from resplice.kernels.quant_linear import BITS, dequantize, quant_linear
from resplice.pass_base import Approx, Exact, Meaning, Pass, option
from resplice.pattern import Match, Var, aten, either
from resplice.program import Program
from resplice.rules import Rule, apply_rules

_ROWS_AT_ONCE = 1 << 22
_USEFUL_BLOCK = 16

Block = Literal["auto", "off"] | int


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as packed codes.

    Attributes:
        codes: uint8 [N, ceil(K*bits/8)].
        step: float32 [N, groups], the distance between levels.
        bits: Bits per weight.
        group: Weights per step along K; 0 means the whole row.
        block: Order of the Hadamard transform applied along K; 1 means none.
        size: K.
    """

    codes: Tensor
    step: Tensor
    bits: int
    group: int
    block: int
    size: int

    def dequantize(self) -> Tensor:
        """The weight these codes stand for, in the original basis: float32 [N, K]."""
        rotated = dequantize(self.codes, self.step, self.bits, self.group, self.size)
        return hadamard(rotated, self.block) if self.block > 1 else rotated

    @property
    def nbytes(self) -> int:
        """Bytes of codes and steps."""
        return self.codes.nbytes + self.step.nbytes


def quantize_weight(
    weight: Tensor, bits: int, *, group: int = 0, hadamard: Block = "auto"
) -> QuantizedWeight:
    """Quantise a weight matrix after training; needs no data.

    Args:
        weight: Floating point [N, K]; rows are output channels.
        bits: 1, 2, 3, 4 or 8.
        group: Weights per scale along K; 0 means one scale per row.
        hadamard: "auto" (the largest power of two dividing K, at most 128), "off", or a block.

    Returns:
        Codes and steps; `dequantize()` gives the rounded weight back.

    Raises:
        OpError: An argument is out of range.
    """
    if bits not in BITS:
        raise OpError("quantize_weight", "bits", f"is {bits}, not one of {BITS}")
    if group < 0:
        raise OpError("quantize_weight", "group", f"is {group}, must be 0 or positive")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise OpError(
            "quantize_weight",
            "weight",
            f"must be a float matrix, is {weight.dtype} {list(weight.shape)}",
        )
    size, block = int(weight.shape[1]), hadamard_block(int(weight.shape[1]), hadamard)
    rows = max(1, _ROWS_AT_ONCE // size)
    parts = [_quantize_rows(part, bits, group, block) for part in weight.detach().split(rows)]
    codes, steps = (torch.cat(column) for column in zip(*parts, strict=True))
    return QuantizedWeight(codes, steps, bits, group, block, size)


def hadamard_block(size: int, wanted: Block) -> int:
    """The transform's order for rows of `size`; 1 means none.

    Raises:
        OpError: A wanted block does not divide the size.
    """
    if wanted == "off":
        return 1
    if wanted == "auto":
        block = largest_block(size)
        return block if block >= _USEFUL_BLOCK else 1
    if wanted < 1 or wanted & (wanted - 1) or size % wanted:
        raise OpError(
            "quantize_weight", "hadamard", f"is {wanted}: not a power of two dividing {size}"
        )
    return wanted


def _quantize_rows(weight: Tensor, bits: int, group: int, block: int) -> tuple[Tensor, Tensor]:
    values = weight.float()
    values = hadamard(values.contiguous(), block) if block > 1 else values
    if group == 0:
        step = grid_step(values, bits)
        return pack(to_codes(values, step, bits), bits), step
    pieces = values.split(group, dim=-1)  # the last one may be shorter
    steps = [grid_step(piece, bits) for piece in pieces]
    codes = [to_codes(p, s, bits) for p, s in zip(pieces, steps, strict=True)]
    return pack(torch.cat(codes, -1), bits), torch.cat(steps, -1)


@dataclass(frozen=True)
class Quest(Pass):
    """Post-training quantisation of linear weights to few bits.

    Finds `linear`, `addmm` (GPT-2's Conv1D) and `matmul` by constant matrices. Left alone, with
    the reason in the report: the output head (a linear layer whose result is returned), routers
    (whose result is ranked), weights tied to an embedding, and names matching `skip`.
    """

    name = "quest"
    needs = (Canonical, FloatWeights)
    destroys = (FloatWeights,)

    weight_bits: int = option(4, "bits per weight; 16 changes nothing", choices=(*BITS, 16))
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
        if self.weight_bits == 16:
            return Exact()
        theory = expected_sqnr_db(self.weight_bits)
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
        if isinstance(block, int) and (block < 1 or block & (block - 1)):
            raise SpecError(f"quest: hadamard={block} is not a power of two")

    @classmethod
    def identity(cls) -> Self:
        """16 bits."""
        return cls(weight_bits=16)

    def run(self, program: Program, context: Context) -> Change:
        """Replace weights one at a time; a replaced weight is released at once."""
        if self.weight_bits == 16:
            return Change(notes=["16 bits: nothing to do"])
        rules = [_QuantizeLinear(self, context), _QuantizeMatmul(self, context)]
        change = apply_rules(program, rules, context, self.name)
        saved = sum(s.metrics["bytes_before"] - s.metrics["bytes_after"] for s in change.sites)
        change.notes.append(f"{change.count} weights, {saved / 2**20:.1f} MiB saved")
        return change


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
        name = str(weight.target)
        outputs = weight.meta["val"].shape[1 if self.transposed else 0]
        bias = found["bias"]
        plain = bias is None or tuple(bias.meta["val"].shape) == (outputs,)
        found.require(plain, "what it adds is no bias of one value per output")
        for skipped in options.skip:
            found.require(not fnmatch(name, skipped), f"{name} matches skip={skipped}")
        if not options.head:
            role = _role(found.root)
            found.require(role is None, f"it is {role} (head=true includes it)")
            found.require(not _feeds_embedding(weight), "its weight is an embedding table")
        if isinstance(options.hadamard, int):
            size = weight.meta["val"].shape[0 if self.transposed else 1]
            found.require(
                size % options.hadamard == 0, f"hadamard={options.hadamard} does not divide {size}"
            )

    def rewrite(self, found: Match, build: Builder) -> tuple[fx.Node, dict[str, Any]]:
        node, options = found.node("weight"), self.options
        original, name = build.program.weight(node), str(node.target)
        weight = original.t() if self.transposed else original
        quantized = self.context.once(
            weight,
            (options.weight_bits, options.group, options.hadamard),
            lambda: quantize_weight(
                weight, options.weight_bits, group=options.group, hadamard=options.hadamard
            ),
        )
        x = _rotated(build, found.node("x"), quantized.block)
        codes = build.weight(f"{name}_codes", quantized.codes)
        step = build.weight(f"{name}_step", quantized.step)
        new = build(
            quant_linear.overload, x, codes, step, found["bias"], quantized.bits, quantized.group
        )
        return new, _metrics(weight, quantized)


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


def _rotated(build: Builder, x: fx.Node, block: int) -> fx.Node:
    """The Hadamard transform of `x`, made once for all of its readers."""
    if block == 1:
        return x
    for user in x.users:
        if user.target is hadamard.overload and user.args == (x, block) and user < build.before:
            return user
    return build(hadamard.overload, x, block)


def _role(node: fx.Node) -> str | None:
    """What the result is for, if it only passes through one-input ops (casts, views, soft-caps)."""
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if user.op == "output":
                return "the output head"
            if user.target is torch.ops.aten.topk.default:
                return "a router"
            if len([n for n in user.all_input_nodes if _is_tensor(n)]) == 1:
                frontier.append(user)
    return None


def _feeds_embedding(weight: fx.Node) -> bool:
    readers = (user for user in weight.users)
    return any(user.target is torch.ops.aten.embedding.default for user in readers)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
