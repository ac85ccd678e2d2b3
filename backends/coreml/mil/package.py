"""An `.mlpackage` loaded on any machine: its MIL program and what its interface declares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError

from resplice.backends.coreml.mil.constants import Constants
from resplice.backends.coreml.mil.tools import coremltools, load_program, silent
from resplice.errors import UsageError

_DECLARED = {
    "FLOAT32": torch.float32,
    "FLOAT16": torch.float16,
    "DOUBLE": torch.float64,
    "INT32": torch.int32,
    "INT8": torch.int8,
}


_OTHER = {"int64Type": torch.int64, "stringType": torch.int64}
"""Types of a classifier's label, which is returned as a position; the rest are floats."""


@dataclass(frozen=True)
class TensorDescription:
    """What a model declares of one input, output or state.

    Attributes:
        name: As callers use it.
        dtype: Declared element type.
        shape: Declared (for flexible shapes: default) sizes; empty if none are declared.
        ranges: Smallest and largest size of each axis; None for the largest means no limit.
            Empty if the shape is fixed or enumerated.
        choices: All allowed shapes, if they are enumerated.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int | None], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        if self.choices:
            return shape in self.choices
        if not self.ranges:
            return shape == self.shape
        return len(shape) == len(self.ranges) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def describe(self) -> str:
        """The allowed shapes as text: `[1, 2..8, 4..]` or `[1, 2] or [1, 4]`."""
        if self.choices:
            return " or ".join(str(list(choice)) for choice in self.choices)
        if not self.ranges:
            return str(list(self.shape))
        parts = (
            str(low) if low == high else f"{low}..{'' if high is None else high}"
            for low, high in self.ranges
        )
        return f"[{', '.join(parts)}]"


@dataclass
class MilPackage:
    """A saved mlprogram.

    Attributes:
        path: Where it was loaded from.
        program: The PyMIL program.
        functions: Names of its functions, the default one first.
        default: The function that runs if none is named.
        metadata: What its maker stored besides: user-defined texts by key.
        constants: Weights that were already decoded, shared by all its interpreters.
    """

    path: Path
    program: Any
    functions: tuple[str, ...]
    default: str
    metadata: dict[str, str]
    constants: Constants = field(default_factory=Constants, repr=False)
    _description: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> MilPackage:
        """Load a package.

        Args:
            path: Any saved `.mlpackage` that holds an mlprogram.

        Raises:
            UsageError: There is no such package, it is damaged, or it holds another kind of model.
            BackendMissing: coremltools is not installed.
        """
        place = Path(path)
        if not place.exists():
            raise UsageError("there is no such model", where=str(place), hint="check the path")
        with silent():
            model = _read(place)
            spec = model.get_spec()
            kind = spec.WhichOneof("Type")
            if kind != "mlProgram":
                raise UsageError(
                    f"the model is a {kind or 'model of unknown type'}, not an mlprogram",
                    where=str(place),
                    hint="convert it with convert_to='mlprogram'",
                )
            program = _load(spec, model.weights_dir, place)
        description = spec.description
        default = description.defaultFunctionName or "main"
        names = sorted(program.functions, key=lambda name: name != default)
        metadata = dict(description.metadata.userDefined)
        return cls(place, program, tuple(names), names[0], metadata, _description=description)

    def inputs(self, function: str | None = None) -> tuple[TensorDescription, ...]:
        """What a function takes, states aside."""
        found = self._interface(function).input
        own = self._function(function).inputs
        return tuple(_describe(item, own.get(item.name)) for item in found)

    def outputs(self, function: str | None = None) -> tuple[TensorDescription, ...]:
        """What a function returns."""
        names = {var.name: var for var in self._function(function).outputs}
        found = self._interface(function).output
        return tuple(_describe(item, names.get(item.name)) for item in found)

    def states(self, function: str | None = None) -> tuple[TensorDescription, ...]:
        """The state a function reads and writes."""
        return tuple(
            TensorDescription(
                item.name,
                _DECLARED[_type_of(item.type.stateType.arrayType)],
                tuple(item.type.stateType.arrayType.shape),
            )
            for item in self._interface(function).state
        )

    def function_name(self, function: str | None) -> str:
        """The name of a function, the default's for None.

        Raises:
            UsageError: There is no such function.
        """
        name = self.default if function is None else function
        if name not in self.functions:
            raise UsageError(
                f"there is no function {name!r}",
                where=str(self.path),
                hint=f"functions are {', '.join(self.functions)}",
            )
        return name

    def _function(self, function: str | None) -> Any:
        return self.program.functions[self.function_name(function)]

    def _interface(self, function: str | None) -> Any:
        name = self.function_name(function)
        described = {item.name: item for item in self._description.functions}
        return described.get(name, self._description)


def _read(place: Path) -> Any:
    try:
        return coremltools.models.MLModel(str(place), skip_model_load=True)
    except (OSError, ValueError, RuntimeError, KeyError, DecodeError) as error:
        raise UsageError(
            f"the model can't be read: {error}",
            where=str(place),
            hint="give an .mlpackage that coremltools or Xcode saved",
        ) from error


def _load(spec: Any, weights: str, place: Path) -> Any:
    try:
        return load_program(spec, spec.specificationVersion, weights)
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise UsageError(f"its program can't be read: {error}", where=str(place)) from error


def _type_of(array: Any) -> str:
    kinds = type(array).ArrayDataType
    return str(kinds.Name(array.dataType))


def _describe(item: Any, var: Any) -> TensorDescription:
    """One entry of the interface; what it leaves open is taken from the program's variable."""
    kind = item.type.WhichOneof("Type")
    if kind != "multiArrayType":
        image = kind == "imageType" and var is not None
        shape = _fixed(var.shape) if image else ()
        return TensorDescription(item.name, _OTHER.get(kind, torch.float32), shape)
    array = item.type.multiArrayType
    dtype, shape = _DECLARED[_type_of(array)], tuple(array.shape)
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "enumeratedShapes":
        choices = tuple(tuple(each.shape) for each in array.enumeratedShapes.shapes)
        return TensorDescription(item.name, dtype, shape, choices=choices)
    if flexible == "shapeRange":
        ranges = tuple(_range(each) for each in array.shapeRange.sizeRanges)
        return TensorDescription(item.name, dtype, shape, ranges)
    return TensorDescription(item.name, dtype, shape)


def _range(limits: Any) -> tuple[int, int | None]:
    high = limits.upperBound
    return int(limits.lowerBound), None if high < 0 else int(high)


def _fixed(shape: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(size) if isinstance(size, int) else 1 for size in shape)
