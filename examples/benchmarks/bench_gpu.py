"""The Triton kernels on a GPU: correctness first, then times beside what else there is.

    python examples/benchmarks/bench_gpu.py --json gpu.json
    python examples/benchmarks/bench_gpu.py --only sta --dtype fp16
    python examples/benchmarks/bench_gpu.py --tune          also the fastest configuration of each
    python examples/benchmarks/bench_gpu.py --interpret     no GPU: tiny sizes, correctness alone

Every way of a row is compared with a float32 reference before anything is timed; one that is past
its bar is printed as wrong, is not timed, and makes the exit code 1. Times are medians of
`triton.testing.do_bench`, all of a row in one process; "x" is the baseline's time over that of the
way, as the papers print it.

    sta      tile attention against dense attention (torch's flash attention) and FlexAttention
             with the same mask, its tokens put in tile order before the clock starts; "ideal" is
             the pairs of dense attention over those of the window
    quest    packed weights against cuBLAS (F.linear) and, where it is installed, torchao's int4
    moe      carved feed-forward layers against the dense ones; "ideal" is their share of neurons
    rope     rotary application against the eager formula

Shapes: HunyuanVideo 117x768x1280 and Wan 2.1 69x768x1280 as in arXiv 2502.04507; layers as in the
speed tables of arXiv 2502.05003. With --interpret nothing is timed: a CPU says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sta_speed import blocks, listed, tile_numbers, tile_table
from torch import Tensor, nn

from resplice.compare import EXACT_BARS, difference
from resplice.kernels.cuda.launch import using
from resplice.kernels.cuda.register import host_functions, register
from resplice.kernels.cuda.tuning import tune
from resplice.kernels.moe_ffn import moe_ffn, sample_arguments
from resplice.kernels.packing import pack
from resplice.kernels.quant_linear import quant_linear
from resplice.kernels.rope3d import rope3d
from resplice.kernels.tile_attention import tile_attention
from resplice.kernels.tile_grid import seen_pairs, tile_grid

Triple = tuple[int, int, int]
Clock = Callable[[Callable[[], Any]], float]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Way:
    """One way to compute something: what is timed, and which part of it is compared."""

    call: Callable[[], Tensor]
    part: Callable[[Tensor], Tensor] = lambda result: result
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """One subject at one size.

    Attributes:
        title: What and how large.
        expected: The compared part, float32.
        bar: Largest error relative to its scale.
        ways: Name -> way.
        baseline: Name and call that ratios refer to; it may compute something else (all pairs).
        ideal: The ratio that counting operations promises.
    """

    title: str
    expected: Tensor
    bar: float
    ways: dict[str, Way]
    baseline: tuple[str, Callable[[], Tensor]]
    ideal: float | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how large: device, dtype, and whether everything is tiny."""

    device: str
    dtype: torch.dtype
    tiny: bool
    generator: torch.Generator = field(default_factory=torch.Generator)

    def drawn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype)

    def ours(self, op: Any) -> Callable[..., Tensor]:
        """The op, which is its kernel on a GPU; the interpreted kernel on the CPU."""
        return op if self.device == "cuda" else host_functions()[op.name]


