"""Measured choice among a kernel's configurations, on the GPU that will run it.

    with using(**tune(lambda: tile_attention(q, k, v, canvas, tile, window))):
        model(video)

Candidates are those that the kernel's own `configs` lists: pruned by shared memory and registers.
Nothing is chosen behind the caller's back; without it every kernel takes its first candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from resplice.errors import UsageError
from resplice.kernels.cuda.launch import Config, asking, using

Clock = Callable[[Callable[[], Any]], float]


def tune(call: Callable[[], Any], *, clock: Clock = do_bench) -> dict[str, Config]:
    """The fastest configuration of every kernel that a call launches, kernel after kernel.

    Args:
        call: Runs the kernels at the sizes that matter.
        clock: Time of a call, in any unit; by default `triton.testing.do_bench`.

    Returns:
        Kernel name -> configuration, for `using`. A candidate that asks for more than the GPU has
        is passed over.

    Raises:
        UsageError: The call launches no kernel, or no candidate of one runs.
    """
    with asking() as offers:
        call()
    if not offers:
        raise UsageError("nothing to tune: the call launches no Triton kernel")
    best: dict[str, Config] = {}
    for name, candidates in offers.items():
        times = _times(call, name, candidates, best, clock)
        if not times:
            raise UsageError(f"{name}: none of its {len(candidates)} configurations runs here")
        best[name] = candidates[min(times, key=times.__getitem__)]
    return best


def _times(
    call: Callable[[], Any], name: str, candidates: Sequence[Config], best: dict[str, Config],
    clock: Clock,
) -> dict[int, float]:  # fmt: skip
    """Time by number of the candidate."""
    found: dict[int, float] = {}
    for number, candidate in enumerate(candidates):
        with using(**best, **{name: candidate}):
            try:
                found[number] = clock(call)
            except OutOfResources:
                continue
    return found
