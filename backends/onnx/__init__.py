"""ONNX backend: Program -> .onnx, run and checked with onnxruntime."""

from resplice.backends.onnx.backend import OnnxBackend
from resplice.backends.onnx.options import OnnxOptions

__all__ = ["OnnxBackend", "OnnxOptions"]
