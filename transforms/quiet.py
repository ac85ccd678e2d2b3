"""Silence for libraries whose logs speak to people who call them by hand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("torch", "torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch._export",
            "torch._dynamo", "onnxscript", "onnx_ir")  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and all but critical logs of torch and onnx inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
