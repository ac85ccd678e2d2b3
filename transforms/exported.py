"""Program <-> torch.export.ExportedProgram, in both directions without tracing again.

`unlift` turns an exported program into our flat graph (weights as `get_attr`, state updates as
trailing `copy_`); `lift` goes back, for saving as `.pt2` and for exporters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from resplice import weights
from resplice.errors import CaptureError
from resplice.fxtypes import input_node, returned, returned_nodes
from resplice.infer import fake_of
from resplice.origin import where
from resplice.program import Program, copy_graph

aten = torch.ops.aten
_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def unlift(
    exported: ExportedProgram,
    input_names: tuple[str, ...],
    rename: Callable[[str], str] = lambda name: name,
) -> fx.GraphModule:
    """Rebuild the exported graph with weights as attributes.

    Args:
        exported: The exported program; its tensors are shared, not copied.
        input_names: New names of the user inputs, in order.
        rename: Maps a weight's exported name to the name we keep.

    Raises:
        CaptureError: The graph holds control flow or objects that no backend understands.
    """
    old, root, graph = exported.graph, nn.Module(), fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    _refuse_unsupported(exported)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = iter(input_names)
    placeholders = [node for node in old.nodes if node.op == "placeholder"]
    for node in (n for n in placeholders if specs[n.name].kind is InputKind.USER_INPUT):
        mapped[node] = graph.placeholder(next(names))
        mapped[node].name = str(mapped[node].target)

    written = [
        node
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
        for node in placeholders
        if _names(specs[node.name], str(spec.target))
    ]

    def value_of(node: fx.Node) -> fx.Node:
        """The new node; a weight is read right before its first use."""
        if node not in mapped:
            name = _free_name(rename(str(specs[node.name].target)))
            if not weights.has(root, name):
                weights.put(root, name, weights.frozen_view(_tensor_of(exported, specs[node.name])))
            mapped[node] = graph.get_attr(name)
            if node in written:  # its old value may be saved for backward; the write comes later
                mapped[node].meta = dict(node.meta)
                mapped[node] = graph.call_function(aten.clone.default, (mapped[node],))
        return mapped[node]

    for node in old.nodes:
        if node.target is aten.clone.default and node.args[0] in written:
            mapped[node] = value_of(input_node(node))  # copied already, by an earlier unlift
        elif node.op not in ("placeholder", "output"):
            mapped[node] = graph.node_copy(node, value_of)
    for value in returned(old):
        if isinstance(value, fx.Node):
            value_of(value)
    for node in written:
        value_of(node)
    for node, new in mapped.items():
        new.meta = dict(node.meta)
    _emit_outputs(exported, graph, mapped, rename)
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(root, graph)


def lift(
    program: Program,
    *,
    extra: Mapping[str, torch.Tensor] | None = None,
    dialect: str = "TRAINING",
) -> ExportedProgram:
    """The program as an ExportedProgram, ready to save or to export.

    Args:
        program: What to lift.
        extra: Further weights to carry along, which the graph does not read.
        dialect: What the exporter expects; our graphs are functional, so they satisfy "ATEN" too.
    """
    graph = copy_graph(program.graph)
    specs = list(_lift_weights(program, graph))
    specs += _extra_specs(program, graph, extra or {})
    users = [n for n in graph.nodes if n.op == "placeholder" and not n.meta.pop("lifted", False)]
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in users]
    outputs = _lift_outputs(graph, {s.arg.name: s for s in specs})
    samples = tuple(program.samples[node.name] for node in users)
    count = len([o for o in outputs if o.kind is OutputKind.USER_OUTPUT])
    root = nn.Module()
    own = {str(s.target) for s in specs if s.target} - set(extra or {})
    state = {**{name: program.weight(name) for name in own}, **(extra or {})}
    exported = ExportedProgram(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=_ranges(program),
        module_call_graph=[ModuleCallEntry("", _call_signature(samples, count))],
        example_inputs=(samples, {}),
        constants={},
        verifiers=[torch._export.verifier.load_verifier(dialect)],
    )
    return _without_guards(exported)


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Inline wrapped regions and turn in-place writes into values, only where there are any."""
    for node in exported.graph.nodes:
        target = node.target
        wrapped = isinstance(target, torch._ops.HigherOrderOperator)
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        if wrapped or writes or _updates_statistics(node):
            plain: ExportedProgram = exported.run_decompositions({})
            return plain
    return exported


def _updates_statistics(node: fx.Node) -> bool:
    """Training-mode batch norm updates its running statistics though its schema hides it."""
    return node.target is aten.batch_norm.default and bool(node.args[5])


