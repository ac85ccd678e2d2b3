"""Compiled CPU kernels of the dialect, built on first use; everything works without them."""

from resplice.kernels.cpu.library import kernels, kernels_status, use_kernels

__all__ = ["kernels", "kernels_status", "use_kernels"]
