"""The sampling loop: Euler steps on a rectified flow, guidance, and a leap where asked for.

Source: Open-Sora v1.2 for loop, shift and guidance; On-device Sora, arXiv 2502.04363, section 4.1
for the leap. One loop drives every artefact, since a model is any callable of named tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resplice.errors import UsageError
from resplice.sampling.leap import Judge, Leap, leap_of
from resplice.sampling.models import Model, Phased, Switched, model_at, velocity_of
from resplice.sampling.schedule import FULL, durations

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sampled:
    """The result of a run.

    Attributes:
        latents: [B,C,...], dtype of the noise.
        evaluations: Model evaluations made, each of the doubled batch under guidance.
        leaps: Per item of the batch: the step at which it leapt, counted from 0, or None.
    """

    latents: Tensor
    evaluations: int
    leaps: tuple[int | None, ...]


def sample(
    model: Model | Phased | Switched,
    noise: Tensor,
    times: list[float],
    condition: Inputs | None = None,
    unconditional: Inputs | None = None,
    *,
    guidance: float = 7.0,
    leap: str | Leap | None = None,
    towards: Literal["data", "noise"] = "data",
    names: tuple[str, str] = ("x", "timestep"),
    progress: bool = False,
) -> Sampled:
    """Integrate from noise to data.

    Every item of the batch is decided on its own and with nothing kept from earlier calls: it gets
    the same result as if it were alone. The model is evaluated until the last item has leapt.

    Args:
        model: Called with the named inputs; see `Phased`, `Switched`, `of_artifact`.
        noise: [B,C,...].
        times: From `schedule.timesteps`.
        condition: Further inputs of the model, such as the caption.
        unconditional: The same without the prompt, for classifier-free guidance: tensors that are
            named in both go to the model as one batch, [condition, unconditional]; those named in
            `condition` only are handed over as they are. None: no guidance.
        guidance: s in v = v_u + s (v_c - v_u); unused without `unconditional`.
        leap: None, a setting, or its name in `PRESETS`.
        towards: What the model's velocity points to: "data" (data - noise) or "noise".
        names: Names of the latents and of the time (float [B], on the scale of 1000) among inputs.
        progress: Show a progress bar on stderr.

    Raises:
        UsageError: There are no times, the two conditions do not fit, or the model returns no
            velocity.
    """
    if not times or any(a <= b for a, b in zip(times, [*times[1:], 0.0], strict=True)):
        raise UsageError("times must go down to the last one above 0", hint="see timesteps()")
    rule, count = leap_of(leap), noise.shape[0]
    judges: list[Judge] = [rule.judge(len(times)) if rule else _never for _ in range(count)]
    given, doubled = _joined(condition or {}, unconditional)
    latents, leaps = noise.clone(), list[int | None]([None] * count)
    lengths, evaluations = durations(times), 0
    with torch.no_grad(), _steps(len(times), progress) as steps:
        for step in steps:
            batch = torch.cat((latents, latents)) if doubled else latents
            clock = batch.new_full((batch.shape[0],), times[step])
            result = model_at(model, step)(**{names[0]: batch, names[1]: clock}, **given)
            velocity = velocity_of(result, noise.shape[1]).to(noise)
            velocity = _guided(velocity, guidance) if doubled else velocity
            velocity = velocity if towards == "data" else -velocity
            evaluations += 1
            for i in [i for i in range(count) if leaps[i] is None]:
                leaps[i] = step if judges[i](step, velocity[i]) else None
                length = lengths[step] if leaps[i] is None else times[step] / FULL
                latents[i] += velocity[i] * length
            if None not in leaps:
                break
    return Sampled(latents, evaluations, tuple(leaps))


def _never(step: int, velocity: Tensor) -> bool:
    return False


def _guided(velocity: Tensor, guidance: float) -> Tensor:
    with_prompt, without = velocity.chunk(2)
    return without + guidance * (with_prompt - without)


def _joined(condition: Inputs, unconditional: Inputs | None) -> tuple[dict[str, Tensor], bool]:
    """The inputs beside latents and time, and whether the batch is doubled."""
    if unconditional is None:
        return dict(condition), False
    unknown = sorted(set(unconditional) - set(condition))
    if unknown:
        raise UsageError(f"unconditional has {', '.join(unknown)}, which condition has not")
    both = {name: torch.cat((condition[name], other)) for name, other in unconditional.items()}
    return {**condition, **both}, True


@contextmanager
def _steps(count: int, progress: bool) -> Iterator[Iterable[int]]:
    """0, 1, ... with a progress bar on stderr where wanted."""
    if not progress:
        yield range(count)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=count)

        def told() -> Iterator[int]:
            for step in range(count):
                yield step
                bar.advance(task)

        yield told()
        bar.update(task, completed=count)
