"""Launches the kernels of this folder through the CUDA driver; needs no PyTorch and no Triton.

This file is part of the artefact and stands alone: Python and the `cuda-python` package are all it
needs.

    from launcher import Launcher

    kernels = Launcher("folder")                      # of the GPU whose context is current
    for index, launch in enumerate(kernels.launches("main")):
        ...                                           # its node, kernel, grid and arguments
    kernels.launch("main", 0, {"q": 0x7f..., "k": k, "v": v, "out": out}, stream=0)

A tensor is given as a device address, or as anything with `data_ptr()`, or with the CUDA array
interface; numbers and tables come from the manifest. Layouts must be those of the manifest.
AMD targets: `kernels/gfx*/*.hsaco` load with hipModuleLoadData, parameters in the same order.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import operator
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FORMAT = "resplice-triton/1"
_SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}  # fmt: skip
_TABLES = {
    "i8": "b", "u8": "B", "i16": "h", "i32": "i", "i64": "q", "f32": "f", "f64": "d", "bool": "?",
    "f16": "e",
}  # fmt: skip
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_FUNCTIONS: dict[str, Any] = {
    "Max": max, "Min": min, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod,
}  # fmt: skip
_USUAL_SHARED = 48 * 1024
"""Bytes a block may ask for without an attribute."""


class LauncherError(Exception):
    """The folder, the GPU or the arguments do not fit together."""


class Launcher:
    """The kernels of one folder for one target.

    Attributes:
        folder: The artefact.
        manifest: Its manifest.
        target: Name of the target, "sm_90".
    """

    def __init__(self, folder: str | Path, target: str | None = None, driver: Any = None) -> None:
        """Open a folder.

        Args:
            folder: The artefact.
            target: Which binaries to use; None: those for the current GPU.
            driver: The driver API, `cuda.bindings.driver` or something alike.

        Raises:
            LauncherError: Files are missing or changed, or there are none for the GPU.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._driver = driver or _cuda_driver()
        self._ready()
        self.target = target or self._own_target()
        if self.target not in self.manifest["targets"]:
            have = ", ".join(self.manifest["targets"])
            raise LauncherError(f"no kernels for {self.target}; the folder has {have}")
        if self.target.startswith("gfx"):
            raise LauncherError(f"{self.target}: this launcher speaks to CUDA; see its head")
        self._entry = self.manifest["targets"][self.target]
        self._functions: dict[str, tuple[Any, Any]] = {}
        self._tables: dict[Any, int] = {}

    def launches(self, function: str = "main") -> list[Json]:
        """The launches of a function, as the manifest describes them."""
        if function not in self._entry["functions"]:
            have = ", ".join(self._entry["functions"])
            raise LauncherError(f"there is no function {function!r}; there is {have}")
        found: list[Json] = self._entry["functions"][function]
        return found

    def launch(
        self,
        function: str,
        index: int,
        tensors: Mapping[str, Any],
        stream: Any = 0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Launch one kernel.

        Args:
            function: "main", or a further function of the program.
            index: Which of `launches(function)`.
            tensors: Argument name -> device address or tensor, for every tensor that is no table.
            stream: A CUstream, or its handle.
            sizes: Name -> size, for programs with dynamic sizes; `manifest["functions"]` says
                which there are and where to read them.

        Raises:
            LauncherError: An argument is missing or not aligned, or the driver refuses.
        """
        entry = self.launches(function)[index]
        kernel = self._entry["kernels"][entry["kernel"]]
        given = sizes or {}
        values = [
            evaluate(argument["value"], given)
            if argument["role"] == "scalar"
            else self._address(function, index, argument, parameter, tensors)
            for argument, parameter in zip(entry["arguments"], kernel["parameters"], strict=True)
        ]
        grid = [evaluate(size, given) for size in entry["grid"]]
        blocks = grid[0] * grid[1] * grid[2]
        if blocks == 0:
            return
        scratch = [self._scratch(item, blocks, stream) for item in kernel["scratch"]]
        parameters = pack(kernel["parameters"], values, scratch)
        self._call(
            "cuLaunchKernel", self._function(entry["kernel"]), *grid, *kernel["block"],
            kernel["shared"], stream, parameters.address, 0,
        )  # fmt: skip
        for address in filter(None, scratch):
            self._call("cuMemFreeAsync", address, stream)

    def close(self) -> None:
        """Unload the modules and free the tables."""
        for module, _ in self._functions.values():
            self._call("cuModuleUnload", module)
        for address in self._tables.values():
            self._call("cuMemFree", address)
        self._functions, self._tables = {}, {}

    def _function(self, title: str) -> Any:
        if title not in self._functions:
            kernel = self._entry["kernels"][title]
            image = (self.folder / kernel["files"]["cubin"]["path"]).read_bytes()
            (module,) = self._call("cuModuleLoadData", image)
            (found,) = self._call("cuModuleGetFunction", module, kernel["symbol"].encode())
            if kernel["shared"] > _USUAL_SHARED:
                attribute = self._driver.CUfunction_attribute
                which = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", found, which, kernel["shared"])
            self._functions[title] = module, found
        return self._functions[title][1]

    def _address(
        self, function: str, index: int, argument: Json, parameter: Json, tensors: Mapping[str, Any]
    ) -> int:
        name = argument["name"]
        if argument["role"] == "table" and name not in tensors:
            return self._table((function, index, name), argument)
        if name not in tensors:
            have = ", ".join(tensors) or "none"
            raise LauncherError(f"tensor {name} is missing; given: {have}")
        address = address_of(tensors[name])
        if address % parameter["multiple_of"]:
            raise LauncherError(f"{name} is at {address:#x}, must be aligned to 16 bytes")
        return address

    def _table(self, key: Any, argument: Json) -> int:
        if key not in self._tables:
            code = _TABLES.get(argument["dtype"])
            if code is None:
                raise LauncherError(f"table {argument['name']} is of {argument['dtype']}")
            data = struct.pack(f"<{len(argument['values'])}{code}", *argument["values"])
            (address,) = self._call("cuMemAlloc", max(len(data), 1))
            self._call("cuMemcpyHtoD", address, data, len(data))
            self._tables[key] = int(address)
        return self._tables[key]

    def _scratch(self, item: Json, blocks: int, stream: Any) -> int:
        size = item["bytes_per_block"] * blocks
        if not size:
            return 0
        (address,) = self._call("cuMemAllocAsync", size, stream)
        if int(address) % item["alignment"]:
            raise LauncherError(f"{item['name']} needs alignment {item['alignment']}")
        return int(address)

    def _ready(self) -> None:
        """Make a context current, that of device 0 if there is none."""
        self._call("cuInit", 0)
        (context,) = self._call("cuCtxGetCurrent")
        if not int(context):
            (device,) = self._call("cuDeviceGet", 0)
            (context,) = self._call("cuDevicePrimaryCtxRetain", device)
            self._call("cuCtxSetCurrent", context)

    def _own_target(self) -> str:
        """The target of the current GPU: its own, or an older one of its generation before 9.0.

        Code for 9.0 and later uses features of exactly that architecture.
        """
        (device,) = self._call("cuCtxGetDevice")
        attribute = self._driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", which, device)[0]
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        names = [f"sm_{major}{m}" for m in range(minor, -1 if major < 9 else minor - 1, -1)]
        return next((name for name in names if name in self.manifest["targets"]), names[0])

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        status, *results = list(getattr(self._driver, name)(*arguments))
        if int(status):
            raise LauncherError(f"{name}: {status}")
        return results


class Packed:
    """Kernel parameters in memory: one cell per parameter, and the array of their addresses."""

    def __init__(self, cells: Sequence[Any]) -> None:
        """Keep the cells alive as long as this object."""
        self.cells = cells
        self.array = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))

    @property
    def address(self) -> int:
        """What the driver takes as `kernelParams`."""
        return ctypes.addressof(self.array)


def pack(parameters: Sequence[Json], values: Sequence[Any], scratch: Sequence[int] = ()) -> Packed:
    """Put values into memory as the kernel reads them.

    Args:
        parameters: Of the manifest: name and type of each.
        values: Device addresses, integers and floats, in the same order.
        scratch: Addresses that follow, 0 for none.

    Raises:
        LauncherError: A type is not known, or a value does not fit its type.
    """
    cells = [
        _cell(item["name"], item["type"], v) for item, v in zip(parameters, values, strict=True)
    ]
    return Packed([*cells, *(ctypes.c_uint64(address) for address in scratch)])


def _cell(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("*"):
        return ctypes.c_uint64(value)
    if kind not in _SCALARS:
        raise LauncherError(f"{name} is of type {kind}, which is not known")
    if kind in ("fp32", "fp64"):
        return _SCALARS[kind](float(value))
    cell = _SCALARS[kind](int(value))
    if cell.value != value:
        raise LauncherError(f"{name} is {value}, which does not fit {kind}")
    return cell


def evaluate(text: float | str, sizes: Mapping[str, int]) -> Any:
    """The value of a number, or of an expression of sizes such as "-((-batch*seq)//64)".

    Raises:
        LauncherError: A size is missing, or the text is no such expression.
    """
    if not isinstance(text, str):
        return text
    try:
        return _evaluated(ast.parse(text, mode="eval").body, sizes)
    except (SyntaxError, ZeroDivisionError) as error:
        raise LauncherError(f"{text!r}: {error}") from error


def _evaluated(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            if name not in sizes:
                raise LauncherError(f"size {name} is not given")
            return int(sizes[name])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand, sizes)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            function = _OPERATORS[type(sign)]
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in _FUNCTIONS:
            function = _FUNCTIONS[name]
        case _:
            raise LauncherError(f"{ast.unparse(node)} is no arithmetic that is known")
    return int(function(_evaluated(left, sizes), _evaluated(right, sizes)))


def address_of(tensor: Any) -> int:
    """The device address of a tensor, of a CUDA array, or the address itself."""
    if isinstance(tensor, int):
        return tensor
    if hasattr(tensor, "data_ptr"):
        return int(tensor.data_ptr())
    interface = getattr(tensor, "__cuda_array_interface__", None)
    if interface is None:
        raise LauncherError(f"a {type(tensor).__name__} has no device address")
    return int(interface["data"][0])


def read_manifest(folder: Path) -> Json:
    """The manifest, after its files were compared with their hashes.

    Raises:
        LauncherError: A file is missing or changed, or the format is another one.
    """
    try:
        manifest: Json = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LauncherError(f"{folder} has no readable manifest.json: {error}") from error
    if manifest.get("format") != FORMAT:
        raise LauncherError(f"format {manifest.get('format')!r}, this launcher reads {FORMAT!r}")
    for target in manifest["targets"].values():
        for kernel in target["kernels"].values():
            for file in kernel["files"].values():
                _check_file(folder / file["path"], file["sha256"])
    return manifest


def _check_file(path: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise LauncherError(f"{path} is missing: {error}") from error
    if found != digest:
        raise LauncherError(f"{path} is not the file that the manifest describes")


def _cuda_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        try:
            from cuda import cuda as driver
        except ImportError as error:
            hint = "pip install cuda-python"
            raise LauncherError(f"the driver API is missing: {hint}") from error
    return driver
