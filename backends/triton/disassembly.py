"""What compiled code says about itself: resources and instruction mix.

NVIDIA: `cuobjdump`, which Triton's wheel ships, on the cubin. AMD: the metadata and the text of the
assembly, which Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from resplice.errors import LoweringError


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: Per thread (AMD: vector registers, accumulators included).
        scalar_registers: Per wave; AMD only.
        spilled: Registers kept in memory (AMD), or bytes of stack per thread (NVIDIA).
        static_shared: Shared memory that the binary itself asks for, bytes.
    """

    registers: int
    scalar_registers: int | None
    spilled: int
    static_shared: int


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
_GCN = re.compile(r"^\t([a-z][a-z0-9_]*)\b", re.MULTILINE)

_NVIDIA_KINDS = (
    ("tensor core", re.compile(r"(?:[HIQBDO]G?MMA|UTC\w*MMA)")),
    ("16-byte global load", re.compile(r"LDG\.(?:\S+\.)?128")),
    ("16-byte asynchronous copy", re.compile(r"LDGSTS\S*\.128")),
    ("bulk copy", re.compile(r"(?:UTMALDG|UBLKCP)")),
    ("global load", re.compile(r"LDG\.")),
    ("asynchronous copy", re.compile(r"LDGSTS")),
    ("global store", re.compile(r"STG")),
    ("shared memory", re.compile(r"(?:LDS|STS|LDSM|STSM)\b")),
    ("tensor memory", re.compile(r"(?:LDTM|STTM)")),
    ("local memory", re.compile(r"(?:LDL|STL)\b")),
    ("special function", re.compile(r"MUFU")),
    ("population count", re.compile(r"U?POPC")),
    ("barrier", re.compile(r"BAR\b")),
)
_AMD_KINDS = (
    ("tensor core", re.compile(r"v_(?:mfma|smfmac|wmma)_")),
    ("16-byte global load", re.compile(r"(?:global|buffer|flat)_load_dwordx4")),
    ("global load", re.compile(r"(?:global|buffer|flat)_load_")),
    ("global store", re.compile(r"(?:global|buffer|flat)_store_")),
    ("shared memory", re.compile(r"ds_(?:read|write|load|store)")),
    ("local memory", re.compile(r"scratch_(?:load|store)")),
    ("special function", re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")),
    ("population count", re.compile(r"v_bcnt_")),
    ("barrier", re.compile(r"s_barrier")),
)


def nvidia_report(cubin: Path, cuobjdump: str) -> tuple[Resources, dict[str, int], dict[str, int]]:
    """Resources, instructions by kind and matrix instructions by name of a cubin.

    Args:
        cubin: The file.
        cuobjdump: Path of the tool.

    Raises:
        LoweringError: The tool does not read the file.
    """
    usage, code = (_dumped(cuobjdump, option, cubin) for option in ("-res-usage", "-sass"))
    return nvidia_resources(usage), *instruction_mix(_SASS.findall(code), _NVIDIA_KINDS)


def nvidia_resources(usage: str) -> Resources:
    """Registers, stack and shared memory from the text of `cuobjdump -res-usage`.

    Raises:
        LoweringError: The text has another form.
    """
    found = _RESOURCES.search(usage)
    if found is None:
        raise LoweringError("triton", [f"cuobjdump says no resource usage: {usage[:200]!r}"])
    registers, stack, shared, local = map(int, found.groups())
    return Resources(registers, None, stack + local, shared)


def nvidia_instructions(sass: str) -> tuple[dict[str, int], dict[str, int]]:
    """Instructions by kind, and matrix instructions by name, of disassembled code."""
    return instruction_mix(_SASS.findall(sass), _NVIDIA_KINDS)


def amd_report(assembly: str) -> tuple[Resources, dict[str, int], dict[str, int]]:
    """Resources, instructions by kind and matrix instructions by name of an assembly text.

    Raises:
        LoweringError: It has no metadata of a kernel.
    """
    numbers = {
        name: re.search(rf"\.{name}:\s+(\d+)", assembly)
        for name in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count",
                     "group_segment_fixed_size")
    }  # fmt: skip
    missing = [name for name, found in numbers.items() if found is None]
    if missing:
        raise LoweringError("triton", [f"the assembly does not say its {', '.join(missing)}"])
    count = {name: int(found[1]) for name, found in numbers.items() if found}
    resources = Resources(
        count["vgpr_count"], count["sgpr_count"],
        count["vgpr_spill_count"] + count["sgpr_spill_count"], count["group_segment_fixed_size"],
    )  # fmt: skip
    return resources, *instruction_mix(_GCN.findall(assembly), _AMD_KINDS)


def instruction_mix(
    names: list[str], kinds: tuple[tuple[str, re.Pattern[str]], ...]
) -> tuple[dict[str, int], dict[str, int]]:
    """How many instructions are of each kind, all of them as "all"; and the matrix ones by name.

    An instruction may be of several kinds: a 16-byte load is a load too.
    """
    mix, matrix = {"all": len(names)}, Counter[str]()
    for name, count in Counter(names).items():
        for kind, pattern in kinds:
            if pattern.match(name):
                mix[kind] = mix.get(kind, 0) + count
                if kind == "tensor core":
                    matrix[name] += count
    return mix, dict(matrix)


def _dumped(tool: str, option: str, file: Path) -> str:
    done = subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError("triton", [f"{Path(tool).name} {option}: {done.stderr.strip()[:300]}"])
    return done.stdout
