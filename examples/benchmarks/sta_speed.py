"""Sliding tile attention on a CPU: measured speed-up beside the ideal one.

    python examples/benchmarks/sta_speed.py --threads 1 2 --json sta.json

All variants of a case run interleaved in one process, float32, one call each per round; a figure is
the best of the rounds. "Ideal" is query-key pairs of dense attention over those of the window, and
"%" how much of it was measured. Compared with dense `scaled_dot_product_attention`:
- the op `tile_attention`;
- `flex_attention`, compiled, with the same mask as full blocks, its tokens put in tile order before
  the clock starts (in favour of it);
- NATTEN, if it is installed, with a token window of as many tokens; on a CPU it is flex_attention
  without compilation, which holds all scores at once, so only small canvases are measured;
- the op lowered to ONNX against dense attention lowered to ONNX, both in onnxruntime;
- a whole Wan block (hidden 512, 8 heads, FFN 2048) against itself with full attention, beside the
  ideal of Amdahl's law: all of the block but the pairs outside the window.
Results are compared before anything is timed.
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

import torch
from torch import Tensor, nn

import resplice
from resplice.kernels.tile_attention import tile_attention
from resplice.kernels.tile_grid import extent, first_tile, seen_pairs, tile_grid
from resplice.passes.sta import Sta

attend = nn.functional.scaled_dot_product_attention
Case = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]
CASES: list[Case] = [
    ((20, 32, 32), (4, 8, 8), (3, 3, 3)),
    ((20, 32, 32), (4, 8, 8), (1, 3, 3)),
    ((12, 24, 24), (4, 8, 8), (1, 3, 3)),
    ((12, 24, 24), (4, 8, 8), (3, 1, 1)),
    ((21, 30, 52), (6, 8, 8), (3, 3, 3)),
]
_MOST_SCORES = 2**30
PARTS = ("op", "onnx", "block")


def main() -> None:
    """Measure what is asked for, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--no-flex", action="store_true", help="it takes a C++ compiler")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for number in options.cases:
            for part in [p for p in options.parts if p != "block"]:
                measure = measure_op if part == "op" else measure_onnx
                rows += report(measure(CASES[number], threads, options))
        if "block" in options.parts:
            rows += report(measure_block(threads, options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def report(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows as they come."""
    for row in rows:
        print(
            f"{row['threads']} thread(s)  {row['what']:<34} {row['case']:<34}"
            f" {row['baseline_ms']:>9.1f} -> {row['ms']:>8.1f} ms"
            f"  x{row['ratio']:.2f}  ideal x{row['ideal']:.2f}  {row['percent']:>5.1f} %",
            flush=True,
        )
    return rows


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Best wall-clock seconds of each variant; every round runs each of them once.

    What took over ten times as long as the first variant is not run again.
    """
    best, first = dict.fromkeys(variants, math.inf), next(iter(variants))
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first one warms up, and counts if it is the best
            for name, call in variants.items():
                if 10 * best[first] < best[name] < math.inf:
                    continue
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def row(
    what: str, case: str, threads: int, base: float, own: float, ideal: float
) -> dict[str, Any]:
    """One figure."""
    ratio = base / own
    return {
        "what": what, "case": case, "threads": threads, "baseline_ms": 1e3 * base, "ms": 1e3 * own,
        "ratio": ratio, "ideal": ideal, "percent": 100 * ratio / ideal,
    }  # fmt: skip


def named(case: Case) -> str:
    """`20x32x32 tile 4x8x8 window 3x3x3`."""
    canvas, tile, window = ("x".join(map(str, sizes)) for sizes in case)
    return f"{canvas} tile {tile} window {window}"


def ideal_of(case: Case) -> float:
    """Pairs of dense attention over pairs seen."""
    canvas, tile, window = case
    return math.prod(canvas) ** 2 / seen_pairs(canvas, tile, window)


def drawn(tokens: int, heads: int) -> list[Tensor]:
    """Query, key and value as models have them, [1,heads,tokens,64] over [1,tokens,heads,64]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, heads, 64)
    return [torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3)]


# ---- the op ------------------------------------------------------------------------------


def measure_op(case: Case, threads: int, options: Any) -> list[dict[str, Any]]:
    """Dense attention, the op, flex_attention and NATTEN, one after another in each round."""
    canvas, tile, window = case
    q, k, v = drawn(math.prod(canvas), options.heads)
    variants: dict[str, Callable[[], Any]] = {
        "dense": lambda: attend(q, k, v),
        "tile_attention": lambda: tile_attention(q, k, v, canvas, tile, window),
    }
    if not options.no_flex:
        variants["flex_attention, compiled"] = flex(case, q, k, v)
    found = natten(case, q, k, v)
    if found is not None:
        variants["NATTEN, token window"] = found
    best = interleaved(variants, options.rounds)
    ideal = ideal_of(case)
    return [
        row(name, named(case), threads, best["dense"], seconds, ideal)
        for name, seconds in best.items()
        if name != "dense"
    ]


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Compiled flex_attention on tokens in tile order; checked against the op."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    canvas, tile, window = case
    numbers, seen = tile_numbers(case), tile_table(case)
    order = torch.argsort(numbers, stable=True)
    ordered = numbers[order]
    divides = all(size % length == 0 for size, length in zip(canvas, tile, strict=True))
    size = math.prod(tile) if divides else 128
    some, all_ = blocks(ordered, seen, size)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[ordered[query], ordered[key]]

    partial, full = (listed(table) for table in (some & ~all_, all_))
    block_mask = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(len(order), len(order))
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    tiled = [x[:, :, order].contiguous() for x in (q, k, v)]
    with torch.no_grad():
        found = compiled(*tiled, block_mask=block_mask)
        expected = tile_attention(q, k, v, canvas, tile, window)[:, :, order]
    error = float((found - expected).abs().max())
    assert error < 2e-5, f"flex_attention computes something else: {error}"
    return lambda: compiled(*tiled, block_mask=block_mask)


def tile_numbers(case: Case) -> Tensor:
    """Number of each token's tile."""
    canvas, tile, _ = case
    grid = tile_grid(canvas, tile)
    axes = [torch.arange(size) // length for size, length in zip(canvas, tile, strict=True)]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    return ((t * grid[1] + h) * grid[2] + w).flatten()


def tile_table(case: Case) -> Tensor:
    """Which tile sees which: boolean [tiles, tiles]."""
    canvas, tile, window = case
    table = torch.ones(1, 1, dtype=torch.bool)
    for count, size in zip(tile_grid(canvas, tile), window, strict=True):
        seen = extent(size, count)
        axis = torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            axis[i, first_tile(i, seen, count) : first_tile(i, seen, count) + seen] = True
        table = torch.kron(table.int(), axis.int()).bool()
    return table


def blocks(numbers: Tensor, seen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of tokens with some, and with all, of their pairs seen."""
    count = -(-len(numbers) // size)
    holds = torch.zeros(count, len(seen))
    holds[torch.arange(len(numbers)) // size, numbers] = 1
    some = holds @ seen.float() @ holds.T > 0
    hidden = holds @ (~seen).float() @ holds.T > 0
    if len(numbers) % size:  # the last block is not whole
        hidden[-1], hidden[:, -1] = True, True
    return some, ~hidden


def listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks per row, and the blocks, as flex_attention wants them."""
    order = torch.argsort((~table).int(), dim=1, stable=True).int()
    return table.sum(1, dtype=torch.int32)[None, None], order[None, None]


def natten(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """NATTEN with a window of as many tokens, odd; None where it can't be had.

    Without a GPU it computes all scores and masks them, so it needs their memory.
    """
    canvas, tile, window = case
    scores = q.shape[1] * math.prod(canvas) ** 2 * 4
    if scores > _MOST_SCORES and not torch.cuda.is_available():
        print(f"NATTEN: not measured, its scores alone would take {scores / 2**30:.1f} GiB")
        return None
    try:
        import natten as package

        size = [
            min(length * count, n) - (1 - min(length * count, n) % 2)
            for length, count, n in zip(tile, window, canvas, strict=True)
        ]
        shaped = [x.transpose(1, 2).reshape(1, *canvas, *x.shape[1::2]) for x in (q, k, v)]
        package.na3d(*shaped, kernel_size=tuple(size))
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        print(f"NATTEN: not measured ({type(error).__name__}: {error})".splitlines()[0])
        return None
    return lambda: package.na3d(*shaped, kernel_size=tuple(size))


# ---- onnxruntime -------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention alone, as a model to lower."""

    def __init__(self, case: Case | None) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Windowed, or dense without a case."""
        return attend(q, k, v) if self.case is None else tile_attention(q, k, v, *self.case)


def measure_onnx(case: Case, threads: int, options: Any) -> list[dict[str, Any]]:
    """One head: dense attention in onnxruntime holds all scores at once."""
    inputs = dict(zip("qkv", [x.contiguous() for x in drawn(math.prod(case[0]), 1)], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        variants = {}
        for name, model in {"dense": Attention(None), "tiles": Attention(case)}.items():
            program = resplice.capture(model, inputs, check=False)
            path = Path(folder) / f"{name}.onnx"
            artifact = resplice.optimize(program, check=False).to_onnx(
                path, check=False, threads=threads
            )
            variants[name] = lambda a=artifact: a.run(inputs)
        (found,) = variants["tiles"]().values()
        expected = tile_attention(*inputs.values(), *case)
        error = float((found - expected).abs().max())
        assert error < 2e-5, f"onnxruntime computes something else: {error}"
        best = interleaved(variants, max(2, options.rounds // 2))
    what = "lowered op in onnxruntime, 1 head"
    return [row(what, named(case), threads, best["dense"], best["tiles"], ideal_of(case))]


# ---- a whole block -----------------------------------------------------------------------


def measure_block(threads: int, options: Any) -> list[dict[str, Any]]:
    """A Wan block on 16x32x32 tokens, full attention and two windows."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    canvas, tile = (16, 32, 32), (4, 8, 8)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=64, in_channels=4,
        out_channels=4, text_dim=64, freq_dim=64, ffn_dim=2048, num_layers=1, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, canvas[0], 2 * canvas[1], 2 * canvas[2]),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 64),
        "return_dict": False,
    }
    full = resplice.capture(model, inputs, check=False)
    tensors = full.call.bind((), inputs)
    q, k, v = drawn(math.prod(canvas), 8)
    variants: dict[str, Callable[[], Any]] = {
        "full": lambda: full.run(tensors), "attention": lambda: attend(q, k, v)
    }  # fmt: skip
    windows = [(3, 3, 3), (1, 3, 3), (3, 1, 1)]
    for window in windows:
        sparse = resplice.optimize(full, Sta(tile=tile, window=window), check=False).program
        assert len(sparse.metadata["sta"]["sites"]) == 1
        variants[str(window)] = lambda p=sparse: p.run(tensors)
    best = interleaved(variants, options.rounds)
    rows = []
    for window in windows:
        case = (canvas, tile, window)
        kept = best["attention"] / ideal_of(case)
        ideal = best["full"] / (best["full"] - best["attention"] + kept)
        rows.append(
            row("whole Wan block", named(case), threads, best["full"], best[str(window)], ideal)
        )
    return rows


if __name__ == "__main__":
    main()
