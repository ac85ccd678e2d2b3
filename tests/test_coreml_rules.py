"""The Core ML rules: what coremltools gets wrong comes out right, and a missing rule is caught."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from coreml_subjects import FAMILIES, Construct, Family, inputs_of
from torch import Tensor, nn

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.artifact import CoremlArtifact
from resplice.backends.coreml.legalize import RULES
from resplice.errors import LoweringError, NumericsError
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


def results(
    artifact: CoremlArtifact, program: Program, inputs: Mapping[str, Tensor]
) -> list[Tensor]:
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
    "root_mean_square": ("layers", "rms_norm"),
}
"""Rules without which coremltools translates a construct into something else, silently."""
UNSAID = {
    "groups_at_rank_three": ("layers", "group_norm_five"),
    "layers_with_computed_weights": ("layers", "layer_norm_computed"),
    "moments_apart": ("layers", "var_mean"),
    "angles_by_norms": ("layers", "cosine_similarity"),
    "vectors_as_matrices": ("layers", "mv"),
    "promote_integers": ("rounding", "sqrt_integers"),
    "products_of_parts": ("layers", "addbmm"),
    "masks_read_as_integers": ("logic", "gather_mask"),
    "add_at_index": ("indexing", "index_add"),
    "scatter_with_reduction": ("indexing", "sum_apart"),
    "remainder_by_floor": ("rounding", "fmod_integers"),
    "sums_from_the_front": ("sorting", "cumsum"),
    "products_by_axis": ("sorting", "prod"),
}
"""Rules without which it, or the check before it, refuses."""


@pytest.mark.parametrize("rule", WRONG)
def test_a_missing_rule_is_caught_by_running(rule: str, tmp_path: Path) -> None:
    name, label = WRONG[rule]
    _, program = captured({label: FAMILIES[name][label]})
    with pytest.raises(NumericsError, match="differs from the program|shapes differ") as refused:
        lowered(program, tmp_path, without=rule)
    assert refused.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", UNSAID)
def test_a_missing_rule_is_refused(rule: str, tmp_path: Path) -> None:
    name, label = UNSAID[rule]
    _, program = captured({label: FAMILIES[name][label]})
    with pytest.raises(LoweringError):
        lowered(program, tmp_path, without=rule)
    assert list(tmp_path.iterdir()) == []


def test_all_that_has_no_form_is_listed_at_once(tmp_path: Path) -> None:
    class Impossible(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            middle = torch.hypot(x, x + 1)
            return middle + x.kthvalue(2, -1, keepdim=True)[0]

    program = resplice.capture(Impossible(), (torch.rand(3, 4),))
    with pytest.raises(LoweringError) as refused:
        lowered(program, tmp_path)
    assert len(refused.value.problems) == 2
    for problem, operator in zip(refused.value.problems, ("hypot", "kthvalue"), strict=True):
        assert operator in problem
        assert "test_coreml_rules.py:" in problem
    assert list(tmp_path.iterdir()) == []


class LargeActivations(nn.Module):
    """The mean of squares passes 65504."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x * 600, (16,), eps=1e-6)


class LongPositions(nn.Module):
    """Positions that float16 can't count."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None] * 1e4 ** (-torch.arange(8) / 8)
        turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + turned * sin


class LowestMask(nn.Module):
    """The lowest float32, which is -inf in float16, at some keys of every row."""

    def forward(self, x: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        mask = torch.full((6, 6), lowest).triu(1)
        return nn.functional.scaled_dot_product_attention(x, x, x, mask[None, None])


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (LargeActivations(), {"x": torch.linspace(-3, 3, 64).reshape(4, 16)}),
        (
            LongPositions(),
            {"x": torch.linspace(-1, 1, 96).reshape(6, 16), "positions": torch.arange(4000, 4006)},
        ),
        (LowestMask(), {"x": torch.linspace(-1, 1, 96).sin().reshape(1, 2, 6, 8)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_float16_would_break_stays_right(
    model: nn.Module, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    program = resplice.capture(model, tuple(inputs.values()))
    artifact = lowered(program, tmp_path, "fp16")
    found, expected = results(artifact, program, inputs)[0], model(*inputs.values())
    assert (found - expected).abs().max() <= FP16_BAR * expected.abs().max()
