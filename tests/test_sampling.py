"""The sampler: schedule, guidance, the leap and its step counts, and what may be a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resplice
from resplice.errors import UsageError
from resplice.sampling import (
    PRESETS,
    Dynamic,
    Fixed,
    Phased,
    Switched,
    frame_cosine,
    of_artifact,
    sample,
    shift_ratio,
    timesteps,
    whole_cosine,
)

TIMES = timesteps(30, shift_ratio(256, 256, 68))


def test_times_are_those_of_the_formulas() -> None:
    assert shift_ratio(256, 256, 68) == pytest.approx(0.5 * math.sqrt(20))
    assert shift_ratio(512, 512) == 1.0
    assert shift_ratio(192, 192, 16) == shift_ratio(192, 192) == pytest.approx(192 / 512)
    r = 0.5 * math.sqrt(20)
    expected = [1000 * (r * u / (1 + (r - 1) * u)) for u in (1 - i / 30 for i in range(30))]
    assert pytest.approx(expected) == TIMES
    assert timesteps(7) == pytest.approx([1000 * (1 - i / 7) for i in range(7)])
    assert timesteps(7, whole=True) == [1000.0, 857.0, 714.0, 571.0, 429.0, 286.0, 143.0]
    for wrong in ((0, 1.0), (3, 0.0), (3, -1.0), (3, math.nan)):
        with pytest.raises(UsageError, match="must be positive"):
            timesteps(*wrong)
    with pytest.raises(UsageError, match="has no schedule"):
        shift_ratio(0, 256)


class Bending:
    """A velocity field that trembles less and less; counts its calls."""

    def __init__(self, seed: int, rate: float = 0.004) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ends, self.bend = torch.randn(2, 2, 4, 3, 5, 6, generator=generator).double()
        self.rate, self.calls = rate, 0

    def __call__(self, x: Tensor, timestep: Tensor, **more: Tensor) -> Tensor:
        self.calls += 1
        decay = torch.exp(-(1000 - timestep) * self.rate) * torch.cos(timestep / 7)
        turned = self.bend[: len(x)] * decay[:, None, None, None, None]
        return torch.cat((self.ends[: len(x)] - 0.1 * x + turned, 9 * x), 1)


def euler(model: Any, z: Tensor, times: list[float], leap: int | None = None) -> Tensor:
    """Plain Euler written from the formulas; from step `leap` on the velocity is kept."""
    kept = None
    for i, t in enumerate(times):
        step = (t - times[i + 1]) if i + 1 < len(times) else t
        if kept is None or leap is None or i <= leap:
            kept = model(x=z, timestep=z.new_full((len(z),), t))[:, :4]
        z = z + kept * step / 1000
    return z


def noise(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 3, 5, 6, generator=generator).double()


def test_without_a_leap_it_is_plain_euler() -> None:
    found = sample(Bending(1), noise(2), TIMES)
    assert (found.evaluations, found.leaps) == (30, (None, None))
    torch.testing.assert_close(
        found.latents, euler(Bending(1), noise(2), TIMES), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("at", [0, 1, 15, 28, 29])
def test_a_fixed_leap_keeps_the_velocity_for_all_that_is_left(at: int) -> None:
    model = Bending(1)
    found = sample(model, noise(2), TIMES, leap=Fixed(at))
    assert found.evaluations == model.calls == at + 1
    assert found.leaps == (at, at)
    expected = euler(Bending(1), noise(2), TIMES, leap=at)
    torch.testing.assert_close(found.latents, expected, rtol=0, atol=1e-12)


def test_leaping_at_the_last_step_is_plain_euler() -> None:
    found, plain = (sample(Bending(3), noise(4), TIMES, leap=leap) for leap in (Fixed(29), None))
    assert torch.equal(found.latents, plain.latents)


def test_the_published_step_counts() -> None:
    assert sample(Bending(1), noise(2), TIMES, leap="fixed").evaluations == 16

    def straight(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.ones_like(x)

    for name, evaluations in {"fixed": 16, "dynamic": 18, "paper": 19}.items():
        found = sample(straight, noise(0), TIMES, leap=name)
        assert found.evaluations == evaluations, name
        torch.testing.assert_close(found.latents, noise(0) + 1)
    assert PRESETS["dynamic"] == Dynamic(14, 1e-3, 3, frame_cosine)


def dynamic(velocities: list[Tensor], first: int, tolerance: float, patience: int) -> int | None:
    """The published algorithm, on velocities given in advance."""
    best, left = 0.0, patience
    for i in range(1, len(velocities)):
        if i < first:
            continue
        a, b = velocities[i][0, 0], velocities[i - 1][0, 0]
        rows = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]
        cosine = sum(rows) / len(rows)
        if cosine > best + tolerance:
            best, left = cosine, patience
        else:
            left -= 1
        if left == 0:
            return i
    return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [(14, 1e-3, 3), (15, 1e-4, 3), (0, 1e-3, 5), (3, 0.05, 1)])
def test_a_dynamic_leap_is_that_of_the_algorithm(seed: int, rule: tuple[int, float, int]) -> None:
    model, seen = Bending(seed, 0.004), list[Tensor]()

    def watched(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(model(x, timestep)[:, :4].clone())
        return seen[-1]

    sample(watched, noise(seed), TIMES)
    expected = tuple(dynamic([v[i] for v in seen], *rule) for i in range(2))
    found = sample(model, noise(seed), TIMES, leap=Dynamic(*rule))
    assert found.leaps == expected
    steps = [i for i in expected if i is not None]
    assert found.evaluations == (max(steps) + 1 if len(steps) == 2 else 30)


def test_patience_is_restored_by_growth() -> None:
    """Cosines that grow only now and then: a counter that is not restored would leap earlier."""
    angles = [0.0, 0.9, 1.7, 2.5, 3.2, 3.9, 4.6, 5.1, 5.6, 6.1, 6.6]

    def turning(x: Tensor, timestep: Tensor) -> Tensor:
        angle = angles[round(11 - float(timestep[0]) / 1000 * 11)]
        return torch.tensor([math.cos(angle), math.sin(angle)]).expand(1, 1, 1, 1, 2)

    found = sample(turning, torch.zeros(1, 1, 1, 1, 2), timesteps(11), leap=Dynamic(1, 1e-3, 3))
    assert found.leaps == (10,)


def test_samples_do_not_see_each_other() -> None:
    """One after the other, and side by side in a batch."""
    rule = Dynamic(2, 1e-3, 2)
    alone = [sample(Bending(5, 0.003), noise(s), TIMES, leap=rule) for s in (1, 2)]
    in_a_row = [sample(Bending(5, 0.003), noise(s), TIMES, leap=rule) for s in (1, 2)]
    for a, b in zip(alone, in_a_row, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert a.leaps == b.leaps
    fields = (Bending(6, 0.0005), Bending(7, 1.0))

    def both(x: Tensor, timestep: Tensor) -> Tensor:
        pairs = zip(fields, x.split(1), timestep.split(1), strict=True)
        return torch.cat([field(z, t) for field, z, t in pairs])

    together = sample(both, noise(3), TIMES, leap=rule)
    for i, field in enumerate(fields):
        single = sample(field, noise(3)[i : i + 1], TIMES, leap=rule)
        assert together.leaps[i] == single.leaps[0]
        torch.testing.assert_close(together.latents[i], single.latents[0], rtol=0, atol=1e-13)
    assert together.leaps[0] != together.leaps[1]


def test_a_run_that_never_leaps_leaves_nothing_behind() -> None:
    def jumpy(x: Tensor, timestep: Tensor) -> Tensor:
        sign = 1.0 if round(float(timestep[0])) % 2 else -1.0
        return torch.ones_like(x) * sign

    rule = Dynamic(1, 1e-3, 40)
    assert sample(jumpy, noise(1), TIMES, leap=rule).leaps == (None, None)
    first = sample(Bending(1), noise(2), TIMES, leap="dynamic")
    sample(jumpy, noise(1), TIMES, leap=rule)
    second = sample(Bending(1), noise(2), TIMES, leap="dynamic")
    assert torch.equal(first.latents, second.latents)
    assert first.leaps == second.leaps


def test_the_two_cosines() -> None:
    a, b = noise(1)[0], noise(2)[0]
    rows = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a[0, 0], b[0, 0], strict=True)]
    assert frame_cosine(a, b) == pytest.approx(sum(rows) / len(rows))
    assert frame_cosine(a[:, 0], b[:, 0]) == pytest.approx(sum(rows) / len(rows))
    whole = float((a * b).sum() / (a.norm() * b.norm()))
    assert whole_cosine(a, b) == pytest.approx(whole)


# ---- guidance and inputs -----------------------------------------------------------------


def captioned(x: Tensor, timestep: Tensor, y: Tensor, fps: Tensor) -> Tensor:
    assert fps.shape == (1,)
    return torch.cat((y[:, :, None, None, None] * x + fps, x), 1)


def test_guidance_doubles_the_batch_and_mixes_both_halves() -> None:
    y, null, fps = torch.rand(2, 4).double(), torch.rand(2, 4).double(), torch.rand(1).double()
    found = sample(captioned, noise(1), TIMES, {"y": y, "fps": fps}, {"y": null}, guidance=3.0)
    z = noise(1)
    for i, t in enumerate(TIMES):
        length = (t - TIMES[i + 1] if i < 29 else t) / 1000
        with_prompt, without = (captioned(z, z.new_full((2,), t), c, fps)[:, :4] for c in (y, null))
        z = z + (without + 3.0 * (with_prompt - without)) * length
    torch.testing.assert_close(found.latents, z)
    plain = sample(captioned, noise(1), TIMES, {"y": y, "fps": fps})
    same = sample(captioned, noise(1), TIMES, {"y": y, "fps": fps}, {"y": null}, guidance=1.0)
    torch.testing.assert_close(plain.latents, same.latents)


def test_velocities_that_point_to_the_noise() -> None:
    model = Bending(1)
    turned = sample(lambda x, timestep: -model(x, timestep), noise(1), TIMES, towards="noise")
    assert torch.equal(turned.latents, sample(model, noise(1), TIMES).latents)


@pytest.mark.parametrize(
    "wrap",
    [lambda v: (v, 1), lambda v: {"sample": v}, lambda v: SimpleNamespace(sample=v),
     lambda v: v.numpy(), lambda v: [v]],
)  # fmt: skip
def test_models_may_return_what_they_like(wrap: Callable[[Tensor], Any]) -> None:
    model, plain = Bending(1), Bending(1)
    found = sample(lambda x, timestep: wrap(model(x, timestep)), noise(1), TIMES)
    assert torch.equal(found.latents, sample(plain, noise(1), TIMES).latents)


def test_misuse_is_refused() -> None:
    model = Bending(1)
    for times in ([], [1000.0, 1000.0], [10.0, 20.0], [1000.0, 0.0]):
        with pytest.raises(UsageError, match="times must go down"):
            sample(model, noise(1), times)
    with pytest.raises(UsageError, match="unconditional has y"):
        sample(model, noise(1), TIMES, {}, {"y": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"returned shape \[2, 3"):
        sample(lambda x, timestep: x[:, :3], noise(1), TIMES)
    with pytest.raises(UsageError, match="returned nothing"):
        sample(lambda x, timestep: (), noise(1), TIMES)
    with pytest.raises(UsageError, match="there is no leap 'far'"):
        sample(model, noise(1), TIMES, leap="far")
    with pytest.raises(UsageError, match="leap at step 30"):
        sample(model, noise(1), TIMES, leap=Fixed(30))
    with pytest.raises(UsageError, match="patience=0"):
        sample(model, noise(1), TIMES, leap=Dynamic(patience=0))


def test_the_noise_stays_as_it_is_and_keeps_its_dtype() -> None:
    start = noise(1).half()
    before = start.clone()
    found = sample(lambda x, timestep: x.float(), start, TIMES)
    assert found.latents.dtype == torch.float16
    assert torch.equal(start, before)


def test_a_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    shown = sample(Bending(1), noise(1), TIMES, leap=Fixed(3), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "sampling" in err
    assert shown.evaluations == 4


# ---- several models ----------------------------------------------------------------------


def test_models_in_turn() -> None:
    early, late = Bending(1), Bending(2)
    sample(Phased(early, late, 12), noise(1), TIMES)
    assert (early.calls, late.calls) == (12, 18)
    flags = list[bool]()

    def switched(x: Tensor, timestep: Tensor, merge: Tensor) -> Tensor:
        flags.append(bool(merge))
        return x

    sample(Switched(switched, 4), noise(1), TIMES)
    assert flags == [True] * 4 + [False] * 26


class Net(nn.Module):
    """A convolution as velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 8, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B,8,T,H,W]."""
        return self.conv(x) * (1 + timestep[:, None, None, None, None] / 1000)


def test_one_loop_drives_every_artefact(tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    coreml = pytest.importorskip("resplice.backends.coreml")
    net = Net().eval()
    inputs = {"x": torch.randn(2, 4, 3, 5, 6), "timestep": torch.rand(2) * 1000}
    program = resplice.capture(net, inputs)
    eager = sample(net, noise(1).float(), timesteps(5))
    wide = coreml.CoremlOptions(precision="fp32")
    for artifact in (
        onnx.OnnxBackend().lower(program, tmp_path / "m.onnx"),
        coreml.CoremlBackend().lower(program, tmp_path / "m.mlpackage", wide),
    ):
        found = sample(of_artifact(artifact), noise(1).float(), timesteps(5))
        torch.testing.assert_close(found.latents, eager.latents, rtol=1e-4, atol=1e-4)
        named = sample(of_artifact(artifact, output="output"), noise(1).float(), timesteps(5))
        assert torch.equal(named.latents, found.latents)
