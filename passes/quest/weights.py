"""Weight matrices as packed codes, after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.kernels.gaussian_grid import grid_step, to_codes
from resplice.kernels.hadamard import hadamard, largest_block
from resplice.kernels.packing import pack
from resplice.kernels.quant_linear import BITS, dequantize

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
    parts = [codes_of_rows(part, bits, group, block) for part in weight.detach().split(rows)]
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


def codes_of_rows(weight: Tensor, bits: int, group: int, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes and steps of a matrix, rotated by a known block; 1 is none."""
    values = weight.float()
    values = hadamard(values.contiguous(), block) if block > 1 else values
    if group == 0:
        step = grid_step(values, bits)
        return pack(to_codes(values, step, bits), bits), step
    pieces = values.split(group, dim=-1)  # the last one may be shorter
    steps = [grid_step(piece, bits) for piece in pieces]
    codes = [to_codes(p, s, bits) for p, s in zip(pieces, steps, strict=True)]
    return pack(torch.cat(codes, -1), bits), torch.cat(steps, -1)
