"""How a program is called: the caller's args and kwargs <-> the graph's flat, named tensors.

`bind` takes `(args, kwargs)` exactly as the captured module took them; non-tensor leaves are
constants of the capture and must not change. `restore` gives the captured output type back.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from resplice.errors import InputError

Json = Any


@dataclass(frozen=True)
class Leaf:
    """One leaf of the call: a tensor input by name, or a constant."""

    path: str
    tensor: str | None = None
    constant: Any = None


@dataclass(frozen=True)
class CallSpec:
    """The calling convention of a captured module.

    Attributes:
        parameters: Names of the module's positional parameters, in order.
        leaves: Every leaf of the captured call, by path such as `past[0].key`.
        outputs: A JSON-able description of the output structure (see `describe`).
        extra: Inputs that passes added; given by keyword.
    """

    parameters: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    outputs: Json
    extra: tuple[str, ...] = field(default=())

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Match a call to named tensors.

        Raises:
            InputError: An input is missing, unknown, not a tensor, or a constant has changed.
        """
        given = _flat_call(self.parameters, args, kwargs)
        bound: dict[str, torch.Tensor] = {}
        for name in self.extra:
            bound[name] = _tensor(name, given.pop(name, None))
        for leaf in self.leaves:
            value = given.pop(leaf.path, None)
            if leaf.tensor is not None:
                bound[leaf.tensor] = _tensor(leaf.path, value)
            elif value is not None and not _same(value, leaf.constant):
                shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise InputError(
                    f"{leaf.path}={shown}, but it was captured as {leaf.constant!r}",
                    hint="capture the model again with this value",
                )
        unknown = [path for path, value in given.items() if value is not None]
        if unknown:
            raise InputError(
                f"the captured call had no input {', '.join(unknown)}",
                hint=f"inputs are {', '.join(self.tensor_names)}",
            )
        return bound

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensor inputs."""
        return (*(leaf.tensor for leaf in self.leaves if leaf.tensor), *self.extra)

    def restore(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Rebuild the captured output structure around the flat outputs."""
        return rebuild(self.outputs, iter(tensors))

    def to_json(self) -> Json:
        """A JSON-able form; constants that JSON can't hold are kept as text."""
        return {
            "parameters": list(self.parameters),
            "leaves": [[leaf.path, leaf.tensor, _plain(leaf.constant)] for leaf in self.leaves],
            "outputs": self.outputs,
            "extra": list(self.extra),
        }

    @classmethod
    def from_json(cls, data: Json) -> CallSpec:
        """Read what `to_json` wrote."""
        leaves = tuple(Leaf(path, tensor, constant) for path, tensor, constant in data["leaves"])
        return cls(tuple(data["parameters"]), leaves, data["outputs"], tuple(data["extra"]))


def describe_call(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[Leaf, ...], dict[str, torch.Tensor]]:
    """Flatten a sample call: parameter names, leaves, and the tensors by input name."""
    parameters = _parameter_names(forward, len(args))
    leaves: list[Leaf] = []
    tensors: dict[str, torch.Tensor] = {}
    for path, value in _flat_call(parameters, args, kwargs).items():
        if isinstance(value, torch.Tensor):
            name = _unique(re.sub(r"\W+", "_", path).strip("_"), tensors)
            tensors[name] = value
            leaves.append(Leaf(path, tensor=name))
        else:
            leaves.append(Leaf(path, constant=value))
    return parameters, tuple(leaves), tensors


def describe(value: Any) -> tuple[Json, list[torch.Tensor]]:
    """Describe an output structure in JSON and list its tensors in order.

    Tensors become `"*"`; tuples, lists and dicts are kept; a registered class (transformers'
    `ModelOutput`, diffusers' `BaseOutput`, dataclasses) keeps its import name and field names.
    """
    if isinstance(value, torch.Tensor):
        return "*", [value]
    if value is None or isinstance(value, bool | int | float | str):
        return {"constant": value}, []
    names, children = _children(value)
    parts = [describe(child) for child in children]
    tensors = [tensor for _, found in parts for tensor in found]
    return {"type": _kind(value), "names": names, "items": [part for part, _ in parts]}, tensors


