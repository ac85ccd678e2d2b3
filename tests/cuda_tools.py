"""What tests of Triton kernels share: poisoned results, bars, and compiled code without a GPU."""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from resplice.kernels.cuda.launch import Launch, recording, shared_limit, targeting

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_CORE = re.compile(r"^(HGMMA|IGMMA|HMMA|IMMA|UTC\w*MMA|v_mfma_\w+)")


def wide(args: Sequence[Any]) -> list[Any]:
    """The same call in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def cast(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The same call with its floating point tensors in another type."""
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def bar(dtype: torch.dtype) -> float:
    """Error allowed relative to the largest value: 1e-5, or two last places of 16-bit results."""
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value; infinite where one is NaN."""
    assert found.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    worst = (found.double() - exact.double()).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float(worst) if math.isfinite(float(worst)) else math.inf


@contextmanager
def poison() -> Iterator[None]:
    """New tensors hold NaN, or integers that no kernel may use."""
    fresh, like = Tensor.new_empty, torch.empty_like

    def spoilt(made: Tensor) -> Tensor:
        return made.fill_(math.nan if made.is_floating_point() else 77)

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return spoilt(fresh(self, *args, **kwargs))

    def empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return spoilt(like(*args, **kwargs))

    with (
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(function: Callable[..., Any], args: Sequence[Any], arch: str) -> list[Launch]:
    """What a host function would launch on that architecture."""
    with targeting(arch), recording() as found:
        function(*args)
    return found


@dataclass(frozen=True)
class Code:
    """Compiled code: registers a thread, spilled bytes or registers, shared bytes, instructions."""

    registers: int
    spills: int
    shared: int
    instructions: Counter[str]

    @property
    def tensor_core(self) -> int:
        """Matrix instructions."""
        return sum(n for name, n in self.instructions.items() if TENSOR_CORE.match(name))

    def count(self, *names: str) -> int:
        """Instructions of that name, whatever their suffixes."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in names)


def compiled(launch: Launch, arch: str, tmp_path: Path) -> Code:
    """Compile a launch and take it apart; fails where shared memory would not do."""
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    source = ASTSource(
        JITFunction(launch.function.fn), launch.signature, launch.constants, launch.attributes
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    made = triton.compile(source, target=target, options=options)
    assert made.metadata.shared <= shared_limit(arch), (
        f"{launch.name}: {made.metadata.shared} bytes"
    )
    if nvidia:
        return _nvidia(made.asm["cubin"], made.metadata.shared, tmp_path / "kernel.cubin")
    return _amd(made.asm["amdgcn"], made.metadata.shared)


def _nvidia(cubin: bytes, shared: int, path: Path) -> Code:
    path.write_bytes(cubin)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    usage = _run(str(tools / "cuobjdump"), "-res-usage", str(path))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    code = _run(str(tools / "nvdisasm"), "-c", str(path))
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    return Code(int(registers), int(stack), shared, Counter(re.findall(pattern, code)))


def _amd(assembly: str, shared: int) -> Code:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]

    lines = [line.split() for line in assembly.splitlines() if line.startswith("\t")]
    names = Counter(words[0] for words in lines if words and words[0][0] not in ".;")
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Code(number("vgpr_count"), spills, shared, names)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
