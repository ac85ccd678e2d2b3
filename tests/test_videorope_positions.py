"""Positions and axis maps against the published code's own outputs, and laws that hold for any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resplice.errors import UsageError
from resplice.marks import ANY, marked
from resplice.passes.videorope import (
    build_position_ids,
    decode_positions,
    default_section,
    interleaved_map,
    lta_by_rank,
    lta_map,
    oscillation,
    score_curve,
    sectioned_map,
)
from resplice.passes.videorope.maps import describe, section_of

DATA = Path(__file__).parent / "data"
SCHEMES = ("videorope", "mrope", "mrope-5", "rope", "tad")
Layout = list[Any]


def vectors(name: str) -> Any:
    return json.loads((DATA / f"videorope_{name}.json").read_text())


def described(layout: Layout) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Token types and grids of a layout such as [3, ["v", 2, 2, 2], 2]."""
    types, grids = list[int](), list[tuple[int, int, int]]()
    for part in layout:
        if isinstance(part, int):
            types += [0] * part
            continue
        kind, sizes = part[0], tuple(part[1:])
        grid = (1, *sizes) if kind == "i" else sizes
        grids.append(grid)
        types += [1 if kind == "i" else 2] * int(np.prod(grid))
    return types, grids


def built(parts: Layout, **options: Any) -> tuple[Tensor, Tensor]:
    types, grids = described(parts)
    return build_position_ids(torch.tensor([types]), [grids], **options)


CASES = {case["name"]: case for case in vectors("positions")}
VARIANTS: dict[str, dict[str, Any]] = {
    "videorope_plus_vllm_2.0": {"layout": "plus"},
    "m_rope_v4_45": {"scheme": "mrope"},
    "vanilla": {"scheme": "rope"},
    "hf_5_23_qwen2_vl": {"scheme": "mrope-5"},
    "hf_5_23_qwen2_5_vl_tps4_spg1": {"scheme": "mrope-5", "tokens_per_grid": 4.0},
}


