"""Options of the ONNX export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnnxOptions:
    """How to export.

    Attributes:
        portable: Standard operators only, for runtimes without ONNX Runtime's own.
        accuracy_level: Of `MatMulNBits`: 4 computes with int8 activations (fast), 0 in float.
        external_above: Weights go to a file beside the model above this many bytes (protobuf's
            own limit is 2 GiB).
        opset: ONNX opset, None for the exporter's default.
        threads: onnxruntime's threads when the artefact is run here; 0 leaves it to onnxruntime.
    """

    portable: bool = False
    accuracy_level: int = 4
    external_above: int = 64 * 2**20
    opset: int | None = None
    threads: int = 0
