"""Options of the ONNX export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resplice.errors import UsageError

MOE_STRATEGIES = ("auto", "unrolled", "moe")


@dataclass(frozen=True)
class OnnxOptions:
    """How to export.

    Attributes:
        portable: Standard operators only, for runtimes without ONNX Runtime's own.
        accuracy_level: Of `MatMulNBits`: 4 computes with int8 activations (fast), 0 in float.
        external_above: Weights go to a file beside the model above this many bytes (protobuf's
            own limit is 2 GiB).
        opset: ONNX opset, None for the exporter's default.
        moe_strategy: Experts "unrolled" into standard operators or as one "moe" operator of
            onnxruntime; "auto" is unrolled, the faster one at every number of tokens measured.
        threads: onnxruntime's threads when the artefact is run here; 0 leaves it to onnxruntime.
    """

    portable: bool = False
    accuracy_level: int = 4
    external_above: int = 64 * 2**20
    opset: int | None = None
    moe_strategy: Literal["auto", "unrolled", "moe"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        """Validate what needs no program.

        Raises:
            UsageError: A value is not one of those listed.
        """
        if self.moe_strategy not in MOE_STRATEGIES:
            raise UsageError(
                f"onnx: moe_strategy is {self.moe_strategy!r}",
                hint=f"choose {', '.join(MOE_STRATEGIES)}",
            )
