"""cmoe: dense feed-forward layers carved into experts, layer by layer, without training.

Source: "CMoE", arXiv 2502.04416; official code JarvisPei/CMoE where paper and code disagree.

    %4 = aten.linear(%3, gate); %5 = aten.silu(%4); %6 = aten.linear(%3, up)
    %7 = aten.mul(%5, %6); %8 = aten.linear(%7, down)
      ->
    %8 = resplice.moe_ffn(%3, shared_in, None, shared_out, experts_in, None, experts_out, None,
                          router, None, gate_scale, balance, 3, silu, True, absolute)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, fx, nn

from resplice.build import Builder
from resplice.change import Change, Site
from resplice.context import Batch, Context
from resplice.cost import node_cost
from resplice.errors import OpError, SpecError, UsageError
from resplice.facts import Canonical, FloatWeights
from resplice.kernels.moe_ffn import moe_ffn
from resplice.origin import origin
from resplice.pass_base import Exact, Meaning, Pass, Redefines, option
from resplice.passes.cmoe.carving import Carving, carve_ffn, validate
from resplice.passes.cmoe.ffn import Ffn
from resplice.passes.cmoe.profile import PROFILES
from resplice.passes.cmoe.quality import measure
from resplice.passes.cmoe.routers import ROUTERS
from resplice.passes.cmoe.sites import FfnSite, Projection, find_ffns
from resplice.program import Program
from resplice.rules import erase_dead, replace_node
from resplice.show import show_nodes
from resplice.stream import Stream

aten = torch.ops.aten
_LAYOUT = re.compile(r"[sS](\d+)[aA](\d+)[eE](\d+)")
SAFE_SHARE = 0.75
"""A smaller share of active neurons needs training: untrained 7B models fell to chance level."""


@dataclass(frozen=True)
class Cmoe(Pass):
    """Carve feed-forward layers into always-on neurons and routed experts.

    Finds SwiGLU and GeGLU (separate or fused), and plain layers with GELU, ReLU and others, with
    biases, by dataflow. Layers are profiled one after the other, on what the carved layers before
    them make of the calibration data; give it as `calibration`, else the sample inputs serve. At
    any time the activations of one layer are held: tokens x width x 4 bytes for its input, a few
    times 32 MiB of neurons, a second copy of its input rows, and 8 n^2 bytes for the assignment of
    n routed neurons. In a `torch.distributed` group every process profiles its own batches, and
    all get the same layers.
    """

    name = "cmoe"
    needs = (Canonical, FloatWeights)

    experts: int = option(8, "experts, shared ones included (E)")
    shared: int = option(3, "experts that are always on, merged into one (S)")
    active: int = option(3, "routed experts per token (A)")
    layout: str = option("", "the three at once, as S3A3E8")
    k_act: int = option(10, "neurons that a calibration token marks")
    router: str = option("analytic", "how tokens choose", choices=ROUTERS)
    profile: str = option("code", "where paper and published code disagree", choices=PROFILES)
    layers: tuple[int, ...] = option((), "layers to carve, counted from 0; all by default")
    calibration: str = option("", "folder of .npz batches, in place of those handed over")
    mask: str = option("attention_mask", "input that is 0 at padding, if there is one of the name")

    def __post_init__(self) -> None:
        """Read `layout` and validate what needs no model.

        Raises:
            SpecError: Numbers of experts do not fit together.
        """
        super().__post_init__()
        if self.layout:
            found = _LAYOUT.fullmatch(self.layout)
            if not found:
                raise SpecError(f"cmoe: layout={self.layout} is not of the form S3A3E8")
            for field, number in zip(("shared", "active", "experts"), found.groups(), strict=True):
                object.__setattr__(self, field, int(number))
            object.__setattr__(self, "layout", "")
        try:
            validate(self.experts, self.shared, self.active)
        except OpError as error:
            raise SpecError(f"cmoe: {error.argument} {error.what.partition(' ')[2]}") from error
        if self.k_act < 1:
            raise SpecError(f"cmoe: k-act={self.k_act} must be positive")

    @property
    def meaning(self) -> Meaning:
        """Exact with every expert active, else another model."""
        return Exact() if self.shared + self.active == self.experts else Redefines()

    @classmethod
    def identity(cls) -> Self:
        """One expert, always on."""
        return cls(experts=1, shared=1, active=0)

    def run(self, program: Program, context: Context) -> Change:
        """Carve every layer, in the order of execution."""
        change = Change()
        if self.shared == self.experts:
            change.notes.append("every neuron is always on: nothing to carve")
            return change
        sites = find_ffns(program)
        for node, reason in sites.refused:
            change.refuse(node, reason)
        batches = self._batches(program, context, change)
        stream = Stream(program, batches)
        for site in context.track(self.name, sites.found):
            why = self._left_alone(site)
            if why:
                change.refuse(site.down.node, why)
            elif context.take(f"{self.name}:{site.down.node.name}"):
                change.sites.append(self._rewrite(program, site, stream, batches, context))
        program.drop_unused_weights()
        self._summarise(change)
        return change

    def _left_alone(self, site: FfnSite) -> str | None:
        if self.layers and site.layer not in self.layers:
            return f"layer {site.layer} is not in layers={','.join(map(str, self.layers))}"
        if site.size <= self.k_act:
            return f"it has {site.size} neurons, k-act={self.k_act} would mark them all"
        if site.size < self.experts:
            return f"it has {site.size} neurons for {self.experts} experts"
        return None

    def _batches(self, program: Program, context: Context, change: Change) -> list[Batch]:
        """Calibration data that fits this function, else its sample inputs."""
        names = {node.name for node in program.placeholders}
        given = _read(self.calibration, program) if self.calibration else context.calibration
        fitting = [batch for batch in given if names <= set(batch)]
        if not fitting:
            change.notes.append(
                "profiled on the sample inputs only: give calibration data for a model to keep"
            )
            return [program.sample_tensors()]
        return list(fitting)

    def _rewrite(
        self, program: Program, site: FfnSite, stream: Stream, batches: Sequence[Batch],
        context: Context,
    ) -> Site:  # fmt: skip
        down, made_at = site.down.node, origin(site.down.node)
        weight = program.weight(site.down.weight)

        def make() -> tuple[str, dict[str, Any], dict[str, Any]]:
            tokens = self._tokens(site, stream, batches)
            return _prefix(site), *self._carve(site.ffn(program), tokens)

        options = (self.name, site.offset, *self.__dict__.values())
        prefix, arguments, metrics = context.once(weight, options, make)
        build = Builder(program, down, self.name)
        old = _between(site)
        before, spent = show_nodes(program, sorted(old)), sum(node_cost(n).flops for n in old)
        new = _insert(build, site, prefix, arguments)
        name = down.name
        replace_node(program, down, new, self.name)
        constants = {n for node in old for n in node.all_input_nodes if n.op == "get_attr"}
        erase_dead(program, [*(old - {down}), *constants])
        now = sum(node_cost(node).flops for node in build.made)
        metrics = {"layer": site.layer, **metrics, "flops_before": spent, "flops_after": now}
        metrics["summary"] = _summary(metrics)
        return Site(name, made_at, before, show_nodes(program, build.made), metrics)

    def _tokens(self, site: FfnSite, stream: Stream, batches: Sequence[Batch]) -> Tensor:
        """The layer's input as the layers before it, already carved, make it: [q, d] float32."""
        place = site.start.all_input_nodes.index(site.x)
        rows = []
        for values, batch in zip(stream.inputs_of(site.start), batches, strict=True):
            x = values[place].reshape(-1, values[place].shape[-1])
            valid = batch.get(self.mask)
            if valid is not None and valid.dim() == 2 and valid.numel() == len(x):
                x = x[valid.reshape(-1) != 0]
            rows.append(x.float() if x.dtype != torch.float64 else x)
        return torch.cat(rows)

    def _carve(self, ffn: Ffn, x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        wide = ffn.to(x.dtype)
        carving = carve_ffn(
            wide, x, experts=self.experts, shared=self.shared, active=self.active,
            k_act=self.k_act, profile=self.profile, router=self.router,
        )  # fmt: skip
        metrics = {
            "neurons": ffn.size, "experts": self.experts, "shared": self.shared,
            "active": self.active, "tokens": carving.markers.tokens,
            "assignment_cost": carving.assignment_cost, "cold_seeds": carving.cold_seeds,
            **measure(carving, x),
        }  # fmt: skip
        return _frozen(carving, ffn.first.dtype), metrics

    def _summarise(self, change: Change) -> None:
        share = (self.shared + self.active) / self.experts
        if change.sites and share < SAFE_SHARE:
            change.notes.append(
                f"warning: {share:.0%} of the neurons are active; below {SAFE_SHARE:.0%} a model "
                "needs recovery training (resplice.passes.cmoe.recovery)"
            )
        cold = sum(site.metrics["cold_seeds"] for site in change.sites)
        if cold:
            change.notes.append(
                f"warning: {cold} clusters grew from a neuron that no token marked: give more "
                "calibration tokens or a larger k-act"
            )
        before, after = (
            sum(site.metrics[key] for site in change.sites)
            for key in ("flops_before", "flops_after")
        )
        if before:
            change.notes.append(
                f"feed-forward FLOPs {before:,} -> {after:,} ({after / before:.1%}) at the "
                "sample sizes"
            )


def _read(folder: str, program: Program) -> list[Batch]:
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise UsageError(f"cmoe: there is no .npz file in calibration={folder}")
    batches = []
    for file in files:
        with np.load(file, allow_pickle=False) as data:
            batches.append({name: torch.from_numpy(data[name]) for name in data.files})
    for batch in batches:
        program.check_inputs(batch)
    return batches


def _frozen(carving: Carving, kind: torch.dtype) -> dict[str, Any]:
    """Arguments as parameters in the model's dtype; what routes stays in float32."""
    found: dict[str, Any] = {}
    for name, value in carving.arguments().items():
        if not isinstance(value, Tensor) or name == "balance":
            found[name] = value
        else:
            routes = name in ("router", "router_bias", "gate_scale")
            own = value.clone() if name == "out_bias" else value
            own = own.float() if routes and kind != torch.float64 else own.to(kind)
            found[name] = nn.Parameter(own.contiguous(), requires_grad=False)
    return found


def _between(site: FfnSite) -> set[fx.Node]:
    """The layer's own nodes: what leads from its input to its result."""
    projections = {site.first.projection.node}
    projections |= {site.second.projection.node} if site.second else set()
    found, stack = {site.down.node, *projections}, [site.down.x]
    others = {node for group in site.others for node in group}
    while stack:
        node = stack.pop()
        if node in found or node in others or node.op != "call_function":
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found


def _insert(build: Builder, site: FfnSite, prefix: str, arguments: dict[str, Any]) -> fx.Node:
    """The carved layer; columns of other values stay a plain product, added to it."""
    values = [
        build.weight(f"{prefix}.{name}", value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    ]
    new = build(moe_ffn.overload, site.x, *values)
    rest = [node for group in site.others for node in group]
    if not rest:
        return new
    matrix = site.down.matrix(build.program)
    kept = torch.cat((matrix[:, : site.offset], matrix[:, site.offset + site.size :]), 1)
    weight = build.weight(f"{prefix}.others", nn.Parameter(kept.contiguous(), requires_grad=False))
    joined = rest[0] if len(rest) == 1 else build(aten.cat.default, rest, -1)
    return build(aten.add.Tensor, _product(build, site.down, joined, weight), new)


def _product(build: Builder, down: Projection, x: fx.Node, weight: fx.Node) -> fx.Node:
    return build(aten.linear.default, x, weight, down.bias)


def _prefix(site: FfnSite) -> str:
    """Where the new weights live: the module that holds both old ones."""
    names = [str(p.weight.target).split(".") for p in (site.first.projection, site.down)]
    common = []
    for a, b in zip(*names, strict=False):
        if a != b:
            break
        common.append(a)
    return ".".join([*common[: min(map(len, names)) - 1], f"cmoe_{site.layer}"])


def _summary(metrics: dict[str, Any]) -> str:
    parts = [
        f"{metrics['neurons']} neurons as S{metrics['shared']}A{metrics['active']}"
        f"E{metrics['experts']}",
        f"expected loss {metrics['loss']:.3f}",
    ]
    if "hit_rate" in metrics:
        parts.append(f"hit rate {metrics['hit_rate']:.2f} (chance {metrics['chance']:.2f})")
        parts.append(f"load {min(metrics['load']):.2f} to {max(metrics['load']):.2f}")
    saved = 1 - metrics["flops_after"] / max(1, metrics["flops_before"])
    parts.append(f"{saved:.0%} of its FLOPs saved")
    assert math.isfinite(metrics["loss"])
    return ", ".join(parts)