@pytest.mark.parametrize("name", CASES)
def test_vectors_reproduce_exactly(name: str) -> None:
    case = CASES[name]
    for delta, expected in case["videorope"].items():
        found, end = built(case["layout"], delta=float(delta))
        assert found.dtype == torch.float32
        assert found[:, 0].tolist() == expected["position_ids"]
        assert end.tolist() == [[expected["rope_delta"]]]
    for variant, options in VARIANTS.items():
        if variant in case:
            found, end = built(case["layout"], **options)
            assert found[:, 0].tolist() == case[variant]["position_ids"], variant
            assert end.tolist() == [[case[variant]["rope_delta"]]], variant
    found, _ = built(case["layout"], scheme="tad")
    assert found[:, 0].tolist() == case["tad_rope_sum"]["position_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_reproduce_exactly(side: str) -> None:
    case = vectors("batch_padding")[side]
    ids = torch.tensor(case["input_ids"])
    types = torch.where(ids == 151656, 2, 0)
    mask = torch.tensor(case["attention_mask"])
    grids = [[(t, h // 2, w // 2)] for t, h, w in case["video_grid_thw"]]
    for options, key, delta in (
        ({"delta": 2.0}, "videorope_2.0", "videorope_delta"),
        ({"scheme": "mrope"}, "m_rope_4_45", "m_rope_4_45_delta"),
        ({"scheme": "mrope-5"}, "hf_5_23_qwen2_vl", "hf_5_23_delta"),
    ):
        found, end = build_position_ids(types, grids, attention_mask=mask, **options)
        assert found.tolist() == case[key]
        assert end.tolist() == case[delta]
    _, end = build_position_ids(types, grids, attention_mask=mask, convention="unpadded")
    padding = (mask == 0).sum(1, keepdim=True)
    assert torch.equal(end, torch.tensor(case["videorope_delta"]) + padding)


def test_text_alone_reproduces_exactly() -> None:
    case = vectors("batch_padding")["text_only"]
    mask = torch.tensor(case["mask"])
    types = torch.zeros_like(mask)
    for scheme in ("videorope", "mrope", "rope"):
        found, end = build_position_ids(types, [], scheme=scheme, attention_mask=mask)
        assert found.tolist() == case["position_ids_with_mask"]
        assert end.tolist() == case["delta"]
        found, end = build_position_ids(types, [], scheme=scheme, dtype=torch.int64)
        assert (found.dtype, end.dtype) == (torch.int64, torch.int64)
        assert found.tolist() == case["position_ids_no_mask"]
        assert end.tolist() == case["delta_no_mask"]


def reference(layout: Layout, delta: float) -> tuple[list[list[float]], float]:
    """The published loop, token by token."""
    rows: list[list[float]] = []
    p = 0.0
    for part in layout:
        if isinstance(part, int):
            rows += [[p + j] * 3 for j in range(part)]
            p += part
            continue
        t_size, h_size, w_size = (1, *part[1:]) if part[0] == "i" else part[1:]
        for f in range(t_size):
            for h in range(h_size):
                for w in range(w_size):
                    t = p + delta * f
                    rows.append([t, t + h - ((h_size - 1) // 2), t + w - ((w_size - 1) // 2)])
        p = t + 1
    return rows, max(row[0] for row in rows) + 1 - len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_layouts_that_are_in_no_vector(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layout: Layout = []
    for _ in range(int(draw.integers(1, 5))):
        layout.append(int(draw.integers(1, 7)))
        sizes = [int(draw.integers(1, 6)) for _ in range(3)]
        layout.append(["v", *sizes] if draw.random() < 0.6 else ["i", *sizes[1:]])
        layout.append(1)
    delta = float(draw.choice([0.25, 0.5, 1, 1.5, 2, 3]))
    rows, end = reference(layout, delta)
    found, found_end = built(layout, delta=delta)
    assert found[:, 0].T.tolist() == rows
    assert found_end.tolist() == [[end]]


def test_worked_examples_of_the_paper() -> None:
    found, _ = built([3, ["v", 2, 2, 2], 2], layout="paper")
    t, y, x = found[:, 0].tolist()
    assert t == [0, 1, 2, 3, 3, 3, 3, 5, 5, 5, 5, 7, 8]
    assert y == [0, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 7, 8]
    assert x == [0, 1, 2, 2, 3, 2, 3, 4, 5, 4, 5, 7, 8]
    centred, _ = built([1, ["i", 3, 4], 1], centre="paper")
    assert centred[1, 0, 1:5].tolist() == [-0.5] * 4
    assert centred[2, 0, 1:5].tolist() == [-1, 0, 1, 2]
    assert centred[0, 0, -1] == 2, "only the centre is the paper's"
    two, end = built([2, ["v", 2, 2, 3], 3, ["v", 3, 3, 2], 2])
    assert two[0, 0].unique().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14]
    assert end.item() == -22


def test_switches_of_the_ablations() -> None:
    layout: Layout = [2, ["v", 3, 2, 5], 2]
    plain, _ = built(layout, scheme="mrope")
    same, _ = built(layout, dl=False, delta=1.0)
    assert torch.equal(plain, same)
    spaced, _ = built(layout, dl=False, delta=4.0)
    assert torch.equal(spaced[1:, 0, 2:-2], plain[1:, 0, 2:-2])
    assert torch.equal(spaced[0, 0, 2:-2] - 2, 4 * (plain[0, 0, 2:-2] - 2))
    assert spaced[:, 0, -2:].tolist() == [[11, 12]] * 3


def test_laws_of_the_layout() -> None:
    for delta in (0.5, 1.0, 2.0):
        found, _ = built([3, ["v", 4, 3, 2], 3], delta=delta)
        video = found[:, 0, 3:-3].view(3, 4, 3, 2)
        assert (video[:, 1:] - video[:, :-1] == delta).all(), "frames move along the diagonal"
        assert video[0, 0, 0, 0] - found[0, 0, 2] == 1
        assert found[0, 0, -3] - video[0, -1, 0, 0] == 1, "the gaps before and after are one"
    alone, _ = built([2, ["v", 3, 1, 1], 2], delta=1.0)
    assert alone[:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3


def test_adjacent_blocks_are_told_apart_by_their_grids() -> None:
    types = torch.tensor([[0, 2, 2, 2, 2, 2, 2, 0]])
    found, _ = build_position_ids(types, [[(1, 2, 2), (2, 1, 1)]])
    assert found[0, 0].tolist() == [0, 1, 1, 1, 1, 2, 4, 5]


def test_numpy_in_numpy_out_and_flat_grids() -> None:
    types, grids = described([1, ["v", 2, 1, 2], 1])
    expected, delta = build_position_ids(torch.tensor([types]), [grids])
    found, end = build_position_ids(np.array([types]), grids)
    assert isinstance(found, np.ndarray)
    assert isinstance(end, np.ndarray)
    assert (found == expected.numpy()).all()
    assert (end == delta.numpy()).all()
    listed, _ = build_position_ids([types], torch.tensor(grids))
    assert torch.equal(listed, expected)


def test_generated_tokens_go_on_after_the_prompt() -> None:
    for delta, first in ((2.0, 8), (1.0, 7), (0.5, 6.5), (3.0, 9)):
        _, end = built([3, ["v", 2, 2, 2], 2], delta=delta)
        found = decode_positions(end, 13, 3)
        assert found.tolist() == [[[first, first + 1, first + 2]]] * 3


def test_positions_remember_what_they_were_built_for() -> None:
    layout: Layout = [1, ["i", 2, 2], 1]
    assert marked(built(layout)[0]) == "videorope{delta=2}"
    assert marked(built(layout, delta=0.5, centre="paper")[0]) == (
        "videorope{delta=0.5 centre=paper}"
    )
    assert marked(built(layout, scheme="mrope-5")[0]) == "mrope-5{convention=unpadded}"
    assert marked(built([4])[0]) == ANY
    assert marked(built([4], scheme="tad")[0]) == "tad"


@pytest.mark.parametrize(
    ("types", "grids", "options", "reason"),
    [
        ([0, 2, 2, 0], [[]], {}, "has vision tokens at 1 and no grid"),
        ([0, 2, 2, 0], [[(2, 1, 2)]], {}, "does not fill its grid"),
        ([0, 2, 2, 0], [[(2, 1, 1), (1, 1, 1)]], {}, "1 grids more than vision blocks"),
        ([0, 1, 1, 0], [[(2, 1, 1)]], {}, "the image at token 1 does not fill"),
        ([0, 2, 0, 2], [[(2, 1, 1)]], {}, "does not fill"),
        ([0, 3], [[]], {}, "must be 0 (text), 1 (image) or 2"),
        ([0, 2], [[(0, 1, 1)]], {}, "of positive sizes"),
        ([0, 2], [[(1, 1)]], {}, "of positive sizes"),
        ([0, 2], [[], []], {}, "grids for 2 rows, the batch has 1"),
        ([0, 0], [], {"scheme": "m_rope"}, "is not one of"),
        ([0, 0], [], {"delta": 0.0}, "must be positive"),
        ([0, 0], [], {"attention_mask": [[1]]}, "attention_mask is (1, 1)"),
        ([0, 0], [], {"dtype": torch.float16}, "are float32 or int64"),
        ([0, 2, 2], [[(2, 1, 1)]], {"delta": 0.5, "dtype": torch.int64}, "have fractions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    types: list[int], grids: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build_position_ids(torch.tensor([types]), grids, **options)
    assert reason in str(caught.value)
    with pytest.raises(UsageError, match="must be"):
        build_position_ids(torch.tensor(types), grids, **options)


# ---- axis maps ---------------------------------------------------------------------------

MAPS = vectors("axis_maps")["maps"]


@pytest.mark.parametrize("text", MAPS)
def test_axis_maps_reproduce(text: str) -> None:
    section = json.loads(text)
    assert [*lta_map(section)] * 2 == MAPS[text]["lta_full_head"]
    assert [*sectioned_map(section)] * 2 == MAPS[text]["mrope_full_head"]
    ladder = 1e6 ** -(torch.arange(sum(section)) / sum(section))
    assert lta_by_rank(ladder, section[0]) == lta_map(section)


def test_maps_of_other_sections() -> None:
    assert lta_map((3, 4, 1)) == (1, 2, 1, 2, 1, 0, 0, 0)
    assert interleaved_map((2, 1, 1)) == (0, 1, 2, 0)
    assert interleaved_map((24, 20, 20))[:6] == (0, 1, 2, 0, 1, 2)
    assert section_of(interleaved_map((24, 20, 20))) == (24, 20, 20)
    assert [default_section(n) for n in (64, 32, 8, 4, 6)] == [
        (16, 24, 24), (8, 12, 12), (2, 3, 3), (2, 1, 1), (2, 2, 2)
    ]  # fmt: skip
    assert lta_by_rank(torch.tensor([1.0, 0.1, -1.0, 0.1, 1.0, 0.01]), 2) == (1, 2, 2, 0, 1, 0)
    assert describe(lta_map((16, 24, 24))) == "(hw)24 t16"
    assert describe(sectioned_map((16, 24, 24))) == "t16 h24 w24"
    assert describe(interleaved_map((24, 20, 20))) == "(thw)20 t4"
    for bad in ((1, 2), (-1, 2, 3)):
        with pytest.raises(UsageError, match="does not divide"):
            lta_map(bad)


# ---- oscillation (section 5.2 of the analysis) ----------------------------------------------

FIGURES = [
    # D, section, base, G, M-RoPE (extrema, variation, ratio, recurrence), LTA with delta 1, 2
    ((16, 24, 24), 1e6, 3000, (752, 176.37, 176, 0.5556), (0, 0.0008, 1.0), (0, 0.0032, 1.0)),
    ((16, 24, 24), 1e6, 1000, (250, 58.98, 63.2, 0.416), (0, 9e-5, 1.0), (0, 3.6e-4, 1.0)),
    ((16, 24, 24), 1e4, 1000, (252, 68.91, 54.1, 0.498), (0, 0.118, 1.0), (0, 0.409, 1.0)),
    ((16, 24, 24), 1e4, 3000, (742, 206.7, 193, 0.562), (0, 0.727, 1.0), (1, 1.03, 1.02)),
    ((8, 12, 12), 1e6, 1000, (284, 92.98, 89.8, 0.693), (0, 1.1e-4, 1.0), (0, 4.3e-4, 1.0)),
    ((2, 3, 3), 1e6, 1000, (318, 307.7, 350, 0.995), (0, 2.6e-4, 1.0), (0, 1.0e-3, 1.0)),
]  # fmt: skip


def ladder(angles: int, base: float) -> Tensor:
    return base ** -(torch.arange(angles, dtype=torch.float64) / angles)


@pytest.mark.parametrize(("section", "base", "frames", "mrope", "one", "two"), FIGURES)
def test_the_temporal_band_stops_oscillating(
    section: Any, base: float, frames: int, mrope: Any, one: Any, two: Any
) -> None:
    """Figures are quoted to three digits or so."""
    inv_freq = ladder(sum(section), base)
    before = oscillation(score_curve(inv_freq, sectioned_map(section), frames=frames))
    assert before.extrema == mrope[0]
    assert before.variation == pytest.approx(mrope[1], rel=2e-3)
    assert before.ratio == pytest.approx(mrope[2], rel=5e-3)
    assert before.recurrence == pytest.approx(mrope[3], abs=1e-3)
    if frames == 3000 and base == 1e6:
        assert before.recurrence_at == 2846
    for delta, (extrema, variation, ratio) in ((1.0, one), (2.0, two)):
        curve = score_curve(inv_freq, lta_map(section), step=delta, frames=frames)
        after = oscillation(curve)
        assert after.extrema == extrema
        assert after.variation == pytest.approx(variation, rel=0.07)
        assert after.ratio == pytest.approx(ratio, abs=5e-3)
        fastest = max(inv_freq[n] for n, row in enumerate(lta_map(section)) if row == 0)
        monotone = int(torch.pi / float(fastest) / delta)
        assert (curve[: monotone + 1].diff() < 0).all(), "strictly decreasing up to the bound"


def test_the_full_score_is_the_wrong_thing_to_look_at() -> None:
    """The same patch moves along all rows: over all angles VideoRoPE oscillates more, not less."""
    section, inv_freq = (16, 24, 24), ladder(64, 1e6)
    every = (0,) * 64
    whole = oscillation(score_curve(inv_freq, every, step=2.0, frames=3000))
    band = torch.cos(torch.outer(torch.arange(3001.0, dtype=torch.float64), inv_freq[:16])).sum(1)
    mrope = oscillation((band + 48) / 64)  # same patch: the spatial angles see no distance
    assert (whole.extrema, mrope.extrema) == (1409, 752)
    assert whole.variation == pytest.approx(81, abs=0.6)
    assert mrope.variation == pytest.approx(44, abs=0.6)
    assert whole.variation > mrope.variation
    temporal = oscillation(score_curve(inv_freq, lta_map(section), step=2.0, frames=3000))
    assert temporal.extrema == 0


def test_recurrence_and_empty_bands() -> None:
    curve = score_curve(ladder(8, 1e4), sectioned_map((2, 3, 3)), axis=2, frames=20)
    assert len(curve) == 21
    assert oscillation(curve).recurrence != oscillation(curve).recurrence, "too short to tell"
    assert (score_curve(ladder(4, 1e4), (1, 1, 2, 2), frames=5) == 1).all()
