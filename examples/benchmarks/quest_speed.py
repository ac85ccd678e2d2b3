"""Linear layers in few bits on a CPU, beside dense ones: measured ratios.

    python examples/benchmarks/quest_speed.py --threads 1 2 --json quest.json

All variants of a case (a shape, a number of tokens) run interleaved in one process, one call each
per round, each on weights of its own: what one reads is in no cache because another has read it. A
figure is the best of the rounds, the ratio is to float32 `F.linear` (= 1). Variants:
- `F.linear` in bfloat16, and torch's 4-bit `_weight_int4pack_mm_for_cpu` where it exists;
- the op `quant_linear` (activations float32 or bfloat16) with 8, 4, 3, 2 and 1 bits a weight;
- the op `code_linear` on codes that were made before: they are shared by the layers of one input;
  "with codes" adds the making of them (`quest_codes`, rotated in blocks of 128) to every call;
- onnxruntime's `MatMulNBits` as made by hand (accuracy level 4, no correction), and what our ops
  lower to.
The last lines are the Hadamard transform by butterflies and by a product with its matrix.
Results are compared before anything is timed. What does not exist here is left out by name.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import resplice
from resplice.kernels import code_linear, hadamard, quant_linear, quest_codes
from resplice.kernels.cpu import kernels_status, use_kernels
from resplice.kernels.quant_linear import dequantize
from resplice.passes.quest import Quest

Variants = dict[str, Callable[[], Any]]
SHAPES = [(4096, 4096), (2048, 5632)]
WEIGHTS = (8, 4, 3, 2, 1)
PAIRS = ((8, 8), (4, 8), (4, 4), (2, 8), (2, 2), (1, 8), (1, 4), (1, 1))


def main() -> None:
    """Measure what is asked for, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    print(f"kernels: {kernels_status()}")
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for number in options.shapes:
            for tokens in options.tokens:
                rows += measure(SHAPES[number], tokens, threads, options)
        rows += measure_hadamard(threads, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def interleaved(variants: Variants, rounds: int) -> dict[str, float]:
    """Best wall-clock seconds of each variant; every round runs each of them once.

    What in three rounds took over four times as long as the first variant is not run again.
    """
    best, first = dict.fromkeys(variants, math.inf), next(iter(variants))
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first one warms up, and counts if it is the best
            for name, call in variants.items():
                if number > 2 and best[name] > 4 * best[first]:
                    continue
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(case: str, threads: int, best: dict[str, float]) -> list[dict[str, Any]]:
    """Print and return one row per variant; the first one is the measure."""
    rows, base = [], next(iter(best.values()))
    for what, seconds in best.items():
        row = {"threads": threads, "case": case, "what": what, "ms": 1e3 * seconds,
               "ratio": base / seconds}  # fmt: skip
        rows.append(row)
        print(
            f"{threads} thread(s)  {case:<24} {what:<42} {row['ms']:>9.3f} ms  x{row['ratio']:.2f}",
            flush=True,
        )
    return rows


# ---- linear layers -----------------------------------------------------------------------


def measure(
    shape: tuple[int, int], tokens: int, threads: int, options: Any
) -> list[dict[str, Any]]:
    """All variants of one case."""
    rows, size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator)
    dense = torch.randn(rows, size, generator=generator)
    half, half_x = dense.bfloat16(), x.bfloat16()
    variants: Variants = {
        "F.linear float32": lambda: nn.functional.linear(x, dense),
        "F.linear bfloat16": lambda: nn.functional.linear(half_x, half),
    }
    variants |= torch_int4(dense, half_x, generator)
    for bits in WEIGHTS:
        for name, a in ((f"quant_linear W{bits}", x), (f"quant_linear W{bits}, bfloat16", half_x)):
            variants[name] = float_variant(a, *drawn(rows, size, bits, generator), bits)
    for bits, act_bits in PAIRS:
        for with_codes in (False, True):
            packed = drawn(rows, size, bits, generator)
            variants |= code_variant(x, *packed, bits, act_bits, with_codes)
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_onnx:
            for bits in (8, 4, 2):
                variants[f"onnxruntime MatMulNBits, {bits} bits"] = nbits(x, rows, bits, threads)
            for bits, act_bits in ((8, 16), (4, 16), (2, 16), (1, 16), (4, 8), (1, 1)):
                name = f"W{bits}" + ("" if act_bits == 16 else f"A{act_bits}")
                variants[f"our {name} lowered, in onnxruntime"] = lowered(
                    x, dense, bits, act_bits, threads, Path(folder)
                )
        best = interleaved(variants, options.rounds if tokens < 16 else max(2, options.rounds // 6))
    return report(f"{rows}x{size}, {tokens} token(s)", threads, best)


def drawn(rows: int, size: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random packed codes and steps."""
    codes = torch.randint(0, 256, (rows, size * bits // 8), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(rows, 1, generator=generator) + 0.1


def float_variant(x: Tensor, codes: Tensor, step: Tensor, bits: int) -> Callable[[], Tensor]:
    """`quant_linear`, compared with float64 on a few rows."""
    few = slice(0, 512)  # enough weights for the kernel to run
    found = quant_linear(x[:2], codes[few], step[few], None, bits, 0)
    dense = dequantize(codes[few], step[few].double(), bits, 0, x.shape[1])
    compare(found, x[:2].double() @ dense.T, 1e-5 if x.dtype == torch.float32 else 8e-3)
    return lambda: quant_linear(x, codes, step, None, bits, 0)


def code_variant(
    x: Tensor, codes: Tensor, step: Tensor, bits: int, act_bits: int, with_codes: bool
) -> Variants:
    """`code_linear` alone, or with the making of its codes."""
    a, unit = quest_codes(x, act_bits, 128)
    few, value = slice(0, 64), (a[:2].double() + 0.5) * unit[:2]
    found = code_linear(a[:2], unit[:2], codes[few], step[few], None, bits, 0, act_bits)
    compare(found, value @ dequantize(codes[few], step[few].double(), bits, 0, x.shape[1]).T)
    name = f"code_linear W{bits}A{act_bits}"
    if not with_codes:
        return {name: lambda: code_linear(a, unit, codes, step, None, bits, 0, act_bits)}
    return {
        f"{name}, with codes": lambda: code_linear(
            *quest_codes(x, act_bits, 128), codes, step, None, bits, 0, act_bits
        )
    }


def compare(found: Tensor, expected: Tensor, bar: float = 1e-5) -> None:
    """Fail where a variant computes something else."""
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < bar, f"it computes something else: {error}"


def torch_int4(dense: Tensor, x: Tensor, generator: torch.Generator) -> Variants:
    """Torch's own 4-bit product in groups of 128, bfloat16 activations."""
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    multiply = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
    if pack is None or multiply is None:
        print("torch's int4pack: not measured, this torch has none")
        return {}
    rows, size = dense.shape
    codes = torch.randint(0, 16, (rows, size), dtype=torch.int32, generator=generator)
    packed = pack(codes, 1)
    scales = torch.rand(size // 128, rows, 2, generator=generator).bfloat16()
    return {"torch int4pack, bfloat16": lambda: multiply(x, packed, 128, scales)}


# ---- onnxruntime -------------------------------------------------------------------------


def nbits(x: Tensor, rows: int, bits: int, threads: int) -> Callable[[], Any]:
    """One MatMulNBits by hand: blocks of 128, no zero points, accuracy level 4."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    size, block, rng = x.shape[1], 128, np.random.default_rng(0)
    packed = rng.integers(0, 256, (rows, size // block, block * bits // 8), dtype=np.uint8)
    scales = rng.random((rows, size // block), dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=size, N=rows, bits=bits,
        block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), rows])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


class _Layer(nn.Module):
    """A linear layer whose result nobody takes for a head's: a constant is added."""

    def __init__(self, dense: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(dense)
        self.register_buffer("one", torch.ones(dense.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return nn.functional.linear(x, self.weight) + self.one


def lowered(
    x: Tensor, dense: Tensor, bits: int, act_bits: int, threads: int, folder: Path
) -> Callable[[], Any]:
    """The pass without a rotation, to ONNX with default options; weights are float constants."""
    program = resplice.capture(_Layer(dense), (x,), check=False)
    item = Quest(weight_bits=bits, act_bits=act_bits, hadamard="off", head=True)
    path = folder / f"w{bits}a{act_bits}.onnx"
    artifact = resplice.optimize(program, item, check=False).to_onnx(
        path, check=False, threads=threads
    )
    inputs = {program.inputs[0].name: x}
    artifact.run(inputs)
    return lambda: artifact.run(inputs)


# ---- the Hadamard transform --------------------------------------------------------------


def measure_hadamard(threads: int, rounds: int) -> list[dict[str, Any]]:
    """The product with the matrix (= 1) and butterflies."""
    rows = []
    for tokens in (1, 64, 1024):
        x = torch.randn(tokens, 4096)
        compare(hadamard(x, 128), hadamard.reference(x.double(), 128))

        def plain(x: Tensor = x) -> Tensor:
            with use_kernels(False):
                return hadamard(x, 128)

        variants: Variants = {
            "hadamard by a product": plain, "hadamard by butterflies": lambda x=x: hadamard(x, 128)
        }  # fmt: skip
        rows += report(f"{tokens}x4096, blocks of 128", threads, interleaved(variants, rounds))
    return rows


if __name__ == "__main__":
    main()
