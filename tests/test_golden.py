"""Golden texts: what each pass makes of a small program, in our own printed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Golden
from torch import nn

import resplice
from resplice.pipeline import Pipeline


class Attention(nn.Module):
    """One head of rotary self-attention with spellings that canonicalize removes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.register_buffer("table", torch.arange(4.0) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        angle = torch.cat((self.table.cos(), self.table.cos()), -1).repeat(2)
        q = q * angle.to(x.dtype).contiguous() * 1.0
        mixed = nn.functional.scaled_dot_product_attention(q, k[:, :], v)
        return x + self.out(mixed.view(x.shape[0], -1, 16))


class Conv1dStyle(nn.Module):
    """GPT-2's linear layer: addmm with a transposed weight, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.zeros(64))
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.addmm(self.bias, x.view(-1, 32), self.weight).view(*x.shape[:-1], 64)
        return self.head(hidden.relu())


class Video(nn.Module):
    """Patches of a video attend to each other, then to a summary of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2)), nn.Linear(16, 16)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        summary = heads.mean(2, keepdim=True)
        seen = nn.functional.scaled_dot_product_attention(mixed, summary, summary)
        return self.out((mixed + seen).transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "attention": (Attention, (2, 5, 16), {"x": {0: "batch", 1: "tokens"}}),
    "conv1d": (Conv1dStyle, (3, 5, 32), {"x": {0: "batch"}}),
    "video": (Video, (2, 3, 4, 8, 12), {"video": {0: "batch"}}),
}
CASES = [
    ("canonicalize", "attention", 0),
    ("fold", "attention", 0),
    ("cse", "attention", 0),
    ("dce", "conv1d", 0),
    ("quest{weight-bits=2 group=8}", "attention", 2),
    ("quest{weight-bits=1 hadamard=off}", "conv1d", 1),
    ("quest{head=true skip=weight}", "conv1d", 1),
    ("sta{tile=2,2,2 window=1,1,3}", "video", 1),
]


@pytest.mark.parametrize(("spec", "model", "rewrites"), CASES)
def test_a_pass_prints_as_before(spec: str, model: str, rewrites: int, golden: Golden) -> None:
    torch.manual_seed(0)
    build, shape, dims = MODELS[model]
    program = resplice.capture(build().eval(), (torch.randn(shape),), dynamic_shapes=dims)
    result, steps = Pipeline.of(spec).run(program, check=True)
    change = steps[-1].changes[0]
    assert change.count == rewrites
    refusals = "\n".join(str(refusal) for refusal in change.refusals) or "none"
    parts = [
        f"# {spec}",
        resplice.show(program),
        "# after",
        resplice.show(result),
        "# refused",
        refusals,
    ]
    case = spec.replace("{", "-").replace("}", "").replace("=", "").replace(" ", "-")
    golden.check(f"{spec.partition('{')[0]}/{case}-{model}", "\n".join(parts))


def test_no_golden_file_is_stale() -> None:
    names = {
        f"{s.replace('{', '-').replace('}', '').replace('=', '').replace(' ', '-')}-{m}"
        for s, m, _ in CASES
    }
    assert {path.stem for path in Golden.folder.rglob("*.txt")} == names
