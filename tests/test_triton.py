"""The Triton backend: folders of kernels that run, described truly, and never half there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Mlp
from torch import nn

import resplice
from resplice.artifact import Artifact
from resplice.backends.triton import TritonBackend, TritonOptions, launcher
from resplice.backends.triton import backend as backend_module
from resplice.backends.triton.artifact import TritonArtifact, run_on
from resplice.backends.triton.hosts import host_of
from resplice.backends.triton.manifest import validate
from resplice.cli.app import run as command
from resplice.compare import difference
from resplice.errors import (
    BackendMissing,
    InputError,
    LoweringError,
    NumericsError,
    UsageError,
    VerifyError,
)
from resplice.program import Program

ONE = TritonOptions(arch="sm_90")


def _mlp() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Mlp().eval(), (torch.randn(5, 32),)


@pytest.fixture(scope="module")
def small() -> resplice.Optimized:
    """Four-bit weights: quant_linear and hadamard."""
    model, inputs = _mlp()
    return resplice.optimize(model, "quest{weight-bits=4}", example_inputs=inputs)


@pytest.fixture(scope="module")
def folder(small: resplice.Optimized, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small.to_triton(tmp_path_factory.mktemp("triton") / "mlp", arch="sm_90")


def _copied(artifact: Artifact, path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(artifact.path, path / "copy"))


def test_the_folder_runs_like_the_program(small: resplice.Optimized, folder: Artifact) -> None:
    opened = TritonArtifact.open(folder.path)
    x = torch.randn(5, 32)
    found = difference(small(x), opened.run({"x": x})["output"])
    assert found.relative < opened.bar == 1e-4
    assert {name for f in folder.notes["check"].values() for name in f} == {"output"}


def test_every_launch_is_described(folder: Artifact) -> None:
    manifest = TritonArtifact.open(folder.path).manifest
    validate(manifest)
    program = TritonArtifact.open(folder.path).program
    nodes = {node.name: node for node in program.graph.nodes}
    for name, target in manifest["targets"].items():
        launches = target["functions"]["main"]
        sites = [node.name for node in program.graph.nodes if host_of(node)]
        assert list(dict.fromkeys(launch["node"] for launch in launches)) == sites
        for launch in launches:
            kernel = target["kernels"][launch["kernel"]]
            assert [a["name"] for a in launch["arguments"]] == [
                p["name"] for p in kernel["parameters"]
            ]
            assert kernel["block"][0] == kernel["num_warps"] * (64 if name == "gfx942" else 32)
            for argument in launch["arguments"]:
                if argument["role"] == "input":
                    value = nodes[argument["value"]].meta["val"]
                    assert value.numel() == torch.Size(argument["shape"]).numel()
        roles = [a["role"] for launch in launches for a in launch["arguments"]]
        assert roles.count("output") >= len(sites)


def test_weights_are_named_in_the_manifest(folder: Artifact) -> None:
    manifest = TritonArtifact.open(folder.path).manifest
    program = TritonArtifact.open(folder.path).program
    names = {
        argument["weight"]
        for launch in manifest["targets"]["sm_90"]["functions"]["main"]
        for argument in launch["arguments"]
        if "weight" in argument
    }
    assert names
    assert names <= {name for name, _ in program.named_weights()}


def test_the_report_is_computed_for_every_kernel_and_site(folder: Artifact) -> None:
    report = json.loads((folder.path / "performance.json").read_text())
    manifest = TritonArtifact.open(folder.path).manifest
    assert "not measured" in report["label"]
    for name, target in report["targets"].items():
        assert target["kernels"].keys() == manifest["targets"][name]["kernels"].keys()
        for kernel in target["kernels"].values():
            assert kernel["spilled"] == 0
            assert 0 < kernel["occupancy"]["share"] <= 1
            assert kernel["instructions"]["all"] > 20
        for site in target["sites"]:
            assert site["seconds_at_best"] > 0
            assert site["intensity"] == pytest.approx(site["flops"] / site["bytes"])
    text = (folder.path / "performance.md").read_text()
    assert "computed from the compiled code and published limits, not measured" in text
    assert all(name in text for name in report["targets"])


@pytest.mark.slow
def test_all_default_targets_are_compiled_without_spills(
    small: resplice.Optimized, tmp_path: Path
) -> None:
    artifact = small.to_triton(tmp_path / "all", check=False)
    report = json.loads((artifact.path / "performance.json").read_text())
    assert list(report["targets"]) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for target in report["targets"].values():
        assert target["kernels"]
        for kernel in target["kernels"].values():
            assert kernel["spilled"] == 0
            assert kernel["matrix_instructions"]


def test_the_report_of_a_run_shows_it(
    small: resplice.Optimized, folder: Artifact, tmp_path: Path
) -> None:
    page = small.report.save(tmp_path).read_text()
    assert "computed from the compiled code and published limits, not measured" in page
    assert "quant_linear" in page


def test_the_launcher_of_the_folder_is_ours_and_reads_it(folder: Artifact) -> None:
    assert (folder.path / "launcher.py").read_text() == Path(launcher.__file__).read_text()
    assert launcher.read_manifest(folder.path)["format"] == launcher.FORMAT


@pytest.mark.parametrize("victim", ["program.pt2", "kernels", "launcher.py"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_changed_and_missing_files_are_refused(
    victim: str, how: str, folder: Artifact, tmp_path: Path
) -> None:
    copied = _copied(folder, tmp_path)
    file = next(copied.rglob("*.cubin")) if victim == "kernels" else copied / victim
    if how == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:
        file.unlink()
    with pytest.raises(VerifyError, match=f"{file.name}: missing, or not what"):
        TritonArtifact.open(copied)


def _without(path: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        *rest, last = path.split("/")
        for key in rest:
            content = content[key]
        del content[last]

    return change


def _with(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *rest, last = path.split("/")
        for key in rest:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("targets"),
        _with("format", "resplice-triton/9"),
        _with("targets", {}),
        _with("targets/volta", {}),
        _with("bar", -1),
        _with("surprise", 1),
        _without("functions/main/sizes"),
        _with("files/program.pt2", "abc"),
    ],
)
def test_the_schema_refuses_what_is_no_manifest(
    change: Any, folder: Artifact, tmp_path: Path
) -> None:
    content = copy.deepcopy(TritonArtifact.open(folder.path).manifest)
    change(content)
    with pytest.raises(VerifyError):
        validate(content)
    copied = _copied(folder, tmp_path)
    (copied / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(VerifyError):
        TritonArtifact.open(copied)


def test_a_path_out_of_the_folder_is_refused(folder: Artifact, tmp_path: Path) -> None:
    copied = _copied(folder, tmp_path)
    content = json.loads((copied / "manifest.json").read_text())
    (tmp_path / "outside").write_bytes(b"x")
    content["files"]["../outside"] = content["files"]["launcher.py"]
    (copied / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(VerifyError, match="outside"):
        TritonArtifact.open(copied)


def test_other_folders_are_never_replaced(program: Program, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no artefact of ours"):
        TritonBackend().lower(program, tmp_path, ONE)
    with pytest.raises(UsageError, match="no artefact of ours"):
        TritonBackend().lower(program, tmp_path / "thesis.txt", ONE)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_nothing_appears_when_the_check_fails(
    small: resplice.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "exact_bar", lambda _: 0.0)
    monkeypatch.setattr(
        TritonArtifact, "run", lambda self, given, function: {"output": torch.ones(5, 10)}
    )
    with pytest.raises(NumericsError, match="output output differs"):
        TritonBackend().lower(small.program, tmp_path / "x", ONE)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be_compiled_are_named_before_any_work(
    small: resplice.Optimized, tmp_path: Path
) -> None:
    with pytest.raises(LoweringError) as refused:
        small.to_triton(tmp_path / "x", arch=["sm_90", "sm_12", "alpha"])
    assert len(refused.value.problems) == 2
    assert "target sm_12" in str(refused.value)
    assert "target alpha: no such architecture" in str(refused.value)
    with pytest.raises(UsageError, match="names no target"):
        TritonOptions(arch=" , ")
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_kernels_is_an_artefact_too(program: Program, tmp_path: Path) -> None:
    artifact = TritonBackend().lower(program, tmp_path / "plain", ONE)
    assert artifact.manifest["targets"]["sm_90"]["functions"] == {"main": []}
    x = torch.randn(6, 32)
    torch.testing.assert_close(
        artifact.run({"x": x})["output"], program.run_fresh({"x": x})["output"]
    )


def test_ops_without_a_kernel_become_plain_operators(
    mlp: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resplice.backends.triton import hosts

    monkeypatch.setattr(hosts, "host_functions", dict)
    x = torch.randn(6, 32)
    small = resplice.optimize(mlp, "quest{weight-bits=2 hadamard=off}", example_inputs=(x,))
    artifact = small.to_triton(tmp_path / "plain", arch="sm_90")
    assert artifact.notes["main"]["ops"] == {"quant_linear: reference": 6}
    namespaces = {
        node.target.namespace
        for node in artifact.program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    assert namespaces == {"aten"}
    assert difference(small(x), artifact.run({"x": x})["output"]).relative < 1e-4


def test_dynamic_rows_give_a_grid_in_terms_of_sizes(mlp: nn.Module, tmp_path: Path) -> None:
    small = resplice.optimize(
        mlp, "quest{weight-bits=2 hadamard=off}", example_inputs=(torch.randn(96, 32),),
        dynamic_shapes={"x": {0: "rows=65:4096"}},
    )  # fmt: skip
    artifact = small.to_triton(tmp_path / "rows", arch="sm_90")
    manifest = artifact.manifest
    assert manifest["functions"]["main"]["sizes"] == {"rows": ["x", 0]}
    texts = [
        size
        for launch in manifest["targets"]["sm_90"]["functions"]["main"]
        for size in launch["grid"]
        if isinstance(size, str)
    ]
    assert texts
    for text in texts:
        sizes = [launcher.evaluate(text, {"rows": rows}) for rows in (65, 1000, 4096)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] <= 4096
    x = torch.randn(70, 32)
    assert difference(small(x), artifact.run({"x": x})["output"]).relative < 1e-4


@pytest.mark.parametrize("how", ["a question", "a constant"])
def test_launches_that_hang_on_a_dynamic_size_are_refused(
    how: str, mlp: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resplice.backends.triton import record
    from resplice.kernels.cuda.launch import Config, using

    def hosted(node: Any) -> Any:
        real = host_of(node)
        if real is None:
            return None

        def host(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            if how == "a question":
                return real(x[:1] if x.shape[0] > 100 else x, *rest)
            sizes = {"block_m": x.shape[0], "block_n": 64, "words": 16}
            with using(quant_linear_tiles=Config(sizes, 4, 2)):
                return real(x, *rest)

        return host

    monkeypatch.setattr(record, "host_of", hosted)
    small = resplice.optimize(
        mlp, "quest{weight-bits=2 hadamard=off}", example_inputs=(torch.randn(96, 32),),
        dynamic_shapes={"x": {0: "rows=65:4096"}},
    )  # fmt: skip
    with pytest.raises(LoweringError) as refused:
        small.to_triton(tmp_path / "x", arch="sm_90")
    wanted = "rows > 100 is False" if how == "a question" else "block_m="
    assert f"rely on {wanted}" in str(refused.value)
    assert "capture the model with fixed sizes" in str(refused.value)
    assert len(refused.value.problems) == 6
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_functions_are_checked(folder: Artifact) -> None:
    opened = TritonArtifact.open(folder.path)
    with pytest.raises(InputError, match="x is missing"):
        opened.run({})
    with pytest.raises(InputError, match="expected 5"):
        opened.run({"x": torch.randn(6, 32)})
    with pytest.raises(InputError, match="no function 'other'"):
        opened.run({"x": torch.randn(5, 32)}, function="other")


def test_the_program_moves_to_a_device(folder: Artifact, small: resplice.Optimized) -> None:
    """The way to a GPU, walked to the CPU: ops then run their reference path."""
    x = torch.randn(5, 32)
    found = run_on(TritonArtifact.open(folder.path).program, {"x": x}, "cpu")
    torch.testing.assert_close(found["output"], small(x), rtol=1e-4, atol=1e-4)


def test_the_command_line_converts_checks_and_runs(
    factory_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels"
    given = [f"{factory_module}:mlp", "-p", "quest{weight-bits=4}", "--to", "triton"]
    assert command(["convert", *given, "--arch", "sm_90", "-o", str(out)]) == 0
    assert command(["check", str(out), str(out), "--inputs", _saved(tmp_path)]) == 0
    assert command(["run", str(out), "--inputs", _saved(tmp_path)]) == 0
    assert "output" in capsys.readouterr().out
    assert command(["convert", *given, "--arch", "sm_90,sm_11", "-o", str(tmp_path / "b")]) == 5
    assert "sm_11" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def _saved(path: Path) -> str:
    import numpy as np

    np.savez(path / "x.npz", input=np.ones((4, 32), np.float32))
    return str(path / "x.npz")


def test_without_triton_the_extra_is_named(
    small: resplice.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(name, *args, **kwargs)

    for name in [
        n
        for n in sys.modules
        if n.startswith(("resplice.backends.triton", "resplice.kernels.cuda"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendMissing, match=r"pip install 'resplice\[triton\]'"):
        small.to_triton(tmp_path / "x", arch="sm_90")
