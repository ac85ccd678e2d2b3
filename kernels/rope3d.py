"""rope3d: rotary embedding whose angles follow several rows of positions.

angle[b, s, n] = positions[axis_map[n], b, s] * inv_freq[n]

rotates one pair of channels per angle: (n, n + N), or (2n, 2n + 1) with `pairs`. Positions may be
negative and have fractions, so there is no table of them. Source: M-RoPE (arXiv 2409.12191) and
VideoRoPE (arXiv 2502.05173); with equal rows it is the plain embedding of arXiv 2104.09864.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.ops import OpSample, op

Tables = tuple[Tensor, Tensor]


def _verify(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    axis_map: Sequence[int],
    scaling: float = 1.0,
    pairs: bool = False,
    token_axis: int = -2,
) -> None:
    def refuse(argument: str, what: str) -> None:
        raise OpError("rope3d", argument, what)

    if x.dim() < 1:
        refuse("x", "has no axes")
    if x.dim() < 3:
        refuse("x", f"must be [batch, .., tokens, .., channels], has {x.dim()} axes")
    if not x.is_floating_point():
        refuse("x", f"has dtype {x.dtype}, not floating point")
    if inv_freq.dim() != 1 or inv_freq.dtype not in (torch.float32, torch.float64):
        refuse("inv_freq", f"must be float32 [N], is {inv_freq.dtype} {list(inv_freq.shape)}")
    if x.shape[-1] != 2 * inv_freq.shape[0]:
        refuse("inv_freq", f"has {inv_freq.shape[0]} angles for {x.shape[-1]} channels, not half")
    if len(axis_map) != inv_freq.shape[0]:
        refuse("axis_map", f"has {len(axis_map)} entries for {inv_freq.shape[0]} angles")
    if positions.dim() != 3 or positions.is_complex() or positions.dtype == torch.bool:
        refuse("positions", f"must be numbers [rows, batch, tokens], has {positions.dim()} axes")
    if positions.dtype in (torch.float16, torch.bfloat16):
        refuse("positions", f"are {positions.dtype}, which can't count past 2048")
    if min(axis_map, default=0) < 0 or max(axis_map, default=0) >= positions.shape[0]:
        refuse("axis_map", f"names rows outside the {positions.shape[0]} of positions")
    if not -x.dim() < token_axis < -1:
        refuse("token_axis", f"is {token_axis}, must lie between batch and channels of x")
    fits = positions.shape[2] == x.shape[token_axis] and positions.shape[1] in (1, x.shape[0])
    if not fits:
        refuse(
            "positions",
            f"are for {list(positions.shape[1:])} tokens, x has "
            f"{[x.shape[0], x.shape[token_axis]]}",
        )


def angle_tables(
    positions: Tensor, inv_freq: Tensor, axis_map: Sequence[int], scaling: float
) -> Tables:
    """Cosines and sines, each [batch, tokens, N] in the dtype of `inv_freq`."""
    rows = torch.tensor(axis_map, device=positions.device)
    chosen = positions.to(inv_freq.dtype).index_select(0, rows).permute(1, 2, 0)
    angles = chosen * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)


def placed(table: Tensor, axes: int, token_axis: int) -> Tensor:
    """A table [batch, tokens, N] with axes of size 1 where x has its heads."""
    for _ in range(-2 - token_axis):
        table = table.unsqueeze(-2)
    while table.dim() < axes:
        table = table.unsqueeze(1)
    return table


def _rotated_pair(
    low: Tensor, high: Tensor, cos: Tensor, sin: Tensor, out: tuple[Tensor, Tensor]
) -> None:
    """Four products, two sums; the order of roundings is that of x cos + rotate_half(x) sin."""
    torch.mul(low, cos, out=out[0])
    out[0].sub_(high * sin)
    torch.mul(high, cos, out=out[1])
    out[1].add_(low * sin)


class _LastTables:
    """The tables of the last call: all layers of a model ask for the same ones.

    They are kept for one positions tensor, alive and unwritten since, so nothing can be stale.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Tables | None = None

    def of(
        self, positions: Tensor, inv_freq: Tensor, axis_map: Sequence[int], scaling: float
    ) -> Tables:
        if positions.is_inference() or inv_freq.is_inference():
            return angle_tables(positions, inv_freq, axis_map, scaling)
        versions = positions._version, inv_freq._version
        rest = (versions, tuple(axis_map), scaling)
        known = self._key
        if known and known[0]() is positions and known[1]() is inv_freq and known[2] == rest:
            assert self._value is not None
            return self._value
        self._value = angle_tables(positions, inv_freq, axis_map, scaling)
        self._key = (weakref.ref(positions, self._forget), weakref.ref(inv_freq), rest)
        return self._value

    def _forget(self, _: object) -> None:
        self._key = self._value = None


_LAST = _LastTables()


def _fast(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    axis_map: Sequence[int],
    scaling: float = 1.0,
    pairs: bool = False,
    token_axis: int = -2,
) -> Tensor:
    """Half tables made once for all layers, no rotated copy of x; bits as in the reference."""
    cos, sin = _LAST.of(positions, inv_freq, axis_map, scaling)
    cos, sin = (placed(table.to(x.dtype), x.dim(), token_axis) for table in (cos, sin))
    result = torch.empty_like(x)
    _rotated_pair(*halves(x, pairs), cos, sin, halves(result, pairs))
    return result


