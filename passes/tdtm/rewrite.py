"""tdtm: attention on groups of neighbouring frames (temporal dimension token merging).

Source: On-device Sora, arXiv 2502.04363, section 4.2.

    %7 = attention(project(%5))                          %5: f32[B*T,S,C], frames in the batch
      ->
    %6 = resplice.merge_frames(%5, -3, T, 1, 2)          f32[B*ceil(T/2),S,C]
    %7 = resplice.unmerge_frames(attention(project(%6)), -3, T, 1, 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import fx

from resplice.change import Change, Refused, Site
from resplice.context import Context
from resplice.cost import node_cost, program_cost
from resplice.errors import SpecError
from resplice.facts import Canonical
from resplice.origin import origin
from resplice.pass_base import Exact, Meaning, Pass, Redefines, option
from resplice.passes.canonicalize import remove_dead
from resplice.passes.tdtm.attention import Merged, merge_attention
from resplice.passes.tdtm.rebuild import Rebuild
from resplice.passes.tdtm.sites import AttentionSite, Sites, find_sites
from resplice.passes.tdtm.tables import centred, compact
from resplice.phases import is_full, keep_full
from resplice.program import Program
from resplice.rules import erase_dead, replace_node
from resplice.show import show_nodes

KINDS = ("spatial", "temporal", "cross")
_TABLES = {"compact": compact, "centred": centred}


@dataclass(frozen=True)
class Tdtm(Pass):
    """Let attentions of a video transformer see the average of every `pair` frames.

    Merges in front of the projections to queries, keys and values and unmerges behind the output
    projection; MLPs, modulation and the residual stream keep all frames. Rotary tables and masks
    are rewritten for the merged tokens. Attention over all tokens of a video at once counts as
    both spatial and temporal. Motion suffers: merging all steps makes videos nearly still.
    """

    name = "tdtm"
    needs = (Canonical,)
    before = ("sta",)

    which: tuple[str, ...] = option(KINDS, "attentions to merge: spatial, temporal, cross")
    layers: tuple[int, ...] = option((), "which of each kind, counted from 0; all by default")
    pair: int = option(2, "frames of a group; 1 merges nothing")
    rope_positions: str = option(
        "compact", "positions of merged frames: 0,1,.. or the middle of their group",
        choices=("compact", "centred"),
    )  # fmt: skip
    steps: int = option(0, "merge in the first steps only: keep the rest as a function, `full`")
    force: bool = option(False, "merge even where it costs more than it saves")

    def __post_init__(self) -> None:
        """Validate what needs no model.

        Raises:
            SpecError: A kind is unknown or a number out of range.
        """
        super().__post_init__()
        unknown = [kind for kind in self.which if kind not in KINDS]
        if unknown or not self.which:
            raise SpecError(
                f"tdtm: which={','.join(self.which)} is not one or several of {', '.join(KINDS)}"
            )
        if self.pair < 1:
            raise SpecError(f"tdtm: pair={self.pair} must be at least 1")
        if self.steps < 0 or min(self.layers, default=0) < 0:
            raise SpecError("tdtm: steps and layers must not be negative")

    @property
    def meaning(self) -> Meaning:
        """Exact for groups of one, else another model."""
        return Exact() if self.pair == 1 else Redefines()

    @classmethod
    def identity(cls) -> Self:
        """Groups of one frame."""
        return cls(pair=1)

    def run(self, program: Program, context: Context) -> Change:
        """Rewrite every site that the options name.

        Raises:
            SpecError: With `steps`, there is a function `full` already.
        """
        if is_full(program, self.name):
            return Change(notes=["merges nothing: left as it is"])
        if self.pair == 1:
            return Change(notes=["pair=1 merges nothing"])
        sites, change = find_sites(program), Change()
        for node, reason in sites.refused:
            change.refuse(node, reason)
        if self.steps and sites.found:
            keep_full(program, self.name, "steps is given")
        before, shared = program_cost(program).flops, dict[Any, fx.Node]()
        for site in sites.found:
            why = self._left_alone(site)
            if why:
                change.refuse(site.node, why)
            elif context.limit is None or len(context.taken) < context.limit:
                self._rewrite(program, site, sites, shared, change, context)
        remove_dead(program)
        after = program_cost(program).flops
        if change.sites:
            change.notes.append(_ceiling(before, after, change.count, self.steps))
        program.metadata["tdtm"] = {
            "phase": "merged", "pair": self.pair, "steps": self.steps,
            "sites": [site.node for site in change.sites], "flops": [before, after],
        }  # fmt: skip
        return change

    def _left_alone(self, site: AttentionSite) -> str | None:
        wanted = ("spatial", "temporal") if site.kind == "joint" else (site.kind,)
        if not set(wanted) & set(self.which):
            return f"{site.kind} attention is not in which={','.join(self.which)}"
        if self.layers and site.layer not in self.layers:
            return f"layer {site.layer} ({site.kind}) is not in layers={_by(self.layers)}"
        return None

    def _rewrite(
        self, program: Program, site: AttentionSite, sites: Sites, shared: dict[Any, fx.Node],
        change: Change, context: Context,
    ) -> None:  # fmt: skip
        own = dict(shared)
        rebuild = Rebuild(program, self.pair, _TABLES[self.rope_positions], own)
        node, made_at, name = site.node, origin(site.node), site.node.name
        before = show_nodes(program, [node])
        try:
            merged = merge_attention(rebuild, site, sites.axes)
            metrics = self._worth(merged, site)
        except Refused as reason:
            change.refuse(node, str(reason))
            erase_dead(program, rebuild.made)
            return
        context.take(f"tdtm:{name}")
        shared.update(own)
        for old, new in merged.replacements:
            replace_node(program, old, new, self.name)
        erase_dead(program, merged.old)
        after = show_nodes(program, [new for _, new in merged.replacements])
        ends = merged.replacements[0][1].name
        change.sites.append(Site(ends, made_at, before, after, metrics))

    def _worth(self, merged: Merged, site: AttentionSite) -> dict[str, Any]:
        """What the site costs before and after.

        Raises:
            Refused: It would cost more.
        """
        gone = [*merged.old, *(old for old, _ in merged.replacements)]
        before = sum(node_cost(node).flops for node in gone)
        after = sum(node_cost(node).flops for node in merged.new)
        if after >= before and not self.force:
            raise Refused(
                f"merging {site.frames} frames by {self.pair} would take {after:,} FLOPs in place "
                f"of {before:,}; force=true merges all the same"
            )
        return {
            "kind": site.kind, "layer": site.layer, "frames": site.frames,
            "merged": -(-site.frames // self.pair), "flops_before": before, "flops_after": after,
        }  # fmt: skip


def _ceiling(before: int, after: int, count: int, steps: int) -> str:
    """What arithmetic allows at most."""
    when = f"the first {steps} steps" if steps else "all steps"
    return (
        f"{count} attentions merged: {before / 1e9:.3f} -> {after / 1e9:.3f} GFLOP per evaluation, "
        f"so at most x{before / after:.3f} in {when}; expect less motion"
    )


def _by(values: Any) -> str:
    return ",".join(map(str, values))
