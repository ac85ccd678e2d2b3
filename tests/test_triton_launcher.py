"""The launcher of an artefact, against a driver that only writes down what it is told."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resplice.backends.triton import launcher
from resplice.backends.triton.launcher import Launcher, LauncherError, address_of, evaluate, pack
from resplice.backends.triton.manifest import validate

TITLE = "axpy-0123456789ab"


class FakeDriver:
    """Remembers calls; reads kernel parameters from memory the way a driver does."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
    )

    def __init__(self, capability: tuple[int, int] = (9, 0), context: int = 7) -> None:
        self.capability, self.context = capability, context
        self.calls: list[tuple[Any, ...]] = []
        self.sizes: tuple[str, ...] = ()
        self.seen: tuple[Any, ...] = ()
        self.broken = ""
        self._next = 4096

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.broken:
                return (700,)
            return (0, *getattr(self, f"_{name}", lambda *_: ())(*arguments))

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def _cuCtxGetCurrent(self) -> tuple[int]:
        return (self.context,)

    def _cuDeviceGet(self, index: int) -> tuple[int]:
        return (index,)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int]:
        return (99,)

    def _cuCtxGetDevice(self) -> tuple[int]:
        return (0,)

    def _cuDeviceGetAttribute(self, which: str, device: int) -> tuple[int]:
        return (self.capability[0 if which == "major" else 1],)

    def _cuModuleLoadData(self, image: bytes) -> tuple[str]:
        return ("module of " + image.decode(),)

    def _cuModuleGetFunction(self, module: str, name: bytes) -> tuple[str]:
        return (f"{name.decode()} in {module}",)

    def _cuMemAlloc(self, size: int) -> tuple[int]:
        self._next += 4096
        return (self._next,)

    _cuMemAllocAsync = lambda self, size, stream: self._cuMemAlloc(size)  # noqa: E731

    def _cuLaunchKernel(self, *arguments: Any) -> tuple[()]:
        count = struct.calcsize("P")
        array = ctypes.string_at(arguments[9], count * len(self.sizes))
        cells = struct.unpack(f"{len(self.sizes)}P", array)
        self.seen = tuple(
            struct.unpack(code, ctypes.string_at(cell, struct.calcsize(code)))[0]
            for cell, code in zip(cells, self.sizes, strict=True)
        )
        return ()


