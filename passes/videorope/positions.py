"""Positions of text, images and videos in five schemes: a pure function of token types and grids.

Per row of the batch, padding taken out, a cursor p walks over the tokens. A text token has
(p, p, p) and moves it by 1. A vision block is T x H x W tokens, t-major; token (f, h, w) has

    videorope  t = p + delta f,  y = t + h - (H-1)//2,  x = t + w - (W-1)//2;  p += delta (T-1) + 1
    mrope      (p + f, p + h, p + w);                                          p += max(T, H, W)
    mrope-5    (p + trunc(c f), p + h, p + w);                                 p += max(H, W)
    rope       the token's index on all rows
    tad        the token's index plus its frame-collapsed index, on all rows

Sources: VideoRoPE, arXiv 2502.05173, section 4.2, as the published code computes it (the paper's
formula with `layout="paper"`); transformers 4.x and 5.x for the two `mrope`. The module needs numpy
only and has no loop over tokens, so that it can be restated on a phone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from resplice.errors import UsageError
from resplice.marks import ANY, mark

Scheme = Literal["videorope", "mrope", "mrope-5", "rope", "tad"]
Centre = Literal["code", "paper"]
Layout = Literal["code", "paper", "plus"]
Convention = Literal["padded", "unpadded"]
SCHEMES: tuple[Scheme, ...] = ("videorope", "mrope", "mrope-5", "rope", "tad")
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Semantics:
    """What positions mean: everything two sides must agree on.

    Attributes:
        scheme: See the top of this file.
        delta: Positions between two frames; `videorope` only.
        dl: Diagonal layout: frames move along all three rows. Without it the spatial rows and the
            cursor are those of `mrope`.
        centre: Spatial offsets of the published code, (H-1)//2, or of the paper, H/2.
        layout: Where text goes on after a block: published code, paper (delta T further), or `plus`
            (after the largest position of any row, as VideoRoPE++).
        convention: Whether `rope_delta` counts from the padded length (published code,
            transformers 4.x) or the unpadded one (transformers 5.x).
        tokens_per_grid: `mrope-5` only: c, tokens per second times seconds per grid of videos.
    """

    scheme: Scheme = "videorope"
    delta: float = 2.0
    dl: bool = True
    centre: Centre = "code"
    layout: Layout = "code"
    convention: Convention = "padded"
    tokens_per_grid: float = 1.0

    def __str__(self) -> str:
        """`videorope{delta=2}`; other defaults are not printed."""
        given = {"delta": f"{self.delta:g}"} if self.scheme == "videorope" else {}
        for name in ("dl", "centre", "layout", "convention", "tokens_per_grid"):
            value = getattr(self, name)
            if value != getattr(_DEFAULT, name):
                given[name] = str(value).lower()
        inside = " ".join(f"{name.replace('_', '-')}={value}" for name, value in given.items())
        return f"{self.scheme}{{{inside}}}" if inside else self.scheme

    def call(self) -> str:
        """The call of `build_position_ids` that makes such positions, for messages."""
        given = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(_DEFAULT, name) or name == "scheme"
        }
        inside = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"resplice.passes.videorope.build_position_ids(token_types, grids, {inside})"


_DEFAULT = Semantics()


def build_position_ids(
    token_types: Any,
    grids: Sequence[Any],
    *,
    scheme: Scheme = "videorope",
    delta: float = 2.0,
    attention_mask: Any = None,
    dl: bool = True,
    centre: Centre = "code",
    layout: Layout = "code",
    convention: Convention | None = None,
    tokens_per_grid: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """Positions of a batch.

    Args:
        token_types: Integers [B, S]: 0 text, 1 image, 2 video; a tensor, an array or lists.
        grids: Per row, in order of appearance, (T, H, W) of every image and video in tokens of the
            language model; an image has T = 1. One flat list will do for a batch of one.
        scheme: One of `SCHEMES`.
        delta: Positions between two frames; `videorope` only.
        attention_mask: [B, S], 1 where a token counts, or None. Padding has position 1 (0 in
            `mrope-5`).
        dl: See `Semantics`.
        centre: See `Semantics`.
        layout: See `Semantics`.
        convention: See `Semantics`; by default the scheme's own: "unpadded" for `mrope-5`.
        tokens_per_grid: See `Semantics`.
        dtype: torch.float32, or torch.int64 where no position has a fraction.

    Returns:
        Positions [3, B, S], rows t, h, w, and rope_delta [B, 1]: what a generated token's index
        adds to have its position. Torch tensors, or numpy arrays if `token_types` is one.

    Raises:
        UsageError: Types, grids and mask do not fit together, or int64 is asked for fractions.
    """
    own: Convention = "unpadded" if scheme == "mrope-5" else "padded"
    meaning = Semantics(
        scheme, float(delta), dl, centre, layout, convention or own, float(tokens_per_grid)
    )
    types = _matrix("token_types", token_types)
    _check(meaning, types)
    mask = np.ones(types.shape, bool)
    if attention_mask is not None:
        mask = _matrix("attention_mask", attention_mask) != 0
    if mask.shape != types.shape:
        raise UsageError(f"attention_mask is {mask.shape}, token_types are {types.shape}")
    batch, padded = len(types), int(np.size(types, 1))
    rows = _per_row(grids, batch)
    positions = np.full((3, batch, padded), 0.0 if scheme == "mrope-5" else 1.0)
    deltas = np.zeros((batch, 1))
    for b, blocks in enumerate(rows):
        found = _row(types[b][mask[b]], blocks, meaning, b)
        positions[:, b, mask[b]] = found
        length = padded if meaning.convention == "padded" else found.shape[1]
        deltas[b] = _end(found, meaning) - length
    text_only = not types[mask].any() and scheme != "tad"
    return _as_given(token_types, positions, deltas, dtype, ANY if text_only else str(meaning))


def decode_positions(rope_delta: Any, index: int, count: int = 1) -> torch.Tensor:
    """Positions of generated tokens: three equal rows, one further per token.

    Args:
        rope_delta: [B, 1], from `build_position_ids`.
        index: Index of the first of them, counted as `rope_delta` counts (with padding or without).
        count: How many.

    Returns:
        [3, B, count] in the dtype of `rope_delta`.
    """
    delta = torch.as_tensor(rope_delta)
    steps = torch.arange(index, index + count, dtype=delta.dtype, device=delta.device)
    return (steps + delta)[None].expand(3, -1, -1).contiguous()


def block_positions(grid: Grid, cursor: float, meaning: Semantics) -> tuple[np.ndarray, float]:
    """Positions [3, T*H*W] of one vision block that starts at a cursor, and the cursor after it."""
    t_size, h_size, w_size = (int(size) for size in grid)
    f, h, w = (a.reshape(-1).astype(float) for a in list(np.indices(grid)))
    if meaning.scheme in ("mrope", "mrope-5"):
        c = meaning.tokens_per_grid if meaning.scheme == "mrope-5" else 1.0
        rows = np.stack((cursor + np.trunc(f * c), cursor + h, cursor + w))
        step = max(h_size, w_size) if meaning.scheme == "mrope-5" else max(grid)
        return rows, cursor + step
    t = cursor + meaning.delta * f
    if not meaning.dl:
        rows = np.stack((t, cursor + h, cursor + w))
        return rows, float(rows.max()) + 1
    rows = np.stack((t, t + h - _offset(h_size, meaning), t + w - _offset(w_size, meaning)))
    after = {
        "code": cursor + meaning.delta * (t_size - 1) + 1,
        "paper": cursor + meaning.delta * t_size,
        "plus": float(rows.max()) + 1,
    }
    return rows, after[meaning.layout]


def _offset(size: int, meaning: Semantics) -> float:
    return size / 2 if "paper" in (meaning.centre, meaning.layout) else (size - 1) // 2


def _row(types: np.ndarray, blocks: Sequence[Grid], meaning: Semantics, row: int) -> np.ndarray:
    """Positions [3, tokens] of one unpadded row."""
    if meaning.scheme in ("rope", "tad"):
        return _indices(types, blocks, meaning, row)
    parts, cursor = [np.zeros((3, 0))], 0.0
    for grid, length in _segments(types, blocks, row):
        if grid is None:
            parts.append(np.tile(cursor + np.arange(length), (3, 1)))
            cursor += length
        else:
            rows, cursor = block_positions(grid, cursor, meaning)
            parts.append(rows)
    return np.concatenate(parts, 1)


def _indices(types: np.ndarray, blocks: Sequence[Grid], meaning: Semantics, row: int) -> np.ndarray:
    """One and the same number on all rows: the index, for `tad` plus the frame-collapsed one."""
    index = np.arange(len(types), dtype=float)
    frames: list[np.ndarray] = []
    place = 0
    for grid, length in _segments(types, blocks, row):
        steps, each = (length, 1) if grid is None else (grid[0], grid[1] * grid[2])
        frames.append(place + np.repeat(np.arange(steps, dtype=float), each))
        place += steps
    tad = meaning.scheme == "tad" and len(types)
    found = index + np.concatenate(frames) if tad else index
    return np.tile(found, (3, 1))


def _segments(
    types: np.ndarray, blocks: Sequence[Grid], row: int
) -> Iterator[tuple[Grid | None, int]]:
    """Runs of text (None, length) and vision blocks (grid, tokens) in order.

    Raises:
        UsageError: A block's tokens do not fill its grid, or grids are missing or left over.
    """
    place, rest = 0, list(blocks)
    while place < len(types):
        kind = types[place]
        if kind == 0:
            vision = np.flatnonzero(types[place:])
            length = int(vision[0]) if len(vision) else len(types) - place
            yield None, length
            place += length
            continue
        if not rest:
            raise UsageError(f"row {row} has vision tokens at {place} and no grid for them")
        grid = rest.pop(0)
        length = int(np.prod(grid))
        block = types[place : place + length]
        if len(block) != length or (block != kind).any() or (kind == 1 and grid[0] != 1):
            raise UsageError(
                f"row {row}: the {'image' if kind == 1 else 'video'} at token {place} does not "
                f"fill its grid {grid} of {length} tokens",
                hint="grids are (T, H, W) in tokens of the language model, after merging patches",
            )
        yield grid, length
        place += length
    if rest:
        raise UsageError(f"row {row} has {len(rest)} grids more than vision blocks")


def _end(found: np.ndarray, meaning: Semantics) -> float:
    """The position after the last token; spatial rows may reach beyond the text, so only t counts.

    The `mrope` conventions and `plus` count all rows, as their implementations do.
    """
    if not found.shape[1]:
        return 0.0
    temporal = meaning.scheme == "videorope" and meaning.dl and meaning.layout != "plus"
    return float((found[0] if temporal else found).max()) + 1


def _check(meaning: Semantics, types: np.ndarray) -> None:
    known = {"scheme": SCHEMES, "centre": ("code", "paper"), "layout": ("code", "paper", "plus"),
             "convention": ("padded", "unpadded")}  # fmt: skip
    for name, choices in known.items():
        if getattr(meaning, name) not in choices:
            raise UsageError(f"{name}={getattr(meaning, name)!r} is not one of {choices}")
    if not meaning.delta > 0 or not np.isfinite(meaning.delta):
        raise UsageError(f"delta={meaning.delta} must be positive")
    if not np.isin(types, (0, 1, 2)).all():
        raise UsageError("token_types must be 0 (text), 1 (image) or 2 (video)")


def _matrix(name: str, value: Any) -> np.ndarray:
    found = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    if found.ndim != 2:
        raise UsageError(f"{name} must be [batch, sequence], has {found.ndim} axes")
    return found


def _per_row(grids: Sequence[Any], batch: int) -> list[list[Grid]]:
    listed = [item.tolist() if hasattr(item, "tolist") else list(item) for item in grids]
    if listed and listed[0] and isinstance(listed[0][0], int):
        listed = [listed]
    listed = listed or [[] for _ in range(batch)]
    if len(listed) != batch:
        raise UsageError(
            f"there are grids for {len(listed)} rows, the batch has {batch}",
            hint="give one list of (T, H, W) per row, empty for a row of text",
        )
    return [[_grid(item) for item in row] for row in listed]


def _grid(item: Any) -> Grid:
    sizes = [int(size) for size in item]
    if len(sizes) != 3 or min(sizes) < 1:
        raise UsageError(f"the grid {tuple(item)} is no (T, H, W) of positive sizes")
    return sizes[0], sizes[1], sizes[2]


def _as_given(
    like: Any, positions: np.ndarray, deltas: np.ndarray, dtype: torch.dtype, semantics: str
) -> tuple[Any, Any]:
    if dtype not in (torch.float32, torch.int64):
        raise UsageError(f"positions are float32 or int64, not {dtype}")
    whole = dtype == torch.int64
    if whole and (positions != np.trunc(positions)).any():
        raise UsageError(
            "these positions have fractions, int64 can't hold them",
            hint="use a whole delta and centre='code', or dtype=torch.float32",
        )
    kind = np.int64 if whole else np.float32
    both = positions.astype(kind), deltas.astype(kind)
    if isinstance(like, np.ndarray):
        return both
    device = like.device if isinstance(like, torch.Tensor) else None
    found, delta = (torch.from_numpy(item).to(device) for item in both)
    return mark(found, semantics), delta
