"""Decoding with a cache as state: two functions, one set of weights, one state."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import decoding
import golden_files
import numpy as np
import pytest
import torch

from resplice.backends.coreml.backend import CoremlBackend
from resplice.backends.coreml.options import CoremlOptions
from resplice.backends.coreml.stateful import fill, state_name
from resplice.errors import NumericsError

LENGTH, CHUNK, WRITTEN = 32, 8, 6
MAC_SCRIPT = Path(__file__).parent.parent / "examples" / "mac" / "check_on_mac.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A tiny Llama, its program of two functions, and the checked package."""
    from zoo import ZOO

    torch.manual_seed(0)
    model = ZOO["llama"]()[0]
    program = decoding.capture(model, length=LENGTH, chunk=CHUNK)
    path = tmp_path_factory.mktemp("decoding") / "llama.mlpackage"
    artifact = CoremlBackend().lower(program, path, CoremlOptions(precision="fp32"))
    return model, program, artifact


@pytest.fixture
def prompt() -> torch.Tensor:
    """Eleven tokens: a whole chunk and a padded one."""
    return torch.arange(11)[None] * 7 % 100


@torch.no_grad()
def test_writes_what_the_model_writes_without_a_cache(made: Any, prompt: torch.Tensor) -> None:
    model, _, artifact = made
    written = decoding.greedy(decoding.steps_of(artifact), prompt, WRITTEN, chunk=CHUNK)
    assert written == decoding.greedy_without_cache(model, prompt, WRITTEN)
    assert len(set(written)) > 1


@torch.no_grad()
def test_state_goes_from_prefill_to_decode(made: Any, prompt: torch.Tensor) -> None:
    """Logits of every call equal those of the eager static cache and of the whole text."""
    model, _, artifact = made
    ids = torch.cat((prompt[:, :CHUNK], prompt[:, CHUNK : CHUNK + 2]), 1)
    eager = decoding.Decoder(model, LENGTH).eval()
    step = decoding.steps_of(artifact)
    found, expected = [], []
    for function, start, stop in (("prefill", 0, CHUNK), ("main", 8, 9), ("main", 9, 10)):
        inputs = {"input_ids": ids[:, start:stop], "position": torch.arange(start, stop)}
        found.append(step(function, inputs))
        expected.append(eager(**inputs))
    whole = model(input_ids=ids, use_cache=False).logits
    scale = whole.abs().max()
    assert (torch.cat(expected, 1) - whole).abs().max() < 1e-5 * scale
    assert (torch.cat(found, 1) - whole).abs().max() < artifact.bar * scale
    forgetful = artifact.run({"input_ids": ids[:, 9:10], "position": torch.tensor([9])})["output"]
    assert (forgetful - whole[:, 9:10]).abs().max() > 10 * artifact.bar * scale


def test_functions_share_state_and_weights(made: Any, tmp_path: Path) -> None:
    _, program, artifact = made
    assert artifact.functions == ("main", "prefill")
    states = [[s.name for s in artifact.package.states(f)] for f in artifact.functions]
    assert states[0] == states[1]
    assert len(states[0]) == 4
    alone = program.copy()
    alone.functions.clear()
    single = CoremlBackend().lower(
        alone, tmp_path / "one.mlpackage", CoremlOptions(precision="fp32"), check=False
    )
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    sizes = [(each.path / weights).stat().st_size for each in (artifact, single)]
    assert sizes[0] < 1.1 * sizes[1]


class Running(torch.nn.Module):
    """Keeps a running mean in a buffer of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Module()
        self.inner.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.mean.mul_(0.5).add_(x, alpha=0.5)
        return x - self.inner.mean


def test_the_check_compares_what_is_left_in_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resplice import capture
    from resplice.backends.coreml.mil.state import StateCell

    program = capture(Running(), (torch.randn(4),))
    artifact = CoremlBackend().lower(program, tmp_path / "running.mlpackage")
    assert [state.name for state in artifact.package.states()] == [state_name("inner.mean")]
    assert set(artifact.notes["check"]["main"]) == {"output", "inner_mean"}
    monkeypatch.setattr(StateCell, "write", lambda *_: None)
    with pytest.raises(NumericsError, match="inner_mean|output"):
        CoremlBackend().lower(program, tmp_path / "broken.mlpackage")
    assert not (tmp_path / "broken.mlpackage").exists()


def test_a_filled_state_holds_values_that_were_written(made: Any) -> None:
    _, program, artifact = made
    reference, state = program.copy(), artifact.make_state()
    fill(reference, state)
    assert not any(value.any() for value in state.tensors.values())
    reference.run_fresh({"input_ids": torch.tensor([[5]]), "position": torch.tensor([3])})
    fill(reference, state)
    assert all((value != 0).all() for value in state.tensors.values())
    assert torch.equal(reference.weight("keys_0"), state.tensors["keys_0"].float())


@pytest.fixture(scope="module")
def mac() -> ModuleType:
    """The script for a Mac, imported without coremltools."""
    spec = importlib.util.spec_from_file_location("check_on_mac", MAC_SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["check_on_mac"] = module
    spec.loader.exec_module(module)
    return module


def test_golden_files_are_read_back_and_agree_with_themselves(
    made: Any, mac: ModuleType, prompt: torch.Tensor, tmp_path: Path
) -> None:
    _, _, artifact = made
    calls = [*decoding.reads(prompt[:, :5], CHUNK), decoding.decodes(9, 5), decoding.decodes(4, 6)]
    path = golden_files.write(tmp_path / "llama.npz", artifact, calls)
    read = mac.read_golden(path)
    assert [call.function for call in read] == ["prefill", "main", "main"]
    assert read[1].inputs["input_ids"].dtype == np.int32
    assert all(mac.problems(call.outputs, call.outputs, 0.0) == [] for call in read)
    assert mac.problems(read[1].outputs, read[2].outputs, 0.02)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 0.1,
        lambda x: x[:1],
        lambda x: np.where(x > 1, np.nan, x),
        lambda x: x * np.inf,
    ],
)
def test_the_mac_script_tells_bad_results(
    mac: ModuleType, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    good = np.array([[1.0, -2.0], [0.5, 1.5]], np.float32)
    assert mac.problems({"y": good}, {"y": good * 1.001}, 0.02) == []
    with np.errstate(invalid="ignore"):
        assert len(mac.problems({"y": good}, {"y": change(good)}, 0.02)) == 1
    assert mac.problems({"y": good}, {}, 0.02) == ["output y is missing"]


def test_the_mac_script_refuses_to_run_elsewhere(
    mac: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.argv", ["check_on_mac.py", "m.mlpackage", "g.npz"])
    assert mac.main() == 2
    assert "nothing was checked" in capsys.readouterr().err
