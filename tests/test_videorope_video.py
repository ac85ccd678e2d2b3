"""videorope on video transformers: float64 against eager models whose tables were replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from zoo import ZOO

import resplice
from resplice.kernels.rope3d import rope3d
from resplice.pipeline import Pipeline
from resplice.program import Program

SIZES = {"batch": 2, "frames": 3, "rows": 5, "columns": 4, "text": 6}
OTHER = {"batch": 3, "frames": 5, "rows": 4, "columns": 7, "text": 6}


def widened(value: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value
    )


def captured(name: str, dynamic: bool = True) -> tuple[Program, nn.Module, Any]:
    entry = ZOO[name]
    model = entry.model().double()
    args, kwargs = widened(entry.inputs(seed=1, **{s: SIZES[s] for s in entry.sizes}))
    shapes = entry.dynamic_shapes if dynamic else None
    sample = resplice.Sample(args, kwargs)
    return resplice.capture(model, sample, dynamic_shapes=shapes, check=False), model, entry


def by_rank(rates: list[float], s_t: int) -> list[int]:
    """The allocation, written once more: fastest first, h and w in turns, the rest t."""
    order = sorted(range(len(rates)), key=lambda n: -rates[n])
    found = [0] * len(rates)
    for place, n in enumerate(order[: len(rates) - s_t]):
        found[n] = 1 + place % 2
    return found


def positions(sizes: dict[str, int], delta: float) -> Tensor:
    """[3, T*H*W] in the diagonal layout."""
    t, h, w = torch.meshgrid(
        *(torch.arange(sizes[a], dtype=torch.float64) for a in ("frames", "rows", "columns")),
        indexing="ij",
    )
    t = t * delta
    h, w = t + h - (sizes["rows"] - 1) // 2, t + w - (sizes["columns"] - 1) // 2
    return torch.stack((t, h, w)).reshape(3, -1)


def angles(rates: list[float], s_t: int, sizes: dict[str, int], delta: float) -> Tensor:
    """[tokens, N]."""
    rows = positions(sizes, delta)
    axes = by_rank(rates, s_t)
    return torch.stack([rows[a] * r for a, r in zip(axes, rates, strict=True)], -1)


def ladder(channels: int, theta: float) -> list[float]:
    return [theta ** (-2 * n / channels) for n in range(channels // 2)]


def spread(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.cos().repeat_interleave(2, -1), a.sin().repeat_interleave(2, -1)


@contextmanager
def wan(sizes: dict[str, int], delta: float) -> Iterator[None]:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        a = angles([*ladder(4, 1e4)] * 3, 2, sizes, delta)
        return tuple(t[None, :, None] for t in spread(a))

    with patch.object(WanRotaryPosEmbed, "forward", forward):
        yield


@contextmanager
def hunyuan(sizes: dict[str, int], delta: float) -> Iterator[None]:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return spread(angles([*ladder(4, 256.0)] * 3, 2, sizes, delta))

    with patch.object(HunyuanVideoRotaryPosEmbed, "forward", forward):
        yield


@contextmanager
def ltx(sizes: dict[str, int], delta: float) -> Iterator[None]:
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    def forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        steps = [1e4 ** (i / 3) * torch.pi for i in range(4)]  # per index: twice pi/2
        rates = [r for r in steps for _ in range(3)]
        axes = by_rank(rates, 4)
        rows = positions(sizes, delta) - 0.5
        a = torch.stack([rows[x] * r for x, r in zip(axes, rates, strict=True)], -1)
        return tuple(t[None].expand(len(hidden_states), -1, -1) for t in spread(a))

    with patch.object(LTXVideoRotaryPosEmbed, "forward", forward):
        yield


@pytest.mark.parametrize(
    ("name", "replaced", "delta"), [("wan", wan, 0.5), ("hunyuanvideo", hunyuan, 2.0)]
)
def test_the_frequency_function_of_an_eager_model(name: str, replaced: Any, delta: float) -> None:
    """At a size other than the captured one; tables of these models are float32 (1e-5)."""
    program, model, entry = captured(name)
    result, steps = Pipeline.of(f"videorope{{delta={delta:g}}}").run(program)
    assert steps[-1].sites == 1
    assert len([n for n in result.graph.nodes if n.target is rope3d.overload]) == 4
    assert "positions" not in result.metadata, "positions are counted in the graph"
    args, kwargs = widened(entry.inputs(seed=3, **OTHER))
    with torch.no_grad():
        plain = pytree.tree_leaves(model(*args, **kwargs))[0]
        with replaced(OTHER, delta):
            expected = pytree.tree_leaves(model(*args, **kwargs))[0]
        found = pytree.tree_leaves(result(*args, **kwargs))[0]
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((plain - expected).abs().max()) > 1e-2 * scale, "nothing to see"


def test_ltx_whose_tokens_come_packed() -> None:
    """Its angles are float32 products of up to 3e4 per token, so they are compared, not outputs."""
    program, model, entry = captured("ltx")
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    nodes = [n for n in result.graph.nodes if n.target is rope3d.overload]
    assert len(nodes) == 4
    rows = result.weight(nodes[0].args[1])[:, 0]
    assert torch.equal(rows.double(), positions(SIZES, 2.0) - 0.5)
    rates = result.weight(nodes[0].args[2])
    expected = [1e4 ** (i / 3) * torch.pi for i in range(4) for _ in range(3)]
    assert torch.allclose(rates.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5)
    assert list(nodes[0].args[3]) == by_rank(expected, 4)
    args, kwargs = widened(entry.inputs(seed=3, **{s: SIZES[s] for s in entry.sizes}))
    with torch.no_grad(), ltx(SIZES, 2.0):
        wanted = model(*args, **kwargs)[0]
    (found,) = pytree.tree_leaves(result(*args, **kwargs))
    assert float((found - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


def test_tables_that_are_inputs() -> None:
    """CogVideoX gets them from its pipeline; afterwards the graph makes its own."""
    program, model, entry = captured("cogvideox_rotary")
    result, steps = Pipeline.of("videorope").run(program)
    assert steps[-1].sites == 1
    notes = steps[-1].changes[0].notes
    assert "input image_rotary_emb_0 is not read any more" in notes
    rates = [*ladder(4, 1e4), *ladder(6, 1e4), *ladder(6, 1e4)]
    args, kwargs = widened(entry.inputs(seed=3, **OTHER))
    tables = spread(angles(rates, 2, OTHER, 2.0))
    with torch.no_grad():
        expected = model(*args, **{**kwargs, "image_rotary_emb": tables})[0]
        plain = model(*args, **kwargs)[0]
        (found,) = pytree.tree_leaves(result(*args, **kwargs))
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((plain - expected).abs().max()) > 1e-2 * scale


def test_switches_and_refusals() -> None:
    program, _, _ = captured("wan", dynamic=False)
    kept, steps = Pipeline.of("videorope{lta=false}").run(program)
    (site,) = steps[-1].changes[0].sites
    assert site.metrics["axis_map_after"] == [0, 0, 1, 1, 2, 2]
    node = next(n for n in kept.graph.nodes if n.target is rope3d.overload)
    assert torch.equal(kept.weight(node.args[1])[:, 0].double(), positions(SIZES, 2.0))
    flat, _ = Pipeline.of("videorope{dl=false ats=false}").run(program)
    node = next(n for n in flat.graph.nodes if n.target is rope3d.overload)
    assert flat.weight(node.args[1])[1, 0, :5].tolist() == [0, 0, 0, 0, 1]
    for name, reason in {
        "mochi": "each of its angles mixes several axes (aten.einsum)",
    }.items():
        program, _, _ = captured(name, dynamic=False)
        _, steps = Pipeline.of("videorope").run(program)
        assert steps[-1].sites == 0
        assert any(reason in r.reason for r in steps[-1].changes[0].refusals)
    entry = ZOO["wan"]
    inputs = entry.inputs(seed=1, **{**SIZES, "frames": 1})
    still = resplice.capture(entry.model(), resplice.Sample(*inputs), check=False)
    _, steps = Pipeline.of("videorope").run(still)
    assert "not the three axes of a video" in steps[-1].changes[0].refusals[0].reason
