"""Sliding tile attention: the pass, its sites, window tables and fine-tuning losses."""

from resplice.passes.sta.rewrite import Sta
from resplice.passes.sta.sites import AttentionSite, find_sites
from resplice.passes.sta.windows import WindowTable, load_windows, save_windows

__all__ = ["AttentionSite", "Sta", "WindowTable", "find_sites", "load_windows", "save_windows"]
