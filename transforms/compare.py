"""Error measures between a reference and a result, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from resplice.errors import NumericsError

EXACT_BARS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error that an exact rewrite may show, by dtype; other dtypes may show none."""


@dataclass(frozen=True)
class Difference:
    """How far a result is from its reference.

    Attributes:
        sqnr_db: 10 log10(signal power / error power); None where the two are identical.
        max_abs: Largest absolute difference.
        relative: `max_abs` over the largest absolute reference value (the output scale).
        finite: Whether the result is finite wherever the reference is.
    """

    sqnr_db: float | None
    max_abs: float
    relative: float
    finite: bool = True

    def within(self, bar: float) -> bool:
        """Whether the result is finite and its relative error at most `bar`."""
        return self.finite and not self.relative > bar

    @property
    def rms(self) -> float:
        """Root mean square of the error over that of the reference."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 20)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        """`42.0 dB, max abs 1.2e-3 (4.0e-4 of scale)`."""
        ratio = "identical" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return f"{ratio}, max abs {self.max_abs:.2e} ({self.relative:.2e} of scale)"


def difference(reference: torch.Tensor, result: torch.Tensor) -> Difference:
    """Compare two tensors of equal shape.

    Positions where the reference is not finite must hold the same value in the result; they
    count for nothing else (attention masks are full of -inf).
    """
    if reference.shape != result.shape:
        raise NumericsError(
            f"shapes differ: {list(reference.shape)} and {list(result.shape)}",
            measured=math.inf, bar=0.0,
        )  # fmt: skip
    a, b = _wide(reference), _wide(result)
    usual = a.isfinite()
    same_rest = torch.allclose(a[~usual], b[~usual], rtol=0, atol=0, equal_nan=True)
    finite = same_rest and bool(b[usual].isfinite().all())
    a, b = a[usual], b[usual]
    if not finite:
        return Difference(-math.inf, math.inf, math.inf, finite=False)
    error, scale = (a - b).abs(), float(a.abs().max()) if a.numel() else 0.0
    worst = float(error.max()) if error.numel() else 0.0
    return Difference(
        _sqnr(a, error), worst, worst / scale if scale else (math.inf if worst else 0.0)
    )


def worst(differences: Sequence[Difference]) -> Difference:
    """The difference with the largest relative error."""
    return max(differences, key=lambda d: d.relative, default=Difference(None, 0.0, 0.0))


def keep_worst(
    found: dict[str, Difference],
    expected: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
) -> None:
    """Compare every expected output by name and keep, per name, the larger error in `found`."""
    for name, value in expected.items():
        measured = difference(value, actual[name])
        if name not in found or measured.relative > found[name].relative:
            found[name] = measured


def sqnr_db(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB; infinity where identical."""
    found = difference(reference, result).sqnr_db
    return math.inf if found is None else found


def _wide(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()


def _sqnr(signal: torch.Tensor, error: torch.Tensor) -> float | None:
    power, noise = _decibels(signal), _decibels(error)
    return None if noise is None else -math.inf if power is None else power - noise


def _decibels(value: torch.Tensor) -> float | None:
    """20 log10 of the norm, None if it is zero; scaled first, so that no square underflows."""
    top = float(value.abs().max()) if value.numel() else 0.0
    return 20 * (math.log10(top) + math.log10(float((value / top).norm()))) if top else None
