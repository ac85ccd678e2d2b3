"""The repair catalogue: known model bugs that stop or falsify torch.export.

A repair is a context manager. Inside it, torch.export sees a mathematically equal model that it can
trace; on leaving, everything is as it was, also after an error. No repair imports transformers or
diffusers: one for a library applies only once that library has been imported.

Each repair has a numeric proof in `tests/test_repairs.py`: the unmodified model against the
repaired one on the same inputs.
"""

from resplice.repairs.base import Repair
from resplice.repairs.catalogue import CATALOGUE, applied

__all__ = ["CATALOGUE", "Repair", "applied"]