def rebuild(structure: Json, tensors: Any) -> Any:
    """Inverse of `describe`; a class that is not imported here comes back as a dict."""
    if structure == "*":
        return next(tensors)
    if "constant" in structure:
        return structure["constant"]
    items = [rebuild(item, tensors) for item in structure["items"]]
    kind, names = structure["type"], structure["names"]
    if kind in ("builtins:tuple", "builtins:list"):
        return tuple(items) if kind.endswith("tuple") else items
    cls = _imported(kind)
    if kind == _DYNAMIC_CACHE:
        return cls(items) if cls is not None else items
    if cls is not None and names is None:
        whole = issubclass(cls, tuple | list | deque) and not hasattr(cls, "_fields")
        return cls(items) if whole else cls(*items)
    pairs = OrderedDict(zip(names or map(str, range(len(items))), items, strict=True))
    if cls is None or cls is dict:
        return dict(pairs)
    try:
        return cls(**pairs)
    except TypeError:
        return dict(pairs)


_DYNAMIC_CACHE = "transformers.cache_utils:DynamicCache"


def _register_caches() -> None:
    """Let pytree see into transformers' key/value caches, once transformers has been imported."""
    caches = sys.modules.get("transformers.cache_utils")
    if caches is not None and caches.DynamicCache not in pytree.SUPPORTED_NODES:
        integration = importlib.import_module("transformers.integrations.executorch")
        integration.register_dynamic_cache_export_support()


def _kind(value: object) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _children(value: Any) -> tuple[list[str | int] | None, list[Any]]:
    if _kind(value) == _DYNAMIC_CACHE:
        return None, [(layer.keys, layer.values) for layer in value.layers]
    if isinstance(value, Mapping):
        return [k if type(k) is int else str(k) for k in value], list(value.values())
    if isinstance(value, tuple | list):
        return None, list(value)
    if type(value) in pytree.SUPPORTED_NODES:
        children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        return None, list(children)
    if hasattr(value, "__dataclass_fields__"):
        names = list(value.__dataclass_fields__)
        return names, [getattr(value, name) for name in names]
    raise InputError(
        f"the model returned a {type(value).__name__}, which holds tensors in an unknown way",
        hint="return tensors, tuples, dicts or dataclasses, or register it with torch's pytree",
    )


def _imported(kind: str) -> type | None:
    """The class of that name, if it is a container and its module is imported already."""
    module, _, name = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and _is_container(found) else None


def _is_container(cls: type) -> bool:
    """A file may name any class, and making one must not do anything."""
    known = issubclass(cls, tuple | list | dict | deque) or cls in pytree.SUPPORTED_NODES
    return known or hasattr(cls, "__dataclass_fields__")


def _parameter_names(forward: Callable[..., Any], count: int) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return tuple(names)


def _flat_call(
    parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    if len(args) > len(parameters):
        raise InputError(f"{len(args)} positional inputs, at most {len(parameters)} are known")
    call = dict(zip(parameters, args, strict=False))
    twice = call.keys() & kwargs.keys()
    if twice:
        raise InputError(f"input {', '.join(sorted(twice))} is given twice")
    call.update(kwargs)
    _register_caches()
    leaves, _ = pytree.tree_flatten_with_path(call)
    return {_path_text(path): value for path, value in leaves}


def _path_text(path: Sequence[Any]) -> str:
    first, *rest = path
    return str(first.key) + "".join(pytree.keystr((entry,)) for entry in rest)


def _tensor(path: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    got = "is missing" if value is None else f"is a {type(value).__name__}, not a tensor"
    raise InputError(f"input {path} {got}", hint="it was a tensor when the model was captured")


def _same(value: Any, constant: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return False
    return bool(value == constant) or str(value) == str(constant)


def _plain(value: Any) -> Json:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    candidate, count = name or "input", 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate
