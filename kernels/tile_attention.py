"""tile_attention: attention of a video's tokens to a window of tiles around each query's tile.

Source: "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507, section 3. Canvases
whose sizes are no multiples of the tile, other text layouts and masks on text are our extension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.kernels.tile_boxes import Problem, box_attention, box_gradients
from resplice.kernels.tile_grid import (
    Triple,
    extent,
    is_meant,
    seen_pairs,
    tile_count,
    tile_grid,
    triples,
    window_groups,
)
from resplice.kernels.tile_lowering import lower
from resplice.ops import OpSample, op

_MASK = 8


def text_mask(lengths: Tensor, text_length: int) -> Tensor:
    """The `mask` for texts of different length, padded at their end.

    Args:
        lengths: Integer [B], valid text tokens of each item.
        text_length: Text tokens in the sequence, padding included.

    Returns:
        Boolean [B,1,1,text_length], true at valid tokens.
    """
    positions = torch.arange(text_length, device=lengths.device)
    return (positions < lengths[:, None])[:, None, None]


def tile_mask(
    canvas: Sequence[int],
    tile: Sequence[int],
    window: Sequence[int],
    text_length: int = 0,
    text_first: bool = False,
) -> Tensor:
    """Which key (column) each query (row) sees: boolean [S,S], S = T*H*W + text_length."""
    size = math.prod(canvas)
    places = torch.arange(size)
    allowed = torch.ones(size, size, dtype=torch.bool)
    inner = 1
    for length, step, seen in reversed(list(zip(canvas, tile, window, strict=True))):
        index = (places // inner % length) // step
        inner *= length
        count = tile_count(length, step)
        reach = seen // 2
        if extent(seen, count) < count:
            centre = index.clamp(reach, count - 1 - reach)
            allowed = allowed & ((index[None, :] - centre[:, None]).abs() <= reach)
    before, after = (text_length, 0) if text_first else (0, text_length)
    return torch.nn.functional.pad(allowed, (before, after, before, after), value=True)


def _verify(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> None:  # fmt: skip
    def require(condition: bool, argument: str, what: str) -> None:
        if not condition:
            raise OpError("tile_attention", argument, what)

    for name, x in (("q", q), ("k", k), ("v", v)):
        axes = x.dim() or "no"
        require(x.dim() == 4, name, f"has {axes} axes, needs [batch, heads, tokens, channels]")
        require(x.is_floating_point(), name, f"has dtype {x.dtype}, not floating point")
        require(x.dtype == q.dtype, name, f"has dtype {x.dtype}, q has {q.dtype}")
        require(x.shape[:3] == q.shape[:3], name, f"is {_shape(x)}, q is {_shape(q)}")
    require(k.shape[3] == q.shape[3], "k", f"has {k.shape[3]} channels, q has {q.shape[3]}")
    for name, value in (("canvas", canvas), ("tile", tile)):
        proper = len(value) == 3 and min(value) > 0
        require(proper, name, f"is {list(value)}, must be three positive sizes")
    require(text_length >= 0, "text_length", f"is {text_length}, must not be negative")
    tokens = math.prod(canvas) + text_length
    words = f"canvas {_by(canvas)} and {text_length} text tokens make {tokens}"
    require(q.shape[2] == tokens, "q", f"has {q.shape[2]} tokens, {words}")
    _verify_windows(require, windows, tile_grid(canvas, tile), int(q.shape[1]))
    if mask is not None:
        _verify_mask(require, mask, q, text_length)


def _verify_windows(require: Any, windows: Sequence[int], grid: Triple, heads: int) -> None:
    fits = len(windows) in (3, 3 * heads)
    require(fits, "windows", f"has {len(windows)} sizes, must be 3, or 3 for each of {heads} heads")
    for window in triples(windows):
        for size, count in zip(window, grid, strict=True):
            require(
                is_meant(size, count),
                "windows",
                f"has {size} on an axis of {count} tiles: must be odd, or the whole axis "
                f"(a window of {size} would cover {extent(size, count)} tiles)",
            )


def _verify_mask(require: Any, mask: Tensor, q: Tensor, text_length: int) -> None:
    require(mask.dtype in (torch.bool, q.dtype), "mask", f"has dtype {mask.dtype}")
    tokens = q.shape[2]
    fits = (
        mask.dim() == 4
        and all(mask.shape[i] == 1 or mask.shape[i] == q.shape[i] for i in (0, 1))
        and mask.shape[2] == 1
        and mask.shape[3] in (text_length, tokens)
    )
    wanted = f"[batch or 1, heads or 1, 1, {text_length} (text) or {tokens} (all keys)]"
    require(fits, "mask", f"is {_shape(mask)}, must be {wanted}")


def _shape(x: Tensor) -> list[Any]:
    return list(x.shape)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _cost(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> Cost:  # fmt: skip
    """Scores and sums of the pairs that are seen; text sees and is seen by everything."""
    batch, heads, tokens = (int(size) for size in q.shape[:3])
    groups = window_groups(triples(windows), tile_grid(canvas, tile), heads)
    pairs = sum(len(group) * seen_pairs(canvas, tile, seen) for seen, group in groups.items())
    pairs += heads * text_length * (2 * tokens - text_length)
    read = sum(x.numel() * x.element_size() for x in (q, k, v, mask) if x is not None)
    written = batch * heads * tokens * int(v.shape[3]) * q.element_size()
    return Cost(2 * batch * pairs * int(q.shape[3] + v.shape[3]), read, written)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Like torch's own attention on a CPU, in memory [B,S,heads,D]: views behind it rely on it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _samples() -> Iterator[OpSample]:
    generator = torch.Generator().manual_seed(0)

    def call(
        canvas: Triple, tile: Triple, windows: list[int], text: int = 0, first: bool = False,
        batch: int = 1, heads: int = 2, mask: Tensor | None = None, dtype: Any = torch.float,
    ) -> tuple[Any, ...]:  # fmt: skip
        shape = (batch, heads, math.prod(canvas) + text, 16)
        q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
        return q, k, v, list(canvas), list(tile), windows, text, first, mask, None

    lengths = text_mask(torch.tensor([1, 3]), 3)
    bias = torch.randn(2, 1, 1, 3, generator=generator)
    keys = torch.rand(1, 2, 1, 36 * 2 + 3, generator=generator) < 0.7
    small, one = (2, 6, 6), (1, 2, 2)
    yield OpSample("one window", call((3, 6, 10), (1, 2, 2), [3, 3, 3]))
    yield OpSample("whole axes", call((4, 6, 6), (2, 2, 2), [2, 1, 3]), grad=True)
    yield OpSample("a window per head", call(small, one, [1, 3, 1, 2, 1, 3], 3, True))
    yield OpSample("everything is seen", call(small, one, [2, 3, 3], 1), grad=True)
    yield OpSample("odd sizes", call((3, 5, 7), (2, 2, 3), [1, 3, 1], 2, heads=3))
    yield OpSample("tiles of one token", call((3, 4, 5), (1, 1, 1), [3, 1, 3]))
    yield OpSample("a tile larger than the canvas", call((2, 3, 4), (6, 8, 8), [3, 3, 3], 1))
    yield OpSample("texts of two lengths", call(small, one, [1, 1, 3], 3, batch=2, mask=lengths))
    yield OpSample("text bias, text first", call(small, one, [1, 3, 1], 3, True, 2, mask=bias))
    yield OpSample("masked keys", call(small, one, [1, 3, 1], 3, mask=keys))
    yield OpSample("long axes, float64", call((9, 8, 14), (1, 2, 2), [3, 3, 3], dtype=torch.double))
    yield OpSample("even window", call(small, one, [1, 2, 3]), refused="would cover 3 tiles")
    yield OpSample("no window", call(small, one, [1, 0, 3]), refused="must be odd")
    yield OpSample("windows of other heads", call(small, one, [1] * 9), refused="each of 2 heads")
    q, k, v, *rest = call(small, one, [1, 1, 1])
    yield OpSample("short sequence", (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], *rest),
                   refused="has 71 tokens, canvas 2x6x6 and 0 text tokens make 72")  # fmt: skip
    yield OpSample("fewer keys", (q, k[:, :, 1:], v, *rest), refused="k is [1, 2, 71, 16], q is")
    yield OpSample("mask per query", call(small, one, [1, 1, 1], 3, mask=torch.ones(1, 1, 75, 75)),
                   refused="mask is [1, 1, 75, 75], must be")  # fmt: skip


@op(
    "tile_attention(Tensor q, Tensor k, Tensor v, int[] canvas, int[] tile, int[] windows,"
    " int text_length=0, bool text_first=False, Tensor? mask=None, float? scale=None) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=_fake,
    fast=lambda *args, **kwargs: _fast(*args, **kwargs),
    samples=_samples,
)
def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention in which an image query sees the image keys of a window of tiles.

    The window is centred on the query's tile and moved inwards at borders, so its size is the same
    everywhere. Text keys are seen by all queries, and text queries see all keys.

    Args:
        q: Floating point [B,heads,S,D]; image tokens in raster order (t, then h, then w).
        k: Like `q`.
        v: [B,heads,S,Dv].
        canvas: T, H, W in tokens; T*H*W + text_length = S. Sizes need not be multiples of `tile`:
            the last tile of an axis may be short.
        tile: Size of a tile in tokens.
        windows: Size of the window in tiles, three numbers for all heads or three per head; each
            odd or at least the whole axis.
        text_length: Text tokens in the sequence, padding included.
        text_first: Whether they stand before the image.
        mask: Which keys may be seen (boolean) or what is added to their scores (dtype of `q`):
            [B or 1, heads or 1, 1, text_length] for text keys, or [.., S] for all. It gets no
            gradient. See `text_mask` for texts of different length.
        scale: Of the scores; 1 / sqrt(D) by default.

    Returns:
        [B,heads,S,Dv] in the dtype of `q`, in memory [B,S,heads,Dv]. A query that sees no key
        gives zeros.

    Raises:
        OpError: Sizes, windows or dtypes do not fit together.
    """
    kinds = [tile_mask(canvas, tile, w, text_length, text_first) for w in triples(windows)]
    allowed = torch.stack(kinds).to(q.device)
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = (q @ k.mT * factor).masked_fill(~allowed, -math.inf)
    if mask is not None:
        keys = _of_all_keys(mask, int(q.shape[2]), text_first)
        scores = scores.masked_fill(~keys, -math.inf) if keys.dtype == torch.bool else scores + keys
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nothing, 0)
    return _laid_out(weights @ v)


