"""placeholder until rules land"""
from __future__ import annotations
def legalize(draft): return {}
