"""Non-maximum suppression of boxes."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements


@implements("non_maximum_suppression")
def non_maximum_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    max_boxes: int,
    per_class_suppression: bool,
    score_threshold: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """The best boxes, their scores and positions; before iOS 17 also how many there are.

    Boxes are `[N, B, 4]` and scores `[N, B, K]`; from iOS 17 on, which has no score threshold,
    the last two axes are exchanged. Unused places are zero, their position is -1.
    """
    swapped = score_threshold is None
    boxes, scores = (boxes.mT, scores.mT) if swapped else (boxes, scores)
    kept = [
        _select(*each, iou_threshold, max_boxes, per_class_suppression, score_threshold)
        for each in zip(boxes, scores, strict=True)
    ]
    places = torch.full((len(kept), max_boxes), -1)
    out_boxes = boxes.new_zeros(len(kept), max_boxes, 4)
    out_scores = scores.new_zeros(len(kept), max_boxes, scores.shape[-1])
    for sample, chosen in enumerate(kept):
        places[sample, : len(chosen)] = chosen
        out_boxes[sample, : len(chosen)] = boxes[sample, chosen]
        out_scores[sample, : len(chosen)] = scores[sample, chosen]
    if swapped:
        return out_boxes.mT, out_scores.mT, places
    return out_boxes, out_scores, places, torch.tensor([len(chosen) for chosen in kept])


def _select(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: float,
    max_boxes: int,
    per_class: bool,
    score_threshold: float | None,
) -> torch.Tensor:
    """Positions of the surviving boxes `[B, 4]` of one sample, best first."""
    best, classes = scores.max(-1)
    order = torch.sort(best, descending=True, stable=True).indices
    if score_threshold is not None:
        order = order[best[order] >= score_threshold]
    chosen: list[int] = []
    while len(order) and len(chosen) < max_boxes:
        first, order = int(order[0]), order[1:]
        chosen.append(first)
        clear = _overlap(boxes[first], boxes[order]) <= iou_threshold
        if per_class:
            clear |= classes[order] != classes[first]
        order = order[clear]
    return torch.tensor(chosen, dtype=torch.long)


def _overlap(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union; boxes are (x centre, y centre, width, height)."""
    low = torch.maximum(box[:2] - box[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = torch.minimum(box[:2] + box[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(-1)
    union = box[2:].prod() + others[:, 2:].prod(-1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))
