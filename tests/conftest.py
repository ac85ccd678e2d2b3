"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from torch import nn

import resplice
from resplice.program import Program

torch.set_num_threads(1)
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Mlp(nn.Module):
    """Two gated layers on a residual stream, and a head: enough structure for every pass."""

    def __init__(self, width: int = 32, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        names = ("gate", "up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.Linear(*((hidden, width) if name == "down" else (width, hidden)))
                    for name in names
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        for layer in self.layers:
            nn.init.normal_(layer["gate"].weight, std=0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            gated = nn.functional.silu(layer["gate"](x)) * layer["up"](x)
            x = x + scale * layer["down"](gated)
        return self.head(self.norm(x))


@pytest.fixture
def mlp() -> Mlp:
    """A seeded two-layer gated MLP in eval mode."""
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture
def program(mlp: Mlp) -> Program:
    """The MLP, captured with a dynamic, even number of rows."""
    return resplice.capture(mlp, (torch.randn(4, 32),), dynamic_shapes={"x": {0: "2*pairs=1:32"}})


@pytest.fixture
def tiny_llama() -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    """A factory of seeded tiny Llamas with sharpened attention, and their inputs."""
    from zoo import ZOO

    def make() -> tuple[nn.Module, dict[str, Any]]:
        model, _, kwargs, _ = ZOO["llama"]()
        return model, kwargs

    return make


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module `subject` with factories for the command line."""
    (tmp_path / "subject.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def mlp():\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),\n"
        "                          nn.Linear(32, 5)).eval()\n"
        "    return model, (torch.randn(4, 32),), {}, {'input': {0: 'rows=1:64'}}\n"
        "def branchy():\n"
        "    class Branchy(nn.Module):\n"
        "        def forward(self, x):\n"
        "            return x if x.sum() > 0 else -x\n"
        "    return Branchy(), (torch.randn(3),), {}\n"
        "def trained():\n"
        "    return nn.BatchNorm1d(4).train(), (torch.randn(3, 4),), {}\n"
        "def wrong():\n"
        "    return 42\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "subject", raising=False)
    return "subject"


class Golden:
    """Compares text with `golden/<pass>/<case>.txt`; remembers which files were used."""

    used: ClassVar[set[Path]] = set()
    folder = Path(__file__).parent / "golden"

    def __init__(self, update: bool) -> None:
        self._update = update

    def check(self, case: str, text: str) -> None:
        path = self.folder / f"{case}.txt"
        Golden.used.add(path)
        if self._update and not os.environ.get("CI"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
            pytest.fail(f"wrote {path.name}: read the diff, then run again without --update-golden")
        if not path.exists():
            pytest.fail(f"there is no {path}; run with --update-golden and read what it writes")
        assert text + "\n" == path.read_text(encoding="utf-8")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Golden texts in our own printed form."""
    return Golden(request.config.getoption("--update-golden"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes golden files and fails once."""
    parser.addoption("--update-golden", action="store_true", default=False)