def _of_all_keys(mask: Tensor, tokens: int, text_first: bool) -> Tensor:
    """A mask of text keys as one of all keys."""
    missing = tokens - int(mask.shape[3])
    open_keys = mask.new_full((*mask.shape[:3], missing), mask.dtype == torch.bool)
    return torch.cat((mask, open_keys) if text_first else (open_keys, mask), -1)


def _laid_out(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# ---- the fast path -----------------------------------------------------------------------


def _fast(
    q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_length: int = 0, text_first: bool = False,
    mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    everything = all(map(_covers, triples(windows), [tile_grid(canvas, tile)] * len(windows)))
    if everything:
        keys = None if mask is None else _of_all_keys(mask, q.shape[2], text_first)
        attend = torch.nn.functional.scaled_dot_product_attention
        return _laid_out(attend(q, k, v, attn_mask=keys, scale=scale))
    out = _fake(q, k, v)
    for rows, problem in _groups(q, canvas, tile, windows, text_first, scale):
        parts = [x[:, rows] for x in (q, k, v)]
        result = out[:, rows] if isinstance(rows, slice) else _fake(*parts)
        _by_text(parts, _rows(mask, rows), problem, result)
        if not isinstance(rows, slice):
            out[:, rows] = result
    return out


def _covers(window: Triple, grid: Triple) -> bool:
    return all(size >= count for size, count in zip(window, grid, strict=True))


def _groups(
    q: Tensor, canvas: Sequence[int], tile: Sequence[int], windows: Sequence[int],
    text_first: bool, scale: float | None,
) -> Iterator[tuple[slice | list[int], Problem]]:  # fmt: skip
    """Heads with equal windows: a slice where they are neighbours, and their problem."""
    grid, heads = tile_grid(canvas, tile), int(q.shape[1])
    ((canvas3,), (tile3,)) = triples(canvas), triples(tile)
    for window, group in window_groups(triples(windows), grid, heads).items():
        neighbours = group == list(range(group[0], group[-1] + 1))
        rows = slice(group[0], group[-1] + 1) if neighbours else group
        yield rows, Problem(canvas3, tile3, window, text_first, scale)


def _rows(mask: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask[:, rows]


def _by_text(inputs: Sequence[Tensor], mask: Tensor | None, problem: Problem, out: Tensor) -> None:
    for items, tensors, keys in _unmasked(inputs, mask, problem):
        if isinstance(items, slice):
            box_attention(*tensors, keys, problem, out)
            continue
        result = _fake(*tensors)
        box_attention(*tensors, keys, problem, result)
        out[items] = result


def _unmasked(
    inputs: Sequence[Tensor], mask: Tensor | None, problem: Problem
) -> Iterator[tuple[slice | Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]]:
    """Batch items with equal text: invalid text keys are left out instead of masked.

    Yields:
        Which items, their query, key and value, and a mask of all keys where one is needed.
    """
    q, k, v = inputs
    image = problem.image(q)
    text_only = mask is not None and mask.shape[3] == q.shape[2] - image.length
    if mask is None or mask.dtype != torch.bool or mask.shape[1] > 1 or not text_only:
        keys = None if mask is None else _of_all_keys(mask, q.shape[2], problem.text_first)
        yield slice(None), (q, k, v), None if keys is None else keys.expand(*q.shape[:2], -1, -1)
        return
    every, kinds = torch.unique(mask.flatten(1), dim=0, return_inverse=True)
    for number, kind in enumerate(every):
        items = (kinds == number).nonzero().flatten() if len(every) > 1 else slice(None)
        kept = _of_all_keys(kind[None, None, None], q.shape[2], problem.text_first).flatten()
        chosen = (x[items] for x in (k, v))
        key, value = (x if bool(kept.all()) else x[:, :, kept] for x in chosen)
        yield items, (q[items], key, value), None


# ---- the gradient ------------------------------------------------------------------------


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, canvas: Sequence[int], tile: Sequence[int],
    windows: Sequence[int], text_first: bool, mask: Tensor | None, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value; each box is computed once more, nothing is stored."""
    results = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys = None if mask is None else _of_all_keys(mask, q.shape[2], text_first)
    for rows, problem in _groups(q, canvas, tile, windows, text_first, scale):
        inputs = (q[:, rows], k[:, rows], v[:, rows])
        chosen = _rows(keys, rows)
        chosen = chosen if chosen is None else chosen.expand(*inputs[0].shape[:2], -1, -1)
        if isinstance(rows, slice):
            targets = (results[0][:, rows], results[1][:, rows], results[2][:, rows])
            box_gradients(inputs, chosen, problem, grad[:, rows], targets)
            continue
        own = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2])
        box_gradients(inputs, chosen, problem, grad[:, rows], own)
        for result, part in zip(results, own, strict=True):
            result[:, rows] = part
    return results


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.canvas, ctx.tile, ctx.windows, _, ctx.text_first, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[_MASK : _MASK + 1]):  # defaults at the end are not passed
        raise OpError("tile_attention", "mask", "can't be differentiated; detach it")
    if torch.is_grad_enabled():
        raise OpError("tile_attention", "q", "can't be differentiated twice")
    q, k, v, mask = ctx.saved_tensors
    sizes = (ctx.canvas, ctx.tile, ctx.windows, ctx.text_first)
    found = _gradients(grad, q, k, v, *sizes, mask, ctx.scale)
    return (*found, *([None] * 7))


tile_attention.differentiate(_backward, setup=_save)
tile_attention.lowerings.update(onnx=lower, coreml=lower)
