"""The dialect: one op, one file. Importing this package registers every op with torch."""

from resplice.kernels.hadamard import hadamard
from resplice.kernels.quant_linear import quant_linear

__all__ = ["hadamard", "quant_linear"]
