"""Launching Triton kernels: on a GPU, in the interpreter, into a traced graph, or onto a list.

A host function allocates its results and calls `launch`. What that does depends on the tensors:

    CUDA tensors          the kernel runs
    CPU tensors           Triton's interpreter runs it, in any process: no variable need be set
    traced CUDA tensors   the graph gets a node which torch.compile and AOTInductor see through
    under `recording()`   a `Launch` is appended and nothing runs: meta or fake tensors will do
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.compiler.code_generator  # noqa: F401  (binds `min` before any patch of it)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from resplice.errors import OpError
from resplice.kernels.cuda.bfloat16 import bfloat16_arithmetic
from resplice.ops import Op

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
"""Triton's names of element types."""

SHARED_LIMIT = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448,
    "sm_120": 101_376, "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip
"""Shared memory that one block may ask for, bytes, by architecture."""


# ---- configurations ----------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled.

    Attributes:
        constants: Compile-time sizes ("block_m"), by the kernel's argument names.
        num_warps: Warps (wavefronts) of a block.
        num_stages: Depth of the software pipeline.
    """

    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """All of it as keyword arguments of `launch`."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


_arch: ContextVar[str | None] = ContextVar("arch", default=None)
_chosen: ContextVar[dict[str, Config] | None] = ContextVar("chosen", default=None)
_asked: ContextVar[dict[str, list[Config]] | None] = ContextVar("asked", default=None)
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def current_arch() -> str:
    """The architecture that configurations are chosen for, such as "sm_90" or "gfx942".

    The one of `targeting`, else that of the GPU here, else "sm_90".
    """
    chosen = _arch.get()
    if chosen is not None:
        return chosen
    if not torch.cuda.is_available():
        return "sm_90"
    properties = torch.cuda.get_device_properties()
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def targeting(arch: str) -> Iterator[None]:
    """Choose configurations for an architecture, whatever the machine is."""
    token = _arch.set(arch)
    try:
        yield
    finally:
        _arch.reset(token)


@contextmanager
def using(**configs: Config) -> Iterator[None]:
    """Use these configurations, by kernel name, instead of the default ones."""
    token = _chosen.set({**(_chosen.get() or {}), **configs})
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def asking() -> Iterator[dict[str, list[Config]]]:
    """Note which kernels are configured, and their candidates."""
    found: dict[str, list[Config]] = {}
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def configured(name: str, candidates: Sequence[Config]) -> Config:
    """The configuration of a kernel: what `using` says, else the first candidate."""
    asked = _asked.get()
    if asked is not None:
        known = asked.setdefault(name, [])
        known += [candidate for candidate in candidates if candidate not in known]
    return (_chosen.get() or {}).get(name, candidates[0])


def shared_limit(arch: str) -> int:
    """Shared memory a block may ask for, bytes; the smallest known where `arch` is not."""
    return SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))


