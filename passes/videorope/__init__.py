"""VideoRoPE: positions, axis maps, score curves, rotary sites and the pass."""

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

__all__ = [
    "Oscillation",
    "Semantics",
    "build_position_ids",
    "decode_positions",
    "default_section",
    "interleaved_map",
    "lta_by_rank",
    "lta_map",
    "oscillation",
    "score_curve",
    "sectioned_map",
]
