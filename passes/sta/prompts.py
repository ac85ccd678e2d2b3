"""What a search runs on: inputs recorded at every step, or a prompt whose steps are sampled.

A folder of data holds one prompt per entry:
- `NAME/*.npz`: inputs recorded at every step of a pipeline, in the order of the file names;
- `NAME.npz`: the inputs of one call; with several steps, the video is sampled from noise by the
  model itself (flow matching, Euler steps), the noise being drawn from the seed.
Conditional and unconditional calls of guidance are two prompts.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resplice.errors import UsageError
from resplice.passes.sta.progress import digest_of

Batch = Mapping[str, Tensor]
Steps = Generator[Batch, Sequence[Tensor], None]
"""Yields the inputs of each step, and is sent the model's outputs."""


class Prompt(ABC):
    """Inputs of all steps.

    Attributes:
        count: Number of steps.
        chained: Whether a step's inputs depend on the outputs of the step before.
    """

    count: int
    chained: bool = False

    @abstractmethod
    def steps(self) -> Steps:
        """All steps."""

    @abstractmethod
    def digest(self, step: int) -> str:
        """A checksum of what determines a step's inputs, besides the model."""


class Recorded(Prompt):
    """Inputs that were recorded, in memory or in `.npz` files that are read when needed."""

    def __init__(self, items: Iterable[Batch | Path]) -> None:
        """One item per step."""
        self._items = list(items)
        self.count = len(self._items)

    def steps(self) -> Steps:
        """All steps; outputs are ignored."""
        for number in range(self.count):
            yield self.inputs(number)

    def digest(self, step: int) -> str:
        """A checksum of the step's inputs."""
        return digest_of(self.inputs(step))

    def inputs(self, step: int) -> Batch:
        """The inputs of one step."""
        item = self._items[step]
        return _read(item) if isinstance(item, Path) else item


@dataclass(frozen=True)
class Flow:
    """How a video is sampled: from noise (sigma 1) to the video (sigma 0) along straight lines.

    Attributes:
        steps: Number of steps.
        latent: The input that holds the video, of the shape of the first output.
        timestep: The input that holds 1000 * sigma.
        shift: Of the schedule: sigma' = shift * sigma / (1 + (shift - 1) * sigma).
        seed: Of the noise; prompt number p draws from seed + p.
    """

    steps: int
    latent: str = "hidden_states"
    timestep: str = "timestep"
    shift: float = 1.0
    seed: int = 0

    def sigmas(self) -> Tensor:
        """Float64 [steps + 1], from 1 to 0."""
        even = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return self.shift * even / (1 + (self.shift - 1) * even)


class Sampled(Prompt):
    """Steps that the model itself makes."""

    chained = True

    def __init__(self, inputs: Batch, flow: Flow, number: int = 0) -> None:
        """Start from the inputs of one call; its video only gives the shape of the noise.

        Raises:
            UsageError: There is no such input for the video or for the step.
        """
        for name in (flow.latent, flow.timestep):
            if name not in inputs:
                raise UsageError(
                    f"the inputs have no {name!r} to sample with",
                    hint=f"they are {', '.join(inputs)}: name the video and the step among them",
                )
        self._inputs, self._flow, self._number = dict(inputs), flow, number
        self.count = flow.steps

    def steps(self) -> Steps:
        """Yield the inputs of each step; wants the model's outputs sent back.

        Raises:
            UsageError: The first output has another shape than the video.
        """
        flow, sample = self._flow, self._inputs[self._flow.latent]
        generator = torch.Generator().manual_seed(flow.seed + self._number)
        video = torch.randn(sample.shape, generator=generator).to(sample.dtype)
        clock, sigmas = self._inputs[flow.timestep], flow.sigmas().tolist()
        for now, after in itertools.pairwise(sigmas):
            time = torch.full_like(clock, round(1000 * now) if _whole(clock) else 1000 * now)
            outputs = yield {**self._inputs, flow.latent: video, flow.timestep: time}
            velocity = outputs[0]
            if velocity.shape != video.shape:
                raise UsageError(
                    f"the first output is {list(velocity.shape)}, {flow.latent} "
                    f"{list(video.shape)}: this model can't be sampled",
                    hint="record the inputs of every step instead",
                )
            video = video + (after - now) * velocity

    def digest(self, step: int) -> str:
        """A checksum of the call's inputs and the schedule."""
        return digest_of(self._inputs, self._flow, self._number, step)


def prompts_from(folder: str | Path, flow: Flow | None = None) -> list[Prompt]:
    """Read a folder of data; see the top of this file.

    Args:
        folder: Where the data lie.
        flow: How `NAME.npz` files are sampled; None takes them as single steps.

    Raises:
        UsageError: The folder has no data, or prompts have different numbers of steps.
    """
    found: list[Prompt] = []
    entries = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    for entry in entries:
        if entry.is_dir() and (files := sorted(entry.glob("*.npz"))):
            found.append(Recorded(files))
        elif entry.suffix == ".npz":
            found.append(Sampled(_read(entry), flow, len(found)) if flow else Recorded([entry]))
    if not found:
        raise UsageError(
            f"there are no prompts in {folder}",
            hint="it holds NAME.npz with the inputs of a call, or NAME/*.npz, one file per step",
        )
    return found


def _whole(x: Tensor) -> bool:
    return not x.is_floating_point()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read inputs from {path}: {error}") from error
