"""The static performance report: computed from compiled code and published limits, not measured.

Per kernel and target: resources, occupancy and instruction mix. Per site and target: operations and
bytes by the op's cost rule, arithmetic intensity, and the time that peak rates allow at best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from resplice.backends.triton.compile import Compiled
from resplice.backends.triton.disassembly import amd_report, nvidia_report
from resplice.backends.triton.hardware import Hardware, Kind, occupancy
from resplice.backends.triton.record import Site
from resplice.backends.triton.targets import Target
from resplice.backends.triton.variants import variant_of
from resplice.cost import Cost, node_cost
from resplice.errors import LoweringError
from resplice.report.kernels import LABEL, Table, kernel_table, site_table

Json = dict[str, Any]
FORMAT = "resplice-triton-performance/1"


def performance(
    target: Target,
    compiled: Mapping[str, Compiled],
    functions: Mapping[str, Sequence[Site]],
) -> Json:
    """Everything that is known of one target without running on it.

    Args:
        target: The target.
        compiled: Its kernels by title.
        functions: The sites of every function.
    """
    kernels = {title: kernel_figures(item) for title, item in compiled.items()}
    return {
        "product": target.hardware.product if target.hardware else None,
        "kernels": kernels,
        "sites": [
            row for name, sites in functions.items() for row in _rows(name, sites, kernels, target)
        ],
    }  # fmt: skip


def kernel_figures(compiled: Compiled) -> Json:
    """Resources, occupancy and instruction mix of one kernel.

    Raises:
        LoweringError: Its code can't be disassembled.
    """
    resources, mix, matrix = _disassembled(compiled)
    shared = compiled.shared + resources.static_shared
    figures: Json = {
        "kernel": compiled.variant.name,
        "threads": compiled.threads,
        **asdict(resources),
        "shared": compiled.shared,
        "instructions": mix,
        "matrix_instructions": matrix,
        "occupancy": None,
    }
    if compiled.target.hardware is not None:
        hardware = compiled.target.hardware
        own = 0 if compiled.target.amd else resources.static_shared  # the system's reserve
        found = occupancy(
            hardware, threads=compiled.threads, warp=compiled.target.warp,
            registers=resources.registers, shared=shared - min(own, hardware.shared_reserved),
        )  # fmt: skip
        figures["occupancy"] = asdict(found)
    return figures


def roofline(cost: Cost, kind: Kind, hardware: Hardware) -> Json:
    """The shortest time that peak rates allow, and which of the two rates sets it."""
    arithmetic, memory = cost.flops / hardware.peak[kind], cost.bytes / hardware.bandwidth
    return {
        "peak": kind,
        "seconds_at_best": max(arithmetic, memory),
        "bound_by": "arithmetic" if arithmetic >= memory else "memory",
    }


def markdown(report: Json) -> str:
    """The report for people."""
    lines = ["# Static performance report", "", f"All figures are {LABEL}.", ""]
    for name, target in report["targets"].items():
        lines += [f"## {name}" + (f" ({target['product']})" if target["product"] else ""), ""]
        lines += _table(kernel_table(target["kernels"]))
        lines += _table(site_table(target["sites"]))
    return "\n".join(lines)


def _disassembled(compiled: Compiled) -> Any:
    if compiled.target.amd:
        return amd_report(compiled.assembly)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.binary)
        return nvidia_report(file, _cuobjdump())


def _cuobjdump() -> str:
    from triton import knobs

    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError as error:
        raise LoweringError("triton", [f"cuobjdump is missing: {error}"]) from error


def _rows(
    function: str, sites: Sequence[Site], kernels: Mapping[str, Json], target: Target
) -> Iterator[Json]:
    """Sites with equal cost and kernels make one row."""
    found: dict[Any, Json] = {}
    for site in sites:
        cost = node_cost(site.node)
        titles = tuple(dict.fromkeys(variant_of(launch).title for launch in site.launches))
        row = found.setdefault((site.op, cost, titles), {
            "function": function, "op": site.op, "node": site.node.name, "count": 0,
            "kernels": list(titles), "flops": cost.flops, "bytes": cost.bytes,
            "intensity": cost.flops / cost.bytes if cost.bytes else None,
        })  # fmt: skip
        row["count"] += 1
        if target.hardware is not None:
            row |= roofline(cost, _kind([kernels[t] for t in titles]), target.hardware)
    yield from found.values()


def _kind(kernels: Sequence[Json]) -> Kind:
    """Which peak applies, by the matrix instructions that the kernels have."""
    names = " ".join(name for kernel in kernels for name in kernel["matrix_instructions"])
    if not names:
        return "fp32"
    if any(text in names for text in ("IMMA", "IGMMA", "i8")):
        return "int8"
    return "tf32" if any(text in names for text in ("TF32", "xf32", "_f32_f32")) else "half"


def _table(cells: Table) -> list[str]:
    header, *rows = cells
    lines = [header, ("---",) * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""] if rows else []
