"""Temporal dimension token merging: the pass and its sites."""

from resplice.passes.tdtm.rewrite import Tdtm
from resplice.passes.tdtm.sites import AttentionSite, find_sites

__all__ = ["AttentionSite", "Tdtm", "find_sites"]
