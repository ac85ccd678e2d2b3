"""Triton backend: Program -> a folder of compiled kernels, run and checked here."""

from resplice.backends.triton.backend import TritonBackend
from resplice.backends.triton.options import TritonOptions

__all__ = ["TritonBackend", "TritonOptions"]
