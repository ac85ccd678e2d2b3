"""merge_frames, unmerge_frames: neighbouring frames of a video averaged, and spread out again.

Source: On-device Sora, arXiv 2502.04363, section 4.2 (temporal dimension token merging): groups of
`pair` frames with stride `pair`, no similarity search. Where the group does not divide the frames,
the last frame is repeated first, so that with pairs an odd frame travels alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resplice.cost import Cost
from resplice.errors import OpError
from resplice.ops import OpSample, op

aten = torch.ops.aten


def group_count(frames: int, pair: int) -> int:
    """Frames after merging: frames / pair, rounded up."""
    return -(-frames // pair)


def _verifier(name: str, merged: bool) -> Any:
    def verify(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> None:
        if x.dim() < 1:
            raise OpError(name, "x", "has no axes")
        if not -x.dim() <= dim < x.dim():
            raise OpError(name, "dim", f"is {dim}, x has {x.dim()} axes")
        if min(frames, inner, pair) < 1:
            raise OpError(name, "frames, inner, pair", f"are {frames}, {inner}, {pair}, below 1")
        if not x.is_floating_point():
            raise OpError(name, "x", f"has dtype {x.dtype}, not floating point")
        count = group_count(frames, pair) if merged else frames
        if x.shape[dim] % (count * inner):
            raise OpError(name, "x", f"has size {x.shape[dim]}, not a multiple of {count}*{inner}")

    return verify


def _resized(x: Tensor, dim: int, before: int, after: int) -> list[Any]:
    shape: list[Any] = list(x.shape)
    shape[dim] = shape[dim] // before * after
    return shape


def _merged_shape(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    return x.new_empty(_resized(x, dim, frames, group_count(frames, pair)))


def _unmerged_shape(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    return x.new_empty(_resized(x, dim, group_count(frames, pair), frames))


def _merge_cost(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Cost:
    size = x.element_size()
    kept = x.numel() // frames * group_count(frames, pair)
    return Cost(x.numel(), x.numel() * size, kept * size)


def _unmerge_cost(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Cost:
    size = x.element_size()
    made = x.numel() // group_count(frames, pair) * frames
    return Cost(made, x.numel() * size, made * size)


def _samples(frames_of: Any) -> Iterator[OpSample]:
    torch.manual_seed(0)
    for label, shape, rest in (
        ("pairs along the tokens", (2, 24, 5), (1, 4, 6, 2)),
        ("an odd frame travels alone", (2, 15, 4), (-2, 5, 3, 2)),
        ("frames in the batch", (10, 6, 4), (0, 5, 1, 2)),
        ("groups of three, one short", (1, 8, 3), (1, 4, 2, 3)),
        ("one frame", (2, 3, 4), (1, 1, 3, 2)),
        ("groups of one", (2, 6, 4), (1, 3, 2, 1)),
        ("a group wider than the video", (2, 6, 4), (1, 3, 2, 8)),
        ("five axes", (2, 3, 4, 2, 3), (2, 4, 1, 2)),
    ):
        sizes = list(shape)
        sizes[rest[0]] = sizes[rest[0]] // rest[1] * frames_of(rest[1], rest[3])
        yield OpSample(label, (torch.randn(sizes), *rest), grad=True)
    yield OpSample("float64", (torch.randn(2, frames_of(6, 2), 3).double(), 1, 6, 1, 2))
    yield OpSample("no such axis", (torch.randn(2, 4), 2, 4, 1, 2), refused="is 2, x has 2 axes")
    yield OpSample("no group", (torch.randn(2, 4), 1, 4, 1, 0), refused="below 1")
    yield OpSample("whole numbers", (torch.ones(2, 4).int(), 1, 4, 1, 2), refused="not floating")
    yield OpSample("other frames", (torch.randn(2, 7), 1, 4, 3, 2), refused="not a multiple of")


def _fast_merge(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """Pairs by one addition of strided halves."""
    if pair != 2 or frames < 2:
        merged: Tensor = merge_frames.reference(x, dim, frames, inner, pair)
        return merged
    place = dim % x.dim()
    split = x.reshape(-1, frames, inner * math.prod(x.shape[place + 1 :]))
    even = frames - frames % 2
    result = torch.add(split[:, 0:even:2], split[:, 1:even:2]).mul_(0.5)
    if frames % 2:
        result = torch.cat((result, split[:, -1:]), 1)
    shaped: Tensor = result.reshape(_resized(x, place, frames, group_count(frames, pair)))
    return shaped


def _fast_unmerge(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """Written once, without the frames that would be cut off."""
    place, count = dim % x.dim(), group_count(frames, pair)
    width = inner * math.prod(x.shape[place + 1 :])
    split = x.reshape(-1, count, width)
    result = x.new_empty(_resized(x, place, count, frames))
    spread = result.view(-1, frames, width)
    for first in range(min(pair, frames)):
        part = spread[:, first::pair]
        part.copy_(split[:, : part.shape[1]])
    return result


@op(
    "merge_frames(Tensor x, int dim, int frames, int inner, int pair) -> Tensor",
    verify=_verifier("merge_frames", merged=False),
    cost=_merge_cost,
    fake=_merged_shape,
    fast=_fast_merge,
    samples=lambda: _samples(lambda frames, pair: frames),
)
def merge_frames(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """Average groups of neighbouring frames along one axis.

    Args:
        x: Floating point, any shape; axis `dim` holds [outer, frames, inner], outer times.
        dim: The axis.
        frames: T.
        inner: Positions of the axis per frame.
        pair: Frames of a group; the last frame is repeated to fill the last group.

    Returns:
        Same shape, `dim` with ceil(T / pair) frames.

    Raises:
        OpError: An argument is out of range, or does not divide the axis.
    """
    place, count = dim % x.dim(), group_count(frames, pair)
    split = x.reshape(-1, frames, inner * math.prod(x.shape[place + 1 :]))
    if count * pair > frames:
        last = split[:, -1:].expand(-1, count * pair - frames, -1)
        split = torch.cat((split, last), 1)
    merged: Tensor = split.unflatten(1, (count, pair)).mean(2)
    return merged.reshape(_resized(x, place, frames, count))


@op(
    "unmerge_frames(Tensor x, int dim, int frames, int inner, int pair) -> Tensor",
    verify=_verifier("unmerge_frames", merged=True),
    cost=_unmerge_cost,
    fake=_unmerged_shape,
    fast=_fast_unmerge,
    samples=lambda: _samples(group_count),
)
def unmerge_frames(x: Tensor, dim: int, frames: int, inner: int, pair: int) -> Tensor:
    """Give every frame of a group the value of the group; the inverse shape of `merge_frames`.

    Args:
        x: Floating point, any shape; axis `dim` holds [outer, ceil(frames / pair), inner].
        dim: The axis.
        frames: T, of the result.
        inner: Positions of the axis per frame.
        pair: Frames of a group.

    Returns:
        Same shape, `dim` with T frames.

    Raises:
        OpError: An argument is out of range, or does not divide the axis.
    """
    place, count = dim % x.dim(), group_count(frames, pair)
    split = x.reshape(-1, count, 1, inner * math.prod(x.shape[place + 1 :]))
    spread = split.expand(-1, -1, pair, -1).flatten(1, 2)[:, :frames]
    return spread.reshape(_resized(x, place, count, frames)).clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Each frame gets its share; the last one also those of its repetitions."""
    dim, frames, inner, pair = ctx.rest
    place, count = dim % grad.dim(), group_count(frames, pair)
    split = grad.reshape(-1, count, inner * math.prod(grad.shape[place + 1 :])) / pair
    shares = split.repeat_interleave(pair, 1)
    last = shares[:, frames - 1 :].sum(1, keepdim=True)
    shares = torch.cat((shares[:, : frames - 1], last), 1)
    return shares.reshape(_resized(grad, place, count, frames)), None, None, None, None


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The sum over each group."""
    dim, frames, inner, pair = ctx.rest
    place, count = dim % grad.dim(), group_count(frames, pair)
    split = grad.reshape(-1, frames, inner * math.prod(grad.shape[place + 1 :]))
    missing = split.new_zeros(split.shape[0], count * pair - frames, split.shape[2])
    summed = torch.cat((split, missing), 1).unflatten(1, (count, pair)).sum(2)
    return summed.reshape(_resized(grad, place, frames, count)), None, None, None, None


merge_frames.differentiate(_merge_backward, setup=_setup)
unmerge_frames.differentiate(_unmerge_backward, setup=_setup)


@merge_frames.lower("coreml")
@merge_frames.lower("onnx")
def _merge_by_mean(build: Any, x: Any, dim: int, frames: int, inner: int, pair: int) -> Any:
    """Reshape to rank 4, mean, reshape."""
    parts = _framed(build, x, dim, frames, inner)
    if parts is None:
        return None
    split, width, sizes = parts
    count = group_count(frames, pair)
    missing = count * pair - frames
    if missing:
        last = build(aten.slice.Tensor, split, 1, frames - 1, frames)
        split = build(aten.cat.default, [split, *([last] * missing)], 1)
    groups = build.reshape(split, [-1, count, pair, width])
    return build.reshape(build(aten.mean.dim, groups, [2]), sizes)


@unmerge_frames.lower("coreml")
@unmerge_frames.lower("onnx")
def _unmerge_by_expand(build: Any, x: Any, dim: int, frames: int, inner: int, pair: int) -> Any:
    """Reshape to rank 4, repeat, cut, reshape."""
    count = group_count(frames, pair)
    parts = _framed(build, x, dim, count, inner)
    if parts is None:
        return None
    split, width, sizes = parts
    groups = build(aten.unsqueeze.default, split, 2)
    spread = build(aten.cat.default, [groups] * pair, 2) if pair > 1 else groups
    flat = build.reshape(spread, [-1, count * pair, width])
    if count * pair > frames:
        flat = build(aten.slice.Tensor, flat, 1, 0, frames)
    return build.reshape(flat, sizes)


def _framed(build: Any, x: Any, dim: int, frames: int, inner: int) -> Any:
    """[rows, frames, width], the width, and the sizes to come back to; None if it is dynamic."""
    sizes = build.sizes(x)
    place = dim % len(sizes)
    if not all(isinstance(size, int) for size in sizes[place + 1 :]):
        return None
    width = inner * math.prod(sizes[place + 1 :])
    back = [*sizes[:place], -1, *sizes[place + 1 :]]
    return build.reshape(x, [-1, frames, width]), width, back
