"""tile_attention in Triton: meaning, gradients, exactly the keys that are seen, compiled code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, cast, compiled, error, launches, poison, wide
from triton.runtime.interpreter import InterpreterBuilder

from resplice.errors import OpError
from resplice.kernels.cuda import tile_attention as cuda
from resplice.kernels.cuda import tile_autograd, tile_gradients
from resplice.kernels.cuda.launch import Config, launch, using
from resplice.kernels.cuda.register import register
from resplice.kernels.cuda.tile_problem import head_table
from resplice.kernels.tile_attention import text_mask, tile_attention, tile_mask
from resplice.kernels.tile_grid import extent, tile_grid, triples

register()
VECTORS = Path(__file__).parent / "data"
KERNELS = (
    "tile_attention_forward", "tile_attention_query_gradient", "tile_attention_key_gradient",
)  # fmt: skip
GOOD = [s for s in tile_attention.samples() if not s.refused]
DOUBLE = [s for s in GOOD if s.args[0].dtype == torch.float64]
SAMPLES = [s for s in GOOD if s.args[0].dtype != torch.float64]
QUICK = ("a window per head", "odd sizes", "texts of two lengths")
SHORT = [
    pytest.param(s, id=s.label, marks=() if s.label in QUICK else pytest.mark.slow)
    for s in SAMPLES
    if s.args[0].shape[2] <= 150
]
RAGGED = (3, 5, 7), (2, 2, 3), [1, 3, 1, 2, 1, 3], 3, True
"""Canvas, tile, windows of two heads, text first: every side has a short last tile."""


@contextmanager
def blocks(m: int, n: int) -> Iterator[None]:
    """The same block sizes for all three kernels."""
    with using(**dict.fromkeys(KERNELS, Config({"block_m": m, "block_n": n}, 4, 1))):
        yield


def drawn(canvas: Any, text: int, heads: int = 2, d: int = 16, dv: int = 16) -> list[Tensor]:
    tokens = math.prod(canvas) + text
    return [torch.randn(1, heads, tokens, width) for width in (d, d, dv)]


def holds(args: Any) -> bool:
    """Near the reference in float64, in memory [B,S,heads,Dv]."""
    with poison():
        found = cuda.tile_attention(*args)
    exact = tile_attention.reference(*wide(args))
    assert found.dtype == args[0].dtype
    assert found.transpose(1, 2).is_contiguous()
    return error(found, exact) <= bar(found.dtype)


# ---- meaning -----------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    with blocks(64, 64):
        assert holds(sample.args)


def test_float64_goes_the_way_of_the_cpu() -> None:
    assert DOUBLE
    for sample in DOUBLE:
        assert torch.equal(cuda.tile_attention(*sample.args), tile_attention(*sample.args))


@pytest.mark.parametrize(("m", "n"), [(16, 16), (128, 32), (32, 128)])
def test_block_sizes_on_ragged_canvases(m: int, n: int) -> None:
    with blocks(m, n):
        assert holds((*drawn(RAGGED[0], RAGGED[3]), *RAGGED))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types(dtype: torch.dtype) -> None:
    """Scores are products of rounded values; the bar is that of the results."""
    with blocks(32, 32):
        assert holds((*cast(drawn(RAGGED[0], RAGGED[3]), dtype), *RAGGED))


@pytest.mark.parametrize(("d", "dv"), [(20, 12), (16, 40)])
def test_any_number_of_channels_in_any_layout(d: int, dv: int) -> None:
    q, k, v = drawn(RAGGED[0], RAGGED[3], d=d, dv=dv)
    q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))
    k = k.repeat_interleave(2, -1)[..., ::2]
    assert k.stride(-1) == 2
    with blocks(32, 32):
        assert holds((q, k, v, *RAGGED, None, 0.3))


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = drawn((1, 4, 4), 0)
    mask = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    with blocks(16, 16), poison():
        found = cuda.tile_attention(
            q, k, v, (1, 4, 4), (1, 2, 2), (1, 1, 1), 0, False, mask
        )  # fmt: skip
    assert bool((found == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sta_d_222_mixed_t0", "sta_h_aniso_t5pad8"])
def test_vectors_reproduce(name: str) -> None:
    data = np.load(VECTORS / f"{name}.npz")
    canvas, tile = data["canvas"].tolist(), data["tile"].tolist()
    q, k, v = (torch.from_numpy(data[x]).float() for x in "qkv")
    grid = tile_grid(canvas, tile)
    windows = [
        extent(w, n) for row in data["windows"].tolist() for w, n in zip(row, grid, strict=True)
    ]
    padded = int(data["text_max_len"])
    lengths = torch.full((q.shape[0],), int(data["text_length"]))
    mask = text_mask(lengths, padded) if padded else None
    with blocks(64, 64), poison():
        found = cuda.tile_attention(q, k, v, canvas, tile, windows, padded, False, mask)
    assert float((found.double() - torch.from_numpy(data["out_raster"])).abs().max()) <= 2e-6


# ---- which keys --------------------------------------------------------------------------

Loads = dict[tuple[str, int, int], list[tuple[str, np.ndarray, bool]]]
"""By kernel, head and program: which tensor, which tokens, and whether some were masked."""


@contextmanager
def watched(**tensors: Tensor) -> Iterator[Loads]:
    """Note every block of rows that kernels load from these [1,heads,S,D] tensors."""
    found: Loads = {}
    real, running = InterpreterBuilder.create_masked_load, [""]

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for name, x in tensors.items():
            places = (pointers.data.astype(np.int64) - x.data_ptr()) // x.element_size()
            inside = mask.data & (places >= 0) & (places < x.numel())
            if pointers.data.ndim == 2 and inside.any():
                rows = inside[:, 0]
                head, token = divmod(places[rows, 0], x.stride(1))
                key = running[0], int(head[0]), int(self.grid_idx[0])
                note = name, token // x.stride(2), bool(rows.all())
                found.setdefault(key, []).append(note)
        return real(self, pointers, mask, *rest)

    def launched(function: Any, *args: Any, **kwargs: Any) -> None:
        running[0] = function.fn.__name__
        launch(function, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(cuda, "launch", launched)
        patch.setattr(tile_gradients, "launch", launched)
        yield found


def trained(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    """Result and gradients by the kernels."""
    saving, gradients = (
        getattr(torch.ops.resplice, f"tile_attention_{name}") for name in ("saving", "gradients")
    )
    with poison():
        out, logsum = saving(q, k, v, *rest)
        return [out, *gradients(torch.ones_like(out), out, logsum, q, k, v, *rest)]


@pytest.mark.parametrize(
    "problem",
    [((3, 8, 8), (1, 4, 4), [1, 1, 1, 3, 1, 2], 0, False), RAGGED],
    ids=["dense", "ragged, with text"],
)
def test_every_kernel_loads_exactly_the_tokens_that_are_seen(problem: Any) -> None:
    """Each once; and where sizes divide, as many blocks as the formula says, none masked."""
    canvas, tile, windows, text, first = problem
    q, k, v = drawn(canvas, text)
    with blocks(16, 16), watched(q=q, k=k) as loads:
        trained(q, k, v, *problem)
    sees = [tile_mask(canvas, tile, w, text, first).numpy() for w in triples(windows)]
    counted: Counter[tuple[str, int]] = Counter()
    for (kernel, head, _), notes in loads.items():
        owner, seen = ("k", "q") if kernel == "tile_attention_key_gradient" else ("q", "k")
        table = sees[head].T if owner == "k" else sees[head]
        own = np.concatenate([tokens for name, tokens, _ in notes if name == owner])
        other = np.concatenate([tokens for name, tokens, _ in notes if name == seen])
        assert len(set(other)) == len(other)
        for token in own:
            assert set(table[token].nonzero()[0]) == set(other)
        counted[kernel, head] += len([name for name, *_ in notes if name == seen])
    assert {kernel for kernel, _ in counted} == set(KERNELS)
    if not text:
        grid, size = tile_grid(canvas, tile), math.prod(tile)
        dense = [math.prod(grid) * math.prod(w) * (size // 16) ** 2
                 for w in triples(windows)]  # fmt: skip
        assert all(number == dense[head] for (_, head), number in counted.items())
        assert all(full for notes in loads.values() for *_, full in notes)


def test_heads_with_most_keys_come_first_and_whole_axes_are_one_tile() -> None:
    table = head_table((4, 9, 6), (2, 2, 2), [1, 1, 1, 2, 3, 3], 2)
    assert table == ((4, 2, 6, 1, 3, 1, 1), (2, 2, 2, 1, 1, 1, 0))


# ---- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SHORT)
def test_gradients_are_those_of_the_reference(sample: Any) -> None:
    q, k, v, *rest = sample.args
    with blocks(64, 64):
        found = trained(q, k, v, *rest)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = tile_attention.reference(*leaves, *wide(rest))
    exact = torch.autograd.grad(out.sum(), leaves)
    for own, other in zip(found, (out.detach(), *exact), strict=True):
        assert error(own, other) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_types(dtype: torch.dtype) -> None:
    """Weights and slopes are rounded before they are multiplied: twice the bar."""
    q, k, v = cast(drawn(RAGGED[0], RAGGED[3], d=12, dv=20), dtype)
    with blocks(32, 64):
        found = trained(q, k, v, *RAGGED)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = tile_attention.reference(*leaves, *RAGGED)
    for own, other in zip(found[1:], torch.autograd.grad(out.sum(), leaves), strict=True):
        assert error(own, other) <= 2 * bar(dtype)


def test_where_gradients_are_asked_for_the_op_saves_what_its_kernels_need() -> None:
    """What is registered for GPUs, called on CPU tensors."""
    q, k, v = (x.requires_grad_() for x in drawn((1, 2, 4), 0))
    rest = (1, 2, 4), (1, 2, 2), (1, 1, 1), 0, False
    with blocks(16, 16):
        out = tile_autograd._forward(q, k, v, *rest)
        assert "saving" in str(out.grad_fn.next_functions) + str(out.grad_fn)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        exact = torch.autograd.grad(tile_attention(q, k, v, *rest).square().sum(), (q, k, v))
        assert all(error(a, b) <= 1e-5 for a, b in zip(found, exact, strict=True))
        mask = torch.zeros(1, 1, 1, 8, requires_grad=True)
        with pytest.raises(OpError, match="mask can't be differentiated"):
            tile_autograd._forward(q, k, v, *rest, mask).sum().backward()
    with torch.no_grad():
        assert tile_autograd._forward(q, k, v, *rest).grad_fn is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(
        "resplice::tile_attention", "AutogradCUDA"
    )


def _kernels(function: Any, shapes: str) -> int:
    """Kernels in the graph that compilers see, traced on tensors of a GPU."""
    sizes = {"x": (1, 2, 8, 16), "l": (1, 2, 8)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(sizes[shape], device="cuda") for shape in shapes]
        functional = dispatch_functionalize(function, FunctionalTensorMode(export=False))
        graph = make_fx(functional)(*given).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert not any("resplice" in name for name in names)
    return sum("triton_kernel_wrapper" in name for name in names)


def test_compilers_see_one_kernel_forward_and_three_backward() -> None:
    """Autograd itself needs a GPU driver, so both operators are traced by themselves."""
    rest, ops = ((1, 2, 4), (1, 2, 2), (1, 1, 1)), torch.ops.resplice
    assert _kernels(lambda *x: tile_attention(*x, *rest), "xxx") == 1
    assert _kernels(lambda *x: ops.tile_attention_saving(*x, *rest), "xxx") == 1
    assert _kernels(lambda *x: ops.tile_attention_gradients(*x, *rest), "xxlxxx") == 3


# ---- compiled code -----------------------------------------------------------------------

FORWARD_HGMMA = {64: 16, 128: 24}
"""On sm_90 in the default configuration, 16 bits: both loops, a product of 16 channels each."""


def _large(dtype: torch.dtype, d: int, mask: str = "") -> tuple[Any, ...]:
    canvas, text = (30, 48, 80), 256
    tokens = math.prod(canvas) + text
    q, k, v = (
        torch.empty(1, tokens, 24, d, dtype=dtype, device="meta").transpose(1, 2) for _ in "qkv"
    )
    masks = {
        "": None,
        "text": torch.empty(1, 1, 1, text, dtype=torch.bool, device="meta"),
        "keys": torch.empty(1, 24, 1, tokens, dtype=dtype, device="meta"),
    }
    return q, k, v, canvas, (6, 8, 8), (3, 3, 3), text, False, masks[mask], None


def _training(*args: Any) -> None:
    out, logsum = tile_autograd._saving(*args)
    tile_autograd._gradients(out, out, logsum, *args)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "d", "mask"),
    [(torch.bfloat16, 128, ""), (torch.bfloat16, 128, "text"), (torch.bfloat16, 128, "keys"),
     (torch.float16, 64, ""), (torch.float32, 64, "")],
)  # fmt: skip
def test_compiled_code(arch: str, dtype: torch.dtype, d: int, mask: str, tmp_path: Path) -> None:
    for item in launches(_training, _large(dtype, d, mask), arch):
        code = compiled(item, arch, tmp_path)
        assert code.spills == 0, item.name
        if item.name == "tile_attention_delta":
            continue
        assert code.tensor_core > 0, item.name
        if arch == "sm_90" and dtype.itemsize == 2:
            assert code.count("HGMMA") == code.tensor_core, item.name
        if arch == "sm_90" and item.name == "tile_attention_forward" and dtype.itemsize == 2:
            assert code.count("HGMMA") == FORWARD_HGMMA[d]
            assert code.count("LDGSTS") > 0
            assert code.count("LDL", "STL") == 0
