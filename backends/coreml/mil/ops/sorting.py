"""Sorting and choosing the largest elements; equal elements keep their order."""

from __future__ import annotations

import torch

from resplice.backends.coreml.mil.registry import implements


@implements("argsort")
def argsort(x: torch.Tensor, axis: int, ascending: bool) -> torch.Tensor:
    """Positions of the sorted elements."""
    return torch.sort(x, stable=True, dim=axis, descending=not ascending).indices


@implements("topk", moves=True)
def topk(
    x: torch.Tensor,
    k: int | torch.Tensor,
    axis: int,
    ascending: bool,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[torch.Tensor, ...]:
    """The `k` largest (smallest if `ascending`) elements and their positions.

    They come sorted even where `sort` leaves the order open.
    """
    count = x.shape[axis] if int(k) < 0 else int(k)
    found = torch.sort(x, stable=True, dim=axis, descending=not ascending)
    values, places = (part.narrow(axis, 0, count) for part in (found.values, found.indices))
    return (values, places.to(torch.int32)) if return_indices else (values,)


@implements("classify")
def classify(probabilities: torch.Tensor, classes: list[object]) -> tuple[torch.Tensor, ...]:
    """The position of the likeliest class, and the probabilities in the order of the classes."""
    flat = probabilities.reshape(-1)
    return torch.argmax(flat), flat
