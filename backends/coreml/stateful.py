"""The state of a package beside the buffers of the program it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from resplice.backends.coreml.mil.state import State
from resplice.program import Program


def state_name(buffer: str) -> str:
    """The name under which coremltools keeps a buffer: dots become underscores."""
    return re.sub(r"[^A-Za-z0-9_]", "_", buffer)


def buffers_of(program: Program, states: Iterable[str]) -> dict[str, torch.Tensor]:
    """The program's own buffers by the name of their state in the package."""
    written = (str(node.all_input_nodes[0].target) for node in program.effects)
    known = {state_name(name): program.weight(name) for name in written}
    return {name: known[name] for name in states if name in known}


def fill(program: Program, state: State, *, seed: int = 0) -> None:
    """Give both the same state, every element drawn from those that were written so far.

    A few calls from zero leave most of a cache empty, and read little of what they wrote; drawn
    from real values, a state stays within what the program can bring about (a variance positive).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in buffers_of(program, state.tensors).items():
        reached = buffer[buffer != 0].flatten()
        if not len(reached):
            continue
        index = torch.randint(len(reached), tuple(buffer.shape), generator=generator)
        stored = reached[index].to(state.tensors[name].dtype)
        state.tensors[name] = stored
        buffer.copy_(stored)
