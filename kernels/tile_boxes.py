"""Tile attention on a CPU: unmasked attention of boxes of queries to boxes of keys.

Queries that see the same keys form a box of the canvas, and so do their keys; nothing is put in
tile order and nothing is masked. Boxes of equal shape are computed together, a few at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from resplice.kernels.tile_grid import Run, Span, Triple, axis_runs

_KEYS_AT_ONCE = 1 << 20
"""Key elements gathered per call; more would only leave the cache."""


@dataclass(frozen=True)
class Problem:
    """What heads with one window compute.

    Attributes:
        canvas: Tokens on the three axes.
        tile: Tokens of a tile.
        window: Tiles that a query sees.
        text_first: Whether text stands before the image.
        scale: Of the scores; None means 1 / sqrt(D).
    """

    canvas: Triple
    tile: Triple
    window: Triple
    text_first: bool
    scale: float | None

    def image(self, x: Tensor) -> Span:
        """Where the canvas lies among the tokens of [B,heads,S,D]."""
        size = math.prod(self.canvas)
        return Span(x.shape[2] - size if self.text_first else 0, size)

    def text(self, x: Tensor) -> Span:
        """Where the text lies; keys may have less of it than queries."""
        size = math.prod(self.canvas)
        return Span(0 if self.text_first else size, x.shape[2] - size)

    def boxes(self, keys: Tensor) -> Iterator[Boxes]:
        """All boxes of queries and keys; those of equal shape together, within bounds."""
        one, text = keys[..., 0, :].numel(), self.text(keys).length
        sides = zip(self.canvas, self.tile, self.window, strict=True)
        for runs in itertools.product(*(axis_runs(*side) for side in sides)):
            tokens = math.prod(run.key.length for run in runs) + text
            yield from portions(runs, max(1, _KEYS_AT_ONCE // max(1, tokens * one)))


Boxes = tuple[Run, ...]
"""One run per axis: every combination of their members is a box."""


def portions(runs: Boxes, most: int) -> Iterator[Boxes]:
    """Cut runs so that at most `most` boxes come at once."""
    sizes = list[int]()
    for run in reversed(runs):
        sizes.insert(0, min(run.count, most))
        most //= sizes[0]
        most = max(most, 1)
    cut = (
        [run.members(start, size) for start in range(0, run.count, size)]
        for run, size in zip(runs, sizes, strict=True)
    )
    yield from itertools.product(*cut)


def part(x: Tensor, span: Span) -> Tensor:
    """The rows of a span: [B,heads,S,D] -> [B,heads,length,D]."""
    return x.narrow(2, span.start, span.length)


def on_canvas(x: Tensor, problem: Problem) -> Tensor:
    """The image rows on their canvas: [B,heads,S,D] -> [B,heads,T,H,W,D], a view."""
    found: Tensor = part(x, problem.image(x)).unflatten(2, problem.canvas)
    return found


def query_boxes(x: Tensor, boxes: Boxes) -> Tensor:
    """[B,heads,T,H,W,D] -> [nt,nh,nw,B,heads,t,h,w,D], a view."""
    return _boxes(x, [(run.query, run.count, run.query_step) for run in boxes])


def key_boxes(x: Tensor, boxes: Boxes) -> Tensor:
    """Like `query_boxes`; boxes of keys may overlap."""
    return _boxes(x, [(run.key, run.count, run.key_step) for run in boxes])


def _boxes(x: Tensor, sides: list[tuple[Span, int, int]]) -> Tensor:
    for axis, (span, count, step) in enumerate(sides, start=2):
        reach = span.length + step * (count - 1)
        x = x.narrow(axis, span.start, reach).unfold(axis, span.length, step)
    return x.permute(2, 3, 4, 0, 1, 6, 7, 8, 5)


def gather_queries(x: Tensor, boxes: Boxes, problem: Problem) -> Tensor:
    """[B,heads,S,D] -> [boxes * B, heads, tokens, D], a copy."""
    found: Tensor = query_boxes(on_canvas(x, problem), boxes).flatten(5, 7).flatten(0, 3)
    return found


def gather_keys(x: Tensor, boxes: Boxes, problem: Problem) -> Tensor:
    """[B,heads,S,D] -> [boxes * B, heads, tokens and text, D], a copy."""
    image, text = key_boxes(on_canvas(x, problem), boxes), part(x, problem.text(x))
    *counts, batch, heads, t, h, w, width = image.shape
    out = x.new_empty(*counts, batch, heads, t * h * w + text.shape[2], width)
    out[..., : t * h * w, :].unflatten(-2, (t, h, w)).copy_(image)
    out[..., t * h * w :, :].copy_(text)
    return out.flatten(0, 3)


Inputs = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""


def gather(
    inputs: Inputs, mask: Tensor | None, boxes: Boxes, problem: Problem
) -> tuple[Inputs, Tensor | None]:
    """Query, key, value and mask of some boxes."""
    keys, values = (gather_keys(x, boxes, problem) for x in inputs[1:])
    chosen = None if mask is None else gather_keys(mask.mT, boxes, problem).mT
    return (gather_queries(inputs[0], boxes, problem), keys, values), chosen


def box_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, problem: Problem, out: Tensor
) -> None:
    """Attention of heads with one window; see `tile_attention`.

    Args:
        q: [B,heads,S,D].
        k: [B,heads,S',D]; it may have fewer text tokens than `q`.
        v: [B,heads,S',Dv].
        mask: None, or boolean or additive [B,heads,1,S'].
        problem: The rest.
        out: [B,heads,S,Dv], where the result goes.
    """
    results = on_canvas(out, problem)
    for boxes in problem.boxes(k):
        (queries, keys, values), chosen = gather((q, k, v), mask, boxes, problem)
        found = attend(queries, keys, values, attn_mask=chosen, scale=problem.scale)
        target = query_boxes(results, boxes)
        target.copy_(found.reshape(target.shape))
    text = problem.text(q)
    if text.length:
        words = attend(part(q, text), k, v, attn_mask=mask, scale=problem.scale)
        part(out, text).copy_(words)


def box_gradients(
    inputs: Inputs,
    mask: Tensor | None,
    problem: Problem,
    grad: Tensor,
    results: Inputs,
) -> None:
    """Add the gradients of `box_attention` to `results`, box by box; nothing was kept for it.

    Args:
        inputs: Query, key and value.
        mask: As for `box_attention`; it gets no gradient.
        problem: The rest.
        grad: Gradient of the result, [B,heads,S,Dv].
        results: What to add to, shaped like the inputs.
    """
    canvases = [on_canvas(x, problem) for x in results]
    for boxes in problem.boxes(inputs[1]):
        gathered, keys = gather(inputs, mask, boxes, problem)
        wanted = gather_queries(grad, boxes, problem)
        dq, dk, dv = _gradients(gathered, keys, problem.scale, wanted)
        for found, result, canvas in zip((dq, dk, dv), results, canvases, strict=True):
            spans = [run.query if found is dq else run.key for run in boxes]
            others = None if found is dq else part(result, problem.text(result))
            _add(found, canvas, others, boxes, spans)
    text = problem.text(inputs[0])
    if text.length:
        words = (part(inputs[0], text), inputs[1], inputs[2])
        targets = [part(results[0], text), *results[1:]]
        sums = _gradients(words, mask, problem.scale, part(grad, text))
        for result, value in zip(targets, sums, strict=True):
            result.add_(value)


def _gradients(
    inputs: Inputs, mask: Tensor | None, scale: float | None, grad: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        return torch.autograd.grad(attend(q, k, v, attn_mask=mask, scale=scale), (q, k, v), grad)


def _add(
    found: Tensor, canvas: Tensor, text: Tensor | None, boxes: Boxes, spans: Sequence[Span]
) -> None:
    """Add gradients of gathered tokens, one box at a time: boxes of keys overlap."""
    counts, lengths = [run.count for run in boxes], [span.length for span in spans]
    split, size = found.unflatten(0, (*counts, -1)), math.prod(lengths)
    for box in itertools.product(*map(range, counts)):
        target = canvas
        for axis, (run, span, i) in enumerate(zip(boxes, spans, box, strict=True), start=2):
            step = run.query_step if text is None else run.key_step
            target = target.narrow(axis, span.start + i * step, span.length)
        target.add_(split[box][..., :size, :].unflatten(-2, lengths))
        if text is not None:
            text.add_(split[box][..., size:, :])
