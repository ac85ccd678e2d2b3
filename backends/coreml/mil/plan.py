"""A function made ready to run: constants resolved, results numbered, last uses known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from resplice.backends.coreml.mil.constants import Constants, decodable, is_constant
from resplice.backends.coreml.mil.dtypes import Mode, Settle, settle, type_name
from resplice.backends.coreml.mil.registry import Implementation, find
from resplice.backends.coreml.mil.tools import mil_types
from resplice.errors import LoweringError

_PYTHON_TUPLES = {"elem_shape", "begins", "ends", "end_masks"}
Slot = int
"""The number of a variable's value among those of a run."""


@dataclass(frozen=True, slots=True)
class Step:
    """One op, ready to run.

    Attributes:
        op: The PyMIL op.
        function: What executes it.
        fixed: Its constant inputs by name.
        inputs: Its other inputs: name and slot, or slots for a tuple.
        outputs: Slots of its results.
        settles: What rounds each result to its type.
        shapes: Declared sizes of each result, where they are all known.
        blocks: Nested blocks.
        frees: Slots that nothing reads after this step.
    """

    op: Any
    function: Callable[..., Any]
    fixed: dict[str, Any]
    inputs: tuple[tuple[str, Slot | tuple[Slot, ...]], ...]
    outputs: tuple[Slot, ...]
    settles: tuple[Settle | None, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    blocks: tuple[BlockPlan, ...]
    frees: tuple[Slot, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A sequence of steps with inputs and outputs."""

    inputs: tuple[Slot, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class FunctionPlan:
    """A function ready to run.

    Attributes:
        inputs: Slot and MIL type of each tensor input.
        states: Slot of each state input.
        body: The steps.
        initial: One value a slot: constants that steps read by number, else None.
        outputs: Slot and MIL type of each output by name.
    """

    inputs: dict[str, tuple[Slot, str]]
    states: dict[str, Slot]
    body: BlockPlan
    initial: list[Any]
    outputs: dict[str, tuple[Slot, str]]


def unsupported(function: Any) -> list[str]:
    """One line for each op that can't be executed, nested blocks included."""
    return [
        f"op {op.op_type} ({op.name})"
        for op in all_ops(function)
        if op.op_type != "const" and find(op.op_type) is None and not decodable(op.op_type)
    ]


def plan(function: Any, constants: Constants, mode: Mode) -> FunctionPlan:
    """Make a PyMIL function ready to run.

    Raises:
        LoweringError: Ops are not supported; names all of them.
    """
    problems = unsupported(function)
    if problems:
        raise LoweringError(
            "coreml", problems, hint="the interpreter does not know these ops; report them"
        )
    return _Planner(constants, mode).function(function)


def all_ops(block: Any) -> Iterator[Any]:
    """Every op of a function or block, those of nested blocks after the op that holds them."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from all_ops(inner)


class _Planner:
    def __init__(self, constants: Constants, mode: Mode) -> None:
        self._constants = constants
        self._mode = mode
        self._slots: dict[int, Slot] = {}
        self._initial: list[Any] = []

    def function(self, function: Any) -> FunctionPlan:
        """Plan the whole function."""
        names = {name: self._slot(var) for name, var in function.inputs.items()}
        held = {n for n, var in function.inputs.items() if mil_types.is_state(var.sym_type)}
        inputs = {
            name: (names[name], type_name(var))
            for name, var in function.inputs.items()
            if name not in held
        }
        body = self._block(function, tuple(names.values()))
        outputs = {var.name: (self._slot(var), type_name(var)) for var in function.outputs}
        return FunctionPlan(
            inputs, {name: names[name] for name in held}, body, self._initial, outputs
        )

    def _slot(self, var: Any) -> Slot:
        """The number of a variable; a constant's value is put in place."""
        if id(var) not in self._slots:
            self._slots[id(var)] = len(self._initial)
            self._initial.append(self._constants.tensor(var) if is_constant(var) else None)
        return self._slots[id(var)]

    def _block(self, block: Any, inputs: tuple[Slot, ...]) -> BlockPlan:
        steps = [self._step(op) for op in block.operations if not _is_stored(op)]
        outputs = tuple(self._slot(var) for var in block.outputs)
        return BlockPlan(inputs, _with_frees(steps, inputs, outputs), outputs)

    def _step(self, op: Any) -> Step:
        implementation = find(op.op_type)
        assert implementation is not None, op.op_type
        fixed: dict[str, Any] = {}
        inputs: list[tuple[str, Slot | tuple[Slot, ...]]] = []
        for name, value in op.inputs.items():
            if isinstance(value, list | tuple):
                self._tuple_input(name, value, fixed, inputs)
            elif is_constant(value):
                fixed[name] = self._constant(op, name, value)
            else:
                inputs.append((name, self._slot(value)))
        blocks = tuple(
            self._block(inner, tuple(self._slot(var) for var in inner.inputs))
            for inner in op.blocks
        )
        return Step(
            op,
            implementation.function,
            fixed,
            tuple(inputs),
            tuple(self._slot(var) for var in op.outputs),
            tuple(self._settle(implementation, var) for var in op.outputs),
            tuple(_known_shape(var) for var in op.outputs),
            blocks,
        )

    def _tuple_input(
        self,
        name: str,
        value: list[Any] | tuple[Any, ...],
        fixed: dict[str, Any],
        inputs: list[tuple[str, Slot | tuple[Slot, ...]]],
    ) -> None:
        if name in _PYTHON_TUPLES and all(is_constant(var) for var in value):
            fixed[name] = [_python_value(var.val) for var in value]
        else:
            inputs.append((name, tuple(self._slot(var) for var in value)))

    def _constant(self, op: Any, name: str, var: Any) -> Any:
        declared = getattr(op.input_spec.input_types[name], "const", False)
        array = var.val
        textual = isinstance(array, str | list) or np.asarray(array).dtype.kind in "SUO"
        if var.op.op_type == "const" and (textual or (declared and not _is_float_array(array))):
            return _python_value(array)
        return self._constants.tensor(var)

    def _settle(self, implementation: Implementation, var: Any) -> Settle | None:
        if mil_types.is_list(var.sym_type):
            return None
        name = type_name(var)
        return settle(name, "fp32" if implementation.moves else self._mode)


def _is_stored(op: Any) -> bool:
    return bool(op.op_type == "const" or op.op_type.startswith("constexpr_"))


def _is_float_array(value: Any) -> bool:
    return np.ndim(value) > 0 and np.asarray(value).dtype.kind == "f"


def _python_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _known_shape(var: Any) -> tuple[int, ...] | None:
    if not (mil_types.is_tensor(var.sym_type) or mil_types.is_scalar(var.sym_type)):
        return None
    sizes = var.shape
    whole = all(isinstance(size, int | np.integer | float | np.floating) for size in sizes)
    return tuple(int(size) for size in sizes) if whole else None


def _reads(step: Step) -> set[Slot]:
    """Slots that a step or its nested blocks read."""
    found: set[Slot] = set()
    for _, slots in step.inputs:
        found.update(slots if isinstance(slots, tuple) else (slots,))
    for block in step.blocks:
        found.update(block.outputs)
        for inner in block.steps:
            found |= _reads(inner)
    return found


def _with_frees(
    steps: list[Step], inputs: tuple[Slot, ...], outputs: tuple[Slot, ...]
) -> tuple[Step, ...]:
    """Steps that also say which of the block's own values end with them."""
    own = set(inputs).union(*(step.outputs for step in steps)) - set(outputs)
    done: set[Slot] = set()
    result = []
    for step in reversed(steps):
        last = (_reads(step) | set(step.outputs)) & own - done
        done |= last
        result.append(_freeing(step, tuple(sorted(last))))
    return tuple(reversed(result))


def _freeing(step: Step, frees: tuple[Slot, ...]) -> Step:
    return Step(
        step.op, step.function, step.fixed, step.inputs, step.outputs,
        step.settles, step.shapes, step.blocks, frees,
    )  # fmt: skip