def halves(x: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Views of the two channels of every pair, each [.., N]."""
    if pairs:
        return x[..., 0::2], x[..., 1::2]
    size = x.shape[-1] // 2
    return x[..., :size], x[..., size:]


def _cost(x: Tensor, positions: Tensor, inv_freq: Tensor, *_: Any, **__: Any) -> Cost:
    """The rotation alone: the angles are made once for all layers."""
    size = x.numel() * x.element_size()
    rest = sum(t.numel() * t.element_size() for t in (positions, inv_freq))
    return Cost(3 * x.numel(), size + rest, size)


def _samples() -> Iterator[OpSample]:
    generator = torch.Generator().manual_seed(0)

    def call(
        shape: tuple[int, ...], axis_map: Sequence[int], token_axis: int = -2, *, rows: int = 3,
        batch: int | None = None, whole: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        x = torch.randn(shape, generator=generator)
        size = (rows, shape[0] if batch is None else batch, shape[token_axis])
        positions = torch.randint(-40, 80, size, generator=generator) / 4
        inv_freq = 1e4 ** -(torch.arange(shape[-1] // 2) / (shape[-1] // 2))
        return x, positions.long() if whole else positions, inv_freq, list(axis_map)

    lta = (1, 2, 1, 2, 1, 2, 0, 0)
    yield OpSample("heads before tokens, fractions", call((2, 3, 5, 16), lta), grad=True)
    yield OpSample(
        "whole numbers, one batch of positions",
        call((2, 2, 4, 8), (0, 1, 2, 2), batch=1, whole=True),
    )
    yield OpSample(
        "tokens before heads, neighbours are pairs, scaled",
        (*call((2, 6, 3, 16), lta, -3), 1.5, True, -3),
        grad=True,
    )
    yield OpSample("no heads", (*call((2, 6, 16), lta), 1.0, True, -2))
    yield OpSample("one row", call((1, 2, 3, 4), (0, 0), rows=1))
    x, positions, inv_freq, rows = call((2, 3, 5, 16), lta)
    yield OpSample("few angles", (x, positions, inv_freq[:7], rows), refused="not half")
    yield OpSample(
        "short map", (x, positions, inv_freq, rows[:7]), refused="7 entries for 8 angles"
    )
    yield OpSample("no such row", (x, positions[:2], inv_freq, rows), refused="outside the 2")
    yield OpSample(
        "other tokens", (x, positions[..., :4], inv_freq, rows), refused="are for [2, 4]"
    )
    yield OpSample(
        "half positions", (x, positions.half(), inv_freq, rows), refused="count past 2048"
    )
    yield OpSample("integer x", (x.long(), positions, inv_freq, rows), refused="not floating point")
    yield OpSample(
        "tokens in the batch", (x, positions, inv_freq, rows, 1.0, False, -4), refused="lie between"
    )


@op(
    "rope3d(Tensor x, Tensor positions, Tensor inv_freq, int[] axis_map, float scaling=1.0,"
    " bool pairs=False, int token_axis=-2) -> Tensor",
    verify=_verify,
    cost=_cost,
    fake=lambda x, *_, **__: torch.empty_like(x),
    fast=_fast,
    samples=_samples,
)
def rope3d(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    axis_map: Sequence[int],
    scaling: float = 1.0,
    pairs: bool = False,
    token_axis: int = -2,
) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: Floating point [B, .., S, .., 2N]: batch first, channels last, tokens on `token_axis`.
        positions: [R, B or 1, S], float32, float64 or integers; rows t, h, w.
        inv_freq: float32 (or float64) [N], angle per position.
        axis_map: N rows of `positions`.
        scaling: Factor of cosines and sines.
        pairs: Channels (2n, 2n + 1) instead of (n, n + N).
        token_axis: Axis of the tokens, from the end: -2, or -3 where the heads come after them.

    Returns:
        Shape and dtype of `x`. Angles are computed in the dtype of `inv_freq`, cosines and sines
        then rounded to that of `x`.

    Raises:
        OpError: Shapes, dtypes or rows do not fit together.
    """
    cos, sin = angle_tables(positions, inv_freq, axis_map, scaling)
    cos, sin = (spread(placed(t.to(x.dtype), x.dim(), token_axis), pairs) for t in (cos, sin))
    return x * cos + turned(x, pairs) * sin


def spread(table: Tensor, pairs: bool) -> Tensor:
    """Each angle for both of its channels: [.., N] -> [.., 2N]."""
    return torch.stack((table, table), -1).flatten(-2) if pairs else torch.cat((table, table), -1)


def turned(x: Tensor, pairs: bool) -> Tensor:
    """Each pair (a, b) as (-b, a)."""
    low, high = halves(x, pairs)
    return torch.stack((-high, low), -1).flatten(-2) if pairs else torch.cat((-high, low), -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, inv_freq, *ctx.rest = inputs
    ctx.save_for_backward(positions, inv_freq)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The rotation is orthogonal (up to `scaling`): gradients are turned back."""
    positions, inv_freq = ctx.saved_tensors
    return rope3d(grad, positions, -inv_freq, *ctx.rest), *[None] * (2 + len(ctx.rest))


rope3d.differentiate(_backward, setup=_save)
rope3d.lowerings["onnx"] = "resplice.kernels.rope_lowering:lower"
rope3d.lowerings["coreml"] = "resplice.kernels.rope_lowering:lower"
