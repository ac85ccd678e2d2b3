"""How long carving takes and how much memory: one layer of Llama-2-7B's shape, all of SmolLM2.

    python examples/benchmarks/cmoe_carving.py --part layer
    python examples/benchmarks/cmoe_carving.py --part model

"layer": d=4096, d_ff=11008, 16,384 random tokens, S3A3E8; the peak is that of the whole process,
weights (541 MB) and tokens (268 MB) included. "model": SmolLM2-135M, 32 windows of 512 tokens of
Python's language reference, profiled layer by layer; capture is not counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from resplice.passes.cmoe import carve

WIDTH, NEURONS, TOKENS = 4096, 11008, 16384


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("layer", "model"), default="layer")
    parser.add_argument("--router", default="analytic")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = layer(options.router) if options.part == "layer" else model(options.router)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.part}, {options.router}: {seconds:.1f} s, peak memory {peak:.2f} GiB")


def layer(router: str) -> float:
    """One layer of random weights."""
    torch.manual_seed(0)
    gate, up = (torch.randn(NEURONS, WIDTH).mul_(WIDTH**-0.5) for _ in range(2))
    down, x = torch.randn(WIDTH, NEURONS).mul_(NEURONS**-0.5), torch.randn(TOKENS, WIDTH)
    start = time.perf_counter()
    found = carve(gate, up, down, x, experts=8, shared=3, active=3, router=router)
    seconds = time.perf_counter() - start
    sizes = [len(found.shared), *map(len, found.experts)]
    print(f"sizes {sizes}, cost {found.assignment_cost:.0f}, cold seeds {found.cold_seeds}")
    return seconds


def model(router: str) -> float:
    """All layers of SmolLM2-135M."""
    import cmoe_quality
    import smollm2

    import resplice
    from resplice.context import Context
    from resplice.pipeline import Pipeline

    loaded, sample, dims = smollm2.load()
    program = resplice.capture(loaded, sample, dynamic_shapes=dims)
    ids = smollm2.tokenizer()(smollm2.english_text(), return_tensors="pt").input_ids[0]
    count = TOKENS // cmoe_quality.WINDOW
    batches = [cmoe_quality.batch_of(w) for w in cmoe_quality.windows(ids, count, seed=0)]
    start = time.perf_counter()
    _, steps = Pipeline.of(f"cmoe{{router={router}}}").run(program, Context(calibration=batches))
    seconds = time.perf_counter() - start
    change = steps[-1].changes[0]
    for site in change.sites:
        print(f"{site.node}: {site.metrics['summary']}")
    print(*change.notes, sep="\n")
    return seconds


if __name__ == "__main__":
    main()
