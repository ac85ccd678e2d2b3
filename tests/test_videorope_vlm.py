"""videorope on a whole vision-language model, captured for one grid and layout of tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rope_models import Canonical
from torch import Tensor, nn

import resplice
from resplice.kernels.rope3d import rope3d
from resplice.passes.videorope import build_position_ids, lta_map
from resplice.pipeline import Pipeline

GRID = torch.tensor([[2, 4, 4]])
TYPES = torch.tensor([[0, 0, 0] + [2] * 8 + [0, 0, 0, 0]])
VIDEO, START, END = 121, 122, 123


class FixedGrid(nn.Module):
    """Pixels and text to logits; what depends on the grid alone is computed beforehand."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual, self.text = model.model.visual, model.model.language_model
        self.head = model.lm_head
        self.register_buffer("places", TYPES[0].eq(2).nonzero()[:, 0])

    def forward(self, input_ids: Tensor, pixels: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [1, S, vocabulary] for ids [1, S], patches [N, P], positions [3, 1, S]."""
        seen = self.visual(pixels, grid_thw=GRID)
        seen = getattr(seen, "pooler_output", seen)
        embeds = self.text.embed_tokens(input_ids).index_copy(1, self.places, seen[None])
        found = self.text(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
        logits: Tensor = self.head(found.last_hidden_state)
        return logits


def vision_language_model(seed: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=VIDEO)
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
                weight.mul_(30)
    return model


def inputs_of(seed: int, positions: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, TYPES.shape, generator=generator)
    ids[TYPES == 2] = VIDEO
    ids[0, 2], ids[0, 11] = START, END
    pixels = torch.randn(32, 96, generator=generator)
    return {"input_ids": ids, "pixels": pixels, "position_ids": positions}


def test_a_whole_model_is_captured_rewritten_and_bit_equal_to_eager() -> None:
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model = vision_language_model(3)
    wrapper = FixedGrid(model).eval()
    before, _ = build_position_ids(TYPES, [[(2, 2, 2)]], scheme="mrope")
    with exporters.apply_patches("dynamo"):
        program = resplice.capture(wrapper, inputs_of(0, before), check=False)
    given = inputs_of(7, before)
    own = model(
        input_ids=given["input_ids"], pixel_values_videos=given["pixels"], video_grid_thw=GRID,
        position_ids=before.long(),
    ).logits  # fmt: skip
    torch.testing.assert_close(program(**given), own, rtol=1e-5, atol=1e-5)
    result, steps = Pipeline.of("videorope").run(program, check=True)
    (change,) = steps[-1].changes
    assert change.count == 1
    (vision,) = change.refusals  # the tower counts its own positions, in two axes
    assert "not the three axes of a video" in vision.reason
    assert len([n for n in result.graph.nodes if n.target is rope3d.overload]) == 4
    positions, _ = build_position_ids(TYPES, [[(2, 2, 2)]])
    eager = copy.deepcopy(wrapper)
    rotary = Canonical(eager.text.rotary_emb.inv_freq, lta_map((2, 1, 1)))
    eager.text.rotary_emb, rotary.positions = rotary, positions
    given = inputs_of(9, positions)
    with torch.no_grad():
        expected = eager(**given)
    found = result(**given)
    assert torch.equal(found, expected)
    assert float((found - program(**inputs_of(9, before))).abs().max()) > 1e-3, "nothing to see"