def decompose(exported: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
    """Replace the given operators by what their functions compute."""
    return _without_guards(exported.run_decompositions(table))


def _without_guards(exported: ExportedProgram) -> ExportedProgram:
    """Drop guards in terms of the captured wrapper's arguments; range constraints remain."""
    exported._guards_code = []
    return exported


def _lift_weights(program: Program, graph: fx.Graph) -> Iterator[InputSpec]:
    """Turn each distinct weight into one placeholder; tied weights become one."""
    first = next(iter(graph.nodes))
    seen: dict[Any, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        value = program.weight(name)
        key = weights.key(value) if value.numel() else name
        if key not in seen:
            parameter = isinstance(value, nn.Parameter)
            with graph.inserting_before(first):
                lifted = graph.placeholder(("p_" if parameter else "b_") + name.replace(".", "_"))
            lifted.meta = {**node.meta, "lifted": True}
            seen[key] = lifted
            kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
            yield InputSpec(
                kind, TensorArgument(lifted.name), name, persistent=None if parameter else True
            )
        node.replace_all_uses_with(seen[key])
        graph.erase_node(node)


def _extra_specs(
    program: Program, graph: fx.Graph, extra: Mapping[str, torch.Tensor]
) -> Iterator[InputSpec]:
    first = next(n for n in graph.nodes if not n.meta.get("lifted"))
    for name, value in extra.items():
        with graph.inserting_before(first):
            node = graph.placeholder("b_" + name.replace(".", "_"))
        node.meta = {"val": fake_of(program.fake_mode, value), "lifted": True}
        yield InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)


def lift_open(program: Program) -> tuple[ExportedProgram, list[str]]:
    """The program with its weights as inputs, before its own inputs; and the weights' names."""
    graph = copy_graph(program.graph)
    names = [str(spec.target) for spec in _lift_weights(program, graph)]
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    specs = [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in nodes]
    outputs = _lift_outputs(graph, {s.arg.name: s for s in specs})
    values = tuple(n.meta["val"] for n in nodes)
    count = len([o for o in outputs if o.kind is OutputKind.USER_OUTPUT])
    exported = ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={},
        range_constraints=_ranges(program),
        module_call_graph=[ModuleCallEntry("", _call_signature(values, count))],
        constants={},
        verifiers=[torch._export.verifier.load_verifier("TRAINING")],
    )
    return _without_guards(exported), names


def close(
    exported: ExportedProgram, input_names: tuple[str, ...], weight_names: list[str], main: Program
) -> fx.GraphModule:
    """Inverse of `lift_open`: bind the weight inputs to the weights of `main`."""
    hidden = tuple(f"weight_input_{i}" for i in range(len(weight_names)))
    module = unlift(exported, (*hidden, *input_names))
    by_name = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}
    for old, name in zip(hidden, weight_names, strict=True):
        weights.put(module, name, main.weight(name))
        if by_name[old].users:
            with module.graph.inserting_before(min(by_name[old].users)):
                new = module.graph.get_attr(name)
            new.meta = dict(by_name[old].meta)
            by_name[old].replace_all_uses_with(new)
        module.graph.erase_node(by_name[old])
    module.recompile()
    return module


def _lift_outputs(graph: fx.Graph, inputs: dict[str, InputSpec]) -> list[OutputSpec]:
    results: list[fx.Node] = []
    specs: list[OutputSpec] = []
    for node in [n for n in graph.nodes if n.target is aten.copy_.default]:
        target, value = node.args[0], node.args[1]
        assert isinstance(target, fx.Node)
        assert isinstance(value, fx.Node)
        spec = inputs[target.name]
        state = spec.kind is not InputKind.USER_INPUT
        kind = OutputKind.BUFFER_MUTATION if state else OutputKind.USER_INPUT_MUTATION
        specs.append(
            OutputSpec(kind, TensorArgument(value.name), spec.target if state else target.name)
        )
        results.append(value)
        graph.erase_node(node)
    for node in returned_nodes(graph):
        specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None))
        results.append(node)
    graph.output_node().args = (tuple(results),)
    return specs


def _call_signature(samples: tuple[torch.Tensor, ...], outputs: int) -> ModuleCallSignature:
    return ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((samples, {})),
        out_spec=pytree.tree_structure(tuple(range(outputs))),
    )


def _ranges(program: Program) -> dict[Any, ValueRanges[Any]]:
    shape_env = program.fake_mode.shape_env
    found = dict(shape_env.var_to_range) if shape_env else {}
    for symbol in found:
        dim = program.dims.get(program.symbols.get(str(symbol), ""))
        if dim:
            top = int_oo if dim.max is None else dim.max * dim.factor
            found[symbol] = ValueRanges(dim.min * dim.factor, top)
    return found


def _tensor_of(exported: ExportedProgram, spec: InputSpec) -> torch.Tensor:
    found = exported.state_dict.get(str(spec.target))
    value = exported.constants.get(str(spec.target)) if found is None else found
    assert isinstance(value, torch.Tensor), spec
    return value


def _emit_outputs(
    exported: ExportedProgram,
    graph: fx.Graph,
    mapped: dict[fx.Node, fx.Node],
    rename: Callable[[str], str],
) -> None:
    by_target = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    by_name = {old.name: new for old, new in mapped.items()}
    results = []
    specs = exported.graph_signature.output_specs
    for spec, value in zip(specs, returned(exported.graph), strict=True):
        if spec.kind in _MUTATIONS:
            assert isinstance(value, fx.Node), spec
            name = str(spec.target)
            target = by_name.get(name) or by_target[_free_name(rename(name))]
            write = graph.call_function(aten.copy_.default, (target, mapped[value]))
            write.meta = {"val": target.meta["val"]}
        elif isinstance(value, fx.Node):
            results.append(mapped[value])
    graph.output(tuple(results))


def _free_name(name: str) -> str:
    """The name, unless its first part is an attribute of every graph module (`code`, `graph`)."""
    return f"model_{name}" if hasattr(fx.GraphModule, name.partition(".")[0]) else name


def _names(spec: InputSpec, target: str) -> bool:
    return target in (spec.target, spec.arg.name)


def _refuse_unsupported(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.input_specs:
        known = spec.kind in _WEIGHT_KINDS or spec.kind is InputKind.USER_INPUT
        if not known or isinstance(spec.arg, ConstantArgument):
            raise CaptureError(f"the model's input {spec.arg.name} is not a tensor ({spec.kind})")
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the model uses {node.target.name()}, a control-flow op",
                where=where(node),
                hint="capture the branch you need, with inputs that do not decide it",
            )


def drop_metadata_asserts(graph: fx.Graph) -> None:
    """Drop trace-time dtype checks: impure, they would keep replaced subgraphs alive."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
