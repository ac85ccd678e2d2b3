"""Training in 1 and 4 bits from scratch: QuEST against plain STE, LSQ and no rounding at all.

    python examples/benchmarks/quest_qat.py --out qat.jsonl          (about an hour on one core)
    python examples/benchmarks/quest_qat.py --out qat.jsonl --table  (only print what is there)

A transformers Llama of 1.1 M parameters, unmodified, reads bytes of the documentation strings in
CPython's standard library; every 16th piece of 4,096 bytes is kept for validation. All methods
start from the same weights, see the same batches in the same order, and are trained by the same
loop with the same recipe; with bits, the linear layers of the blocks have rounded weights and
activations.

- dense: the captured model. Its W1A1 and W4A4 after training (PTQ) are scored as well.
- quest: the captured model rewritten by `quest{mode=qat}`.
- ste: the same grid (Gaussian-optimal per row, no rotation), gradients pass everywhere.
- lsq: Esser et al. 2020: one learned step per tensor, gradients inside the outermost levels and to
  the step; the grid has no zero level, like the others, and starts at the Gaussian optimum.

Finished runs are lines of the output file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cmoe_quality import library_text
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import resplice
from resplice.context import Batch
from resplice.kernels.gaussian_grid import ALPHA
from resplice.passes.quest import Quest, quantized_weights, train
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.training import Recipe, fit, next_token_loss

WINDOW, ROWS = 64, 8
PIECE, EVERY = 4096, 16
METHODS = ("quest", "ste", "lsq")
Logits = Callable[[Tensor], Tensor]


# ---- data and model ----------------------------------------------------------------------


class Text:
    """Bytes for training and validation; a batch is a function of seed and step."""

    def __init__(self, seed: int, steps: int) -> None:
        pieces = torch.frombuffer(bytearray(library_text().encode()), dtype=torch.uint8).long()
        parts = list(pieces.split(PIECE))
        self.training = torch.cat([p for i, p in enumerate(parts) if i % EVERY])
        self.kept = torch.cat(parts[::EVERY])
        self.seed, self.steps = seed, steps

    def __len__(self) -> int:
        """Batches: one a step."""
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        """Windows [ROWS, WINDOW] at random offsets."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - WINDOW, (ROWS,), generator=draw)
        return {"input_ids": torch.stack([self.training[s : s + WINDOW] for s in starts])}

    def validation(self, batches: int = 64) -> Iterator[Batch]:
        """The same windows for every run, spread over what was kept."""
        starts = torch.linspace(0, len(self.kept) - WINDOW, batches * ROWS).long()
        for part in starts.split(ROWS):
            yield {"input_ids": torch.stack([self.kept[s : s + WINDOW] for s in part])}


