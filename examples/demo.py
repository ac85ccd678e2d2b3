"""The main job on real weights: capture SmolLM2, quantise it, convert it, check it, compare it.

    python examples/demo.py [--out FOLDER] [--passes SPEC] [--windows N]

Writes the fp32 and the rewritten ONNX model and a report; prints what both say and how well. Then a
Core ML package that decodes with its cache as state, run by our interpreter, and golden files for
`examples/mac/check_on_mac.py`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import decoding
import golden_files
import smollm2
import torch
from rich.console import Console
from rich.table import Table

import resplice
from resplice.backends.coreml.backend import CoremlBackend
from resplice.backends.coreml.options import CoremlOptions

PROMPT = "Once upon a time, there was a little"
WINDOW = 512
CACHE, CHUNK, WRITTEN = 256, 64, 16
console = Console(highlight=False, width=110)


def main() -> int:
    """Run the demo; exit code 0 if everything held."""
    options = arguments()
    started = time.perf_counter()
    with step("load SmolLM2-135M (GGUF -> fp32)"):
        model, sample, dims = smollm2.load()
        tokens = smollm2.tokenizer()
    with step("capture with dynamic batch and sequence"):
        program = resplice.capture(model, sample, dynamic_shapes=dims)
    with step("convert the original to ONNX and check it in onnxruntime"):
        original = resplice.optimize(program).to_onnx(options.out / "smollm2-fp32.onnx")
    with step(f"run {options.passes}, compare node by node"):
        smaller = resplice.optimize(program, options.passes)
    with step("convert the result to ONNX and check it in onnxruntime"):
        converted = smaller.to_onnx(options.out / "smollm2-quest.onnx")
    runs = {
        "original (PyTorch fp32)": lambda ids: model(input_ids=ids, use_cache=False).logits,
        "original (ONNX fp32)": onnx_logits(original),
        f"{options.passes} (ONNX)": onnx_logits(converted),
    }
    sizes = {f"{options.passes} (ONNX)": converted.nbytes, "original (ONNX fp32)": original.nbytes}
    with torch.no_grad():
        compare(runs, sizes, tokens, options.windows, smaller.report)
        phone(model, tokens, options.out, smaller.report)
    report = smaller.report.save(options.out)
    seconds, peak = (
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    console.print(f"\n{seconds:.0f} s, peak memory {peak / 2**20:.1f} GiB\nreport: {report}")
    return 0


def arguments() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write")
    parser.add_argument("--passes", default="quest{weight-bits=4}", help="pipeline text")
    parser.add_argument(
        "--windows", type=int, default=6, help=f"windows of {WINDOW} tokens to score"
    )
    return parser.parse_args()


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    start = time.perf_counter()
    yield
    console.print(f"{time.perf_counter() - start:6.1f} s  {what}", markup=False)


def onnx_logits(artifact: Any) -> smollm2.NextLogits:
    """Logits from an ONNX artefact."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        (logits,) = artifact.run(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ).values()
        return logits  # type: ignore[no-any-return]  # artefacts are untyped here

    return run


def compare(
    runs: dict[str, smollm2.NextLogits],
    sizes: dict[str, int],
    tokens: Any,
    count: int,
    report: resplice.Report,
) -> None:
    """Score and generate with every model; print a table and add the figures to the report."""
    ids = tokens(smollm2.english_text(), return_tensors="pt").input_ids[0]
    batches = list(smollm2.windows(ids, WINDOW, count))
    table = Table("model", "size", "perplexity", "tokens/s read", "tokens/s written")
    sentences = {}
    for name, run in runs.items():
        found = smollm2.score(run, batches)
        sentences[name], speed = smollm2.generate(run, tokens, PROMPT, 24)
        size = sizes.get(name, 0)
        report.measure("perplexity", found.perplexity, model=name, text="Python language reference")
        report.measure(
            "reading speed", found.tokens_per_second, "tokens/s", model=name, window=WINDOW
        )
        report.measure("writing speed, no cache", speed, "tokens/s", model=name)
        if size:
            report.measure("file size", size / 2**20, "MiB", model=name)
        shown = f"{size / 2**20:.0f} MiB" if size else "-"
        table.add_row(
            name, shown, f"{found.perplexity:.2f}", f"{found.tokens_per_second:.0f}", f"{speed:.1f}"
        )
    console.print(table)
    for name, sentence in sentences.items():
        console.print(f"{name}: {sentence!r}", markup=False)


def phone(model: Any, tokens: Any, out: Path, report: resplice.Report) -> None:
    """One Core ML package that reads a prompt and decodes, its cache as state; run here."""
    started = time.perf_counter()
    with step(f"capture decoding with a cache: 1 token, and {CHUNK} at once"):
        program = decoding.capture(model, length=CACHE, chunk=CHUNK)
    with step("convert both to one Core ML package and check it in our interpreter"):
        artifact = CoremlBackend().lower(
            program, out / "smollm2.mlpackage", CoremlOptions(precision="fp32")
        )
    seconds, prompt = time.perf_counter() - started, tokens(PROMPT, return_tensors="pt").input_ids
    with step(f"write {WRITTEN} tokens with the package and with the model"):
        written = decoding.greedy(decoding.steps_of(artifact), prompt, WRITTEN, chunk=CHUNK)
        expected = decoding.greedy_without_cache(model, prompt, WRITTEN)
    with step("write golden files for a Mac"):
        calls = decoding.reads(prompt, CHUNK)
        size = prompt.shape[1]
        calls += [decoding.decodes(t, size + i) for i, t in enumerate(written[:4])]
        golden = golden_files.write(out / "smollm2.golden.npz", artifact, calls)
    same = sum(a == b for a, b in zip(written, expected, strict=True))
    package = "SmolLM2 decode + prefill (Core ML fp32)"
    report.measure("file size", artifact.nbytes / 2**20, "MiB", model=package)
    report.measure("capture, convert and check", seconds, "s", model=package)
    report.measure("greedy tokens equal to eager", same / WRITTEN, "of 1", model=package)
    for function, found in artifact.notes["check"].items():
        report.measure(
            "largest output error", found["output"].relative, "of scale", model=package,
            function=function,
        )  # fmt: skip
    console.print(
        f"{package}: {artifact.nbytes / 2**20:.0f} MiB, {seconds:.0f} s; "
        f"{same} of {WRITTEN} tokens as eager: {tokens.decode([*prompt[0], *written])!r}\n"
        f"on a Mac: python examples/mac/check_on_mac.py {artifact.path} {golden}",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
