"""Rules that make ATen mean to coremltools what it means to PyTorch, in order of precedence."""

from resplice.backends.coreml.legalize.arithmetic import RULES as ARITHMETIC
from resplice.backends.coreml.legalize.attention import RULES as ATTENTION
from resplice.backends.coreml.legalize.creation import RULES as CREATION
from resplice.backends.coreml.legalize.indexing import RULES as INDEXING
from resplice.backends.coreml.legalize.logic import RULES as LOGIC
from resplice.backends.coreml.legalize.normalization import RULES as NORMALIZATION
from resplice.backends.coreml.legalize.rank import RULES as RANK
from resplice.backends.coreml.legalize.resizing import RULES as RESIZING
from resplice.backends.coreml.legalize.scales import RULES as SCALES
from resplice.backends.coreml.legalize.shapes import RULES as SHAPES

RULES = (
    *RANK, *SHAPES, *ATTENTION, *NORMALIZATION, *ARITHMETIC, *LOGIC, *CREATION, *INDEXING,
    *RESIZING, *SCALES,
)  # fmt: skip

__all__ = ["RULES"]
