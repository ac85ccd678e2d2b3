"""Axes followed through a graph: what is kept, cut and joined, and where nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resplice
from resplice.axes import Axis, axes_of, regrouped
from resplice.kernels.merge_frames import merge_frames, unmerge_frames
from resplice.pipeline import Pipeline


class Function(nn.Module):
    """A function of a video [2,3,4,6,10] and a text [2,5,7] as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2))
        self.table = nn.Parameter(torch.randn(1, 1, 1, 60))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        """The function's result."""
        return self.function(self, video, text)


def told(function: Callable[..., Any]) -> list[str]:
    """Each axis of the result: `v2:4*v3:6` for atoms of one segment, `?` for unknown ones."""
    inputs = (torch.randn(2, 3, 4, 6, 10), torch.randn(2, 5, 7))
    program = resplice.capture(Function(function), inputs, check=False)
    program, _ = Pipeline.of("canonicalize").run(program)
    (result,) = program.output_nodes
    return [_axis(axis) for axis in axes_of(program)[result]]


def _axis(axis: Axis) -> str:
    marks = {"input": "", "constant": "c", "unknown": "?"}
    return " + ".join(
        "*".join(
            f"{a.source[0] if a.origin == 'input' else marks[a.origin]}"
            f"{a.axis if a.origin == 'input' else ''}:{a.size}"
            for a in segment
        )
        or "1"
        for segment in axis
    )


V = ["v0:2", "v1:3", "v2:4", "v3:6", "v4:10"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, v, t: v.relu() * 2 + m.table[..., :10], V),
        (lambda m, v, t: m.conv(v), ["v0:2", "?:8", "v2:4", "v3:3", "v4:5"]),
        (lambda m, v, t: v.flatten(2).transpose(1, 2), ["v0:2", "v2:4*v3:6*v4:10", "v1:3"]),
        (lambda m, v, t: v.permute(0, 2, 1, 4, 3).flatten(0, 1),
         ["v0:2*v2:4", "v1:3", "v4:10", "v3:6"]),
        (lambda m, v, t: v.flatten(0, 2).unflatten(0, (2, 3, 4)), V),
        (lambda m, v, t: v.unflatten(4, (5, 2)), [*V[:4], "v4:5", "v4:2"]),
        (lambda m, v, t: v.unflatten(4, (5, 2)).flatten(4), V),
        (lambda m, v, t: torch.cat((v.flatten(2), v.flatten(2)[..., :2]), -1),
         ["v0:2", "v1:3", "v2:4*v3:6*v4:10 + ?:2"]),
        (lambda m, v, t: torch.cat((v.flatten(3), t[:, :3, None, :].expand(2, 3, 4, 7)), -1),
         ["v0:2", "v1:3", "v2:4", "v3:6*v4:10 + t2:7"]),
        (lambda m, v, t: torch.cat(
            (v.flatten(3), t[:, :3, None, :].expand(2, 3, 4, 7)), -1)[..., 60:],
         ["v0:2", "v1:3", "v2:4", "t2:7"]),
        (lambda m, v, t: torch.cat((v.flatten(3), v.flatten(3)), -1).chunk(2, -1)[1],
         ["v0:2", "v1:3", "v2:4", "v3:6*v4:10"]),
        (lambda m, v, t: v.roll(1, 3), ["?:2", "?:3", "?:4", "?:6", "?:10"]),
        (lambda m, v, t: v + v.roll(1, 3), ["?:2", "?:3", "?:4", "?:6", "?:10"]),
        (lambda m, v, t: v.flip(3) * m.table[..., :10], ["?:2", "?:3", "?:4", "?:6", "?:10"]),
        (lambda m, v, t: v.mean(1, keepdim=True), ["v0:2", "1", "v2:4", "v3:6", "v4:10"]),
        (lambda m, v, t: v.mean((1, 2)), ["v0:2", "v3:6", "v4:10"]),
        (lambda m, v, t: nn.functional.pad(v, (0, 1, 0, 0, 0, 2)),
         ["v0:2", "v1:3", "v2:6", "v3:6", "v4:11"]),
        (lambda m, v, t: v.flatten(0, 1).view_as(v), V),
        (lambda m, v, t: merge_frames(v.flatten(2), 2, 4, 60, 2),
         ["v0:2", "v1:3", "v2:2*v3:6*v4:10"]),
        (lambda m, v, t: unmerge_frames(merge_frames(v.flatten(2), 2, 4, 60, 3), 2, 4, 60, 3),
         ["v0:2", "v1:3", "v2:4*v3:6*v4:10"]),
        (lambda m, v, t: v[:, 1], ["v0:2", "v2:4", "v3:6", "v4:10"]),
        (lambda m, v, t: torch.zeros_like(v).slice_scatter(v[:, :1], 1, 0, 1),
         ["v0:2", "c:3", *V[2:]]),
        (lambda m, v, t: t * torch.stack(torch.meshgrid(
            torch.arange(5.0), torch.arange(7.0), indexing="ij"))[0], ["t0:2", "t1:5", "t2:7"]),
        (lambda m, v, t: t.flatten(1) * torch.stack(torch.meshgrid(
            torch.arange(5.0), torch.arange(7.0), indexing="ij")).flatten(1)[0],
         ["t0:2", "t1:5*t2:7"]),
    ],
)  # fmt: skip
def test_axes_are_followed(function: Callable[..., Any], expected: list[str]) -> None:
    assert told(function) == expected


def test_a_grid_of_positions_tells_more_than_packed_tokens() -> None:
    def packed(m: Any, v: Tensor, t: Tensor) -> Tensor:
        axes = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
        return v * torch.stack(axes, -1).flatten(0, 1)[:, :1]

    assert told(packed) == ["v0:2", "v1:3", "v2:4", "c:2*c:3", "v4:10"]


def test_reshapes_that_cut_across_atoms_are_not_followed() -> None:
    atoms = axes_of(resplice.capture(nn.Identity(), (torch.zeros(4, 6),), check=False))
    (axes,) = [value for node, value in atoms.items() if node.op == "placeholder"]
    assert regrouped((4, 6), axes, (3, 8)) == [None, None]
    assert regrouped((4, 6), axes, (24,)) == [((*axes[0][0], *axes[1][0]),)]
    assert regrouped((4, 6), axes, (2, 2, 6)) is not None
