"""moe_ffn -> rows sorted by expert, two MatMuls per expert, a gathered sum; or com.microsoft::MoE.

Unrolled, an expert reads only the rows that chose it, and its weights are separate constants that
onnxruntime packs when it loads them. That was the faster one at 1, 16 and 256 tokens on one and two
threads, so "auto" always takes it; `MoE` has the smaller graph. Standard operators only, except
`MoE`. A layer with every expert active, or none, decomposes into its reference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from resplice.backends.onnx.builder import OnnxBuilder
from resplice.backends.onnx.composite import DOMAIN, expands
from resplice.errors import LoweringError
from resplice.kernels.moe_lowering import Choice, Routing, emit_hidden

aten = torch.ops.aten
_FAR = -1e9
_MOE = {(True, "silu"): "swiglu", (False, "silu"): "silu", (False, "relu"): "relu"}


def lower(
    build: OnnxBuilder, x: fx.Node, shared_in: fx.Node | None, shared_in_bias: fx.Node | None,
    shared_out: fx.Node | None, experts_in: fx.Node | None, experts_in_bias: fx.Node | None,
    experts_out: fx.Node | None, out_bias: fx.Node | None, router: fx.Node | None,
    router_bias: fx.Node | None, gate_scale: fx.Node | None, balance: fx.Node | None, active: int,
    activation: str, gated: bool, score: str,
) -> fx.Node | None:  # fmt: skip
    """Replace one moe_ffn.

    Raises:
        LoweringError: `moe_strategy="moe"` can't express the layer, or `portable` forbids it.
    """
    if experts_in is None or experts_out is None or router is None or active == 0:
        return None
    count, width, _ = experts_out.meta["val"].shape
    tokens = build.reshape(x, [-1, x.meta["val"].shape[-1]])
    start = None
    if shared_in is not None:
        z = build(aten.linear.default, tokens, shared_in, shared_in_bias)
        hidden = emit_hidden(build, z, activation, gated)
        start = build(aten.linear.default, hidden, shared_out, out_bias)
    routing = Routing(router, router_bias, gate_scale, balance, active, activation, gated, score)
    choice = routing.choose(build, tokens, count)
    layer = _Layer(build, experts_in, experts_in_bias, experts_out, activation, gated)
    if build.options.moe_strategy == "moe":
        routed = layer.fused(tokens, choice, active)
        base = out_bias if start is None else start
        total = routed if base is None else build(aten.add.Tensor, routed, base)
    else:
        if start is None:
            rows = build.size(tokens, 0)
            kind = x.meta["val"].dtype
            start = build(aten.full.default, [rows, width], 0.0, dtype=kind)
            start = start if out_bias is None else build(aten.add.Tensor, start, out_bias)
        total = layer.unrolled(tokens, choice, start, active)
    return build.reshape(total, [*build.sizes(x)[:-1], width])


class _Layer:
    """The routed experts of one layer."""

    def __init__(
        self, build: OnnxBuilder, weight: fx.Node, bias: fx.Node | None, out: fx.Node,
        activation: str, gated: bool,
    ) -> None:  # fmt: skip
        self.build, self.weight, self.bias, self.out = build, weight, bias, out
        self.activation, self.gated = activation, gated

    def unrolled(self, tokens: fx.Node, choice: Choice, start: fx.Node, active: int) -> fx.Node:
        """One composite node; `_unroll` makes ONNX nodes of it."""
        build, count = self.build, int(self.out.meta["val"].shape[0])
        inputs = [tokens, start, choice.mask]
        inputs += [choice.gates] if choice.gates is not None else []
        inputs += self._parts(self.weight, transposed=True)
        inputs += self._parts(self.bias, transposed=False) if self.bias is not None else []
        inputs += self._parts(self.out, transposed=True)
        return build.onnx(
            f"{DOMAIN}::MoeExperts",
            inputs,
            {"experts": count, "active": active, "activation": self.activation,
             "gated": int(self.gated), "biased": int(self.bias is not None),
             "gates": int(choice.gates is not None),
             "one_token": int(statically_known_true(tokens.meta["val"].shape[0] == 1))},
            sizes=build.sizes(start),
            dtype=start.meta["val"].dtype,
        )  # fmt: skip

    def _parts(self, stacked: fx.Node, *, transposed: bool) -> list[fx.Node]:
        """Each expert's own constant, as MatMul takes it; computed where the stack is."""
        build, count = self.build, int(stacked.meta["val"].shape[0])
        if stacked.op != "get_attr":  # packed codes: onnxruntime folds this when it loads them
            picked = [build(aten.select.int, stacked, 0, number) for number in range(count)]
            return [build(aten.transpose.int, p, 0, 1) for p in picked] if transposed else picked
        value = build.program.weight(stacked).detach()
        parts = value.transpose(1, 2) if transposed else value
        return [
            build.weight(f"{stacked.target}_{number}", part.contiguous())
            for number, part in enumerate(parts)
        ]

    def fused(self, tokens: fx.Node, choice: Choice, active: int) -> fx.Node:
        """com.microsoft::MoE with logits that give every chosen expert 1/A, times A."""
        build, kind = self.build, (self.gated, self.activation)
        problem = self._unfusable(choice)
        if problem:
            raise LoweringError(
                "onnx", [f"com.microsoft::MoE can't express this layer: {problem}"],
                hint="moe_strategy=unrolled",
            )  # fmt: skip
        _, width, size = self.out.meta["val"].shape
        value = tokens.meta["val"].dtype
        logits = build(aten.mul.Scalar, build(aten.logical_not.default, choice.mask), _FAR)
        logits = (
            build(aten.to.dtype, logits, value) if logits.meta["val"].dtype != value else logits
        )
        weight = build.program.weight(self.weight).detach()
        if self.gated:  # gate and up rows alternate
            weight = weight.unflatten(1, (2, size)).transpose(1, 2).flatten(1, 2).contiguous()
        first = build.weight(f"{self.weight.target}_alternating", weight)
        attributes: dict[str, Any] = {"k": active, "activation_type": _MOE[kind]}
        if self.gated:
            attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        made = build.onnx(
            "com.microsoft::MoE", [tokens, logits, first, None, self.out], attributes,
            sizes=[build.size(tokens, 0), width], dtype=value,
        )  # fmt: skip
        return build(aten.mul.Scalar, made, float(active))

    def _unfusable(self, choice: Choice) -> str | None:
        if self.build.options.portable:
            return "it is no standard operator"
        if (self.gated, self.activation) not in _MOE:
            gates = "gated " if self.gated else ""
            return f"its activation is {gates}{self.activation}"
        if choice.gates is not None:
            return "its gates are trained"
        if self.bias is not None:
            return "its experts have biases"
        if any(node.op != "get_attr" for node in (self.weight, self.out)):
            return "its weights are packed"
        width = self.weight.meta["val"].shape[-1]
        return None if self.out.meta["val"].shape[1] == width else "it changes the width"


