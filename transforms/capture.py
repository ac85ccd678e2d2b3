"""Capture: an unmodified model + sample inputs -> Program, by torch.export.

What is done on the way, and why:
- sample inputs are copied to distinct tensors: export silently merges inputs that are one object;
- everything runs under `no_grad`: else rotary code hides in a higher-order op;
- non-tensor arguments are bound away, and the output is flattened, so the graph has tensors only;
- named dims are declared to torch, which then proves them; derived sizes it suggests are adopted,
  a dim it can't keep dynamic is an error, never silently fixed;
- in-place writes and inlined autocast regions are made functional.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from resplice import repairs, weights
from resplice.calling import CallSpec, Leaf, describe, describe_call
from resplice.dims import Dim, DynamicShapes, per_axis
from resplice.errors import CaptureError, InputError, UsageError
from resplice.exported import drop_metadata_asserts, functional, unlift
from resplice.facts import Facts, FloatWeights
from resplice.program import Program
from resplice.proof import prove
from resplice.quiet import quiet
from resplice.repairs.base import replaced

aten = torch.ops.aten
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_INNER = "captured"


@dataclass(frozen=True)
class Sample:
    """Sample inputs of a model: what you would write in `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, value: object) -> Sample:
        """Read a sample: a tuple is args, a mapping is kwargs, a tensor the only argument."""
        if isinstance(value, Sample):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        if isinstance(value, torch.Tensor):
            return cls((value,), {})
        if isinstance(value, tuple | list):
            return cls(tuple(value), {})
        raise UsageError(
            f"sample inputs are a {type(value).__name__}",
            hint="give a tuple (args), a dict (kwargs) or resplice.Sample(args, kwargs)",
        )


def capture(
    model: nn.Module,
    example_inputs: object,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    repair: bool = True,
    check: bool = True,
) -> Program:
    """Capture a model as a Program.

    Args:
        model: Any module; its train or eval mode is kept. It is not changed.
        example_inputs: A tuple of args, a dict of kwargs, or `Sample(args, kwargs)`. Tensors may
            sit inside lists, tuples, dicts and registered classes.
        dynamic_shapes: Input name -> {axis: "dim name"} (or a tuple over axes); bounds as
            "seq=2:2048". Inputs inside structures are named by path, `past[0]` -> `past_0`.
        repair: Apply the repair catalogue (`resplice.repairs`) while tracing.
        check: Compare with the eager model, at a second size too where sizes are dynamic. Models
            in train mode and random ones are not compared.

    Returns:
        The program; weights share storage with the model.

    Raises:
        CaptureError: torch.export can't capture the model; says where and what to do.
        UsageError: Sample inputs or dynamic shapes are malformed.
    """
    sample = Sample.of(example_inputs)
    parameters, leaves, tensors = describe_call(model.forward, sample.args, sample.kwargs or {})
    _check_constants(leaves)
    if not tensors:
        raise UsageError("the sample inputs hold no tensor", hint="give at least one tensor input")
    dims = _named_dims(dynamic_shapes or {}, tensors)
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    structures: list[Any] = []
    flat = _Flat(model, sample, structures.append)
    with torch.no_grad(), repairs.applied(model, enabled=repair) as effective:
        exported = _export(flat, tuple(copies.values()), dims)
    names = {f"{_INNER}.{name}": name for name, _ in weights.named(model)}
    module = unlift(exported, tuple(copies), lambda n: names.get(n, n.removeprefix(f"{_INNER}.")))
    _shorten_paths(module.graph)
    drop_metadata_asserts(module.graph)
    _own_written_buffers(module)
    program = Program(
        module=module,
        call=CallSpec(parameters, leaves, structures[-1]),
        samples=copies,
        facts=Facts(FloatWeights()) if _all_float(module) else Facts(),
        metadata={"repairs": effective} if effective else {},
        training=model.training,
    )
    _name_symbols(program, dims)
    module.recompile()
    if check and not model.training:
        prove(program, lambda given: _keeping_state(model, sample, tuple(given.values())))
    return program


def model_call(model: nn.Module, sample: Sample, tensors: Sequence[torch.Tensor]) -> Any:
    """Call the model as the sample does, with other tensors in the places of the sample's."""
    given = iter(tensors)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: next(given) if isinstance(leaf, torch.Tensor) else leaf,
        (sample.args, dict(sample.kwargs or {})),
    )
    return model(*args, **kwargs)


def _keeping_state(model: nn.Module, sample: Sample, tensors: Sequence[torch.Tensor]) -> Any:
    """Call the model and put every buffer back to what it was."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        return model_call(model, sample, tensors)
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


class _Flat(nn.Module):
    """Calls the model with constants bound; takes flat tensors, returns flat tensors."""

    def __init__(self, model: nn.Module, sample: Sample, record: Callable[[Any], None]) -> None:
        super().__init__()
        self.captured = model
        self.training = model.training
        self._sample = sample
        self._record = record  # a bound method: export restores every plain attribute afterwards

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        structure, outputs = describe(model_call(self.captured, self._sample, tensors))
        self._record(structure)
        return tuple(outputs)


def _export(
    flat: _Flat, tensors: tuple[torch.Tensor, ...], dims: Mapping[str, Mapping[int, Dim]]
) -> ExportedProgram:
    """Export with named dims; if torch can't prove their relations, with independent ones.

    The second way keeps every dim dynamic as well, but equal names are then equal by contract.
    """
    shapes: Any = tuple(_torch_dims(axes, named=True) for axes in dims.values())
    fixed: list[str] = []
    for _ in range(4):
        try:
            with quiet(), _watching_fixed_sizes(fixed):
                exported = torch.export.export(
                    flat, tensors, dynamic_shapes=(shapes,), strict=False
                )
                return functional(exported)
        except torch._dynamo.exc.UserError as error:
            shapes = _refined(error, shapes, dims, fixed)
        except (InputError, CaptureError):
            raise
        except Exception as error:
            raise _explain(error) from error
    raise CaptureError("torch.export keeps suggesting new dynamic dimensions")


def _refined(
    error: torch._dynamo.exc.UserError,
    shapes: Any,
    dims: Mapping[str, Mapping[int, Dim]],
    lines: Sequence[str],
) -> Any:
    """Adopt derived sizes (`h = 2*_h`) that torch found necessary; refuse fixed ones."""
    text = str(error)
    if "Constraints violated" not in text and "Suggested fixes" not in text:
        raise _explain(error) from error
    fixes = [
        line.strip() for line in text.split("Suggested fixes:")[-1].splitlines() if "=" in line
    ]
    fixed = [line for line in fixes if line.split("=")[-1].strip().isdigit()]
    if fixed:
        raise CaptureError(
            f"the model can't keep these dimensions dynamic: {'; '.join(fixed)}",
            where=lines[0] if lines else _first_reason(text),
            hint="leave them out of dynamic_shapes; a sample size of 1 also fixes a dimension, "
            "so capture with at least 2",
        ) from error
    try:
        (refined,) = refine_dynamic_shapes_from_suggested_fixes(text, (shapes,))
    except Exception:  # torch raises many kinds when it can't read its own advice
        refined = shapes
    independent = tuple(_torch_dims(axes, named=False) for axes in dims.values())
    if refined != shapes:
        return refined
    if shapes == independent:
        raise _explain(error) from error
    return independent


def _explain(error: Exception) -> CaptureError:
    """Turn an export failure into one sentence, the user's source line and a next step."""
    text = str(error).strip()
    line = _user_line(error)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        hint = (
            "the graph would depend on values: pass what is computed there as an input, or capture "
            "the sub-module after it"
        )
    else:
        hint = "run the model eagerly with the same sample inputs; then simplify that line"
    first = text.splitlines()[0] if text else type(error).__name__
    return CaptureError(f"torch.export failed: {first}", where=line, hint=hint)


def _user_line(error: BaseException) -> str:
    """The deepest frame of a traceback outside torch and this package."""
    return _deepest_foreign(traceback.extract_tb(error.__traceback__))


def _deepest_foreign(frames: Iterable[traceback.FrameSummary]) -> str:
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "contextlib")
    found = ""
    for frame in frames:
        if not any(part in frame.filename for part in own):
            found = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return found


@contextmanager
def _watching_fixed_sizes(lines: list[str]) -> Iterator[None]:
    """Note the user's line whenever torch replaces a symbolic size by a number."""
    replace_symbol = ShapeEnv._set_replacement

    def watched(env: ShapeEnv, symbol: Any, target: Any, *rest: Any) -> Any:
        if getattr(target, "is_Integer", False):
            lines.append(_deepest_foreign(traceback.extract_stack()))
        return replace_symbol(env, symbol, target, *rest)

    with replaced(ShapeEnv, "_set_replacement", watched):
        yield


def _first_reason(text: str) -> str:
    reasons = [line.strip(" -") for line in text.splitlines() if "specialized" in line]
    return reasons[0].split(". ")[0] if reasons else ""


def _torch_dims(axes: Mapping[int, Dim], *, named: bool) -> dict[int, Any] | None:
    return {axis: _torch_dim(dim, named) for axis, dim in axes.items()} or None


def _torch_dim(dim: Dim, named: bool) -> Any:
    if not named or "*" in dim.name:
        top = None if dim.max is None else dim.max * dim.factor
        return torch.export.Dim.DYNAMIC(min=dim.min * dim.factor, max=top)
    base = torch.export.Dim(dim.name, min=dim.min, max=dim.max)
    return base if dim.factor == 1 else dim.factor * base


def _named_dims(
    spec: DynamicShapes, tensors: Mapping[str, torch.Tensor]
) -> dict[str, dict[int, Dim]]:
    flat = {
        key: axes for name, item in spec.items() for key, axes in _leaf_specs(name, item, tensors)
    }
    unknown = [name for name in flat if name not in tensors]
    if unknown:
        raise UsageError(
            f"dynamic_shapes names {', '.join(unknown)}, which is no tensor input",
            hint=f"tensor inputs are {', '.join(tensors)}",
        )
    dims = {name: per_axis(flat.get(name)) for name in tensors}
    bounds: dict[str, Dim] = {}
    for name, axes in dims.items():
        for axis, dim in axes.items():
            if not -tensors[name].dim() <= axis < tensors[name].dim():
                raise UsageError(f"dynamic_shapes: {name} has no axis {axis}")
            base = replace(dim, factor=1)
            if bounds.setdefault(dim.name, base) != base:
                raise UsageError(f"dimension {dim.name} has two bounds: {bounds[dim.name]}, {base}")
    return dims


def _leaf_specs(
    name: str, spec: Any, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Any]]:
    """Specs of single tensors: a spec may mirror the structure of its input."""
    nested = any(known.startswith(f"{name}_") for known in tensors)
    if name in tensors or not nested or not isinstance(spec, Mapping | tuple | list):
        yield name, spec
        return
    items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    for key, item in items:
        yield from _leaf_specs(f"{name}_{key}", item, tensors) if item is not None else ()


def _name_symbols(program: Program, dims: Mapping[str, Mapping[int, Dim]]) -> None:
    """Tie each shape symbol to the name the user gave it."""
    for node in program.placeholders:
        for axis, dim in dims[node.name].items():
            size = node.meta["val"].shape[axis]
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"dimension {dim.name} of {node.name} was fixed to {size}")
            whole = size.node.expr
            own = dim if whole.is_Symbol else replace(dim, factor=1)
            program.dims[own.label] = own
            if len(whole.free_symbols) == 1:
                program.symbols.setdefault(str(next(iter(whole.free_symbols))), own.label)


def _check_constants(leaves: Sequence[Leaf]) -> None:
    for leaf in leaves:
        if leaf.tensor is None and not isinstance(leaf.constant, _PLAIN):
            raise CaptureError(
                f"input {leaf.path} is a {type(leaf.constant).__name__}, which may hide tensors",
                hint="pass tensors, plain values, or a class registered with torch's pytree",
            )


def _shorten_paths(graph: fx.Graph) -> None:
    """Name modules as in the caller's model: drop the wrapper from every node's module stack."""
    prefix, done = f"{_INNER}.", {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and id(stack) not in done:
            entries = list(stack.items())[1:]
            done[id(stack)] = (
                stack,
                {
                    key: (path.removeprefix(prefix).removeprefix(_INNER), kind)
                    for key, (path, kind) in entries
                },
            )
        if stack:
            node.meta["nn_module_stack"] = done[id(stack)][1]


def _own_written_buffers(module: fx.GraphModule) -> None:
    """Give the program its own copy of every buffer it writes, so the caller's stay untouched."""
    for node in module.graph.nodes:
        if node.target is aten.copy_.default and node.args[0].op == "get_attr":
            name = str(node.args[0].target)
            weights.put(module, name, copy.deepcopy(weights.get(module, name)))


def _all_float(module: fx.GraphModule) -> bool:
    return all(value.is_floating_point() for value in module.parameters())
