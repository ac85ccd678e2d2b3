"""Program: a captured model as a flat FX graph with named inputs, weights, dims and facts.

Invariants (checked by `verify.py`):
- inputs are tensors, one placeholder each; the output is a tuple of tensors;
- weights are `get_attr` nodes whose target is the name in the caller's model;
- the graph is functional: the only writes are trailing `aten.copy_` into a buffer or an input
  (`effects`), which stand for the state the model updates;
- every node carries `meta["val"]`, fake tensors of one fake mode.

Weights share storage with the caller's model until a pass replaces them; the objects are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from resplice import weights
from resplice.calling import CallSpec
from resplice.dims import Dim, Size, expression, shape_text, solve
from resplice.errors import InputError, VerifyError
from resplice.facts import Facts
from resplice.fxtypes import returned_nodes
from resplice.marks import check_marks
from resplice.show import dtype_text

aten = torch.ops.aten


@dataclass(frozen=True)
class Port:
    """One input or output: name, dtype and shape, dynamic sizes by name."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        """`input_ids: i64[batch,seq]`."""
        return f"{self.name}: {dtype_text(self.dtype)}[{','.join(map(str, self.shape))}]"


@dataclass
class Program:
    """A captured model. Copy it before editing: `draft = program.copy()`.

    Attributes:
        module: The graph module; call it with flat tensors in the order of `inputs`.
        call: How the caller's args and kwargs map to the flat tensors and back.
        dims: Named dynamic dimensions with their bounds.
        symbols: Shape-symbol name -> dimension name.
        facts: What is known to hold.
        samples: The captured sample inputs by name (our own copies).
        history: Canonical text of every pass already applied, in order.
        metadata: JSON-able notes that later tools need (position semantics, packing, ...).
        functions: Further functions over the same weights (`main` is this program).
        training: Whether the model was captured in train mode.
    """

    module: fx.GraphModule
    call: CallSpec
    dims: dict[str, Dim] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, Program] = field(default_factory=dict)
    training: bool = False

    # ---- looking -------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """Input nodes in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def output_nodes(self) -> list[fx.Node]:
        """The nodes whose values are returned, in order."""
        return returned_nodes(self.graph)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs with dtype and shape."""
        return tuple(self._port(node.name, node) for node in self.placeholders)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Outputs with dtype and shape, named `output`, or `output_0`, `output_1`, ..."""
        nodes = self.output_nodes
        names = ["output"] if len(nodes) == 1 else [f"output_{i}" for i in range(len(nodes))]
        return tuple(self._port(name, node) for name, node in zip(names, nodes, strict=True))

    @property
    def effects(self) -> list[fx.Node]:
        """Trailing writes into buffers and inputs."""
        return list(self.graph.find_nodes(op="call_function", target=aten.copy_.default))

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake mode all `meta["val"]` belong to."""
        for node in self.placeholders:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise VerifyError("the program has no tensor input, so its shapes can't be inferred")

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """The printed shape of a node's value."""
        return shape_text(node.meta["val"].shape, self.symbols)

    def all_functions(self) -> Iterator[tuple[str, Program]]:
        """`main` first, then the others."""
        yield "main", self
        yield from self.functions.items()

    # ---- weights -------------------------------------------------------------------------

    def weight(self, node_or_name: fx.Node | str) -> torch.Tensor:
        """The tensor behind a `get_attr` node or a name."""
        name = node_or_name if isinstance(node_or_name, str) else str(node_or_name.target)
        return weights.get(self.module, name)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight with its name."""
        return weights.named(self.module)

    def drop_unused_weights(self) -> list[str]:
        """Forget weights that no node reads; returns their names."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        unused = [name for name, _ in list(self.named_weights()) if name not in used]
        for name in unused:
            weights.drop(self.module, name)
        return unused

    # ---- running -------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run like the captured module: same inputs, same output type."""
        tensors = self.call.bind(args, kwargs)
        self.check_inputs(tensors)
        return self.call.restore(self.run(tensors))

    def run(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on flat named tensors; returns the flat outputs."""
        result = self.module(*(tensors[node.name] for node in self.placeholders))
        return tuple(result)

    def run_fresh(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run without gradients on copies of named tensors; returns the outputs by name."""
        with torch.no_grad():
            results = self.run({name: value.clone() for name, value in tensors.items()})
        return dict(zip([port.name for port in self.outputs], results, strict=True))

    def check_inputs(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compare names, dtypes, ranks, sizes, named dims and their bounds with the signature.

        Raises:
            InputError: Something does not fit; says which input, which axis and what was expected;
                or positions were built for other semantics than the program requires.
        """
        bound: dict[Any, int] = {}
        for node, port in zip(self.placeholders, self.inputs, strict=True):
            if node.name not in tensors:
                raise InputError(f"input {node.name} is missing", hint=f"it is {port}")
            _check_input(tensors[node.name], port, node.meta["val"].shape, bound)
        sizes = {str(symbol): value for symbol, value in bound.items()}
        for symbol, value in sizes.items():
            self._check_bounds(symbol, value)
        self._check_names(sizes)
        check_marks(self.metadata, tensors)

    def _check_bounds(self, symbol: str, value: int) -> None:
        dim = self.dims.get(self.symbols.get(symbol, ""))
        if dim is None or dim.admits(value):
            return
        multiple = f"a multiple of {dim.factor}, " if dim.factor > 1 else ""
        raise InputError(
            f"dimension {dim.label} is {value}, must be {multiple}"
            f"{dim.min * dim.factor} to {dim.max * dim.factor if dim.max else 'any'}",
            hint='capture again with wider bounds, such as "seq=2:4096"',
        )

    def _check_names(self, sizes: Mapping[str, int]) -> None:
        """One name is one size, also where torch has a symbol per axis; products follow."""
        known: dict[str, int] = {}
        products: dict[str, int] = {}
        for symbol, value in sizes.items():
            dim = self.dims.get(self.symbols.get(symbol, ""))
            if dim is None:
                continue
            base = value // dim.factor
            chosen = products if "*" in dim.name else known
            if chosen.setdefault(dim.name, base) != base:
                raise InputError(f"dimension {dim.name} is both {chosen[dim.name]} and {base}")
        for name, value in products.items():
            factors = [known.get(part) for part in name.split("*")]
            if None not in factors and math.prod(f for f in factors if f) != value:
                raise InputError(f"dimension {name} is {value}, not the product of {factors}")

    # ---- editing -------------------------------------------------------------------------

    def copy(self, _states: dict[Any, torch.Tensor] | None = None) -> Program:
        """A program whose graph can be edited freely and run on its own.

        Weights stay shared; state that the graph writes is copied, once for all functions.
        """
        states = {} if _states is None else _states
        written = {str(node.all_input_nodes[0].target) for node in self.effects}
        root = nn.Module()
        for name, value in self.named_weights():
            kept = (
                states.setdefault(weights.key(value), value.clone()) if name in written else value
            )
            weights.put(root, name, kept)
        return replace(
            self,
            module=fx.GraphModule(root, copy_graph(self.graph)),
            dims=dict(self.dims),
            symbols=dict(self.symbols),
            metadata=copy.deepcopy(self.metadata),
            functions={name: other.copy(states) for name, other in self.functions.items()},
        )

    def add_input(
        self,
        name: str,
        shape: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        sample: torch.Tensor,
    ) -> fx.Node:
        """Add a tensor input, given by keyword; sizes may be the symbols of other inputs.

        Args:
            name: Name of the new input; a valid Python identifier not in use.
            shape: Its sizes; take dynamic ones from another input's `meta["val"].shape`.
            dtype: Its dtype.
            sample: A value of the captured size, kept for checks.

        Raises:
            InputError: The name is taken.
        """
        if any(node.name == name for node in self.graph.nodes) or not name.isidentifier():
            raise InputError(f"the input name {name!r} is taken or not an identifier")
        with self.graph.inserting_after(self.placeholders[-1]):
            node = self.graph.placeholder(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        self.samples = {**self.samples, name: sample.clone()}
        self.call = replace(self.call, extra=(*self.call.extra, name))
        return node

    def settle_weights(self) -> None:
        """Read each weight once, right before its first use: one order for equal programs."""
        first: dict[str, fx.Node] = {}
        for node in list(self.graph.nodes):
            for weight in [n for n in node.all_input_nodes if n.op == "get_attr"]:
                known = first.setdefault(str(weight.target), weight)
                if known is not weight:
                    node.replace_input_with(weight, known)
                elif min(weight.users) is node:
                    node.prepend(weight)
        for node in [n for n in self.graph.nodes if n.op == "get_attr" and not n.users]:
            self.graph.erase_node(node)

    def sample_tensors(self) -> dict[str, torch.Tensor]:
        """Fresh copies of the sample inputs, safe to hand to a graph that writes its inputs."""
        return {node.name: self.samples[node.name].clone() for node in self.placeholders}

    def _port(self, name: str, node: fx.Node) -> Port:
        value = node.meta["val"]
        return Port(name, value.dtype, shape_text(value.shape, self.symbols))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph, keeping node names and metadata (shallow, so fake values stay shared)."""
    new = fx.Graph()
    seen: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        seen[node] = new.node_copy(node, lambda n: seen[n])
        seen[node].name = node.name
        seen[node].meta = dict(node.meta)
    return new


def _check_input(
    tensor: torch.Tensor,
    port: Port,
    shape: Sequence[int | torch.SymInt],
    bound: dict[Any, int],
) -> None:
    if tensor.dtype != port.dtype:
        raise InputError(
            f"input {port.name} has dtype {dtype_text(tensor.dtype)}",
            where=str(port),
            hint=f"convert it: {port.name}.to({port.dtype})",
        )
    if tensor.dim() != len(shape):
        raise InputError(
            f"input {port.name} has {tensor.dim()} axes, expected {len(shape)}", where=str(port)
        )
    order = sorted(range(len(shape)), key=lambda axis: len(expression(shape[axis]).free_symbols))
    for axis in order:
        if not solve(shape[axis], int(tensor.shape[axis]), bound):
            raise InputError(
                f"input {port.name} has size {tensor.shape[axis]} on axis {axis}, "
                f"expected {port.shape[axis]}",
                where=str(port),
                hint="capture the model with that axis dynamic",
            )
