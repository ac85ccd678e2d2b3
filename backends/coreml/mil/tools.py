"""coremltools, imported without its banner of missing macOS libraries."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from resplice.errors import BackendMissing
from resplice.quiet import quiet


@contextmanager
def silent() -> Iterator[None]:
    """Hide warnings, logs and progress bars inside the block."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with quiet(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


with silent():
    try:
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load as load_program
        from coremltools.converters.mil.mil import types as mil_types
    except ModuleNotFoundError as error:
        raise BackendMissing("coremltools", "coreml") from error

__all__ = ["coremltools", "load_program", "mil_types", "silent"]
