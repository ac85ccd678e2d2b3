"""What rounding after training costs SmolLM2-135M: perplexity by bits, with and without rotation.

    python examples/benchmarks/quest_quality.py --json quality.json     (about 20 minutes on a core)

Scored on two real texts that every CPython carries: its language reference, and the documentation
strings of its standard library. Windows of 512 tokens, spread over each text, the same for every
row. "W4A4" rounds weights and activations to 4 bits; "W4" weights only; "/32" is one scale per 32
weights instead of one per output channel; "clipped" clips rows of activations with outliers, whose
grid is wider else at 8 bits. Rotation is the block Hadamard transform (64 for this
width of 576, 128 for the MLP's 1,536).

Programs are scored as float32 products of rounded operands, which computes the same as packed
weights and integer products do, and needs no compiler. The model's weights were dequantised from
a 4-bit file (Q4_1, blocks of 32), so they are not those of the published model.

"expected" is the relative error of one layer by theory, for Gaussian operands; "layers" the range
of what the report measures on 128 tokens of the first text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import smollm2
import torch
from cmoe_quality import batch_of, library_text, loss_of
from torch import Tensor

import resplice
from resplice.build import Builder
from resplice.context import Context
from resplice.kernels.gaussian_grid import expected_error
from resplice.kernels.quant_linear import dequantize, quant_linear
from resplice.passes.fold import Fold
from resplice.passes.quest import Quest
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.rules import replace_node

WINDOW = 512
BITS = [(4, 16), (3, 16), (2, 16), (1, 16), (8, 8), (4, 4), (1, 1)]
GROUPS = (128, 32)


def spread(ids: Tensor, count: int) -> list[Tensor]:
    """Windows [1, WINDOW], evenly spread over a text."""
    starts = torch.linspace(0, len(ids) - WINDOW, count).long()
    return [ids[start : start + WINDOW].unsqueeze(0) for start in starts]


def settings() -> list[Quest]:
    """Every row of the table but the first."""
    rows = [
        Quest(weight_bits=w, act_bits=a, hadamard=turn) for w, a in BITS for turn in ("auto", "off")
    ]
    rows += [Quest(weight_bits=8, act_bits=8, outliers="clip")]
    return rows + [Quest(weight_bits=4, group=group) for group in GROUPS]


def label_of(item: Quest) -> str:
    """`W4A4`, `W4/32`, `W1`, `W8A8clipped`."""
    activations = f"A{item.act_bits}" if item.act_bits < 16 else ""
    clipped = "clipped" if item.outliers == "clip" else ""
    return f"W{item.weight_bits}{activations}{clipped}" + (f"/{item.group}" if item.group else "")


def unpack(program: Program) -> Program:
    """The same program with float weights where it has packed ones."""
    draft = program.copy()
    for node in draft.graph.find_nodes(op="call_function", target=quant_linear.overload):
        x, codes, step, bias, bits, group = node.args
        weight = dequantize(
            draft.weight(codes), draft.weight(step), bits, group, int(x.meta["val"].shape[-1])
        )
        build = Builder(draft, node)
        constant = build.weight(f"{codes.target}_float", weight)
        new = build(torch.ops.aten.linear.default, x, constant, bias)
        replace_node(draft, node, new)
    draft.graph.eliminate_dead_code()
    draft.drop_unused_weights()
    draft.module.recompile()
    return draft


def simulated(program: Program, item: Quest, packed: Program) -> Program:
    """What scores as `packed` does, in float32 products of rounded operands."""
    if item.act_bits == 16:
        return unpack(packed)
    same: dict[str, Any] = {"mode": "qat", "outliers": "keep" if item.widens else "clip"}
    return Pipeline((replace(item, **same), Fold())).run(program)[0]


def main() -> None:
    """Print one table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8, help="windows scored in each text")
    parser.add_argument("--only", nargs="+", help="labels such as W4A4")
    parser.add_argument("--json", type=Path, help="write all figures here, row by row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, sample, dims = smollm2.load()
    program = resplice.capture(model, sample, dynamic_shapes=dims)
    tokens = smollm2.tokenizer()
    texts = {"reference": smollm2.english_text(), "library": library_text()}
    ids = {name: tokens(text, return_tensors="pt").input_ids[0] for name, text in texts.items()}
    scored = {name: spread(found, options.windows) for name, found in ids.items()}
    rows = [{"label": "dense", "rotation": "", **losses(program, scored)}]
    for item in settings():
        if options.only is None or label_of(item) in options.only:
            rows.append(row_of(program, item, scored, ids["reference"][100:228]))
            print(json.dumps(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows, list(scored)))


def losses(program: Program, scored: dict[str, list[Tensor]]) -> dict[str, float]:
    """Mean loss in nats per token of every text."""
    return {name: loss_of(program, batches) for name, batches in scored.items()}


def row_of(
    program: Program, item: Quest, scored: dict[str, list[Tensor]], calibration: Tensor
) -> dict[str, Any]:
    """Round, score."""
    start = time.perf_counter()
    context = Context(calibration=[batch_of(calibration.unsqueeze(0))])
    packed, steps = Pipeline((item,)).run(program, context)
    sites = steps[-1].changes[0].sites
    measured = [s.metrics["output_error"] for s in sites if "output_error" in s.metrics]
    found = losses(simulated(program, item, packed), scored)
    return {
        "label": label_of(item), "rotation": str(item.hadamard), **found,
        "expected": expected_error(item.weight_bits, item.act_bits),
        "layers": [min(measured), max(measured)] if measured else None,
        "notes": steps[-1].changes[0].notes, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown."""
    heads = [part for name in names for part in (f"{name}: perplexity", "nats lost")]
    lines = [
        "| | rotation | " + " | ".join(heads) + " | layer error: expected | layers |",
        "|---" * (len(heads) + 4) + "|",
    ]
    dense = rows[0]
    for row in rows:
        cells = [row["label"], row["rotation"]]
        for name in names:
            cells += [f"{math.exp(row[name]):.2f}", f"{row[name] - dense[name]:.4f}"]
        layers = row.get("layers")
        cells += [
            f"{row['expected']:.4f}" if "expected" in row else "",
            f"{layers[0]:.4f} to {layers[1]:.4f}" if layers else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
