"""Temporal token merging on a CPU: measured speed-up beside that of the arithmetic.

    python examples/benchmarks/tdtm.py --threads 2 --json tdtm.json

One pair of STDiT3 blocks (spatial and temporal, float32) at T=20, S=256, C=1152 with a caption of
300 words, as in Open-Sora at 256 x 256, random weights. Every variant of `which` and the unmerged
program run interleaved in one process, one call each per round; a figure is the best of the rounds.
"Ideal" is the ratio of the programs' FLOPs, "%" how much of it was measured, and "of the gain" the
part of (ideal - 1) that was. Results are compared with the unmerged program's shape before timing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.stdit3 import Block, Config  # the folder beside this one

import resplice
from resplice.cost import program_cost
from resplice.program import Program

VARIANTS = ("spatial", "temporal", "cross", "spatial,temporal,cross")


class Pair(nn.Module):
    """A spatial and a temporal block on latents that are tokens already, [B,C,T,H,W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, temporal) for temporal in (False, True))

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """`y` [B,L,C], `t` [B,6,C] -> [B,T,S,C]."""
        h = x.flatten(3).permute(0, 2, 3, 1)
        for block in self.blocks:
            h = block(h, y, None, block.modulation(t, None, None))
        return h


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--side", type=int, default=16, help="tokens per row and column")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    program, inputs = captured(options)
    programs = {"unmerged": program} | {
        which: resplice.optimize(program, f"tdtm{{which={which}}}", check=False).program
        for which in VARIANTS
    }
    shapes = {name: p.run_fresh(inputs)["output"].shape for name, p in programs.items()}
    assert len(set(shapes.values())) == 1, shapes
    best = interleaved(programs, inputs, options.rounds)
    rows = report(programs, best, options.threads)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def captured(options: Any) -> tuple[Program, dict[str, Tensor]]:
    """The pair of blocks as a program, and its inputs."""
    config = Config(width=options.width, heads=options.heads)
    inputs = {
        "x": torch.randn(1, options.width, options.frames, options.side, options.side),
        "y": torch.randn(1, options.words, options.width),
        "t": torch.randn(1, 6, options.width),
    }
    return resplice.capture(Pair(config).eval(), inputs, check=False), inputs


def interleaved(
    programs: dict[str, Program], inputs: dict[str, Tensor], rounds: int
) -> dict[str, float]:
    """Best wall-clock seconds of each program; every round runs each of them once."""
    best = dict.fromkeys(programs, math.inf)
    order = [inputs[node.name] for node in programs["unmerged"].placeholders]
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first one warms up, and counts if it is the best
            for name, program in programs.items():
                start = time.perf_counter()
                program.module(*order)
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(
    programs: dict[str, Program], best: dict[str, float], threads: int
) -> list[dict[str, Any]]:
    """Print and return one row per variant."""
    rows = []
    whole = program_cost(programs["unmerged"]).flops
    for name in VARIANTS:
        ideal = whole / program_cost(programs[name]).flops
        ratio = best["unmerged"] / best[name]
        row = {
            "which": name, "threads": threads, "unmerged_ms": 1e3 * best["unmerged"],
            "ms": 1e3 * best[name], "ratio": ratio, "ideal": ideal, "percent": 100 * ratio / ideal,
            "percent_of_gain": 100 * (ratio - 1) / (ideal - 1),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{threads} thread(s)  {name:<24} {row['unmerged_ms']:>8.1f} -> {row['ms']:>8.1f} ms"
            f"  x{ratio:.3f}  ideal x{ideal:.3f}  {row['percent']:>5.1f} %"
            f"  {row['percent_of_gain']:>6.1f} % of the gain",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
