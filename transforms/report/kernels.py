"""Tables of a static performance report, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABEL = "computed from the compiled code and published limits, not measured"
Table = list[tuple[str, ...]]
"""Rows of cells; the first is the header."""


def kernel_table(kernels: Mapping[str, Any]) -> Table:
    """One row per kernel of a target: resources, occupancy, what its code consists of."""
    header = ("kernel", "threads", "registers", "spilled", "shared memory", "occupancy",
              "tensor core", "16-byte loads", "local memory")  # fmt: skip
    return [header, *(_kernel_row(title, found) for title, found in kernels.items())]


def site_table(sites: Sequence[Mapping[str, Any]]) -> Table:
    """One row per kind of site of a target: work, and what peak rates allow at best."""
    header = ("op", "sites", "GFLOP", "MB", "FLOP/byte", "at best", "bound by")
    return [header, *map(_site_row, sites)]


def _kernel_row(title: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    mix, held = found["instructions"], found["occupancy"]
    wide = sum(mix.get(f"16-byte {kind}", 0) for kind in ("global load", "asynchronous copy"))
    matrix = [f"{count} {name}" for name, count in found["matrix_instructions"].items()]
    limits = f"{100 * held['share']:.0f} % ({', '.join(held['limits'])})" if held else "unknown"
    return (
        title, str(found["threads"]), str(found["registers"]), str(found["spilled"]),
        f"{found['shared']} B", limits, ", ".join(matrix) or "none", str(wide),
        str(mix.get("local memory", 0)),
    )  # fmt: skip


def _site_row(site: Mapping[str, Any]) -> tuple[str, ...]:
    known = "seconds_at_best" in site
    return (
        f"{site['function']}: {site['op']} ({site['node']})", str(site["count"]),
        f"{site['flops'] / 1e9:.4g}", f"{site['bytes'] / 1e6:.4g}",
        f"{site['intensity'] or 0:.1f}",
        f"{1e6 * site['seconds_at_best']:.3g} us" if known else "unknown",
        f"{site['bound_by']} ({site['peak']})" if known else "unknown",
    )  # fmt: skip
