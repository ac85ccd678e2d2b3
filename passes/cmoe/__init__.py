"""CMoE: carving dense feed-forward layers into experts, as a function and as a pass."""

from resplice.passes.cmoe.carving import Carving, carve
from resplice.passes.cmoe.rewrite import Cmoe

__all__ = ["Carving", "Cmoe", "carve"]
