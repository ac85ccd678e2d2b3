"""What tile attention kernels are told: sizes, the table of heads, masks and strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.errors import OpError
from resplice.kernels.cuda.launch import Config, constant, shared_limit
from resplice.kernels.tile_grid import Triple, extent, tile_count, triples

Row = tuple[int, ...]
"""Tile and extent on three axes, and the head."""


@dataclass(frozen=True)
class TileProblem:
    """One call of tile_attention, without its tensors.

    Attributes:
        canvas: T, H, W in tokens.
        table: A row for every head, those with most keys first.
        text: Text tokens.
        text_first: Whether they stand before the image.
        scale: Of the scores.
    """

    canvas: Triple
    table: tuple[Row, ...]
    text: int
    text_first: bool
    scale: float

    @staticmethod
    def of(
        q: Tensor, canvas: Sequence[int], tile: Sequence[int], windows: Sequence[int],
        text_length: int, text_first: bool, scale: float | None,
    ) -> TileProblem:  # fmt: skip
        """The problem of a call; `q` is [B,heads,S,D].

        Raises:
            OpError: The canvas is too large for the kernels' 32-bit numbers.
        """
        (canvas3,) = triples([int(size) for size in canvas])
        if math.prod(canvas3) * max(canvas3) >= 2**31:
            raise OpError("tile_attention", "canvas", f"is {list(canvas)}, too large for a GPU")
        factor = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
        table = head_table(canvas3, tile, windows, int(q.shape[1]))
        return TileProblem(canvas3, table, int(text_length), bool(text_first), factor)

    def blocks(self, size: int) -> int:
        """Blocks of `size` queries (or keys) of the head with most of them, and of the text."""
        image = max(
            math.prod(map(tile_count, self.canvas, row[:3])) * tile_count(math.prod(row[:3]), size)
            for row in self.table
        )
        return image + tile_count(self.text, size)

    def arguments(self, q: Tensor) -> dict[str, Any]:
        """Sizes, positions and scales, and the table of heads on the device of `q`."""
        t, h, w = self.canvas
        return {
            "table": constant([x for row in self.table for x in row], q),
            "heads": len(self.table), "t": t, "h": h, "w": w, "text": self.text,
            "image_start": self.text if self.text_first else 0,
            "text_start": 0 if self.text_first else t * h * w,
            "scale": self.scale / math.log(2),
        }  # fmt: skip

    def mask_arguments(self, mask: Tensor | None, q: Tensor) -> dict[str, Any]:
        """A mask of keys and how it is meant."""
        if mask is None or mask.shape[3] == 0:
            names = ("mask_batch", "mask_head", "mask_key")
            return {"mask": None, "masking": 0, "mask_image": False, **dict.fromkeys(names, 0)}
        entries = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        shared = [statically_known_true(mask.shape[axis] == 1) for axis in (0, 1)]
        step = [0 if shared[axis] else mask.stride(axis) for axis in (0, 1)]
        return {
            "mask": entries, "masking": 1 if mask.dtype == torch.bool else 2,
            "mask_image": mask.shape[3] != self.text or self.text == q.shape[2],
            "mask_batch": step[0], "mask_head": step[1], "mask_key": mask.stride(3),
        }  # fmt: skip

    @staticmethod
    def strides(**tensors: Tensor) -> dict[str, int]:
        """Strides of [B,heads,S,D] tensors, as the kernels call them."""
        axes = ("batch", "head", "token")
        return {
            f"{name}_{axis}": x.stride(place)
            for name, x in tensors.items()
            for place, axis in enumerate(axes)
        }

    @staticmethod
    def wide(*tensors: Tensor) -> bool:
        """Whether offsets within a head pass 31 bits."""
        return any(not statically_known_true(x.shape[2] * x.stride(2) < 2**31) for x in tensors)


def head_table(
    canvas: Triple, tile: Sequence[int], windows: Sequence[int], heads: int
) -> tuple[Row, ...]:
    """Tile and extent on three axes, and the head, for every head; those with most keys first.

    An axis that is seen whole counts as one tile, so that blocks of queries fill up.
    """
    given, rows = triples(windows), list[Row]()
    for head in range(heads):
        window = given[head if len(given) > 1 else 0]
        sides = [_side(*side) for side in zip(canvas, tile, window, strict=True)]
        rows.append((*(step for step, _ in sides), *(seen for _, seen in sides), head))
    return tuple(sorted(rows, key=lambda row: -_keys(row, canvas)))


def _side(size: int, tile: int, window: int) -> tuple[int, int]:
    count = tile_count(size, tile)
    seen = extent(window, count)
    return (size, 1) if seen == count else (tile, seen)


def _keys(row: Row, canvas: Triple) -> int:
    return math.prod(min(row[axis] * row[axis + 3], canvas[axis]) for axis in range(3))


def aligned(x: Tensor) -> Tensor:
    """The tensor, copied where its channels are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def width_of(size: int) -> int:
    """Channels as a product needs them: a power of two, at least 16."""
    return max(16, 1 << (int(size) - 1).bit_length())


def fitting(
    arch: str,
    dtype: torch.dtype,
    candidates: dict[str, list[tuple[int, int, int, int]]],
    *,
    own: int,
    seen: int,
    held: int,
    blocks: str,
) -> list[Config]:
    """Configurations that fit shared memory and registers; the smallest one if none does.

    Args:
        arch: Such as "sm_90"; candidates of sm_80 stand for ones that are not listed.
        dtype: Of the operands.
        candidates: Sizes `block_m` and `block_n`, warps, and stages, the best first, by `arch`.
        own: Channels that a program keeps for each of its own tokens.
        seen: Channels that a stage loads for each token that it sees.
        held: Float32 results of each of its own tokens.
        blocks: "mn" if a program owns `block_m` tokens, "nm" if it owns `block_n`.
    """
    if dtype == torch.float32:  # three products of parts each: larger blocks spill
        return [Config({"block_m": m, "block_n": 16}, 4, 2) for m in (16, 32)]
    lanes = 64 if arch.startswith("gfx") else 32
    most = 80 if arch == "sm_80" else 192  # its products take operands from registers, too
    kept = own if arch.startswith("sm") else 0

    def fits(m: int, n: int, warps: int, stages: int) -> bool:
        mine, other = (m, n) if blocks == "mn" else (n, m)
        shared = dtype.itemsize * (mine * kept + max(1, stages) * other * seen)
        registers = mine * (held + other) / (lanes * warps)
        return shared <= shared_limit(arch) and registers <= most

    listed = candidates.get(arch, candidates["sm_80"])
    good = [sizes for sizes in listed if fits(*sizes)] or [(16, 16, 4, 1)]
    return [Config({"block_m": m, "block_n": n}, w, s) for m, n, w, s in good]


def precision_of(dtype: torch.dtype, arch: str) -> str:
    """How float32 is multiplied; torch's setting decides whether as TF32."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if arch.startswith("gfx") else "tf32x3"
