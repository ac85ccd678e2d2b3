"""Which configurations of a kernel can run at all on an architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resplice.kernels.cuda.launch import Config, shared_limit

MOST_HELD = 192
"""Registers a thread may hold in sums, of 255."""


def fitting(
    candidates: Sequence[Config], arch: str, tiles: Callable[[Config], int], sums: int = 1
) -> list[Config]:
    """The candidates whose pipeline fits into shared memory and whose sums into registers.

    Args:
        candidates: In order of preference; they have "block_m" and "block_n".
        arch: Such as "sm_90".
        tiles: Bytes that one stage of the pipeline loads.
        sums: How many tiles of block_m by block_n a program sums up, 4 bytes each.

    Returns:
        At least one configuration: the last one if none fits.
    """
    lanes = 64 if arch.startswith("gfx") else 32

    def fits(config: Config) -> bool:
        stages = config.num_stages - arch.startswith("gfx")  # a stage of AMD's waits in registers
        area = config.constants["block_m"] * config.constants["block_n"]
        held = sums * area / (lanes * config.num_warps)
        return stages * tiles(config) <= shared_limit(arch) and held <= MOST_HELD

    return [config for config in candidates if fits(config)] or [candidates[-1]]