# ---- after the export --------------------------------------------------------------------


@expands("MoeExperts")
def _unroll(made: tape.Tape, node: ir.Node) -> ir.Value:
    """Start + the results of every expert on the rows that chose it.

    Rows are gathered once, sorted by expert, and divided among the experts: at one token what
    bounds the speed is the number of nodes.
    """
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    count, name = settings["experts"], node.outputs[0].name
    inputs = iter(node.inputs)
    tokens, start, mask = next(inputs), next(inputs), next(inputs)
    gates = next(inputs) if settings["gates"] else None
    groups = [[next(inputs) for _ in range(count)] for _ in range(2 + settings["biased"])]
    assert mask is not None, "experts are always chosen"
    by_expert = made.op("Transpose", [mask], {"perm": [1, 0]})
    flags = made.op("Cast", [by_expert], {"to": ir.DataType.INT64})
    places = made.op("NonZero", [by_expert])
    rows = made.op("Gather", [places, _constant(made, np.array(1), f"{name}_row")], {"axis": 0})
    last = _constant(made, np.array([1]), f"{name}_axis")
    counts = made.op("ReduceSum", [flags, last], {"keepdims": 0})
    sorted_rows = made.op("Gather", [tokens, rows], {"axis": 0})
    parts = made.op_multi_out("Split", [sorted_rows, counts], {"axis": 0}, num_outputs=count)
    results = []
    for number, part in enumerate(parts):
        z = made.op("MatMul", [part, groups[0][number]])
        z = made.op("Add", [z, groups[1][number]]) if settings["biased"] else z
        hidden = _hidden(made, z, settings["activation"], bool(settings["gated"]))
        results.append(made.op("MatMul", [hidden, groups[-1][number]]))
    joined = made.op("Concat", results, {"axis": 0}) if count > 1 else results[0]
    if gates is not None:
        turned = made.op("Transpose", [gates], {"perm": [1, 0]})
        own = made.op("GatherND", [turned, made.op("Transpose", [places], {"perm": [1, 0]})])
        joined = made.op("Mul", [joined, made.op("Unsqueeze", [own, last])])
    if settings["one_token"]:
        first = _constant(made, np.array([0]), f"{name}_first")
        return made.op("Add", [start, made.op("ReduceSum", [joined, first], {"keepdims": 1})])
    index = _places_by_token(made, mask, flags, settings["active"], name or "")
    chosen = made.op("Gather", [joined, index], {"axis": 0})
    return made.op("Add", [start, made.op("ReduceSum", [chosen, last], {"keepdims": 0})])


