"""MODEL as text: factories, local Hugging Face folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import resplice
from resplice.errors import BackendMissing, CaptureError, UsageError
from resplice.sources import hugging_face, load_model


def test_a_factory_gives_model_inputs_and_dims(factory_module: str) -> None:
    program = load_model(f"{factory_module}:mlp")
    assert str(program.inputs[0]) == "input: f32[rows,32]"
    fixed = load_model(f"{factory_module}:mlp", example_inputs=(torch.randn(7, 32),))
    assert fixed(torch.randn(9, 32)).shape == (9, 5)


def test_a_local_language_model_gets_default_inputs(tmp_path: Path) -> None:
    from zoo import ZOO

    model = ZOO["llama"].model()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    program = load_model(f"hf:{tmp_path}")
    assert [str(port) for port in program.inputs] == [
        "input_ids: i64[batch,seq]",
        "attention_mask: i64[batch,seq]",
    ]
    ids = torch.randint(0, 128, (1, 9))
    mask = torch.ones_like(ids)
    output = program(input_ids=ids.expand(2, -1), attention_mask=mask.expand(2, -1))
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(output.logits[:1], expected, rtol=1e-4, atol=1e-4)


def test_a_local_vision_model_gets_pixels(tmp_path: Path) -> None:
    from zoo import ZOO

    ZOO["vit"].model().save_pretrained(tmp_path)  # type: ignore[operator]
    model, sample, shapes = hugging_face(tmp_path)
    assert set(sample.kwargs or {}) == {"pixel_values"}
    assert shapes == {"pixel_values": {0: "batch"}}
    assert not model.training


def test_unreadable_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match="hf: reads local files only"):
        load_model(f"hf:{tmp_path / 'missing'}")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CaptureError, match="transformers can't read"):
        load_model(f"hf:{tmp_path}")
    with pytest.raises(UsageError, match="names no model"):
        load_model("something")
    with pytest.raises(UsageError, match="can't be imported"):
        load_model("no_such_module:factory")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises((BackendMissing, CaptureError), match="transformers"):
        load_model(f"hf:{tmp_path}")


def test_a_pickle_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    from zoo import ZOO

    model = ZOO["llama"].model()
    model.config.save_pretrained(tmp_path)  # type: ignore[union-attr]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CaptureError, match="transformers can't read"):
        load_model(f"hf:{tmp_path}")


def test_optimize_takes_text(factory_module: str) -> None:
    small = resplice.optimize(f"{factory_module}:mlp", "quest")
    assert small.report.after["weight_bytes"] < small.report.before["weight_bytes"]
