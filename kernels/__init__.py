"""The dialect: one op, one file. Importing this package registers every op with torch."""

from resplice.kernels.code_linear import code_linear
from resplice.kernels.cuda.register import register as _register_kernels
from resplice.kernels.hadamard import hadamard
from resplice.kernels.merge_frames import merge_frames, unmerge_frames
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.quant_linear import quant_linear
from resplice.kernels.quant_weight import quant_weight
from resplice.kernels.quest_codes import quest_codes
from resplice.kernels.quest_quantize import quest_quantize
from resplice.kernels.rope3d import rope3d
from resplice.kernels.round_to_levels import quest_round, round_to_levels
from resplice.kernels.tile_attention import tile_attention

__all__ = [
    "code_linear", "hadamard", "merge_frames", "moe_ffn", "quant_linear", "quant_weight",
    "quest_codes", "quest_quantize", "quest_round", "rope3d", "round_to_levels", "tile_attention",
    "unmerge_frames",
]  # fmt: skip

_register_kernels()
