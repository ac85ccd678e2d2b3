"""resplice: capture a PyTorch model, splice techniques into its graph, lower it, check it.

from resplice import optimize
smaller = optimize(model, "quest{weight-bits=4}", example_inputs=(tokens,))
smaller.to_onnx("model.onnx")
"""

if __name__ != "resplice":
    raise ImportError("import this package as `resplice`; the folder name is not its import name")

from resplice.api import Optimized, optimize
from resplice.capture import Sample, capture
from resplice.dims import Dim
from resplice.errors import (
    BackendMissing,
    CaptureError,
    CompositionError,
    InputError,
    LoweringError,
    NumericsError,
    OpError,
    PassError,
    ResourceError,
    RespliceError,
    RespliceWarning,
    SpecError,
    UsageError,
    VerifyError,
)
from resplice.pass_base import Approx, Exact, Pass, Redefines
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.report import Report
from resplice.saving import load, save
from resplice.show import show
from resplice.spec import parse

__version__ = "0.1.0"
__all__ = [
    "Approx",
    "BackendMissing",
    "CaptureError",
    "CompositionError",
    "Dim",
    "Exact",
    "InputError",
    "LoweringError",
    "NumericsError",
    "OpError",
    "Optimized",
    "Pass",
    "PassError",
    "Pipeline",
    "Program",
    "Redefines",
    "Report",
    "ResourceError",
    "RespliceError",
    "RespliceWarning",
    "Sample",
    "SpecError",
    "UsageError",
    "VerifyError",
    "capture",
    "load",
    "optimize",
    "parse",
    "save",
    "show",
]
