"""Published limits and peak rates of the architectures that figures are computed for.

Peaks are those of one product per architecture, dense, at boost clock; a kernel that runs on
another product of the architecture has another roofline but the same occupancy.

Sources. NVIDIA: "Technical Specifications per Compute Capability" and "occupancy" in the CUDA C++
Programming Guide; peaks from the A100, H100 SXM and HGX B200 datasheets (the table says without
sparsity). AMD: "AMD GPU specifications" of the ROCm documentation, the CDNA3 instruction set
guide (512 registers a lane, in eights), LLVM's AMDGPU target (8 waves a SIMD, 16 workgroups of
more than one wave a compute unit), and the MI300X data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["half", "int8", "tf32", "fp32"]
"""What the matrix units, or for "fp32" the plain ones, work on; "half" is fp16 and bf16 alike."""


@dataclass(frozen=True)
class Hardware:
    """One architecture.

    Attributes:
        product: What the peaks are of.
        units: Streaming multiprocessors, or compute units.
        parts: Of a unit: each has its own share of the registers and the warps.
        warps: That a unit holds at most.
        blocks: That a unit holds at most.
        registers: 32-bit registers of a unit.
        register_step: Registers are given to a warp in multiples of this.
        shared: Shared memory of a unit, bytes.
        shared_block: What one block may ask for, bytes.
        shared_reserved: What the system keeps of it for itself, bytes per block.
        shared_step: It is given out in multiples of this, bytes.
        peak: Operations per second, a multiply-add counted as two.
        bandwidth: Of device memory, bytes per second.
    """

    product: str
    units: int
    parts: int
    warps: int
    blocks: int
    registers: int
    register_step: int
    shared: int
    shared_block: int
    shared_reserved: int
    shared_step: int
    peak: dict[Kind, float]
    bandwidth: float


def _nvidia(
    product: str, units: int, warps: int, blocks: int, shared_kib: int, peak: dict[Kind, float],
    bandwidth: float,
) -> Hardware:  # fmt: skip
    return Hardware(
        product, units, 4, warps, blocks, 65_536, 256, shared_kib * 1024, (shared_kib - 1) * 1024,
        1024, 128, peak, bandwidth,
    )  # fmt: skip


HARDWARE = {
    "sm_80": _nvidia(
        "A100 SXM 80 GB", 108, 64, 32, 164,
        {"half": 312e12, "int8": 624e12, "tf32": 156e12, "fp32": 19.5e12}, 2.039e12,
    ),
    "sm_90": _nvidia(
        "H100 SXM", 132, 64, 32, 228,
        {"half": 989.4e12, "int8": 1978.9e12, "tf32": 494.7e12, "fp32": 66.9e12}, 3.35e12,
    ),
    "sm_100": _nvidia(
        "HGX B200", 148, 64, 32, 228,
        {"half": 2250e12, "int8": 4500e12, "tf32": 1100e12, "fp32": 75e12}, 7.7e12,
    ),
    "gfx942": Hardware(
        "MI300X", 304, 4, 32, 16, 131_072, 512, 65_536, 65_536, 0, 512,
        {"half": 1307.4e12, "int8": 2614.9e12, "tf32": 653.7e12, "fp32": 163.4e12}, 5.3e12,
    ),
}  # fmt: skip
"""By name of the target."""


@dataclass(frozen=True)
class Occupancy:
    """How many blocks a unit holds at once.

    Attributes:
        blocks: Per unit; 0 if one does not fit.
        warps: Per unit.
        share: Of the warps a unit could hold.
        limits: What the number of blocks is limited by: registers, shared memory, warps, blocks.
    """

    blocks: int
    warps: int
    share: float
    limits: tuple[str, ...]


def occupancy(
    hardware: Hardware, *, threads: int, warp: int, registers: int, shared: int
) -> Occupancy:
    """Resident blocks and warps of a kernel, from the published limits.

    Args:
        hardware: Of the architecture.
        threads: Of a block.
        warp: Threads of a warp.
        registers: Per thread.
        shared: Memory per block, bytes, static and dynamic.
    """
    warps = -(-threads // warp)
    per_warp = _rounded(max(registers, 1) * warp, hardware.register_step)
    by_registers = hardware.registers // hardware.parts // per_warp * hardware.parts
    space = _rounded(shared + hardware.shared_reserved, hardware.shared_step)
    found = {
        "registers": by_registers // warps,
        "shared memory": hardware.shared // space if space else hardware.blocks,
        "warps": hardware.warps // warps,
        "blocks": hardware.blocks,
    }
    blocks = min(found.values())
    limits = tuple(name for name, value in found.items() if value == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / hardware.warps, limits)


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step
