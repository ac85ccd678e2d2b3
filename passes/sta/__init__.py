"""Sliding tile attention: the pass, its sites, window tables and search, fine-tuning losses."""

from resplice.passes.sta.candidates import candidate_windows
from resplice.passes.sta.page import save_search
from resplice.passes.sta.prompts import Flow, Recorded, Sampled, prompts_from
from resplice.passes.sta.result import SearchResult
from resplice.passes.sta.rewrite import Sta
from resplice.passes.sta.search import WindowSearch, search_windows
from resplice.passes.sta.sites import AttentionSite, find_sites
from resplice.passes.sta.windows import WindowTable, load_windows, save_windows

__all__ = [
    "AttentionSite",
    "Flow",
    "Recorded",
    "Sampled",
    "SearchResult",
    "Sta",
    "WindowSearch",
    "WindowTable",
    "candidate_windows",
    "find_sites",
    "load_windows",
    "prompts_from",
    "save_search",
    "save_windows",
    "search_windows",
]