# ---- launches ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what ahead-of-time compilation and a launcher need.

    Attributes:
        name: Of the kernel ("tile_attention_forward").
        function: The kernel.
        grid: Blocks in x, y and z; of dynamic sizes where the program has them.
        arguments: Runtime arguments by name, in the kernel's order: tensors (fake or meta ones
            too), integers and floats.
        constants: Compile-time arguments, and runtime ones that are None.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
    """

    name: str
    function: JITFunction[Any]
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def signature(self) -> dict[str, str]:
        """Type of every argument, in order: "*bf16", "i32", "fp32" or "constexpr"."""
        return {
            name: "constexpr" if name in self.constants else _type(self.arguments[name])
            for name in self.function.arg_names
        }

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What the compiler may rely on: pointers and integers that are multiples of 16."""
        return {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(self.function.arg_names)
            if name in self.arguments and _divisible(self.arguments[name])
        }


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    found: list[Launch] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def launch(
    function: Any,
    grid: tuple[int, ...],
    /,
    *,
    num_warps: int,
    num_stages: int,
    **arguments: Any,
) -> None:
    """Launch a kernel; see the head of this file for what that means.

    Args:
        function: The `triton.jit` function.
        grid: Blocks, up to three numbers.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
        **arguments: All arguments of the kernel by name.

    Raises:
        OpError: The tensors are on a device that Triton has no way to.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(_described(function, grid, num_warps, num_stages, arguments))
        return
    tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    device = tensors[0].device.type
    if any(isinstance(x, FakeTensor | FunctionalTensor) for x in tensors):
        torch.library.wrap_triton(function)[grid](**arguments, **options)
    elif device == "cpu":
        _interpret(function, grid, arguments)
    elif device == "cuda":
        function[grid](**arguments, **options)
    else:
        raise OpError(name_of(function), "x", f"is on {device}: Triton runs on CUDA and ROCm")


def by_reference(op: Op, why: str, *args: Any, fast: bool = False) -> Any:
    """What no kernel does: the op's reference, or its fast path for CPUs.

    Raises:
        OpError: Under `recording()`, where a kernel is wanted.
    """
    if _recorded.get() is not None:
        raise OpError(op.name, "x", f"{why}: there is no kernel for that")
    return (op.fast if fast and op.fast else op.reference)(*args)


def constant(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Known numbers as an int32 argument of a kernel, on the device of `like`.

    Under `recording()` it stays a real tensor on the CPU: a tensor with data among the arguments of
    a `Launch` is a constant, to be kept with the kernel.
    """
    if _recorded.get() is not None:
        with unset_fake_temporarily():
            return torch.tensor(numbers, dtype=torch.int32)
    if isinstance(like, FakeTensor | FunctionalTensor) or torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.int32).to(like.device)
    return _kept(tuple(numbers), like.device)


@lru_cache(maxsize=256)
def _kept(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def name_of(function: Any) -> str:
    """The kernel's name."""
    return str(function.fn.__name__)


def _described(
    function: Any, grid: tuple[int, ...], warps: int, stages: int, arguments: dict[str, Any]
) -> Launch:
    x, y, z = (*map(_counted, grid), 1, 1)[:3]
    fixed = _constant_names(function)
    constants = {n: a for n, a in arguments.items() if n in fixed or a is None}
    ordered = {n: arguments[n] for n in function.arg_names if n not in constants}
    return Launch(name_of(function), function, (x, y, z), ordered, constants, warps, stages)


def _constant_names(function: Any) -> set[str]:
    notes = inspect.get_annotations(function.fn)
    return {name for name, note in notes.items() if "constexpr" in str(note)}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.SymInt):
        return "i32"  # launchers refuse a value that does not fit
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _counted(size: Any) -> Any:
    """Blocks along an axis; dynamic sizes stay symbolic."""
    return size if isinstance(size, torch.SymInt) else int(size)


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return statically_known_true(value.storage_offset() * value.element_size() % 16 == 0)
    integer = isinstance(value, int | torch.SymInt)
    return integer and statically_known_true(value % 16 == 0)


# ---- the interpreter ---------------------------------------------------------------------


def _interpret(function: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run a kernel block by block on CPU tensors."""
    with _interpreting():
        InterpretedFunction(function.fn)[grid](**arguments)


@contextmanager
def _interpreting() -> Iterator[None]:
    """Patch the language for one launch, so that kernels stay compilable in the same process."""
    scope = _patch_lang(triton.language.standard.zeros.fn)
    call = JITFunction.__call__
    JITFunction.__call__ = _interpreted_call
    try:
        with bfloat16_arithmetic():
            yield
    finally:
        JITFunction.__call__ = call
        scope.restore()


def _interpreted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a kernel's call of another `triton.jit` function does in the interpreter."""
    return _rewritten(self.fn)(*args, **kwargs)


@cache
def _rewritten(function: Any) -> Any:
    return InterpretedFunction(function).rewrite()
