"""Repairs: each leaves the model's meaning and the libraries' state alone, and is needed."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from zoo import ZOO

import resplice
from resplice.compare import difference, worst
from resplice.repairs import CATALOGUE, Repair, applied
from resplice.repairs.tensors import symbolic_linspace

BY_NAME = {repair.name: repair for repair in CATALOGUE}
SHOWS = {
    "traced-tensor-data": "cogvideox",
    "traced-linspace": "mochi",
    "static-experts": "qwen3moe",
    "batched-mochi-attention": "mochi",
}


def test_every_repair_says_what_and_why_and_is_shown_here() -> None:
    assert BY_NAME.keys() == SHOWS.keys()
    for repair in CATALOGUE:
        assert len(repair.what) > 20
        assert len(repair.why) > 80


@pytest.mark.parametrize("name", SHOWS)
def test_a_repaired_model_computes_what_the_unmodified_one_does(name: str) -> None:
    entry, repair = ZOO[SHOWS[name]], BY_NAME[name]
    model = entry.model()
    for sizes in ({}, entry.second):
        args, kwargs = entry.inputs(seed=3, **sizes)
        assert repair.applies(model)
        with torch.no_grad():
            expected = _tensors(model(*args, **kwargs))
            with repair.patch(model):
                actual = _tensors(model(*args, **kwargs))
            again = _tensors(model(*args, **kwargs))
        found = worst([difference(e, a) for e, a in zip(expected, actual, strict=True)])
        assert found.relative < 1e-5, name
        assert all(torch.equal(e, a) for e, a in zip(expected, again, strict=True))


@pytest.mark.parametrize("name", ["traced-tensor-data", "batched-mochi-attention"])
def test_without_the_repair_the_capture_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = tuple(r for r in CATALOGUE if r.name != name)
    monkeypatch.setattr("resplice.repairs.catalogue.CATALOGUE", rest)
    model, args, kwargs, shapes = ZOO[SHOWS[name]]()
    with pytest.raises(resplice.CaptureError):
        resplice.capture(model, resplice.Sample(args, kwargs), dynamic_shapes=shapes)


def test_an_error_while_tracing_restores_everything() -> None:
    from transformers.integrations import moe

    model = ZOO["qwen3moe"].model()
    implementations = set(moe.ALL_EXPERTS_FUNCTIONS)
    configs = [dict(vars(m.config)) for m in model.modules() if hasattr(m, "config")]

    def fail() -> None:
        with applied(model):
            assert set(moe.ALL_EXPERTS_FUNCTIONS) != implementations
            raise RuntimeError("while tracing")

    with pytest.raises(RuntimeError, match="while tracing"):
        fail()
    assert set(moe.ALL_EXPERTS_FUNCTIONS) == implementations
    assert configs == [dict(vars(m.config)) for m in model.modules() if hasattr(m, "config")]


def test_only_repairs_that_changed_something_are_reported() -> None:
    program = resplice.capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    assert "repairs" not in program.metadata


def test_linspace_with_symbolic_steps_equals_torch() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(-1.5, 2.5, x.shape[0])

    program = resplice.capture(Ramp(), (torch.randn(7),), dynamic_shapes={"x": {0: "n"}})
    assert program.metadata["repairs"] == ["traced-linspace"]
    for n in (2, 3, 8, 33):
        x = torch.randn(n)
        torch.testing.assert_close(program(x), Ramp()(x), rtol=1e-6, atol=1e-6)
    assert symbolic_linspace(0, 1, 5) is NotImplemented


def _tensors(output: object) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def test_repairs_are_immutable_records() -> None:
    with pytest.raises(AttributeError):
        BY_NAME["static-experts"].name = "other"  # type: ignore[misc]
    assert isinstance(CATALOGUE[0], Repair)