def llama(seed: int) -> LlamaForCausalLM:
    """4 blocks, width 128, MLP 512, 4 heads, 256 bytes: 1.05 M parameters in linear layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def captured(seed: int) -> Program:
    """The model as a graph."""
    return resplice.capture(llama(seed), {"input_ids": torch.zeros(ROWS, WINDOW).long()})


def loss_on(text: Text, logits: Logits) -> float:
    """Mean validation loss in nats per byte."""
    with torch.no_grad():
        found = [
            float(next_token_loss({"logits": logits(batch["input_ids"])}, batch))
            for batch in text.validation()
        ]
    return sum(found) / len(found)


# ---- baselines ---------------------------------------------------------------------------


def on_grid(x: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """The nearest of 2**bits levels +-(k + 1/2) * step."""
    half = 2 ** (bits - 1)
    return ((x / step + 0.5).round().clamp(1 - half, half) - 0.5) * step


def gaussian_step(x: Tensor, bits: int, *axes: int) -> Tensor:
    """The step that is best for Gaussian values of this root mean square."""
    rms = x.square().mean(axes or None, keepdim=bool(axes)).sqrt()
    return 2 * (ALPHA[bits] * rms + 1e-8) / (2**bits - 1)


class Ste(nn.Module):
    """Rounded per row; gradients pass as if nothing had happened."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """The level nearest to each value."""
        with torch.no_grad():
            shift = on_grid(x, gaussian_step(x, self.bits, -1), self.bits) - x
        return x + shift


class Lsq(nn.Module):
    """Rounded with one learned step (Esser et al. 2020, arXiv 1902.08153)."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.top = bits, (2**bits - 1) / 2
        self.step = nn.Parameter(torch.tensor(0.0))

    def start(self, x: Tensor) -> None:
        """Take the first step size from values."""
        with torch.no_grad():
            self.step.copy_(gaussian_step(x, self.bits))

    def forward(self, x: Tensor) -> Tensor:
        """The level nearest to each value; the step's gradient is scaled as in the paper."""
        count = x.numel() if isinstance(x, nn.Parameter) else x.shape[-1]
        scale = 1 / math.sqrt(count * self.top)
        step = self.step * scale + (self.step * (1 - scale)).detach()
        step = step.abs() + 1e-8
        inside = (x / step).clamp(-self.top, self.top)
        level = inside + (on_grid(inside, 1.0, self.bits) - inside).detach()
        return level * step


class Rounded(nn.Module):
    """A linear layer with rounded operands."""

    def __init__(self, linear: nn.Linear, make: Callable[[int], nn.Module], bits: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.x, self.w = make(bits), make(bits)

    def forward(self, x: Tensor) -> Tensor:
        """Like the layer; none of these has a bias."""
        return nn.functional.linear(self.x(x), self.w(self.weight))


def baseline(method: str, bits: int, seed: int, text: Text) -> tuple[nn.Module, set[str]]:
    """The model with rounded linear layers in its blocks, and the names of their weights."""
    model, make = llama(seed), {"ste": Ste, "lsq": Lsq}[method]
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, Rounded(layer, make, bits))
    if method == "lsq":
        _start_steps(model, text[0])
    decayed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Rounded)}
    return model, decayed


def _start_steps(model: nn.Module, batch: Batch) -> None:
    """Step sizes from the weights, and from the activations of one batch, layer by layer."""
    hooks = [
        part.register_forward_pre_hook(lambda module, args: module.start(args[0]))
        for part in model.modules()
        if isinstance(part, Lsq)
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()


# ---- runs --------------------------------------------------------------------------------


def finish(method: str, bits: int, seed: int, options: Any) -> dict[str, Any]:
    """Train one model; its row."""
    text, recipe = Text(seed, options.steps), Recipe(rate=options.rate)
    start, more = time.perf_counter(), {}
    name = f"{method}-{bits}-{seed}-{options.steps}.safetensors"
    told: dict[str, Any] = {
        "checkpoint": options.checkpoints / name if options.checkpoints else None, "every": 250,
        "progress": lambda what, done, total: done % 250 or print(what, done, total, flush=True),
    }  # fmt: skip
    if method in ("dense", "quest"):
        program = captured(seed)
        qat, _ = Pipeline.of(f"quest{{weight-bits={bits} act-bits={bits} mode=qat}}").run(program)
        if method == "quest":
            program = qat
        done = train(program, text, recipe=recipe, decayed=quantized_weights(qat), **told)
        losses = done.losses
        loss = loss_on(text, lambda ids: program.run({"input_ids": ids})[0])
        if method == "dense":
            more = {"ptq": {str(b): ptq_loss(program, b, text) for b in options.bits}}
    else:
        model, decayed = baseline(method, bits, seed, text)

        def loss_of(batch: Batch) -> Tensor:
            return next_token_loss({"logits": model(input_ids=batch["input_ids"]).logits}, batch)

        losses = fit(dict(model.named_parameters()), loss_of, text, recipe, decayed=decayed, **told)
        loss = loss_on(text, lambda ids: model(input_ids=ids).logits)
    return {
        "method": method, "bits": bits, "seed": seed, "steps": options.steps, "rate": options.rate,
        "loss": loss, "training_loss": sum(losses[-50:]) / len(losses[-50:]),
        "seconds": time.perf_counter() - start, **more,
    }  # fmt: skip


def ptq_loss(program: Program, bits: int, text: Text) -> float:
    """The loss of a trained dense program with weights and activations rounded afterwards."""
    rounded, _ = Pipeline((Quest(weight_bits=bits, act_bits=bits),)).run(program)
    return loss_on(text, lambda ids: rounded.run({"input_ids": ids})[0])


def unigram_loss(text: Text) -> float:
    """Cross-entropy of the training text's byte frequencies on the validation windows."""
    counts = torch.bincount(text.training, minlength=256).double() + 1
    log = (counts / counts.sum()).log()
    targets = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in text.validation()])
    return -float(log[targets].mean())


