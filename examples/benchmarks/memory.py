"""Peak memory of capture + quest on a random Llama of about 1 B parameters, and a 4 GB ONNX export.

    python examples/benchmarks/memory.py [--layers 22] [--export FOLDER]

Prints JSON. `ratio` is the peak above the model itself, over the model's parameter bytes.
Linux only (reads /proc/self/status).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from torch import nn

import resplice


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--export", type=Path, help="also export the fp32 model to ONNX here")
    options = parser.parse_args()
    model = llama(options.layers)
    ids = torch.randint(0, 1000, (2, 8))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    shapes = {name: {0: "batch", 1: "seq=2:64"} for name in ("input_ids", "attention_mask")}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before, start = reset_peak(), time.perf_counter()
    program = resplice.capture(model, sample, dynamic_shapes=shapes)
    small = resplice.optimize(program, "quest{weight-bits=4}")
    result = {
        "parameters": size // 4,
        "parameter_bytes": size,
        "peak_above_model": peak() - before,
        "ratio": round((peak() - before) / size, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "weight_bytes_after": small.report.after["weight_bytes"],
    }
    if options.export:
        del small
        gc.collect()
        before, start = reset_peak(), time.perf_counter()
        artifact = resplice.optimize(program, check=False).to_onnx(options.export / "model.onnx")
        result["export"] = {
            "bytes": artifact.nbytes,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_above_model": peak() - before,
            "relative_error": artifact.notes["check"]["main"]["output"].relative,
        }
    print(json.dumps(result, indent=1))


def llama(layers: int) -> nn.Module:
    """A random fp32 Llama: width 2048, FFN 5632, vocabulary 32,000, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def reset_peak() -> int:
    """Forget the peak so far; returns the memory in use now, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """Largest resident memory since `reset_peak`, in bytes."""
    return status("VmHWM")


def status(key: str) -> int:
    """One figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024


if __name__ == "__main__":
    main()
