"""The Core ML rules: what coremltools gets wrong comes out right, and a missing rule is caught."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from coreml_subjects import FAMILIES, INFINITY, Construct, Family, inputs_of
from torch import Tensor, nn

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import CoremlArtifact
from resplice.backends.coreml.legalize import RULES
from resplice.errors import LoweringError, NumericsError, RespliceError
from resplice.program import Program

FP16_BAR = 5e-3


def captured(constructs: Mapping[str, Construct]) -> tuple[Family, Program]:
    family = Family(constructs)
    return family, resplice.capture(family, (inputs_of(family, 0),))


def lowered(
    program: Program, path: Path, precision: Literal["fp16", "fp32"] = "fp32", without: str = ""
) -> CoremlArtifact:
    """Convert, execute and compare, maybe with one rule missing."""
    backend = CoremlBackend()
    if without:
        backend.rules = tuple(rule for rule in RULES if rule.__name__ != without)
        assert len(backend.rules) == len(RULES) - 1
    return backend.lower(program, path / "m.mlpackage", CoremlOptions(precision=precision))


def results(artifact: CoremlArtifact, program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    named = zip((port.name for port in program.inputs), inputs.values(), strict=True)
    return list(artifact.run(dict(named)).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_constructs_come_out_as_in_torch(name: str, tmp_path: Path) -> None:
    family, program = captured(FAMILIES[name])
    artifact = lowered(program, tmp_path)
    for seed in (1, 2):
        inputs = inputs_of(family, seed)
        found = results(artifact, program, inputs)
        for (label, expected), value in zip(family(inputs).items(), found, strict=True):
            torch.testing.assert_close(
                value, expected, rtol=2e-4, atol=2e-5, equal_nan=True,
                msg=lambda text, label=label: f"{label}: {text}",
            )  # fmt: skip


WRONG = {
    "gelu_by_name": ("arithmetic", "gelu_tanh"),
    "scale_by_alpha": ("arithmetic", "add_alpha"),
    "divide_exactly": ("arithmetic", "one_over"),
    "root_without_epsilon": ("arithmetic", "rsqrt"),
    "triangles_by_position": ("logic", "triu"),
    "compare_to_bool": ("logic", "to_bool"),
    "indices_from_the_front": ("indexing", "negative"),
    "additive_masks": ("attention", "mask"),
    "scale_the_query": ("attention", "scale"),
    "causal_by_position": ("attention", "causal"),
    "at_rank_four": ("attention", "shared_keys"),
    "repeat_shared_heads": ("attention", "grouped"),
    "products_of_parts": ("layers", "addmm"),
    "root_mean_square": ("layers", "rms_norm"),
    "groups_at_rank_three": ("layers", "group_norm_five"),
    "layers_with_computed_weights": ("layers", "layer_norm_computed"),
    "spread_by_moments": ("layers", "var_correction"),
    "moments_apart": ("layers", "var_mean"),
    "angles_by_norms": ("layers", "cosine_similarity"),
    "vectors_as_matrices": ("layers", "mv"),
    "divide_in_floats": ("rounding", "div_integers"),
    "promote_integers": ("rounding", "sqrt_integers"),
    "sum_as_asked": ("rounding", "mean_dtype"),
    "power_of_scalar": ("arithmetic", "pow_square"),
    "finite_tests": ("logic", "isfinite"),
    "round_towards_zero": ("rounding", "trunc_divide_integers"),
    "remainder_by_floor": ("rounding", "remainder_integers"),
    "clamp_integers": ("rounding", "clamp_integers"),
    "other_logarithms": ("arithmetic", "log2"),
    "same_dtypes": ("rounding", "mixed_add"),
    "masks_by_logic": ("logic", "and"),
    "select_values": ("logic", "where_small"),
    "any_by_maximum": ("logic", "any_floats"),
    "compare_booleans": ("logic", "bool_equal"),
    "fill_with_value": ("creation", "new_zeros"),
    "count_by_constant": ("creation", "linspace"),
    "outer_by_broadcast": ("creation", "outer"),
    "one_cast": ("creation", "alias"),
    "one_hot_by_comparison": ("creation", "one_hot"),
    "masks_read_as_integers": ("logic", "gather_mask"),
    "fill_at_index": ("indexing", "index_fill"),
    "add_at_index": ("indexing", "index_add"),
    "scatter_with_reduction": ("indexing", "sum_apart"),
    "gather_rows": ("creation", "embedding"),
    "permute_by_equation": ("deep", "einsum"),
    "one_reshape": ("shapes", "unflatten"),
    "drop_idle_squeeze": ("shapes", "squeeze"),
    "pad_in_floats": ("resizing", "pad_integers"),
    "parts_by_slices": ("shapes", "split"),
    "chunks_by_split": ("shapes", "chunk"),
    "expand_to_sizes": ("deep", "expand"),
    "repeat_each": ("shapes", "repeat_interleave"),
    "expand_booleans": ("logic", "expand_mask"),
    "one_dtype_in_lists": ("shapes", "cat_mixed"),
    "scatter_by_cat": ("indexing", "slice_scatter"),
    "strided_writes": ("indexing", "strided"),
    "resize_by_matrices": ("resizing", "bicubic"),
    "new_axes_by_reshape": ("deep", "expand"),
    "permute_by_swaps": ("deep", "permute"),
    "elementwise_on_merged_axes": ("deep", "elementwise"),
    "expand_on_merged_axes": ("deep", "expand"),
    "one_axis_of_three": ("deep", "softmax"),
    "joined_at_rank_three": ("deep", "cat"),
    "matrices_in_one_batch": ("deep", "matmul"),
    "linear_on_rows": ("deep", "linear"),
}
