"""tile_attention: the published vectors, a mask written once more by hand, windows, gradients."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resplice.backends.lowering import lower_ops
from resplice.build import Builder
from resplice.capture import capture
from resplice.errors import OpError
from resplice.kernels.tile_attention import text_mask, tile_attention
from resplice.kernels.tile_grid import (
    axis_runs,
    axis_spans,
    extent,
    first_tile,
    seen_pairs,
    tile_count,
    tile_grid,
    window_groups,
)
from resplice.kernels.tile_lowering import MOST_CALLS, lowering_cost, plan
from resplice.ops import find_op

attend = nn.functional.scaled_dot_product_attention
VECTORS = Path(__file__).parent / "data"


def brute_mask(
    canvas: Any, tile: Any, window: Any, text: int = 0, text_first: bool = False
) -> Tensor:
    """Query sees key: token by token, straight from the rule of the paper."""
    tokens = list(itertools.product(*map(range, canvas)))
    grid = [math.ceil(size / length) for size, length in zip(canvas, tile, strict=True)]

    def sees(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        for axis, count in enumerate(grid):
            reach = window[axis] // 2
            low, high = reach, count - 1 - reach
            if low > high:
                continue
            centre = min(max(query[axis] // tile[axis], low), high)
            if abs(key[axis] // tile[axis] - centre) > reach:
                return False
        return True

    image = torch.tensor([[sees(query, key) for key in tokens] for query in tokens])
    size = len(tokens) + text
    mask = torch.ones(size, size, dtype=torch.bool)
    start = text if text_first else 0
    mask[start : start + len(tokens), start : start + len(tokens)] = image
    return mask


def brute(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """Masked softmax, spelled out."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.exp() * allowed
    return weights / weights.sum(-1, keepdim=True) @ v


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype) for _ in range(3))


# ---- the published vectors ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["sta_d_222_mixed_t0", "sta_h_aniso_t5pad8"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_vectors_reproduce(name: str, dtype: torch.dtype, bar: float) -> None:
    """Even windows in them mean what the published kernels make of them: one tile more."""
    data = np.load(VECTORS / f"{name}.npz")
    canvas, tile = data["canvas"].tolist(), data["tile"].tolist()
    q, k, v = (torch.from_numpy(data[x]).to(dtype) for x in "qkv")
    grid = tile_grid(canvas, tile)
    windows = [
        extent(w, n) for row in data["windows"].tolist() for w, n in zip(row, grid, strict=True)
    ]
    padded = int(data["text_max_len"])
    lengths = torch.full((q.shape[0],), int(data["text_length"]))
    mask = text_mask(lengths, padded) if padded else None
    args = (q, k, v, canvas, tile, windows, padded, False, mask)
    expected = torch.from_numpy(data["out_raster"])
    assert float((tile_attention(*args).double() - expected).abs().max()) <= bar
    assert float((tile_attention.reference(*args).double() - expected).abs().max()) <= bar
    for head, density in enumerate(data["density"].tolist()):
        pairs = seen_pairs(canvas, tile, windows[3 * head : 3 * head + 3])
        assert pairs / math.prod(canvas) ** 2 == pytest.approx(density, rel=1e-6)


# ---- a mask written by hand --------------------------------------------------------------

SHAPES = [
    ((4, 6, 6), (2, 2, 2), (1, 3, 3), 0, False, 1),
    ((4, 6, 6), (2, 2, 2), (2, 1, 1), 3, False, 2),
    ((3, 7, 5), (2, 3, 2), (1, 1, 3), 1, True, 2),
    ((5, 5, 9), (1, 2, 2), (3, 3, 3), 4, True, 1),
    ((7, 4, 4), (1, 4, 3), (5, 1, 1), 0, False, 3),
    ((1, 6, 10), (1, 2, 2), (1, 3, 3), 2, False, 1),
    ((2, 3, 4), (6, 8, 8), (3, 3, 3), 5, False, 2),
]


@pytest.mark.parametrize(("canvas", "tile", "window", "text", "first", "batch"), SHAPES)
def test_it_is_attention_under_the_mask(
    canvas: Any, tile: Any, window: Any, text: int, first: bool, batch: int
) -> None:
    q, k, v = drawn((batch, 2, math.prod(canvas) + text, 8))
    allowed = brute_mask(canvas, tile, window, text, first)
    found = tile_attention(q, k, v, canvas, tile, window, text, first)
    assert float((found - brute(q, k, v, allowed)).abs().max()) <= 1e-12
    scaled = tile_attention(q, k, v, canvas, tile, window, text, first, None, 0.1)
    assert float((scaled - brute(q, k, v, allowed, 0.1)).abs().max()) <= 1e-12
    single = tile_attention(q.float(), k.float(), v.float(), canvas, tile, window, text, first)
    assert float((single - brute(q, k, v, allowed)).abs().max()) <= 2e-6


