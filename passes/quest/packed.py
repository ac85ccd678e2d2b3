"""Weights of any rank as packed codes of any form: FP4, pruned, stacked, folded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from resplice.build import Builder
from resplice.kernels.gaussian_grid import expected_sqnr_db
from resplice.kernels.hadamard import hadamard
from resplice.kernels.level_sets import bits_of, encode, expected_mse, step_of
from resplice.kernels.packing import pack
from resplice.kernels.pruning import compress, kept_units
from resplice.kernels.quant_weight import PLACE_BITS, quant_weight
from resplice.passes.quest.quality import weight_metrics

aten = torch.ops.aten
_ROWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Form:
    """How a weight is stored.

    Attributes:
        levels: A key of `level_sets.LEVEL_SETS`.
        unit: 0 is dense; pruned 2:4 is 1, 4:8 is 2 (`pruning.py`).
        group: Weights per step along the input axis; 0 is the whole row.
    """

    levels: str
    unit: int = 0
    group: int = 0

    @property
    def plain(self) -> bool:
        """Whether `quant_linear` holds it."""
        return self.levels != "fp4" and self.unit == 0

    @property
    def expected_db(self) -> float:
        """Signal-to-noise ratio of Gaussian weights, in dB."""
        if self.plain:
            return expected_sqnr_db(bits_of(self.levels))
        return -10 * math.log10(expected_mse(self.levels, self.unit))


@dataclass(frozen=True)
class PackedWeight:
    """A weight [..., N, K] as the constants of `quant_weight`.

    Attributes:
        step: float32 [..., N, groups].
        codes: uint8 [..., N, bytes].
        places: uint8 [..., N, bytes] where pruned, else None.
        form: How it is stored.
        block: Order of the Hadamard transform applied along K before; 1 is none.
        size: K.
    """

    step: Tensor
    codes: Tensor
    places: Tensor | None
    form: Form
    block: int
    size: int

    def rotated(self) -> Tensor:
        """The weight in the basis in which it was rounded: float32."""
        form = self.form
        found: Tensor = quant_weight(
            self.step, self.codes, self.places, form.levels, form.unit, form.group, self.size
        )
        return found

    def dequantize(self) -> Tensor:
        """The weight in the original basis: float32."""
        return self.rotated() if self.block == 1 else hadamard(self.rotated(), self.block)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, places and steps."""
        parts = (self.step, self.codes, self.places)
        return sum(part.nbytes for part in parts if part is not None)

    def metrics(self, weight: Tensor) -> dict[str, Any]:
        """What a report says of the site."""
        return weight_metrics(weight, self, self.form.expected_db)

    def emit(self, build: Builder, name: str, kind: torch.dtype, *, back: bool = False) -> fx.Node:
        """The weight as a node of that dtype; `back` in the original basis."""
        form = self.form
        places = None if self.places is None else build.weight(f"{name}_places", self.places)
        found = build(
            quant_weight.overload, build.weight(f"{name}_step", self.step),
            build.weight(f"{name}_codes", self.codes), places,
            form.levels, form.unit, form.group, self.size,
        )  # fmt: skip
        if back and self.block > 1:
            found = build(hadamard.overload, found, self.block)
        return found if kind == torch.float32 else build(aten._to_copy.default, found, dtype=kind)


def pack_weight(weight: Tensor, form: Form, block: int) -> PackedWeight:
    """Rotate along the last axis, round and pack; needs no data.

    Args:
        weight: Floating point [..., K], K a multiple of `block` and of the groups of `form.unit`.
        form: How to store it.
        block: Order of the Hadamard transform; 1 is none.
    """
    size = int(weight.shape[-1])
    rows = weight.detach().reshape(-1, size).split(max(1, _ROWS_AT_ONCE // size))
    parts = [pack_rows(part, form, block) for part in rows]
    step, codes, places = (
        _joined(column, weight.shape[:-1]) for column in zip(*parts, strict=True)
    )
    assert step is not None
    assert codes is not None
    return PackedWeight(step, codes, places, form, block, size)


def pack_rows(weight: Tensor, form: Form, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps, codes and places of a matrix."""
    values = weight.float()  # as it lies: sums of other strides differ in their last bit
    values = values if block == 1 else hadamard(values.contiguous(), block)
    pieces = values.split(form.group or values.shape[-1], -1)
    steps = [step_of(piece, form.levels) for piece in pieces]
    codes = torch.cat([encode(p, s, form.levels) for p, s in zip(pieces, steps, strict=True)], -1)
    places = None
    if form.unit:
        codes, stood = compress(codes, kept_units(values, form.unit), form.unit)
        places = pack(stood, PLACE_BITS)
    return torch.cat(steps, -1), pack(codes, bits_of(form.levels)), places


def _joined(parts: Iterable[Tensor | None], leading: torch.Size) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given).reshape(*leading, -1) if given else None
