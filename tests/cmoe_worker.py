"""Each process of `torchrun` in `test_cmoe_carve.py`: carve from its share of the tokens."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

import resplice
from resplice.context import Context
from resplice.passes.cmoe import carve
from resplice.pipeline import Pipeline

BATCHES = [{"x": torch.randn(50, 32, generator=torch.Generator().manual_seed(i))} for i in range(4)]


def weights(d: int = 16, f: int = 64, q: int = 96, seed: int = 0) -> tuple[Tensor, ...]:
    """gate, up, down and tokens."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return draw(f, d) / 2, draw(f, d) / 2, draw(d, f) / 4, draw(q, d)


def carved_weights(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of a program of two layers after the pass."""
    from conftest import Mlp

    torch.manual_seed(0)
    program = resplice.capture(Mlp().eval(), (torch.randn(50, 32),))
    carved, _ = Pipeline.of("cmoe{k-act=5}").run(program, Context(calibration=batches))
    return {name: value.detach() for name, value in carved.named_weights() if "cmoe" in name}


def main(folder: str) -> None:
    """Carve, as a function and as a pass, and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    gate, up, down, x = weights(q=301)
    for router, profile in (("analytic", "code"), ("ridge", "paper")):
        part = x[:120] if rank == 0 else x[120:]
        found = carve(
            gate, up, down, part, experts=8, shared=2, active=2, k_act=5, router=router,
            profile=profile,
        )  # fmt: skip
        assert found.router is not None
        torch.save(
            {"shared": found.shared, "experts": found.experts, "rates": found.rates,
             "cost": found.assignment_cost, "router": found.router.weight},
            f"{folder}/{router}-{rank}.pt",
        )  # fmt: skip
    torch.save(carved_weights(BATCHES[rank::2]), f"{folder}/pass-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