@pytest.mark.parametrize("windows", [[(1, 3, 3), (1, 3, 3), (2, 1, 1), (2, 3, 3)],
                                     [(1, 3, 3), (2, 1, 1), (1, 3, 3), (2, 1, 1)]])  # fmt: skip
def test_every_head_has_its_own_window(windows: list[tuple[int, ...]]) -> None:
    canvas, tile = (4, 6, 10), (2, 2, 2)
    q, k, v = drawn((2, 4, 240, 8))
    found = tile_attention(q, k, v, canvas, tile, [size for window in windows for size in window])
    for head, window in enumerate(windows):
        expected = brute(q[:, head], k[:, head], v[:, head], brute_mask(canvas, tile, window))
        assert float((found[:, head] - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("first", [False, True])
def test_padded_text_is_not_seen_whatever_its_length(first: bool) -> None:
    canvas, tile, window = (2, 4, 6), (1, 2, 2), (1, 1, 3)
    q, k, v = drawn((3, 2, 48 + 5, 8))
    mask = text_mask(torch.tensor([5, 0, 3]), 5)
    found = tile_attention(q, k, v, canvas, tile, window, 5, first, mask)
    allowed = brute_mask(canvas, tile, window, 5, first)
    for item, length in enumerate((5, 0, 3)):
        keys = torch.ones(53, dtype=torch.bool)
        keys[(0 if first else 48) + length : (5 if first else 53)] = False
        expected = brute(q[item], k[item], v[item], allowed & keys)
        assert float((found[item] - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_on_all_keys_are_kept(heads: int, boolean: bool) -> None:
    canvas, tile, window = (2, 4, 6), (1, 2, 2), (1, 1, 3)
    q, k, v = drawn((2, 2, 48 + 3, 8))
    allowed = brute_mask(canvas, tile, window, 3)
    bias = torch.randn(2, heads, 1, 51, dtype=torch.float64)
    mask = bias > -1 if boolean else bias
    found = tile_attention(q, k, v, canvas, tile, window, 3, False, mask)
    weights = (mask.double() if boolean else mask.exp()) * allowed
    assert float((found - brute(q, k, v, weights)).abs().max()) <= 1e-12
    assert float((found - tile_attention.reference(
        q, k, v, canvas, tile, window, 3, False, mask)).abs().max()) <= 1e-12  # fmt: skip


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = drawn((1, 1, 16, 8))
    mask = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    for function in (tile_attention, tile_attention.reference):
        assert bool((function(q, k, v, (1, 4, 4), (1, 2, 2), (1, 1, 1), 0, False, mask) == 0).all())


def test_the_whole_window_is_plain_attention_bit_by_bit() -> None:
    q, k, v = drawn((2, 3, 4 * 6 * 6 + 3, 16), torch.float32)
    for windows in ([2, 3, 3], [4, 5, 9], [2, 3, 3, 3, 3, 3, 2, 4, 4]):
        assert torch.equal(
            tile_attention(q, k, v, (4, 6, 6), (2, 2, 2), windows, 3), attend(q, k, v)
        )


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 3), (1, 5, 3), (3, 1, 5)])
def test_tiles_of_one_token_are_neighbourhood_attention(window: tuple[int, ...]) -> None:
    """NATTEN: each token sees its nearest w tokens, shifted inwards at borders."""
    canvas = (3, 5, 6)
    q, k, v = drawn((1, 2, 90, 8))
    image = (1, 2, *canvas, 8)
    expected = torch.empty(image, dtype=torch.float64)
    for t, y, x in itertools.product(*map(range, canvas)):
        spans = [
            slice(start := min(max(i - w // 2, 0), n - w), start + w)
            for i, n, w in zip((t, y, x), canvas, window, strict=True)
        ]
        keys, values = (a.view(image)[:, :, *spans].flatten(2, 4) for a in (k, v))
        query = q.view(image)[:, :, t, y, x, None]
        expected[:, :, t, y, x] = ((query @ keys.mT / 8**0.5).softmax(-1) @ values)[:, :, 0]
    found = tile_attention(q, k, v, canvas, (1, 1, 1), window)
    assert float((found - expected.flatten(2, 4)).abs().max()) <= 1e-12


@pytest.mark.parametrize("window", [(3, 3, 5), (3, 3, 3), (3, 5, 3)])
def test_the_neighbourhood_package_agrees(window: tuple[int, ...]) -> None:
    """Where NATTEN is installed; it takes no windows of one token."""
    natten = pytest.importorskip("natten")
    canvas = (3, 5, 6)
    q, k, v = (x.float() for x in drawn((1, 2, 90, 16)))
    shaped = [x.transpose(1, 2).unflatten(1, canvas) for x in (q, k, v)]
    expected = natten.na3d(*shaped, kernel_size=window).flatten(1, 3).transpose(1, 2)
    found = tile_attention(q, k, v, canvas, (1, 1, 1), window)
    assert float((found - expected).abs().max()) <= 2e-6


# ---- windows -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 11))
def test_every_tile_sees_the_same_number_of_tiles(count: int) -> None:
    for window in range(1, 13):
        seen = extent(window, count)
        for index in range(count):
            reach = window // 2
            centre = max(min(index, count - 1 - reach), min(reach, count - 1 - reach))
            keys = [j for j in range(count) if abs(j - centre) <= reach]
            if seen < count:
                assert keys == list(range(first_tile(index, seen, count), keys[-1] + 1))
                assert len(keys) == seen
            else:
                assert first_tile(index, seen, count) == 0


@pytest.mark.parametrize(("size", "tile"), [(12, 3), (13, 3), (14, 3), (5, 1), (7, 9), (1, 1)])
@pytest.mark.parametrize("window", [1, 3, 5, 99])
def test_runs_are_the_spans_and_cover_every_query_once(size: int, tile: int, window: int) -> None:
    spans = axis_spans(size, tile, window)
    queries = [i for query, _ in spans for i in range(query.start, query.stop)]
    assert queries == list(range(size))
    members = [
        (one.query, one.key)
        for run in axis_runs(size, tile, window)
        for one in (run.members(i, 1) for i in range(run.count))
    ]
    assert members == spans
    count = tile_count(size, tile)
    assert len(spans) == count - extent(window, count) + 1


def test_heads_are_grouped_by_what_they_see() -> None:
    windows = [(3, 3, 3), (5, 7, 9), (9, 3, 3), (3, 7, 7)]
    assert window_groups(windows, (3, 6, 6), 4) == {(3, 3, 3): [0, 2], (3, 6, 6): [1, 3]}
    assert window_groups(windows[:1], (3, 6, 6), 2) == {(3, 3, 3): [0, 1]}


@pytest.mark.parametrize(("window", "count", "covers"), [(2, 5, 3), (4, 6, 5), (4, 5, 5)])
def test_even_windows_are_refused_with_what_they_would_cover(
    window: int, count: int, covers: int
) -> None:
    q, k, v = drawn((1, 1, count * 2, 8))
    with pytest.raises(OpError, match=rf"on an axis of {count} tiles.*would cover {covers} tiles"):
        tile_attention(q, k, v, (1, 1, count * 2), (1, 1, 2), (1, 1, window))


def test_cost_counts_the_pairs_that_are_seen() -> None:
    q, k, v = (torch.empty(1, 4, 20 * 32 * 32 + 7, 64, device="meta") for _ in range(3))
    rule = tile_attention.cost_rule
    assert rule is not None
    full = rule(q, k, v, (20, 32, 32), (4, 8, 8), (5, 4, 4), 7).flops
    assert full == 4 * 4 * 64 * (20480 + 7) ** 2
    sparse = rule(q, k, v, (20, 32, 32), (4, 8, 8), (1, 3, 3), 7).flops
    text = 4 * 4 * 64 * (2 * 20480 * 7 + 49)
    assert (sparse - text) / (full - text) == pytest.approx(9 / 80)


# ---- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "text", "keys", "heads"])
@pytest.mark.parametrize("first", [False, True])
def test_gradients_are_those_of_the_reference(mask: str | None, first: bool) -> None:
    canvas, tile, windows = (3, 5, 6), (1, 2, 2), [1, 3, 1, 3, 1, 3, 1, 3, 1]
    q, k, v = (x.requires_grad_() for x in drawn((2, 3, 94, 8)))
    keys = {
        None: None,
        "text": text_mask(torch.tensor([4, 2]), 4),
        "keys": torch.rand(2, 1, 1, 94) < 0.8,
        "heads": torch.randn(1, 3, 1, 4, dtype=torch.float64),
    }[mask]
    args = (q, k, v, canvas, tile, windows, 4, first, keys)
    weights = torch.randn(2, 3, 94, 8, dtype=torch.float64)
    found = torch.autograd.grad((tile_attention(*args) * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((tile_attention.reference(*args) * weights).sum(), (q, k, v))
    for a, b in zip(expected, found, strict=True):
        assert float((a - b).abs().max()) <= 1e-12


def test_what_has_no_gradient_says_so() -> None:
    q, k, v = drawn((1, 1, 19, 8))
    q.requires_grad_()
    mask = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    args = (q, k, v, (1, 4, 4), (1, 2, 2), (1, 1, 1), 3, False)
    with pytest.raises(OpError, match="mask can't be differentiated"):
        tile_attention(*args, mask).sum().backward()
    with pytest.raises(OpError, match="can't be differentiated twice"):
        torch.autograd.grad(tile_attention(*args).sum(), q, create_graph=True)


# ---- layout and lowering -----------------------------------------------------------------


def test_the_result_lies_in_memory_like_plain_attention() -> None:
    """Exported graphs view the result as [B,S,heads*D], which only this layout allows."""
    q, k, v = (x.float().transpose(1, 2) for x in drawn((2, 72, 3, 8)))
    for windows in ((1, 1, 3), (2, 3, 3), (1, 1, 3, 2, 3, 3, 1, 1, 3)):
        found = tile_attention(q, k, v, (2, 6, 6), (1, 2, 2), windows)
        assert found.stride() == attend(q, k, v).stride()
        found.transpose(1, 2).view(2, 72, 24)


class Attend(nn.Module):
    """One call with fixed geometry."""

    def __init__(self, *rest: Any) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention."""
        return tile_attention(q, k, v, *self.rest, mask=mask)


def test_the_batch_stays_dynamic_through_capture_and_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    q, k, v = (x.float() for x in drawn((2, 2, 4 * 6 * 8 + 3, 8)))
    model = Attend([4, 6, 8], [1, 2, 2], [3, 1, 3, 1, 3, 1], 3, True)
    program = capture(model, (q, k, v), dynamic_shapes={n: {0: "batch"} for n in "qkv"})
    assert any(find_op(node.target) is tile_attention for node in program.graph.nodes)
    artifact = onnx.OnnxBackend().lower(program, tmp_path / "m.onnx")
    others = [x.float() for x in drawn((3, 2, 4 * 6 * 8 + 3, 8))]
    (found,) = artifact.run(dict(zip("qkv", others, strict=True))).values()
    assert float((found - model(*others)).abs().max()) <= 2e-6


def test_lowering_never_takes_more_than_a_bounded_number_of_calls() -> None:
    """The largest published grid needs 96 plain slices; folding one axis brings that down."""
    canvas, tile = (30, 48, 80), (6, 8, 8)
    sliced = math.prod(len(axis_spans(*side)) for side in zip(canvas, tile, (3, 3, 3), strict=True))
    assert sliced == 96
    assert lowering_cost(canvas, tile, (3, 3, 3), 24) == {"calls": 27, "copied": 8.64}
    assert lowering_cost((21, 30, 52), (6, 8, 8), (3, 3, 3), 4)["calls"] == 20
    for size in (7, 21, 64):
        for length, seen in ((1, 3), (2, 3), (3, 1), (4, 5)):
            assert plan((size, 30, 52), (length, 2, 3), (seen, 3, 3)).calls <= MOST_CALLS
            assert plan((size,) * 3, (length,) * 3, (seen,) * 3).calls <= MOST_CALLS
    assert plan(canvas, tile, (1, 6, 10)).calls == 1
    assert plan(canvas, tile, (1, 6, 10)).copied == 115200


@pytest.mark.parametrize("kind", ["none", "text", "text per head", "keys", "keys per head"])
@pytest.mark.parametrize("heads", [1, 2])
def test_folding_bounds_the_calls_whatever_the_mask(kind: str, heads: int) -> None:
    """Plain slices would be 70 calls; ragged at one end."""
    canvas, tile, window, text = (4, 13, 18), (2, 2, 2), (1, 3, 3), 3
    tokens = math.prod(canvas) + text
    shape = {
        "none": None,
        "text": (2, 1, 1, text),
        "text per head": (2, heads, 1, text),
        "keys": (2, 1, 1, tokens),
        "keys per head": (1, heads, 1, tokens),
    }[kind]
    mask = None if shape is None else torch.randn(shape)
    assert (
        math.prod(len(axis_spans(*s)) for s in zip(canvas, tile, window, strict=True)) > MOST_CALLS
    )
    model = Attend(list(canvas), list(tile), list(window), text, False)
    inputs = {n: torch.randn(2, heads, tokens, 8) for n in "qkv"}
    inputs |= {} if mask is None else {"mask": mask}
    program = capture(model, inputs, check=False)
    lowered = program.copy()
    lower_ops(lowered, "onnx", lambda node: Builder(lowered, node))
    calls = lowered.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert len(calls) == plan(canvas, tile, window).calls + 1 <= MOST_CALLS + 1
    lowered.module.recompile()
    others = {name: torch.randn_like(x) for name, x in inputs.items()}
    (found,) = lowered.run(others)
    expected = tile_attention.reference(
        *(others[n].double() for n in "qkv"), canvas, tile, window, text, False,
        None if mask is None else others["mask"].double(),
    )  # fmt: skip
    assert float((found - expected).abs().max()) <= 2e-6
