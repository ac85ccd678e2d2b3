"""VideoRoPE: positions, axis maps, score curves, rotary sites and the pass."""

from resplice.passes.videorope.canonical import RotarySite, find_sites
from resplice.passes.videorope.curve import Oscillation, oscillation, score_curve
from resplice.passes.videorope.maps import (
    default_section,
    interleaved_map,
    lta_by_rank,
    lta_map,
    sectioned_map,
)
from resplice.passes.videorope.positions import (
    Semantics,
    build_position_ids,
    decode_positions,
)
from resplice.passes.videorope.rewrite import VideoRope

__all__ = [
    "Oscillation",
    "RotarySite",
    "Semantics",
    "VideoRope",
    "build_position_ids",
    "decode_positions",
    "default_section",
    "find_sites",
    "interleaved_map",
    "lta_by_rank",
    "lta_map",
    "oscillation",
    "score_curve",
    "sectioned_map",
]
