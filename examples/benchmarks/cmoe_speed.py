"""A carved feed-forward layer on a CPU: measured speed-up beside the ideal one.

    python examples/benchmarks/cmoe_speed.py --threads 1 2 --json cmoe.json

d=2048, d_ff=5632, E=8, SwiGLU, float32, random weights, and fresh random tokens in every call, so
the experts that run vary; the router runs too. "Ideal" is E / (S + A). Dense and carved run
interleaved in one process, one call each per round; a figure is the median over the rounds of the
carved one against that of the dense one in the same runtime. Two onnxruntime models never run at
the same time, but each keeps its own threads; they do not spin while idle.
Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import resplice
from resplice.backends.onnx import OnnxBackend, OnnxOptions
from resplice.kernels.moe_ffn import moe_ffn
from resplice.passes.cmoe import carve

WIDTH, NEURONS, EXPERTS = 2048, 5632, 8
LAYOUTS = {"S1A1": (1, 1), "S2A2": (2, 2), "S3A3": (3, 3)}
PARTS = ("eager", "onnx", "onnx-moe")


class Dense(nn.Module):
    """The layer as models have it."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Keep the weights."""
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w, False) for w in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        return linear(silu(linear(x, self.gate)) * linear(x, self.up), self.down)


class Carved(nn.Module):
    """The carved layer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments of `moe_ffn`."""
        super().__init__()
        self.names = list(arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The op."""
        result: Tensor = moe_ffn(x, *(getattr(self, name) for name in self.names))
        return result


def main() -> None:
    """Measure what is asked for, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["eager", "onnx"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.manual_seed(0)
    gate, up = (torch.randn(NEURONS, WIDTH) * WIDTH**-0.5 for _ in range(2))
    dense = Dense(gate, up, torch.randn(WIDTH, NEURONS) * NEURONS**-0.5)
    rows: list[dict[str, Any]] = []
    for layout in options.layouts:
        shared, active = LAYOUTS[layout]
        found = carve(
            dense.gate, dense.up, dense.down, torch.randn(1024, WIDTH), experts=EXPERTS,
            shared=shared, active=active,
        )  # fmt: skip
        carved = Carved(found.arguments())
        ideal = EXPERTS / (shared + active)
        for tokens in options.tokens:
            for threads in options.threads:
                for part in options.parts:
                    run = measure_eager if part == "eager" else measure_onnx
                    times = run(part, dense, carved, tokens, threads, options.rounds)
                    rows.append(report(part, layout, tokens, threads, times, ideal))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def report(
    part: str, layout: str, tokens: int, threads: int, times: dict[str, float], ideal: float
) -> dict[str, Any]:
    """Print a row as it comes."""
    ratio = times["dense"] / times["carved"]
    print(
        f"{threads} thread(s)  {part:<9} {layout} {tokens:>4} tokens  {1e3 * times['dense']:>8.2f}"
        f" -> {1e3 * times['carved']:>8.2f} ms  x{ratio:.2f}  ideal x{ideal:.2f}"
        f"  {100 * ratio / ideal:>5.1f} %",
        flush=True,
    )
    return {"threads": threads, "part": part, "layout": layout, "tokens": tokens, **times,
            "ratio": ratio, "ideal": ideal, "percent": 100 * ratio / ideal}  # fmt: skip


def interleaved(
    variants: dict[str, Callable[[Tensor], Any]], tokens: int, rounds: int
) -> dict[str, float]:
    """Median seconds of each variant; every round runs each of them once, on new tokens."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for number in range(rounds + 3):
            x = torch.randn(tokens, WIDTH)
            for name, call in variants.items():
                start = time.perf_counter()
                call(x)
                if number >= 3:  # warmed up
                    taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure_eager(
    part: str, dense: nn.Module, carved: nn.Module, tokens: int, threads: int, rounds: int
) -> dict[str, float]:
    """In PyTorch."""
    torch.set_num_threads(threads)
    x = torch.randn(tokens, WIDTH)
    expected = moe_ffn.reference(x, *(getattr(carved, name) for name in carved.names))
    error = (carved(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"the carved layer is wrong by {error:.1e}"
    return interleaved({"dense": dense, "carved": carved}, tokens, rounds)


def measure_onnx(
    part: str, dense: nn.Module, carved: nn.Module, tokens: int, threads: int, rounds: int
) -> dict[str, float]:
    """In onnxruntime; the exported models are compared with PyTorch before they appear."""
    strategy: Any = "moe" if part == "onnx-moe" else "unrolled"
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("dense", dense), ("carved", carved)):
            program = resplice.capture(model, (torch.randn(tokens, WIDTH),))
            options = OnnxOptions(moe_strategy=strategy)
            path = Path(folder) / f"{name}.onnx"
            OnnxBackend().lower(program, path, options)
            calls[name] = _call(path, threads)
        return interleaved(calls, tokens, rounds)


def _call(path: Path, threads: int) -> Callable[[Tensor], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    return lambda x: session.run(None, {wanted.name: x.numpy()})


if __name__ == "__main__":
    main()
