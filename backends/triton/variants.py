"""A kernel as it is compiled: its function, the types of its arguments, and its constants."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from resplice.kernels.cuda.launch import Launch


@dataclass(frozen=True)
class Variant:
    """What makes one binary different from another, the target aside.

    Attributes:
        name: The kernel's.
        source: `module:function`.
        signature: Argument -> "*bf16", "i32", "fp32" or "constexpr", in order.
        constants: Values of the "constexpr" ones.
        divisible: Places of the arguments that are multiples of 16 (pointers: aligned to it).
        num_warps: Of a block.
        num_stages: Of the software pipeline.
        function: The kernel itself; not part of the identity.
    """

    name: str
    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    function: Any

    @property
    def identity(self) -> str:
        """A short digest of everything but the function object."""
        parts = [
            self.source, self.signature, [(n, repr(v)) for n, v in self.constants],
            self.divisible, self.num_warps, self.num_stages,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Name of its files and of its manifest entry."""
        return f"{self.name}-{self.identity}"

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """The arguments that are passed at run time, with their types, in order."""
        return tuple((name, kind) for name, kind in self.signature if kind != "constexpr")

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """In the form the compiler takes."""
        return {(place,): [["tt.divisibility", 16]] for place in self.divisible}


def variant_of(launch: Launch) -> Variant:
    """The variant a launch needs.

    Like Triton's own launcher, an integer argument of 1 is compiled in: strides of 1 are what
    makes wide loads possible.
    """
    python = launch.function.fn
    constants = {**launch.constants, **{n: 1 for n, v in launch.arguments.items() if _is_one(v)}}
    order = tuple(launch.function.arg_names)
    signature = {n: "constexpr" if n in constants else k for n, k in launch.signature.items()}
    return Variant(
        launch.name,
        f"{python.__module__}:{python.__qualname__}",
        tuple((name, signature[name]) for name in order),
        tuple((name, constants[name]) for name in order if name in constants),
        tuple(
            sorted(
                place for (place,) in launch.attributes if signature[order[place]] != "constexpr"
            )
        ),
        launch.num_warps,
        launch.num_stages,
        launch.function,
    )


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool | torch.SymInt) and value == 1
