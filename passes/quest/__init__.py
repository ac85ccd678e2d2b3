"""QuEST: linear layers in few bits; the pass and its weight quantiser."""

from resplice.passes.quest.freeze import freeze
from resplice.passes.quest.rewrite import Quest
from resplice.passes.quest.training import Training, quantized_weights, train
from resplice.passes.quest.weights import QuantizedWeight, hadamard_block, quantize_weight

__all__ = [
    "QuantizedWeight",
    "Quest",
    "Training",
    "freeze",
    "hadamard_block",
    "quantize_weight",
    "quantized_weights",
    "train",
]
