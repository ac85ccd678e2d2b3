"""Execute a MIL function with torch, op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from resplice.backends.coreml.mil.dtypes import Mode, settle
from resplice.backends.coreml.mil.package import MilPackage, TensorDescription
from resplice.backends.coreml.mil.plan import BlockPlan, Step, plan
from resplice.backends.coreml.mil.state import State, StateCell
from resplice.errors import InputError

Observe = Callable[[Any, Sequence[Any]], None]
"""Called after each op with the PyMIL op and its results (tensors, or lists of tensors)."""


class Interpreter:
    """Runs one function of a package.

    Arithmetic is in float32. Mode `declared` rounds every result to its declared type, as a device
    that stores fp16 must; mode `fp32` does not, so that what remains is the lowering's own fault.

    Args:
        package: The loaded package.
        function: Which of its functions; the default one if None.
        mode: What becomes of fp16 results.

    Raises:
        UsageError: There is no such function.
        LoweringError: Ops are not supported; names all of them.
    """

    def __init__(
        self, package: MilPackage, function: str | None = None, *, mode: Mode = "declared"
    ) -> None:
        self.package = package
        self.function = package.function_name(function)
        self.mode: Mode = mode
        self._plan = plan(package.program.functions[self.function], package.constants, mode)
        self._inputs = {each.name: each for each in package.inputs(self.function)}
        self._states = {each.name: each for each in package.states(self.function)}
        self._outputs = {each.name: each for each in package.outputs(self.function)}

    def make_state(self) -> State:
        """A fresh state, all zeros."""
        return State(
            {
                name: torch.zeros(each.shape, dtype=self._state_dtype(each))
                for name, each in self._states.items()
            }
        )

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        state: State | None = None,
        *,
        observe: Observe | None = None,
    ) -> dict[str, torch.Tensor]:
        """Execute the function once.

        Args:
            inputs: Tensors by input name; floats of any width for float inputs, integers or
                booleans for integer inputs.
            state: What `make_state` returned; updated by the run. Another function's state will
                do if it holds the same names.
            observe: Called after each op.

        Returns:
            Tensors by output name in the declared dtypes. A classifier's label comes as the
            position of the class.

        Raises:
            InputError: An input is missing, unknown, or of the wrong kind or shape; the function
                needs a state and got none.
        """
        values = self._plan.initial.copy()
        self._bind_inputs(inputs, values)
        self._bind_states(state, values)
        with torch.no_grad():
            _run_block(self._plan.body, values, observe)
            return {
                name: self._declared(name, values[slot])
                for name, (slot, _) in self._plan.outputs.items()
            }

    def _bind_inputs(self, inputs: Mapping[str, torch.Tensor], values: list[Any]) -> None:
        unknown = [name for name in inputs if name not in self._plan.inputs]
        missing = [name for name in self._plan.inputs if name not in inputs]
        if unknown or missing:
            raise self._refusal(
                "; ".join(
                    f"input {', '.join(names)} is {what}"
                    for names, what in ((missing, "missing"), (unknown, "unknown"))
                    if names
                ),
                f"inputs are {', '.join(self._plan.inputs)}",
            )
        for name, (slot, kind) in self._plan.inputs.items():
            value = self._checked(self._inputs[name], inputs[name])
            rounded = settle(kind, self.mode)
            values[slot] = value if rounded is None else rounded(value)

    def _checked(self, wanted: TensorDescription, value: torch.Tensor) -> torch.Tensor:
        floats = wanted.dtype.is_floating_point
        if value.dtype.is_floating_point != floats or value.dtype.is_complex:
            raise self._refusal(
                f"input {wanted.name} is {_short(value.dtype)}, declared is {_short(wanted.dtype)}",
                f"pass {'floats' if floats else 'integers'}",
            )
        if not wanted.accepts(tuple(value.shape)):
            raise self._refusal(
                f"input {wanted.name} has shape {list(value.shape)}, "
                f"declared is {wanted.describe()}",
                "pass a tensor of a declared shape",
            )
        return value.detach().cpu()

    def _bind_states(self, state: State | None, values: list[Any]) -> None:
        held = {} if state is None else state.tensors
        lacking = [name for name in self._plan.states if name not in held]
        if lacking:
            raise self._refusal(
                f"the function keeps state ({', '.join(lacking)}), which was not given",
                "pass state=interpreter.make_state(), and the same one to the next call",
            )
        for name, slot in self._plan.states.items():
            wanted, found = self._states[name], held[name]
            if tuple(found.shape) != wanted.shape:
                raise self._refusal(
                    f"state {name} has shape {list(found.shape)}, declared is {list(wanted.shape)}",
                    "pass a state that make_state returned",
                )
            assert state is not None
            values[slot] = StateCell(state, name)

    def _state_dtype(self, described: TensorDescription) -> torch.dtype:
        keep = self.mode == "declared" or not described.dtype.is_floating_point
        return described.dtype if keep else torch.float32

    def _declared(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """An output as callers get it: its declared dtype, and no part of another tensor."""
        described = self._outputs.get(name)
        dtype = value.dtype if described is None else described.dtype
        return value.to(dtype, copy=True)

    def _refusal(self, what: str, hint: str) -> InputError:
        return InputError(what, where=f"{self.package.path}, function {self.function}", hint=hint)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run_block(
    block: BlockPlan, values: list[Any], observe: Observe | None, *arguments: Any
) -> tuple[Any, ...]:
    """Execute the steps of a block; `values` holds one value a slot and is changed."""
    for slot, value in zip(block.inputs, arguments, strict=False):
        values[slot] = value
    for step in block.steps:
        results = _execute(step, values, observe)
        for slot, value in zip(step.outputs, results, strict=True):
            values[slot] = value
        if observe is not None:
            observe(step.op, results)
        for slot in step.frees:
            values[slot] = None
    return tuple(values[slot] for slot in block.outputs)


def _execute(step: Step, values: list[Any], observe: Observe | None) -> list[Any]:
    given = dict(step.fixed)
    for name, slot in step.inputs:
        given[name] = [values[s] for s in slot] if isinstance(slot, tuple) else values[slot]
    if step.blocks:
        given["blocks"] = tuple(partial(_run_block, b, values, observe) for b in step.blocks)
    try:
        found = step.function(**given)
    except InputError as error:
        where = error.where or f"op {step.op.op_type} ({step.op.name})"
        raise InputError(error.what, where=where, hint=error.hint) from error
    results = list(found) if isinstance(found, tuple) else [found]
    for at, (settled, shape) in enumerate(zip(step.settles, step.shapes, strict=True)):
        if settled is not None:
            results[at] = settled(results[at])
            assert shape is None or results[at].shape == shape, (
                f"{step.op.op_type} {step.op.name}: {list(results[at].shape)}, not {list(shape)}"
            )
    return results
