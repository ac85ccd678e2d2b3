"""The report: what passes did, what it cost, how far the result is from the original."""

from resplice.report.build import Report

__all__ = ["Report"]