def _manifest(**changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256(b"the cubin").hexdigest()
    tensor = {"dtype": "f32", "shape": [6], "strides": [1]}
    kernel = {
        "symbol": "axpy", "source": "m:axpy", "constants": {"block": 4}, "num_warps": 4,
        "num_stages": 2, "block": [128, 1, 1], "shared": 65536,
        "parameters": [
            {"name": "x", "type": "*fp32", "multiple_of": 16},
            {"name": "table", "type": "*i32", "multiple_of": 1},
            {"name": "n", "type": "i32", "multiple_of": 1},
            {"name": "far", "type": "i64", "multiple_of": 1},
            {"name": "alpha", "type": "fp32", "multiple_of": 1},
        ],
        "scratch": [
            {"name": "global_scratch", "bytes_per_block": 0, "alignment": 1},
            {"name": "profile_scratch", "bytes_per_block": 0, "alignment": 1},
        ],
        "files": {
            "cubin": {"path": "kernels/sm_90/a.cubin", "sha256": digest},
            "ptx": {"path": "kernels/sm_90/a.ptx", "sha256": digest},
        },
    }  # fmt: skip
    launch = {
        "node": "axpy", "op": "axpy", "origin": "", "kernel": TITLE, "grid": [3, 2, 1],
        "arguments": [
            {"name": "x", "role": "input", "value": "x", **tensor},
            {"name": "table", "role": "table", "values": [1, -2, 3], **tensor, "dtype": "i32"},
            {"name": "n", "role": "scalar", "value": 6},
            {"name": "far", "role": "scalar", "value": -(2**40)},
            {"name": "alpha", "role": "scalar", "value": 0.5},
        ],
    }  # fmt: skip
    target = {"warp": 32, "kernels": {TITLE: kernel}, "functions": {"main": [launch]}}
    port = {"name": "x", "dtype": "f32", "shape": [6]}
    return {
        "format": "resplice-triton/1",
        "made_by": {"resplice": "0", "torch": "0", "triton": "0"},
        "pipeline": "", "bar": 1e-4, "lowering": {},
        "functions": {"main": {"inputs": [port], "outputs": [port], "sizes": {}}},
        "targets": {"sm_90": target},
        "files": dict.fromkeys(("program.pt2", "launcher.py", "performance.json"), digest),
        **changes,
    }  # fmt: skip


def _folder(path: Path, manifest: dict[str, Any]) -> Path:
    (path / "kernels" / "sm_90").mkdir(parents=True)
    for kind in ("cubin", "ptx"):
        (path / "kernels" / "sm_90" / f"a.{kind}").write_bytes(b"the cubin")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_launch_puts_every_parameter_where_the_kernel_reads_it(tmp_path: Path) -> None:
    manifest = _manifest()
    validate(manifest)
    driver = FakeDriver()
    driver.sizes = ("Q", "Q", "i", "q", "f", "Q", "Q")
    kernels = Launcher(_folder(tmp_path, manifest), driver=driver)
    kernels.launch("main", 0, {"x": 0x7F00_0000_0010}, stream=5)
    (table,) = driver.named("cuMemcpyHtoD")
    assert driver.seen == (0x7F00_0000_0010, table[0], 6, -(2**40), 0.5, 0, 0)
    assert table[1] == struct.pack("<3i", 1, -2, 3)
    ((function, *rest),) = driver.named("cuLaunchKernel")
    assert function == "axpy in module of the cubin"
    assert rest[:8] == [3, 2, 1, 128, 1, 1, 65536, 5]
    assert driver.named("cuFuncSetAttribute") == [(function, 8, 65536)]
    kernels.launch("main", 0, {"x": 32})
    assert len(driver.named("cuModuleLoadData")) == len(driver.named("cuMemcpyHtoD")) == 1
    kernels.close()
    assert len(driver.named("cuModuleUnload")) == len(driver.named("cuMemFree")) == 1


def test_little_shared_memory_needs_no_attribute(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest["targets"]["sm_90"]["kernels"][TITLE]["shared"] = 48 * 1024
    driver = FakeDriver()
    Launcher(_folder(tmp_path, manifest), driver=driver).launch("main", 0, {"x": 16})
    assert driver.named("cuFuncSetAttribute") == []


def test_scratch_memory_is_given_per_block_and_taken_back(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest["targets"]["sm_90"]["kernels"][TITLE]["scratch"][0]["bytes_per_block"] = 100
    driver = FakeDriver()
    driver.sizes = ("Q", "Q", "i", "q", "f", "Q", "Q")
    Launcher(_folder(tmp_path, manifest), driver=driver).launch("main", 0, {"x": 16}, stream=3)
    assert driver.named("cuMemAllocAsync") == [(600, 3)]
    assert driver.named("cuMemFreeAsync") == [(driver.seen[5], 3)]
    assert driver.seen[6] == 0


def test_dynamic_sizes_are_worked_out_at_the_launch(tmp_path: Path) -> None:
    manifest = _manifest()
    launch = manifest["targets"]["sm_90"]["functions"]["main"][0]
    launch["grid"] = ["-((-batch*seq)//4)", 1, "Max(1, batch)"]
    launch["arguments"][2]["value"] = "batch*seq"
    validate(manifest)
    driver = FakeDriver()
    driver.sizes = ("Q", "Q", "i")
    kernels = Launcher(_folder(tmp_path, manifest), driver=driver)
    kernels.launch("main", 0, {"x": 16}, sizes={"batch": 3, "seq": 7})
    assert driver.named("cuLaunchKernel")[0][1:4] == (6, 1, 3)
    assert driver.seen[2] == 21
    with pytest.raises(LauncherError, match="size seq is not given"):
        kernels.launch("main", 0, {"x": 16}, sizes={"batch": 3})
    with pytest.raises(LauncherError, match=r"n is 4294967296, which does not fit i32"):
        kernels.launch("main", 0, {"x": 16}, sizes={"batch": 2**16, "seq": 2**16})
    calls = len(driver.named("cuLaunchKernel"))
    kernels.launch("main", 0, {"x": 16}, sizes={"batch": 0, "seq": 7})
    assert len(driver.named("cuLaunchKernel")) == calls  # nothing to do is not launched


@pytest.mark.parametrize(
    "text", ["__import__('os')", "a.b", "f(a, a)", "a if a else 1", "1.5", "a/2"]
)
def test_only_arithmetic_of_sizes_is_evaluated(text: str) -> None:
    with pytest.raises(LauncherError):
        evaluate(text, {"a": 1})
    assert evaluate("(a + 63)//64*2 - Mod(a, 7)**2", {"a": 100}) == 2 * 2 - 4


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    kernels = Launcher(_folder(tmp_path, _manifest()), driver=FakeDriver())
    with pytest.raises(LauncherError, match="tensor x is missing; given: y"):
        kernels.launch("main", 0, {"y": 16})
    with pytest.raises(LauncherError, match="x is at 0x18, must be aligned to 16"):
        kernels.launch("main", 0, {"x": 24})
    with pytest.raises(LauncherError, match="no function 'other'; there is main"):
        kernels.launch("other", 0, {})
    with pytest.raises(LauncherError, match="a str has no device address"):
        kernels.launch("main", 0, {"x": "x"})


def test_addresses_come_from_torch_and_from_cuda_arrays() -> None:
    assert address_of(SimpleNamespace(data_ptr=lambda: 12)) == 12
    assert address_of(SimpleNamespace(__cuda_array_interface__={"data": (34, False)})) == 34


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [("i32", 2**31, "does not fit i32"), ("u8", -1, "does not fit u8"), ("fp8", 1, "not known")],
)
def test_values_that_do_not_fit_their_type_are_refused(kind: str, value: int, text: str) -> None:
    with pytest.raises(LauncherError, match=text):
        pack([{"name": "n", "type": kind}], [value])


def test_the_target_follows_from_the_gpu(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest["targets"]["sm_80"] = manifest["targets"]["sm_90"]
    folder = _folder(tmp_path, manifest)
    assert Launcher(folder, driver=FakeDriver((9, 0))).target == "sm_90"
    assert Launcher(folder, driver=FakeDriver((8, 9))).target == "sm_80"
    for capability in ((10, 0), (9, 1), (7, 5)):
        with pytest.raises(
            LauncherError, match="no kernels for sm_.*; the folder has sm_90, sm_80"
        ):
            Launcher(folder, driver=FakeDriver(capability))
    with pytest.raises(LauncherError, match="no kernels for sm_70"):
        Launcher(folder, target="sm_70", driver=FakeDriver())


def test_a_context_is_made_only_where_there_is_none(tmp_path: Path) -> None:
    folder = _folder(tmp_path, _manifest())
    there, missing = FakeDriver(context=7), FakeDriver(context=0)
    Launcher(folder, driver=there)
    Launcher(folder, driver=missing)
    assert there.named("cuCtxSetCurrent") == []
    assert missing.named("cuCtxSetCurrent") == [(99,)]


def test_what_the_driver_refuses_is_named(tmp_path: Path) -> None:
    driver = FakeDriver()
    kernels = Launcher(_folder(tmp_path, _manifest()), driver=driver)
    driver.broken = "cuLaunchKernel"
    with pytest.raises(LauncherError, match="cuLaunchKernel: 700"):
        kernels.launch("main", 0, {"x": 16})


def test_changed_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", _manifest())
    (folder / "kernels" / "sm_90" / "a.cubin").write_bytes(b"another")
    with pytest.raises(LauncherError, match=r"a.cubin is not the file"):
        Launcher(folder, driver=FakeDriver())
    (folder / "kernels" / "sm_90" / "a.cubin").unlink()
    with pytest.raises(LauncherError, match=r"a.cubin is missing"):
        Launcher(folder, driver=FakeDriver())
    newer = _folder(tmp_path / "b", _manifest(format="resplice-triton/2"))
    with pytest.raises(LauncherError, match="this launcher reads"):
        Launcher(newer, driver=FakeDriver())
    with pytest.raises(LauncherError, match="no readable manifest"):
        Launcher(tmp_path, driver=FakeDriver())


def test_amd_targets_are_left_to_other_launchers(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest["targets"]["gfx942"] = manifest["targets"]["sm_90"]
    with pytest.raises(LauncherError, match="gfx942: this launcher speaks to CUDA"):
        Launcher(_folder(tmp_path, manifest), target="gfx942", driver=FakeDriver())


def test_the_launcher_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(launcher.__file__).read_text(encoding="utf-8"))
    names = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    others = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"cuda"}
