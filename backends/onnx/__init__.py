"""ONNX backend: Program -> .onnx, run and checked with onnxruntime."""

from resplice.backends.onnx.backend import OnnxBackend, OnnxOptions

__all__ = ["OnnxBackend", "OnnxOptions"]
