"""The dialect's ops: one declaration holds an op's meaning and everything known about it.

    @op("scale_rows(Tensor x, Tensor scale) -> Tensor", samples=..., cost=...)
    def scale_rows(x, scale):
        return x * scale[:, None]

The decorated function is the reference: plain torch, THE meaning. An op without a lowering for a
backend decomposes into its reference, so every backend supports every op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from resplice.cost import Cost

NAMESPACE = "resplice"
_OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class OpSample:
    """One call of an op for generated tests.

    Attributes:
        label: What it shows ("ragged last group").
        args: Positional arguments.
        refused: For a sample that must raise `OpError`: a part of the message.
        grad: Whether gradients are checked.
    """

    label: str
    args: tuple[Any, ...]
    refused: str = ""
    grad: bool = False


@dataclass
class Op:
    """One op of the dialect.

    Attributes:
        name: Its name in the `resplice` namespace.
        reference: The meaning, in plain torch.
        verify: Raises `OpError` for arguments outside the op's domain.
        cost_rule: FLOPs and bytes from meta tensors.
        fast: A faster implementation of the same meaning, used when called eagerly.
        parameters: Model parameters its packed constants stand for, less their own float entries.
        lowerings: Backend name -> function, or "module:function" loaded on demand. It receives
            the backend's builder first, so this file needs no backend installed.
        samples: Yields good, edge and to-be-refused calls.
        autocast: Under `torch.autocast`, the arguments (by name) that are cast to its dtype first,
            as torch does for its products; the op itself computes in the dtypes it is given. None:
            autocast reaches into the reference.
        rounds: Whether it maps its first argument to levels, so that a last bit decides.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    verify: Callable[..., None] | None = None
    cost_rule: Callable[..., Cost] | None = None
    fast: Callable[..., Any] | None = None
    parameters: Callable[..., int] | None = None
    samples: Callable[[], Iterator[OpSample]] | None = None
    lowerings: dict[str, Callable[..., Any] | str] = field(default_factory=dict)
    autocast: tuple[str, ...] | None = None
    rounds: bool = False
    __doc__: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op eagerly on tensors, with its arguments checked."""
        return self.overload(*args, **kwargs)

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """The registered torch operator."""
        found: torch._ops.OpOverload = getattr(torch.ops.resplice, self.name).default
        return found

    def lower(self, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: declare the lowering to a backend."""

        def declare(function: Callable[..., Any]) -> Callable[..., Any]:
            self.lowerings[backend] = function
            return function

        return declare

    def differentiate(
        self, backward: Callable[..., Any], *, setup: Callable[..., None] | None = None
    ) -> None:
        """Declare the gradient (torch.library's `register_autograd` convention)."""
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", backward, setup_context=setup, lib=_library()
        )


def op(
    schema: str,
    *,
    verify: Callable[..., None] | None = None,
    cost: Callable[..., Cost] | None = None,
    fake: Callable[..., Any] | None = None,
    fast: Callable[..., Any] | None = None,
    parameters: Callable[..., int] | None = None,
    samples: Callable[[], Iterator[OpSample]] | None = None,
    autocast: tuple[str, ...] | None = None,
    rounds: bool = False,
) -> Callable[[Callable[..., Any]], Op]:
    """Register an op: its schema, reference and the rest of its declaration.

    Args:
        schema: `name(Tensor x, int bits) -> Tensor`.
        verify: Raises `OpError` for arguments outside the op's domain.
        cost: FLOPs and bytes of a call, from meta tensors.
        fake: Shape rule; by default the reference itself, run on fake tensors.
        fast: A faster eager implementation of the same meaning.
        parameters: Model parameters its packed constants stand for, less their own float entries.
        samples: Sample calls for the generated tests.
        autocast: Arguments that autocast casts, by name; see `Op`.
        rounds: See `Op`.
    """

    def declare(reference: Callable[..., Any]) -> Op:
        name = schema.partition("(")[0]
        found = Op(
            name, schema, reference, verify, cost, fast, parameters, samples,
            autocast=autocast, rounds=rounds, __doc__=reference.__doc__,
        )  # fmt: skip
        _register(found, fake or reference)
        if autocast is not None:
            _keep_precision(found, autocast)
        _OPS[name] = found
        return found

    return declare


def all_ops() -> dict[str, Op]:
    """Every op registered so far, by name."""
    return dict(_OPS)


def find_op(target: object) -> Op | None:
    """The op behind a node's target, if it is one of ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return _OPS.get(target._schema.name.split("::")[1])
    return None


def _register(found: Op, fake: Callable[..., Any]) -> None:
    library, implementation = _library(), found.fast or found.reference

    def run(*args: Any, **kwargs: Any) -> Any:
        if found.verify is not None:
            found.verify(*args, **kwargs)
        return implementation(*args, **kwargs)

    def shape(*args: Any, **kwargs: Any) -> Any:
        if found.verify is not None:
            found.verify(*args, **kwargs)
        return fake(*args, **kwargs)

    library.define(found.schema)
    library.impl(found.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{found.name}", shape, lib=library)


def _keep_precision(found: Op, casts: tuple[str, ...]) -> None:
    """Cast the named arguments as autocast wants, then run the op with autocast off."""
    names = [argument.name for argument in found.overload._schema.arguments]

    for device in ("CPU", "CUDA"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")

        def run(*args: Any, _device: str = device.lower(), _key: Any = key) -> Any:
            kind = torch.get_autocast_dtype(_device)
            given = [
                value.to(kind) if name in casts and _narrows(value) else value
                for name, value in zip(names, args, strict=False)
            ]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return found.overload(*given)

        _library().impl(found.name, run, f"Autocast{device}")


def _narrows(value: Any) -> bool:
    """Whether autocast touches a value: it leaves float64 alone."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


_libraries: list[torch.library.Library] = []


def _library() -> torch.library.Library:
    if not _libraries:
        _libraries.append(torch.library.Library(NAMESPACE, "FRAGMENT"))
    return _libraries[0]
