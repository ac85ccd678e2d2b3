"""The command line: results on stdout, talk on stderr, JSON, and documented exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from resplice.cli.app import run

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_passes_are_listed_and_described(cli: Cli) -> None:
    code, out, _ = cli("passes")
    assert code == 0
    assert all(name in out for name in ("canonicalize", "cse", "dce", "fold", "quest"))
    code, out, _ = cli("passes", "quest", "--json")
    data = json.loads(out)
    assert {o["name"] for o in data["options"]} >= {"weight-bits", "group", "hadamard", "skip"}
    assert data["identity"] == "quest{weight-bits=16}"


def test_show_prints_the_program(cli: Cli, factory_module: str) -> None:
    code, out, _ = cli("show", f"{factory_module}:mlp", "--origins")
    assert code == 0
    assert out.startswith("program(input: f32[rows,32]) where rows=1:64\n")
    assert "linear.py" not in out.splitlines()[3] or "0" in out


def test_explain_writes_nothing(
    cli: Cli, factory_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    code, out, _ = cli("explain", f"{factory_module}:mlp", "-p", "quest")
    assert code == 0
    assert "quest on main: 2 sites" in out
    assert "- linear_2 in 4" in out
    assert "it is the output head" in out
    assert list(empty.iterdir()) == []


def test_convert_check_and_run_again(cli: Cli, factory_module: str, tmp_path: Path) -> None:
    model, target = f"{factory_module}:mlp", tmp_path / "model.onnx"
    code, out, _ = cli(
        "convert",
        model,
        "-p",
        "quest{weight-bits=8}",
        "-o",
        target,
        "--report",
        tmp_path / "r",
        "--json",
    )
    assert code == 0
    data = json.loads(out)
    assert data["pipeline"] == "canonicalize,quest{weight-bits=8}"
    assert Path(data["report"]).exists()
    code, out, _ = cli("check", model, target, "--bar", "0.1", "--json")
    assert code == 0
    assert 0 < json.loads(out)["output"]["relative"] < 0.1
    code, out, err = cli("check", model, target, "--bar", "1e-9")
    assert code == 6
    assert "measured" in err
    np.savez(tmp_path / "x.npz", input=np.ones((4, 32), np.float32))
    assert cli("check", target, target, "--inputs", tmp_path / "x.npz")[0] == 0
    code, _, err = cli("check", target, target)
    assert code == 2
    assert "--inputs FILE.npz" in err


def test_a_program_is_converted_and_read_back(
    cli: Cli, factory_module: str, tmp_path: Path
) -> None:
    target = tmp_path / "small.pt2"
    assert (
        cli("convert", f"{factory_module}:mlp", "-p", "quest", "--to", "pt2", "-o", target)[0] == 0
    )
    code, out, _ = cli("show", target)
    assert code == 0
    assert "resplice.quant_linear" in out
    assert cli("check", target, target)[0] == 0


def test_check_takes_the_bar_that_an_artefact_was_made_with(
    cli: Cli, factory_module: str, tmp_path: Path
) -> None:
    program, artefact = tmp_path / "small.pt2", tmp_path / "small.onnx"
    for to, file in (("pt2", program), ("onnx", artefact)):
        code, _, _ = cli("convert", f"{factory_module}:mlp", "-p", "quest", "--to", to, "-o", file)
        assert code == 0
    assert cli("check", program, artefact)[0] == 0  # int8 activations inside MatMulNBits
    assert cli("check", program, artefact, "--bar", "1e-5")[0] == 6


def test_bench_gives_a_ratio_beside_its_ideal(cli: Cli, factory_module: str) -> None:
    code, out, _ = cli("bench", f"{factory_module}:mlp", "-p", "quest", "--rounds", "3", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["speedup"] > 0
    assert data["bytes_ideal"] > 1
    assert data["rounds"] == 3


def test_bisect_names_the_rewrite_and_saves_a_repro(
    cli: Cli, factory_module: str, tmp_path: Path
) -> None:
    model = f"{factory_module}:mlp"
    code, out, _ = cli(
        "bisect", model, "-p", "quest{weight-bits=1}", "--bar", "1e-3", "--save", tmp_path, "--json"
    )
    assert code == 6
    culprit = json.loads(out[: out.index('{"error"')])["culprit"]
    assert culprit["index"] == 1
    assert culprit["rewrite"] == "quest:linear"
    assert cli("check", tmp_path / "before.pt2", model)[0] == 0
    assert cli("check", tmp_path / "after.pt2", model)[0] == 6
    assert cli("bisect", model, "-p", "cse")[0] == 0


CASES = [
    (2, ("passes", "qest"), "did you mean quest?"),
    (2, ("explain", "subject:mlp", "-p", "quest{weight-bits=x}"), "must be a whole number"),
    (2, ("explain", "subject:mlp", "-p", "quest{weight-bit=4}"), "did you mean weight-bits?"),
    (
        2,
        ("convert", "subject:mlp", "-o", "x.onnx", "--to", "tflite"),
        "there is no backend 'tflite'",
    ),
    (2, ("show", "nonsense"), "names no model"),
    (2, ("show", "subject:missing"), "can't be imported"),
    (2, ("show", "subject:wrong"), "not a model with inputs"),
    (2, ("show", "subject:mlp", "--dynamic", "input=rows"), "is not NAME:AXIS=DIM"),
    (2, ("no-such-command",), "No such command"),
    (3, ("show", "subject:branchy"), "data-dependent"),
    (3, ("show", "missing.pt2"), "there is no file"),
    (3, ("show", "hf:/no/such/folder"), "local files only"),
    (4, ("explain", "subject:mlp", "-p", "quest,quest"), "which quest broke"),
    (5, ("convert", "subject:trained", "-o", "x.onnx"), "drops such writes silently"),
]


@pytest.mark.parametrize(("code", "arguments", "message"), CASES)
def test_errors_have_their_exit_code_and_say_what_to_do(
    code: int, arguments: tuple[str, ...], message: str, cli: Cli, factory_module: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    found, out, err = cli(*arguments)
    assert found == code
    assert message in err
    assert out == ""
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_errors_are_json_too(cli: Cli, factory_module: str) -> None:
    code, out, _ = cli("explain", f"{factory_module}:mlp", "-p", "quest,quest", "--json")
    assert code == 4
    assert json.loads(out)["error"] == "CompositionError"


def test_numbers_past_the_bar_exit_6_and_leave_nothing(
    cli: Cli, factory_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resplice.backends.onnx.backend.EXACT_BAR", -1.0)
    code, _, err = cli("convert", f"{factory_module}:mlp", "-o", tmp_path / "m.onnx")
    assert code == 6
    assert "differs from the program" in err
    assert not (tmp_path / "m.onnx").exists()


def test_a_full_disk_exits_7(
    cli: Cli, factory_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    code, _, err = cli("convert", f"{factory_module}:mlp", "-o", tmp_path / "out" / "m.onnx")
    assert code == 7
    assert "the disk is full" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_extra_names_the_install_command(
    cli: Cli, factory_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> object:
        if name.startswith("resplice.backends.onnx"):
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    code, _, err = cli("convert", f"{factory_module}:mlp", "-o", tmp_path / "m.onnx")
    assert code == 2
    assert "onnxruntime is not installed" in err
    assert "pip install 'resplice[onnx]'" in err


def test_an_internal_error_exits_1_without_a_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resplice.cli.inspect.pass_table", lambda: 1 / 0)
    code, out, err = cli("passes")
    assert (code, out) == (1, "")
    assert "internal error: ZeroDivisionError" in err
    assert "Traceback" not in err


def test_memory_exhaustion_exits_7(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> None:
        raise MemoryError

    monkeypatch.setattr("resplice.cli.inspect.pass_table", exhausted)
    assert cli("passes")[0] == 7
