"""A rule that is slightly wrong is caught by the check before a package appears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import resplice
from resplice.backends.coreml import CoremlBackend, CoremlOptions
from resplice.backends.coreml.builder import CoremlBuilder
from resplice.errors import NumericsError

functional = nn.functional


class Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._function(*tensors)


def attend(**options: object) -> Callable[..., Tensor]:
    return lambda q, k: functional.scaled_dot_product_attention(q, k, k, **options)


QUERY, KEYS = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
SUBJECTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "scale_the_query": (attend(scale=0.7), (QUERY, QUERY)),
    "causal_by_position": (attend(is_causal=True), (QUERY, QUERY)),
    "repeat_shared_heads": (attend(enable_gqa=True), (QUERY, KEYS)),
    "groups_at_rank_three": (lambda x: functional.group_norm(x, 2), (torch.randn(1, 4, 2, 3, 3),)),
    "root_mean_square": (lambda x: functional.rms_norm(x, (8,)), (torch.randn(3, 8),)),
    "power_of_scalar": (lambda x: torch.pow(3.0, x), (torch.randn(5),)),
    "spread_by_moments": (lambda x: x.var(-1), (torch.randn(3, 7),)),
    "add_at_index": (
        lambda x, y: x.index_add(0, torch.tensor([2, 0]), y),
        (torch.randn(4, 3), torch.randn(2, 3)),
    ),
    "resize_by_matrices": (
        lambda x: functional.interpolate(x, size=(7, 5), mode="bicubic"),
        (torch.randn(1, 2, 4, 3),),
    ),
    "gelu_by_name": (lambda x: functional.gelu(x, approximate="tanh"), (torch.randn(9),)),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_rule_that_is_off_by_a_thousandth_is_caught(name: str, tmp_path: Path) -> None:
    function, inputs = SUBJECTS[name]
    program = resplice.capture(Function(function).eval(), inputs)
    backend = CoremlBackend()
    CoremlBackend().lower(program, tmp_path / "right.mlpackage", CoremlOptions(precision="fp32"))
    (rule,) = [rule for rule in backend.rules if rule.__name__ == name]

    def off(build: CoremlBuilder, node: fx.Node) -> fx.Node | None:
        new = rule(build, node)
        return None if new is None else build(torch.ops.aten.mul.Tensor, new, 1.001)

    off.__name__ = name
    backend.rules = tuple(off if each is rule else each for each in backend.rules)
    with pytest.raises(NumericsError, match="differs from the program") as caught:
        backend.lower(program, tmp_path / "wrong.mlpackage", CoremlOptions(precision="fp32"))
    assert caught.value.exit_code == 6
    assert [item.name for item in tmp_path.iterdir()] == ["right.mlpackage"]
