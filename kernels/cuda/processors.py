"""How many processors architectures have: what a grid must fill."""

from __future__ import annotations

PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors (compute units) of the usual part, by architecture; from data sheets."""
