"""What carving costs SmolLM2-135M: perplexity dense, carved with each router, pruned, recovered.

    python examples/benchmarks/cmoe_quality.py --json quality.json

Calibrated on the first half of Python's language reference and scored on CPython's standard library
documentation strings: two real texts every CPython carries. Profiling takes 8 windows of 512
tokens. "static" keeps as many neurons as the carved layer runs per token, always the same ones
(S = S+A, A = 0). "recovered" trains adapters for `--steps` steps of one window each on the first
half of the calibration text and is scored on the same other text; so is the dense model trained
alike, because training on any text also adapts to it.

"recovered, of what was lost" is in nats: (carved - recovered) / (carved - dense).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import smollm2
import torch
from torch import Tensor, nn

import resplice
from resplice.context import Context
from resplice.passes.cmoe.recovery import Recipe, recover
from resplice.pipeline import Pipeline
from resplice.program import Program

WINDOW = 512
LAYOUTS = {"S3A3E8": (3, 3, 8), "S2A2E8": (2, 2, 8)}
ROUTERS = ("analytic", "analytic-multi", "ridge", "random")


def library_text() -> str:
    """Documentation strings of the standard library's modules, read from their sources."""
    import ast
    import sysconfig

    parts = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        parts += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return "\n\n".join(parts)


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    """Inputs of the captured program."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def windows(ids: Tensor, count: int, seed: int, size: int = WINDOW) -> Iterator[Tensor]:
    """Windows [1, size] at random offsets."""
    draw = random.Random(seed)
    for _ in range(count):
        start = draw.randrange(len(ids) - size)
        yield ids[start : start + size].unsqueeze(0)


def loss_of(program: Program, batches: list[Tensor]) -> float:
    """Mean next-token loss in nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in batches:
            (logits,) = program.run(batch_of(ids))
            found = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            total, count = total + float(found), count + ids.shape[1] - 1
    return total / count


def main() -> None:
    """Print one table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=12, help="windows that are scored")
    parser.add_argument("--tokens", type=int, default=8 * WINDOW, help="tokens profiled")
    parser.add_argument("--k-act", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="0 leaves recovery out")
    parser.add_argument("--step-tokens", type=int, default=2 * WINDOW, help="trained in a step")
    parser.add_argument("--rate", type=float, default=5.95e-5)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--checkpoint", type=Path, help="folder to continue training from")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, sample, dims = smollm2.load()
    program = resplice.capture(model, sample, dynamic_shapes=dims)
    tokens = smollm2.tokenizer()
    known = tokens(smollm2.english_text(), return_tensors="pt").input_ids[0]
    other = tokens(library_text(), return_tensors="pt").input_ids[0]
    known = known[: len(known) // 2]
    scored = list(windows(other, options.windows, seed=1))
    profiled = list(windows(known, max(1, options.tokens // WINDOW), seed=0))
    runs = _Runs(program, scored, profiled, options)
    runs.note("dense", "-", program, 0.0)
    for layout in options.layouts:
        runs.carvings(layout)
    if options.steps and "S2A2E8" in options.layouts:
        runs.recovered(known)
    if options.json:
        options.json.write_text(json.dumps(runs.rows, indent=1) + "\n", encoding="utf-8")


class _Runs:
    def __init__(
        self, program: Program, scored: list[Tensor], profiled: list[Tensor], options: Any
    ) -> None:
        self.program, self.scored, self.options = program, scored, options
        self.profiled = [batch_of(ids) for ids in profiled]
        self.rows: list[dict[str, Any]] = []

    def note(
        self, layout: str, router: str, program: Program, seconds: float, **more: Any
    ) -> float:
        """Score, print and keep one row."""
        loss = loss_of(program, self.scored)
        row = {"layout": layout, "router": router, "perplexity": math.exp(loss), "loss": loss,
               "seconds": seconds, **more}  # fmt: skip
        self.rows.append(row)
        extra = "  ".join(f"{key} {value:.3f}" for key, value in more.items())
        print(
            f"{layout:<8} {router:<16} perplexity {row['perplexity']:>8.3f}  loss {loss:.4f}"
            f"  {seconds:>6.1f} s  {extra}",
            flush=True,
        )
        return loss

    def carve(self, spec: str) -> tuple[Program, float, dict[str, float]]:
        """Carve; seconds; mean hit rate and expected loss over the layers."""
        start = time.perf_counter()
        carved, steps = Pipeline.of(spec).run(self.program, Context(calibration=self.profiled))
        seconds = time.perf_counter() - start
        sites = steps[-1].changes[0].sites
        means = {
            key: sum(site.metrics[key] for site in sites) / len(sites)
            for key in ("hit_rate", "chance", "loss")
            if key in sites[0].metrics
        }
        means["layer_loss"] = means.pop("loss")
        return carved, seconds, means

    def carvings(self, layout: str) -> None:
        """Every router, and static pruning with the same number of neurons."""
        shared, active, experts = LAYOUTS[layout]
        for router in self.options.routers:
            spec = f"cmoe{{layout={layout} router={router} k-act={self.options.k_act}}}"
            carved, seconds, means = self.carve(spec)
            self.note(layout, router, carved, seconds, **means)
        pruned = f"cmoe{{layout=S{shared + active}A0E{experts} k-act={self.options.k_act}}}"
        carved, seconds, means = self.carve(pruned)
        self.note(layout, "static pruning", carved, seconds, **means)

    def recovered(self, known: Tensor) -> None:
        """Adapters on the model at 50 %, and on the dense-equivalent one for comparison."""
        spec = f"cmoe{{layout=S2A2E8 router=ridge k-act={self.options.k_act}}}"
        drawn = windows(known, self.options.steps, 2, self.options.step_tokens)
        batches = [batch_of(ids) for ids in drawn]
        carved, _, _ = self.carve(spec)
        before = loss_of(carved, self.scored)
        seconds = self._train(carved, batches, "S2A2E8")
        after = self.note("S2A2E8", f"ridge+{self.options.steps} LoRA", carved, seconds)
        dense = self.rows[0]["loss"]
        share = (before - after) / (before - dense)
        self.rows.append({"layout": "S2A2E8", "router": "ridge", "recovered_of_lost": share})
        print(f"recovered, of what was lost: {share:.1%}", flush=True)
        whole, _, _ = self.carve("cmoe{layout=S2A6E8}")
        seconds = self._train(whole, batches, "S2A6E8")
        trained = self.note("S2A6E8", f"all+{self.options.steps} LoRA", whole, seconds)
        share = (before - after) / (before - trained)
        print(f"recovered, of what was lost against the dense model trained alike: {share:.1%}")

    def _train(self, program: Program, batches: list[Any], name: str) -> float:
        start, folder = time.perf_counter(), self.options.checkpoint
        file = folder / f"{name}.safetensors" if folder else None
        recover(program, batches, recipe=Recipe(rate=self.options.rate), checkpoint=file)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
