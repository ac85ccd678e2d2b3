"""CMoE: carving dense feed-forward layers into experts, as a function and as a pass."""

from resplice.passes.cmoe.carving import Carving, carve

__all__ = ["Carving", "carve"]
