"""Axis maps: which row of the positions (0 = t, 1 = h, 2 = w) each rotary angle follows.

The canonical form of every rotary embedding here: N angles, row `axis_map[n]` of the positions,

    angle[b, s, n] = positions[axis_map[n], b, s] * inv_freq[n]

Source: VideoRoPE, arXiv 2502.05173, section 4.1 (low-frequency temporal allocation), in the order
of the published code: even angles follow the height, odd ones the width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resplice.errors import UsageError

T, H, W = 0, 1, 2
AxisMap = tuple[int, ...]


def sectioned_map(section: Sequence[int]) -> AxisMap:
    """M-RoPE: `[s_t, s_h, s_w]` angles for t, then h, then w."""
    checked = check_section(section, sum(section))
    return tuple(axis for axis, count in enumerate(checked) for _ in range(count))


def interleaved_map(section: Sequence[int]) -> AxisMap:
    """Qwen3-VL's M-RoPE: t h w t h w ..., the rest of the angles follow t."""
    s_t, s_h, s_w = check_section(section, sum(section))
    found = [T] * (s_t + s_h + s_w)
    for axis, count in ((H, s_h), (W, s_w)):
        found[axis : 3 * count : 3] = [axis] * len(found[axis : 3 * count : 3])
    return tuple(found)


def lta_map(section: Sequence[int]) -> AxisMap:
    """VideoRoPE: h and w take turns, the `s_t` lowest frequencies follow t.

    Args:
        section: `[s_t, s_h, s_w]`; only `s_t` and the sum of the others matter.
    """
    s_t, s_h, s_w = check_section(section, sum(section))
    return tuple(H if n % 2 == 0 else W for n in range(s_h + s_w)) + (T,) * s_t


def lta_by_rank(inv_freq: torch.Tensor, s_t: int) -> AxisMap:
    """`lta_map` for frequencies in any order: the `s_t` lowest follow t, others h and w in turns.

    Factorised embeddings of video transformers have one ladder of frequencies per axis; ordered
    by frequency they are one ladder. Equal frequencies keep their order.

    Args:
        inv_freq: Angle per position, floating point [N]; the sign does not matter.
        s_t: Angles for t, 0 to N.
    """
    order = torch.argsort(inv_freq.double().abs(), descending=True, stable=True).tolist()
    found = [T] * len(order)
    for place, n in enumerate(order[: len(order) - s_t]):
        found[n] = H if place % 2 == 0 else W
    return tuple(found)


def section_of(axis_map: Sequence[int]) -> tuple[int, int, int]:
    """How many angles follow t, h and w."""
    t, h, w = (sum(axis == row for axis in axis_map) for row in (T, H, W))
    return t, h, w


def default_section(angles: int) -> tuple[int, int, int]:
    """The published proportions for a head without sections: a quarter of the angles for t.

    D = 128 gives [16, 24, 24]. Rounded up where the rest would be odd.
    """
    s_t = max(1, round(angles / 4))
    s_t += (angles - s_t) % 2
    half = (angles - s_t) // 2
    return s_t, half, half


def check_section(section: Sequence[int], angles: int) -> tuple[int, int, int]:
    """Three counts that cover all angles.

    Raises:
        UsageError: They are not three, one is negative, or they do not add up.
    """
    if len(section) != 3 or min(section) < 0 or sum(section) != angles:
        given = ",".join(map(str, section))
        raise UsageError(
            f"section={given} does not divide {angles} rotary angles",
            hint="give three counts for t, h, w that add up to half of the rotary channels",
        )
    t, h, w = section
    return t, h, w


def describe(axis_map: Sequence[int]) -> str:
    """Runs of axes: `t16 h24 w24`, and `(hw)24 t16` for axes that take turns."""
    letters = "".join("thw"[axis] for axis in axis_map)
    parts, place = [], 0
    while place < len(letters):
        unit, count = max(
            ((letters[place : place + k], _repeats(letters, place, k)) for k in (1, 2, 3)),
            key=lambda item: (len(item[0]) * item[1] if item[1] > 1 else 1, -len(item[0])),
        )
        count = count if count > 1 else 1
        unit = unit if count > 1 else letters[place]
        parts.append(f"{unit if len(unit) == 1 else f'({unit})'}{count}")
        place += len(unit) * count
    return " ".join(parts)


def _repeats(text: str, start: int, size: int) -> int:
    unit, count = text[start : start + size], 0
    while len(unit) == size and text[start + count * size : start + (count + 1) * size] == unit:
        count += 1
    return count
