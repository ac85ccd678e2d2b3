"""Options of the Core ML conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from resplice.errors import UsageError

TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
PRECISIONS = ("fp16", "fp32")
MOE_STRATEGIES = ("auto", "gather", "masked", "capacity")
IO_DTYPES = ("fp16", "fp32", "int32")


@dataclass(frozen=True)
class CoremlOptions:
    """How to convert.

    Attributes:
        target: Oldest system that must run the package: iOS16, iOS17, iOS18 or iOS26 (macOS 13,
            14, 15, 26). States, fused attention and several functions need iOS18.
        precision: fp16 (what the Neural Engine computes in; operators that it would break stay
            fp32) or fp32.
        names: Input or output name -> name in the package; others keep theirs.
        dtypes: Input or output name -> fp16, fp32 or int32 at the package's border.
        shapes: Input name -> admissible shapes. Named dynamic sizes become ranges unless an input
            is listed here; Core ML then prepares each shape ahead of time.
        moe_strategy: Experts by "gather" (one token), "masked" or "capacity"; see `moe_ffn.py`.
        moe_capacity: Room of each expert as a multiple of an even share, for "capacity".
        longest: Upper bound of a dynamic size that was captured without one.
    """

    target: Literal["iOS16", "iOS17", "iOS18", "iOS26"] = "iOS18"
    precision: Literal["fp16", "fp32"] = "fp16"
    names: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    moe_strategy: Literal["auto", "gather", "masked", "capacity"] = "auto"
    moe_capacity: float = 2.0
    longest: int = 4096

    def __post_init__(self) -> None:
        """Validate what needs no program.

        Raises:
            UsageError: A value is not one of those listed.
        """
        _one_of("target", self.target, TARGETS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("moe_strategy", self.moe_strategy, MOE_STRATEGIES)
        for name, dtype in self.dtypes.items():
            _one_of(f"dtype of {name}", dtype, IO_DTYPES)
        if self.longest < 1:
            raise UsageError(f"coreml: longest={self.longest} must be positive")

    @property
    def generation(self) -> int:
        """The target's number: 16, 17, 18, 26."""
        return int(self.target.removeprefix("iOS"))


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"coreml: {what} is {value!r}", hint=f"choose {', '.join(choices)}")
