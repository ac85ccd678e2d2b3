"""videorope: the axis map and the positions of VideoRoPE in place of a model's rotary embedding.

Source: "VideoRoPE: What Makes for Good Video Rotary Position Embedding?", arXiv 2502.05173.

    %3 = aten.mul(%1, %2)                                       f32[3,B,S,N], positions * inv_freq
    %4, %5 = cos, sin of %3; rows picked by sections; twice     f32[B,S,2N]
    %9 = aten.add(x * %4, rotate_half(x) * %5)
      ->
    %9 = resplice.rope3d(x, position_ids, %2, [1,2,1,2,...,0,0,0])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import fx

from resplice.build import Builder
from resplice.change import Change, Site
from resplice.context import Context
from resplice.errors import SpecError
from resplice.facts import Canonical
from resplice.infer import infer
from resplice.kernels.rope3d import rope3d
from resplice.origin import origin
from resplice.pass_base import Exact, Meaning, Pass, Redefines, option
from resplice.passes.canonicalize import remove_dead
from resplice.passes.videorope.canonical import RotarySite, find_sites
from resplice.passes.videorope.curve import oscillation, score_curve
from resplice.passes.videorope.follow import Runner
from resplice.passes.videorope.grid import grid_positions
from resplice.passes.videorope.maps import (
    AxisMap,
    check_section,
    default_section,
    describe,
    interleaved_map,
    lta_by_rank,
    lta_map,
    section_of,
    sectioned_map,
)
from resplice.passes.videorope.positions import Centre, Convention, Semantics
from resplice.passes.videorope.sites import uncast
from resplice.program import Program
from resplice.rules import replace_node
from resplice.show import show_nodes

NEW_INPUT = "rope_positions"
_CURVE_FRAMES, _PLOTTED_FRAMES = 1000, 300


@dataclass(frozen=True)
class VideoRope(Pass):
    """Let the lowest frequencies follow time, and move frames along the diagonal.

    Finds every rotary site by dataflow: plain RoPE (which gets an input `rope_positions`, while
    masks keep the original positions), M-RoPE in sections or interleaved (whose positions are an
    input already), and factorised embeddings of video transformers, whose positions are counted in
    the graph. Left alone, with the reason in the report: vision towers, learned mixtures of axes.

    A language model needs both halves: this pass, and positions from `build_position_ids` with the
    same options; the program's metadata says which. A rewritten checkpoint answers text exactly as
    before and wants fine-tuning for everything else.
    """

    name = "videorope"
    needs = (Canonical,)
    changes_signature = True

    delta: float = option(2.0, "positions between two frames")
    lta: bool = option(True, "low-frequency temporal allocation: time gets the lowest frequencies")
    dl: bool = option(True, "diagonal layout: frames move along all three rows of positions")
    ats: bool = option(True, "adjustable temporal spacing: `delta`; without it 1")
    section: tuple[int, ...] = option((), "angles for t, h, w; by default the model's own")
    centre: Centre = option(
        "code", "spatial offsets of the code or of the paper", choices=("code", "paper")
    )
    convention: Convention = option(
        "padded", "length that `rope_delta` counts from", choices=("padded", "unpadded")
    )

    def __post_init__(self) -> None:
        """Validate what needs no model.

        Raises:
            SpecError: delta is not positive, or the section has not three counts.
        """
        super().__post_init__()
        if not self.delta > 0:
            raise SpecError(f"videorope: delta={self.delta:g} must be positive")
        if self.section and (len(self.section) != 3 or min(self.section) < 0):
            given = ",".join(map(str, self.section))
            raise SpecError(f"videorope: section={given} must be three counts, for t, h and w")

    @property
    def meaning(self) -> Meaning:
        """Exact with all parts off, else another model."""
        return Redefines() if self.lta or self.dl or self.ats else Exact()

    @classmethod
    def identity(cls) -> Self:
        """All three parts off."""
        return cls(lta=False, dl=False, ats=False)

    @property
    def semantics(self) -> Semantics:
        """What positions must mean afterwards."""
        if not self.dl and not self.ats:
            return Semantics("mrope", convention=self.convention)
        return Semantics(
            "videorope", self.delta if self.ats else 1.0, self.dl, self.centre,
            convention=self.convention,
        )  # fmt: skip

    def run(self, program: Program, context: Context) -> Change:
        """Rewrite every site.

        Raises:
            UsageError: `section` does not fit a site.
        """
        if isinstance(self.meaning, Exact):
            return Change(notes=["all parts are off: nothing to do"])
        done = program.metadata.get("videorope")
        if done:
            return Change(notes=[f"already rewritten by {done['pass']}: left as it is"])
        found, change = find_sites(program), Change()
        for node, reason in found.refused:
            change.refuse(node, reason)
        work = _Work(self, program, change)
        for site in found.found:
            if context.take(f"videorope:{site.node.name}"):
                work.rewrite(site)
        if found.found:
            work.finish()
        return change


class _Work:
    """The rewriting of one program."""

    def __init__(self, item: VideoRope, program: Program, change: Change) -> None:
        self.item, self.program, self.change = item, program, change
        self.moved: dict[fx.Node, fx.Node] = {}
        self.input: fx.Node | None = None
        self.semantics = item.semantics
        self._samples: dict[str, torch.Tensor] = {}

    def rewrite(self, site: RotarySite) -> None:
        """One site: all of its rotations."""
        after = self._map(site)
        if site.kind == "rows" and not self.item.lta:
            self.input = site.source
            self.change.notes.append(f"{site.node.name}: axis map kept, only the positions change")
            return
        first = site.tables.applications[0].root
        made_at, name = origin(first), first.name
        before = show_nodes(self.program, sorted(site.tables.first.nodes))
        positions = self._positions(site)
        rows = [site.rows[axis] for axis in after]
        made = [self._apply(site, application, positions, rows)
                for application in site.tables.applications]  # fmt: skip
        self.change.sites.append(
            Site(name, made_at, before, show_nodes(self.program, made[:1]),
                 self._metrics(site, after))
        )  # fmt: skip

    def _apply(self, site: RotarySite, application: Any, positions: fx.Node, rows: Any) -> fx.Node:
        root = application.root
        build = Builder(self.program, root, self.item.name)
        x = self.moved.get(application.x, application.x)
        if x.meta["val"].dtype != root.meta["val"].dtype:
            x = build(torch.ops.aten.to.dtype, x, root.meta["val"].dtype)
        tables = site.tables
        new = build(
            rope3d.overload, x, positions, self._inv_freq(site, build), list(rows),
            tables.scaling, application.pairs, tables.token_axis,
        )  # fmt: skip
        replace_node(self.program, root, new, self.item.name)
        self.moved[root] = new
        return new

    def _inv_freq(self, site: RotarySite, build: Builder) -> fx.Node:
        """The model's own constant where that holds the frequencies as they are."""
        for term in site.tables.terms:
            node = term.frequencies
            own = self.program.weight(node) if node.op == "get_attr" else None
            if own is None or own.dtype != site.inv_freq.dtype or own.dim() != 1:
                continue
            if torch.equal(own, site.inv_freq):
                return build.weight(str(node.target), own)
        return build.constant("videorope.inv_freq", site.inv_freq)

    # ---- maps ----------------------------------------------------------------------------

    def _map(self, site: RotarySite) -> AxisMap:
        if site.kind == "axial":
            return self._ranked(site)
        section = self._section(site)
        if self.item.lta:
            return lta_map(section)
        own = site.kind == "rows" or len(set(site.before)) > 1
        return site.before if own else sectioned_map(section)

    def _section(self, site: RotarySite) -> tuple[int, int, int]:
        angles = len(site.before)
        if self.item.section:
            return check_section(self.item.section, angles)
        own = len(set(site.before)) > 1
        return section_of(site.before) if own else default_section(angles)

    def _ranked(self, site: RotarySite) -> AxisMap:
        """By frequency; angles that are always zero stay out of it."""
        if not self.item.lta:
            return site.before
        moving = [n for n, rate in enumerate(site.inv_freq.tolist()) if rate]
        s_t = sum(site.before[n] == 0 for n in moving)
        if self.item.section:
            s_t = check_section(self.item.section, len(moving))[0]
        found = list(site.before)
        for n, axis in zip(moving, lta_by_rank(site.inv_freq[moving], s_t), strict=True):
            found[n] = axis
        return tuple(found)

    # ---- positions -----------------------------------------------------------------------

    def _positions(self, site: RotarySite) -> fx.Node:
        if site.kind == "axial":
            assert site.lines is not None
            build = Builder(self.program, site.tables.applications[0].root, self.item.name)
            meaning = self.semantics
            return grid_positions(build, site.lines, meaning)
        if site.kind == "rows":
            assert site.source is not None
            self.input = site.source
            return site.source
        if self.input is None or self.input.name != NEW_INPUT:
            self.input = self._new_input(site)
        return self.input

    def _new_input(self, site: RotarySite) -> fx.Node:
        """`rope_positions` [3, B, S]; its sample is the original positions on all rows."""
        application, source = site.tables.applications[0], site.source
        assert source is not None
        value = application.root.meta["val"]
        sizes = (3, value.shape[0], value.shape[site.tables.token_axis])
        runner = Runner(self.program, self.program.samples)
        shape = runner.shape(application.root)
        sample = runner.value(source).to(torch.float32)
        spread = sample.expand(3, shape[0], shape[site.tables.token_axis]).contiguous()
        return self.program.add_input(NEW_INPUT, sizes, torch.float32, spread)

    # ---- afterwards ----------------------------------------------------------------------

    def finish(self) -> None:
        """Drop what is dead, admit fractions, and note what positions must mean."""
        remove_dead(self.program)
        self.program.drop_unused_weights()
        given = self.input if self.input is not None and self.input.op == "placeholder" else None
        whole = float(self.semantics.delta).is_integer() and self.semantics.centre == "code"
        if given is not None and not whole and not given.meta["val"].is_floating_point():
            self._admit_fractions(given)
        for dead in [n for n in self.program.placeholders if not n.users]:
            self.change.notes.append(f"input {dead.name} is not read any more")
        self.program.metadata["videorope"] = {
            "pass": str(self.item), "sites": [site.node for site in self.change.sites],
        }  # fmt: skip
        if self.input is not None:
            self.program.metadata["positions"] = {
                "input": self.input.name, "semantics": str(self.semantics),
                "build": self.semantics.call(), **_fields(self.semantics),
            }  # fmt: skip
            self.change.notes.append(
                f"input {self.input.name} now means {self.semantics}: {self.semantics.call()}"
            )
        self.program.module.recompile()

    def _admit_fractions(self, node: fx.Node) -> None:
        """Make an integer input float32; readers other than the rotation get whole numbers."""
        kind = node.meta["val"].dtype
        others = [user for user in node.users if user.target is not rope3d.overload]
        with self.program.fake_mode:
            node.meta["val"] = torch.empty(tuple(node.meta["val"].shape), dtype=torch.float32)
        samples = self.program.samples
        self.program.samples = {**samples, node.name: samples[node.name].to(torch.float32)}
        for user in others:
            build = Builder(self.program, user, self.item.name)
            user.replace_input_with(node, build(torch.ops.aten.to.dtype, node, kind))
        infer(self.program)
        self.change.notes.append(
            f"input {node.name} is float32 now, since positions have fractions"
        )

    def _metrics(self, site: RotarySite, after: AxisMap) -> dict[str, Any]:
        moving = [n for n, rate in enumerate(site.inv_freq.tolist()) if rate]
        inv_freq = site.inv_freq[moving]
        before, now = ([m[n] for n in moving] for m in (site.before, after))
        step = self.semantics.delta if self.semantics.scheme == "videorope" else 1.0
        curves = [
            score_curve(inv_freq, rows, step=size, frames=_CURVE_FRAMES)
            for rows, size in ((before, 1.0), (now, step))
        ]
        numbers = [oscillation(curve) for curve in curves]
        self._remark(site)
        return {
            "kind": site.kind,
            "axis_map_before": list(site.before),
            "axis_map_after": list(after),
            "rotations": len(site.tables.applications),
            "oscillation": [vars(n) for n in numbers],
            "curves": [curve[: _PLOTTED_FRAMES + 1].tolist() for curve in curves],
            "summary": f"{describe(site.before)} -> {describe(after)}; temporal band over "
            f"{_CURVE_FRAMES} frames: extrema {numbers[0].extrema} -> {numbers[1].extrema}, "
            f"variation {numbers[0].variation:.4g} -> {numbers[1].variation:.4g}, recurrence "
            f"{numbers[0].recurrence:.3f} -> {numbers[1].recurrence:.3f}",
        }

    def _remark(self, site: RotarySite) -> None:
        for term in site.tables.terms:
            stored = uncast(term.frequencies).meta["val"].dtype
            if stored in (torch.bfloat16, torch.float16):
                self.change.notes.append(
                    f"{term.frequencies.name}: frequencies are stored in {stored}, off by up to "
                    "0.4 %; load the model in that dtype instead of casting it"
                )
        if site.kind == "rows" and site.before == interleaved_map(section_of(site.before)):
            self.change.notes.append(
                "interleaved sections (Qwen3-VL): its processor feeds one block per frame with "
                "timestamps between, for which delta has no effect; give whole videos as one grid"
            )


def _fields(semantics: Semantics) -> dict[str, Any]:
    return {name: getattr(semantics, name) for name in semantics.__dataclass_fields__}
