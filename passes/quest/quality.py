"""How far rounded layers are from theory: figures of every site, and which ones to look at.

Theory is that of independent Gaussian operands, arXiv 2502.05003 and `gaussian_grid.py`: a weight
errs by sqrt(e_w), the result of a layer by sqrt(1 - (1 - e_x)(1 - e_w)), e the relative squared
errors. What was measured in a layer far above it has outliers, or inputs with a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from resplice.change import Change, Site
from resplice.compare import sqnr_db
from resplice.context import Batch
from resplice.kernels.gaussian_grid import expected_error
from resplice.kernels.quest_quantize import quest_quantize
from resplice.passes.quest.weights import QuantizedWeight
from resplice.program import Program
from resplice.stream import Stream

FAR_OFF_DB = 2.0
"""More than this above theory is worth a look."""
_MOST_TOKENS = 1024
_NAMED = 8


class _Codes(Protocol):
    """What stands in the place of a weight."""

    @property
    def block(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def dequantize(self) -> Tensor: ...


def weight_metrics(weight: Tensor, quantized: _Codes, theory_db: float) -> dict[str, Any]:
    """Error and bytes of one weight [..., N, K], beside the error that theory expects."""
    quality = sqnr_db(weight.float(), quantized.dequantize())
    measured = {"sqnr_db": quality} if math.isfinite(quality) else {"note": "the weight is zero"}
    return {
        **measured,
        "theory_db": theory_db,
        "bytes_before": weight.nbytes,
        "bytes_after": quantized.nbytes,
        "block": quantized.block,
    }


class OutputErrors:
    """Relative errors of layers' results on calibration tokens, layer by layer.

    Every layer is measured on the inputs that the rewritten layers before it produce, so its figure
    is its own and does not contain theirs.
    """

    def __init__(self, program: Program, calibration: Sequence[Batch]) -> None:
        """Nothing is measured where the batches are not those of this function."""
        names = {node.name for node in program.placeholders}
        fits = bool(calibration) and all(names <= batch.keys() for batch in calibration)
        self._stream = Stream(program, calibration) if fits else None

    def of(
        self, site: fx.Node, x: fx.Node, weight: Tensor, rounded: QuantizedWeight | None,
        act_bits: int, block: int, widen: bool, signs: Tensor | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Expected and, with calibration, measured error of one layer.

        Args:
            site: The layer's node, in the graph as it is; call in graph order.
            x: Its input.
            weight: [N, K].
            rounded: What is put in its place; None leaves it.
            act_bits: Of activations; 16 leaves them.
            block: Order of the transform, 1 is none.
            widen: Whether rows of activations with outliers get a wider grid.
            signs: [K], what both operands are multiplied by before they are rounded.
        """
        expected = {"theory_error": expected_error(rounded.bits if rounded else 16, act_bits)}
        if self._stream is None:
            return expected
        index, size = site.all_input_nodes.index(x), weight.shape[1]
        found = [values[index].reshape(-1, size) for values in self._stream.inputs_of(site)]
        tokens = torch.cat(found)
        tokens = tokens[:: max(1, -(-len(tokens) // _MOST_TOKENS))].float()
        flips = torch.ones(1) if signs is None else signs.float()
        narrow = tokens * flips
        if act_bits < 16:
            narrow = quest_quantize(narrow, act_bits, hadamard=block, widen=widen)
        matrix = rounded.dequantize() if rounded else weight.float() * flips
        exact = tokens @ weight.float().T
        power = float(exact.norm())
        error = {"output_error": float((narrow @ matrix.T - exact).norm()) / power} if power else {}
        return expected | error


def sum_up(change: Change) -> None:
    """Add notes: the layers whose weight or result is far off theory, worst first; bytes saved."""
    for what, excess in (("weights", _weight_excess), ("results", _result_excess)):
        found = sorted(((excess(site.metrics), _name(site)) for site in change.sites), reverse=True)
        far = [f"{name} (+{decibels:.1f} dB)" for decibels, name in found if decibels > FAR_OFF_DB]
        if far:
            more = f" and {len(far) - _NAMED} more" if len(far) > _NAMED else ""
            change.notes.append(
                f"{len(far)} {what} err {FAR_OFF_DB:.0f} dB more than Gaussian theory: "
                f"{', '.join(far[:_NAMED])}{more}"
            )
    saved = sum(
        site.metrics.get("bytes_before", 0) - site.metrics.get("bytes_after", 0)
        for site in change.sites
    )
    if saved:
        change.notes.append(f"{change.count} weights, {saved / 2**20:.1f} MiB saved")


def _weight_excess(metrics: dict[str, Any]) -> float:
    """By how many dB a weight errs more than theory says."""
    measured = float(metrics.get("sqnr_db", math.inf))
    return float(metrics.get("theory_db", 0.0)) - measured


def _result_excess(metrics: dict[str, Any]) -> float:
    """The same for a layer's result, where it was measured."""
    measured = float(metrics.get("output_error", 0.0))
    return 20 * math.log10(measured / metrics["theory_error"]) if measured else -math.inf


def _name(site: Site) -> str:
    return site.origin.module or site.node