def main() -> None:
    """Run what is asked for, print tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, not timed")
    parser.add_argument("--tune", action="store_true", help="also time all configurations")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args()
    clock = None if given.interpret else median
    if given.interpret and given.tune:
        parser.error("--tune times kernels, --interpret times nothing")
    if not given.interpret and not torch.cuda.is_available():
        parser.error("there is no GPU; --interpret checks the plumbing without one")
    register()
    setting = Setting("cpu" if given.interpret else "cuda", DTYPES[given.dtype], given.interpret)
    rows = []
    for subject in given.only:
        print(f"\n{subject}")
        for row in SUBJECTS[subject](setting):
            rows.append({"subject": subject, **measured(row, clock, given.tune)})
            print(line(rows[-1]), flush=True)
    machine = "CPU, interpreted" if given.interpret else torch.cuda.get_device_name()
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if any(way["wrong"] for row in rows for way in row["ways"].values()):
        raise SystemExit(1)


def median(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    from triton.testing import do_bench

    found: float = do_bench(call, return_mode="median")
    return found


def measured(row: Row, clock: Clock | None, tuned: bool = False) -> dict[str, Any]:
    """Compare every way of a row, then time the right ones and the baseline."""
    ways: dict[str, Any] = {name: compared(row, way) for name, way in row.ways.items()}
    base = None
    if clock:
        base = clock(row.baseline[1])
        for name, way in ways.items():
            if not way["wrong"]:
                way["ms"] = clock(row.ways[name].call)
                way["ratio"] = base / way["ms"]
        if tuned and not ways["ours"]["wrong"]:
            ways["ours, tuned"] = _tuned(row, base, clock)
    return {
        "title": row.title, "bar": row.bar, "ideal": row.ideal, "ways": ways,
        "baseline": {"name": row.baseline[0], "ms": base},
    }  # fmt: skip


def compared(row: Row, way: Way) -> dict[str, Any]:
    """Error of a way, and whether that is past its bar."""
    error = difference(row.expected.cpu(), way.part(way.call()).float().cpu()).relative
    return {"error": error, "wrong": not error <= (way.bar or row.bar)}


def _tuned(row: Row, base: float, clock: Clock) -> dict[str, Any]:
    """Our way with the fastest configuration of each of its kernels; compared again."""
    way = row.ways["ours"]
    chosen = tune(way.call, clock=clock)
    with using(**chosen):
        found = compared(row, way)
        if not found["wrong"]:
            found["ms"] = clock(way.call)
            found["ratio"] = base / found["ms"]
    return found | {"configurations": {name: str(config) for name, config in chosen.items()}}


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    base = found["baseline"]
    parts = [f"{found['title']:46s}"]
    parts += [f"{base['name']} {base['ms']:.3f} ms"] if base["ms"] else []
    for name, way in found["ways"].items():
        if way["wrong"]:
            parts.append(f"{name} WRONG, error {way['error']:.1e}")
        elif "ms" in way:
            parts.append(f"{name} {way['ms']:.3f} ms ({way['ratio']:.2f}x)")
        else:
            parts.append(f"{name} agrees, error {way['error']:.1e}")
    parts += [f"ideal {found['ideal']:.2f}x"] if found["ideal"] and base["ms"] else []
    return "   ".join(parts)


# ---- sliding tile attention --------------------------------------------------------------

VIDEOS: list[tuple[str, int, Triple, Triple]] = [
    ("HunyuanVideo", 24, (30, 48, 80), (6, 8, 8)),
    ("Wan 2.1", 40, (18, 48, 80), (6, 8, 8)),
]
WINDOWS: list[Triple] = [(3, 3, 3), (5, 3, 5), (5, 5, 5), (3, 6, 1), (1, 6, 10)]


def sta(setting: Setting) -> Iterator[Row]:
    """The paper's windows on the canvases of its models."""
    videos = [("tiny", 2, (4, 8, 8), (2, 4, 4))] if setting.tiny else VIDEOS
    windows: list[Triple] = [(1, 1, 1), (2, 1, 2)] if setting.tiny else WINDOWS
    for name, heads, canvas, tile in videos:
        grid = tile_grid(canvas, tile)
        for window in windows:
            if all(w % 2 or w >= g for w, g in zip(window, grid, strict=True)):
                yield _window(setting, name, heads, (canvas, tile, window))


def _window(
    setting: Setting, name: str, heads: int, case: tuple[Triple, Triple, Triple]
) -> Row:  # fmt: skip
    canvas, tile, window = case
    size, width = math.prod(canvas), 16 if setting.tiny else 128
    q, k, v = (setting.drawn(1, heads, size, width, scale=1.5) for _ in range(3))
    numbers, seen = tile_numbers(case), tile_table(case)
    rows = torch.randperm(size, generator=setting.generator)[:64]
    allowed = seen[numbers[rows]][:, numbers].to(setting.device)
    order = torch.argsort(numbers, stable=True)
    places = torch.argsort(order)[rows].to(setting.device)
    attend, ours = nn.functional.scaled_dot_product_attention, setting.ours(tile_attention)
    rows = rows.to(setting.device)
    scores = (q[:, :, rows].float() @ k.float().mT / math.sqrt(width)).masked_fill(
        ~allowed, -math.inf
    )
    ways = {
        "ours": Way(
            lambda: ours(q, k, v, list(canvas), list(tile), list(window)),
            lambda result: result[:, :, rows],
        )
    }
    if not setting.tiny:
        ways["flex"] = Way(_flex(q, k, v, numbers[order], seen, order), lambda r: r[:, :, places])
    return Row(
        f"{name} {'x'.join(map(str, canvas))}, window {','.join(map(str, window))}",
        scores.softmax(-1) @ v.float(), EXACT_BARS[setting.dtype], ways,
        ("dense", lambda: attend(q, k, v)), size * size / seen_pairs(canvas, tile, window),
    )  # fmt: skip


def _flex(
    q: Tensor, k: Tensor, v: Tensor, ordered: Tensor, seen: Tensor, order: Tensor
) -> Callable[[], Tensor]:
    """Compiled FlexAttention on tokens in tile order, the window as whole blocks of 128."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    some, all_ = blocks(ordered, seen, 128)
    device, size = q.device, len(order)
    table, numbers = seen.to(device), ordered.to(device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[numbers[query], numbers[key]]

    lists = [item.to(device) for part in (some & ~all_, all_) for item in listed(part)]
    block_mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=128, mask_mod=mask, seq_lengths=(size, size)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    tiled = [x[:, :, order.to(device)].contiguous() for x in (q, k, v)]
    return lambda: compiled(*tiled, block_mask=block_mask)


# ---- packed weights ----------------------------------------------------------------------

LAYERS = [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632), (12288, 4096), (4096, 4096),
          (22016, 4096), (4096, 11008)]  # fmt: skip
TOKENS = (1, 32, 256, 1024, 4096, 16384)


def quest(setting: Setting) -> Iterator[Row]:
    """Rows of the paper's tables: N x K, tokens, bits."""
    layers = [(64, 96)] if setting.tiny else LAYERS
    for n, k in layers:
        for bits in (1, 2, 4, 8):
            codes = torch.randint(0, 2**bits, (n, k), generator=setting.generator)
            step = torch.rand(n, 1, generator=setting.generator) / math.sqrt(k) / 2**bits + 1e-3
            packed, step = pack(codes, bits).to(setting.device), step.to(setting.device)
            weight = _unpacked(packed, step, k, bits)
            for m in (1, 5) if setting.tiny else TOKENS:
                yield _layer(setting, weight, packed, step, bits, m)