def table(rows: list[dict[str, Any]], bits: list[int]) -> str:
    """Markdown: losses by seed, and what is claimed."""
    seeds = sorted({row["seed"] for row in rows})
    at = {(row["method"], row["bits"], row["seed"]): row["loss"] for row in rows}
    dense = {row["seed"]: row for row in rows if row["method"] == "dense"}

    def line(label: str, values: list[float | None], form: str = ".3f") -> str:
        shown = " | ".join("-" if v is None else format(v, form) for v in values)
        return f"| {label} | {shown} |"

    def less(left: float | None, right: float | None) -> float | None:
        return None if left is None or right is None else left - right

    lines = [line("validation loss, nats/byte", seeds, "d"), "|---" * (len(seeds) + 1) + "|"]
    full = [dense[s]["loss"] if s in dense else None for s in seeds]
    lines.append(line("dense", full))
    for b in bits:
        ptq = [dense[s]["ptq"].get(str(b)) if s in dense else None for s in seeds]
        lines.append(line(f"dense, then W{b}A{b} (PTQ)", ptq))
        found = {m: [at.get((m, b, s)) for s in seeds] for m in METHODS}
        lines += [line(f"{m} W{b}A{b}", found[m]) for m in METHODS]
        ours = found["quest"]
        lines += [
            line(f"quest below {m}, W{b}A{b}",
                 [less(x, y) for x, y in zip(found[m], ours, strict=True)], "+.3f")
            for m in ("ste", "lsq")
        ]  # fmt: skip
        lines.append(
            line(f"quest above dense, W{b}A{b}",
                 [less(x, y) for x, y in zip(ours, full, strict=True)], "+.3f")
        )  # fmt: skip
        closed = [
            None if q is None or p is None or d is None else (p - q) / (p - d)
            for p, q, d in zip(ptq, ours, full, strict=True)
        ]
        lines.append(line(f"gap from PTQ to dense closed by quest, W{b}A{b}", closed, ".1%"))
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("quest_qat.jsonl"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS])
    parser.add_argument("--runs", type=int, default=1000, help="stop after this many runs")
    parser.add_argument("--checkpoints", type=Path, help="folder: go on within a run, too")
    parser.add_argument("--table", action="store_true", help="only print the finished runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] \
        if options.out.exists() else []  # fmt: skip
    rows = [r for r in rows if (r["steps"], r["rate"]) == (options.steps, options.rate)]
    known = {(row["method"], row["bits"], row["seed"]) for row in rows}
    wanted = [
        (method, bits if method != "dense" else 16, seed)
        for seed in options.seeds
        for method in options.methods
        for bits in (options.bits if method != "dense" else [16])
    ]
    missing = [] if options.table else [run for run in wanted if run not in known]
    for method, bits, seed in missing[: options.runs]:
        row = finish(method, bits, seed, options)
        rows.append(row)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(f"unigram {unigram_loss(Text(0, 1)):.3f}\n\n{table(rows, options.bits)}")


if __name__ == "__main__":
    main()
