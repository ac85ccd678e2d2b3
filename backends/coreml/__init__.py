"""Core ML backend: Program -> .mlpackage, run and checked here by our own MIL interpreter."""

from resplice.backends.coreml.artifact import CoremlArtifact
from resplice.backends.coreml.backend import CoremlBackend
from resplice.backends.coreml.options import CoremlOptions

__all__ = ["CoremlArtifact", "CoremlBackend", "CoremlOptions"]