def _unpacked(packed: Tensor, step: Tensor, k: int, bits: int) -> Tensor:
    """The weight in float32, by the op's reference."""
    unit = torch.eye(k, device=packed.device)
    return quant_linear.reference(unit, packed, step, None, bits, 0).T.contiguous()


def _layer(
    setting: Setting, weight: Tensor, packed: Tensor, step: Tensor, bits: int, m: int
) -> Row:  # fmt: skip
    n, k = weight.shape
    x, half = setting.drawn(m, k), weight.to(setting.dtype)
    ours, linear = setting.ours(quant_linear), nn.functional.linear
    ways = {"ours": Way(lambda: ours(x, packed, step, None, bits, 0))}
    if bits == 4 and not setting.tiny:
        ways |= _torchao(half, x)
    return Row(
        f"{n}x{k}, {m} tokens, {bits} bit", linear(x.float(), weight), EXACT_BARS[setting.dtype],
        ways, ("cuBLAS", lambda: linear(x, half)),
    )  # fmt: skip


def _torchao(weight: Tensor, x: Tensor) -> dict[str, Way]:
    """Torchao's int4 weights in groups of 128, where it is installed and takes this dtype."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer = layer.to(weight.device, weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    try:
        quantize_(layer, Int4WeightOnlyConfig(group_size=128))
        layer(x)
    except Exception as error:  # whatever it says, the other ways are to be timed
        print(f"torchao: {str(error).splitlines()[0]}")
        return {}
    return {"torchao": Way(lambda: layer(x), bar=math.inf)}  # it rounds the weights once more


# ---- experts and rotary embeddings -------------------------------------------------------


def moe(setting: Setting) -> Iterator[Row]:
    """A SwiGLU layer of d 4096 and 11008 neurons, carved: S shared, A of the others active."""
    width, neurons = (32, 64) if setting.tiny else (4096, 11008)
    for experts, shared, active in ((8, 2, 2), (8, 3, 3), (16, 4, 4)):
        each = neurons // experts
        for tokens in (7,) if setting.tiny else (1, 256, 4096):
            arguments = sample_arguments(
                (tokens, width), shared=shared * each, experts=experts - shared, size=each,
                active=active, seed=tokens,
            )  # fmt: skip
            yield _experts(setting, arguments, experts, shared + active)


def _experts(setting: Setting, arguments: tuple[Any, ...], experts: int, used: int) -> Row:
    given = [a.to(setting.device, setting.dtype) if isinstance(a, Tensor) else a for a in arguments]
    wide = [a.float() if isinstance(a, Tensor) else a for a in given]
    ours, x = setting.ours(moe_ffn), given[0]
    width, neurons = x.shape[-1], experts * given[6].shape[-1]
    up = setting.drawn(2 * neurons, width, scale=1 / math.sqrt(width))
    down = setting.drawn(width, neurons, scale=1 / math.sqrt(neurons))

    def dense() -> Tensor:
        gate, value = nn.functional.linear(x, up).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * value, down)

    return Row(
        f"{used} of {experts} experts, {x.shape[0]} tokens, d {width}", moe_ffn.reference(*wide),
        2 * EXACT_BARS[setting.dtype], {"ours": Way(lambda: ours(*given))}, ("dense", dense),
        experts / used,
    )  # fmt: skip


def rope(setting: Setting) -> Iterator[Row]:
    """Rotary application on q of a video transformer and of a language model."""
    sizes = [(2, 24, 16)] if setting.tiny else [(24, 57_600, 128), (32, 4096, 128)]
    yield from (_rotation(setting, *size) for size in sizes)


def _rotation(setting: Setting, heads: int, tokens: int, width: int) -> Row:
    device, ours = setting.device, setting.ours(rope3d)
    x = setting.drawn(1, heads, tokens, width)
    places = torch.arange(tokens, device=device)
    positions = torch.stack([places // 16, places // 4 % 4, places % 4])[:, None]
    frequencies = 1e4 ** (-torch.arange(0, width, 2, device=device) / width)
    call = (positions, frequencies, [i % 3 for i in range(width // 2)])
    return Row(
        f"{heads} heads, {tokens} tokens, {width} channels", rope3d.reference(x.float(), *call),
        EXACT_BARS[setting.dtype], {"ours": Way(lambda: ours(x, *call))},
        ("eager", lambda: rope3d.reference(x, *call)),
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "sta": sta, "quest": quest, "moe": moe, "rope": rope,
}  # fmt: skip

if __name__ == "__main__":
    main()