def _places_by_token(
    made: tape.Tape, mask: ir.Value, flags: ir.Value, active: int, name: str
) -> ir.Value:
    """Where the results of every token lie [T, A] in an order by expert; `flags` is [R, T]."""
    flat = _constant(made, np.array([-1]), f"{name}_flat")
    zero, one = (_constant(made, np.array(n), f"{name}_{n}") for n in (0, 1))
    number = made.op("CumSum", [made.op("Reshape", [flags, flat]), zero])
    sizes = made.op("Shape", [flags])  # there may be no token
    place = made.op("Reshape", [made.op("Sub", [number, one]), sizes], {"allowzero": 1})
    chosen = made.op("Transpose", [made.op("NonZero", [mask])], {"perm": [1, 0]})
    own = made.op("GatherND", [made.op("Transpose", [place], {"perm": [1, 0]}), chosen])
    return made.op("Reshape", [own, _constant(made, np.array([-1, active]), f"{name}_places")])


def _constant(made: tape.Tape, value: np.ndarray[Any, Any], name: str) -> ir.Value:
    return made.initializer(ir.tensor(value, name=name), name=name)


def _scalar(made: tape.Tape, like: ir.Value, number: float) -> ir.Value:
    constant = made.op("Constant", [], {"value": ir.tensor(np.array(number, dtype=np.float32))})
    return made.op("CastLike", [constant, like])


def _hidden(made: tape.Tape, z: ir.Value, activation: str, gated: bool) -> ir.Value:
    if not gated:
        return _activate(made, z, activation)
    gate, up = made.op_multi_out("Split", [z], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    return made.op("Mul", [_activate(made, gate, activation), up])


def _activate(made: tape.Tape, x: ir.Value, activation: str) -> ir.Value:
    if activation == "silu":
        return made.op("Mul", [x, made.op("Sigmoid", [x])])
    if activation == "gelu_sigmoid":
        scaled = made.op("Mul", [x, _scalar(made, x, 1.702)])
        return made.op("Mul", [x, made.op("Sigmoid", [scaled])])
    if activation == "relu_squared":
        positive = made.op("Relu", [x])
        return made.op("Mul", [positive, positive])
    if activation not in ("gelu", "gelu_tanh"):
        return made.op(activation.capitalize(), [x])
    inner = x
    if activation == "gelu_tanh":
        cube = made.op("Mul", [made.op("Mul", [x, x]), x])
        inner = made.op("Add", [x, made.op("Mul", [cube, _scalar(made, x, 0.044715)])])
        bent = made.op("Tanh", [made.op("Mul", [inner, _scalar(made, x, math.sqrt(2 / math.pi))])])
    else:
        bent = made.op("Erf", [made.op("Mul", [x, _scalar(made, x, math.sqrt(0.5))])])
    half = made.op("Mul", [x, _scalar(made, x, 0.5)])
    return made.op("Mul", [half, made.op("Add", [bent, _scalar(made, x, 1.0)])])
