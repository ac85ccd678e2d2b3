"""Provenance: which module and which line of the user's source a node comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_OWN_FRAMES = ("/torch/", "/resplice/", "transforms/capture.py")
KEPT = ("nn_module_stack", "stack_trace", "resplice", "resplice_of")


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: module path, source line, and the pass that made it, if any."""

    module: str
    source: str
    made_by: str = ""

    def __str__(self) -> str:
        """`layers.0.mlp (modeling_llama.py:174, by quest)`."""
        details = ", ".join(
            part for part in (self.source, f"by {self.made_by}" if self.made_by else "") if part
        )
        return f"{self.module or 'model'} ({details})" if details else self.module or "model"


def origin(node: Node) -> Origin:
    """The origin of a node, read from what torch.export recorded."""
    made = node.meta.get("resplice", {})
    return Origin(module_path(node), _source(node.meta.get("stack_trace")), made.get("pass", ""))


def where(node: Node) -> str:
    """One line for error messages: the node and its origin."""
    return f"{node.name} in {origin(node)}"


def inherit(new: Node, old: Node, pass_name: str = "") -> None:
    """Give a new node the provenance of the node it stands for."""
    for key in KEPT:
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]
    if pass_name:
        new.meta["resplice"] = {"pass": pass_name, "from": old.name}


def module_path(node: Node) -> str:
    """Qualified name of the innermost module that ran the node, as in the caller's model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""


def describe_target(node: Node) -> str:
    """`aten.linear` for an ATen overload, `op[resplice.name]`-like text for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def _source(trace: str | None) -> str:
    users = [
        m for m in _FRAME.finditer(trace or "") if not any(own in m["file"] for own in _OWN_FRAMES)
    ]
    if not users:
        return ""
    last = users[-1]
    return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']}"
