"""Sampling from rectified-flow models: schedule, guidance, and the leap that ends it early."""

from resplice.sampling.leap import PRESETS, Dynamic, Fixed, frame_cosine, leap_of, whole_cosine
from resplice.sampling.loop import Sampled, sample
from resplice.sampling.models import Phased, Switched, of_artifact
from resplice.sampling.schedule import rounded, shift_ratio, timesteps

__all__ = [
    "PRESETS", "Dynamic", "Fixed", "Phased", "Sampled", "Switched", "frame_cosine", "leap_of",
    "of_artifact", "rounded", "sample", "shift_ratio", "timesteps", "whole_cosine",
]  # fmt: skip
