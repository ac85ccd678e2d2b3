"""Saving and loading: the program comes back as it was, from our files and from anybody's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import resplice
from resplice.errors import CaptureError, ResourceError, UsageError
from resplice.program import Program
from resplice.verify import verify


def test_a_program_comes_back_as_it_was(program: Program, tmp_path: Path) -> None:
    small = resplice.optimize(program, "quest{weight-bits=2}").program
    loaded = resplice.load(resplice.save(small, tmp_path / "small.pt2"))
    verify(loaded)
    x = torch.randn(6, 32)
    assert torch.equal(loaded(x), small(x))
    assert resplice.show(loaded) == resplice.show(small)
    assert loaded.history == ("canonicalize,quest{weight-bits=2}",)
    assert {type(f).__name__ for f in loaded.facts} == {type(f).__name__ for f in small.facts}
    assert loaded.dims == small.dims
    assert torch.equal(loaded.samples["x"], small.samples["x"])


def test_provenance_survives(program: Program, tmp_path: Path) -> None:
    from resplice.origin import origin

    small = resplice.optimize(program, "quest").program
    loaded = resplice.load(resplice.save(small, tmp_path / "small.pt2"))
    for name in ("silu", "silu_1"):
        places = [
            str(origin(next(n for n in p.graph.nodes if n.name == name))) for p in (small, loaded)
        ]
        assert places[0] == places[1]
        assert "conftest.py" in places[0]


def test_passes_go_on_after_loading(program: Program, mlp: nn.Module, tmp_path: Path) -> None:
    loaded = resplice.load(resplice.save(program, tmp_path / "plain.pt2"))
    small = resplice.optimize(loaded, "quest{weight-bits=8}")
    assert sum(len(c["sites"]) for s in small.report.steps for c in s["changes"]) == 6
    with pytest.raises(resplice.CompositionError):
        resplice.optimize(resplice.load(small.save(tmp_path / "small.pt2")), "quest")


def test_state_is_saved_and_goes_on(tmp_path: Path) -> None:
    program = resplice.capture(nn.BatchNorm1d(4).train(), (torch.randn(3, 4),))
    loaded = resplice.load(resplice.save(program, tmp_path / "bn.pt2"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), program(x))
    torch.testing.assert_close(loaded.weight("running_mean"), program.weight("running_mean"))


def test_files_of_torch_export_are_read(mlp: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        exported = torch.export.export(mlp, (torch.randn(4, 32),))
    torch.export.save(exported, tmp_path / "plain.pt2")
    loaded = resplice.load(tmp_path / "plain.pt2")
    x = torch.randn(4, 32)
    torch.testing.assert_close(loaded(x)[0], mlp(x))
    small = resplice.optimize(loaded, "quest")
    assert small.report.after["weight_bytes"] < small.report.before["weight_bytes"]


def test_output_classes_come_back_where_they_are_imported(tmp_path: Path) -> None:
    from zoo import ZOO

    model, args, kwargs, shapes = ZOO["llama"]()
    program = resplice.capture(model, resplice.Sample(args, kwargs), dynamic_shapes=shapes)
    loaded = resplice.load(resplice.save(program, tmp_path / "llama.pt2"))
    output = loaded(*args, **kwargs)
    assert type(output).__name__ == "CausalLMOutputWithPast"
    assert torch.equal(output.logits, program(*args, **kwargs).logits)


def test_bad_paths_are_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.pt2"):
        resplice.save(program, tmp_path / "model.bin")
    with pytest.raises(CaptureError, match="there is no file"):
        resplice.load(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(CaptureError, match=r"is not a \.pt2 archive"):
        resplice.load(tmp_path / "text.pt2")


def test_a_full_disk_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.export.pt2_archive._package.package_pt2", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        resplice.save(program, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resplice.saving.SCHEMA", 99)
    path = resplice.save(program, tmp_path / "new.pt2")
    monkeypatch.undo()
    with pytest.raises(CaptureError, match="written by a newer resplice"):
        resplice.load(path)
