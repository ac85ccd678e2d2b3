"""Tiny language models with rotary embeddings, and an eager VideoRoPE of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH = 128, 32
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
SECTIONS = {"llama": None, "qwen2": (2, 1, 1), "qwen2.5": (1, 2, 1), "qwen3": (2, 1, 1)}
"""Family -> M-RoPE section; plain RoPE has none."""
LTA = {"llama": (1, 2, 0, 0), "qwen2": (1, 2, 0, 0), "qwen2.5": (1, 2, 1, 0), "qwen3": (1, 2, 0, 0)}
"""Family -> row per angle in VideoRoPE, written by hand."""


def language_model(family: str, seed: int = 0) -> nn.Module:
    """The text stack as transformers ships it, attention sharpened, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MAKERS[family]().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    weight.mul_(30)
                elif name.endswith(("v_proj.weight", "o_proj.weight")):
                    weight.mul_(10)
    return model


def _rope(section: Sequence[int], interleaved: bool = False) -> dict[str, Any]:
    found = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    return {**found, "mrope_interleaved": True} if interleaved else found


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**_TEXT))


def _qwen2() -> nn.Module:
    from transformers.models.qwen2_vl import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    return Qwen2VLTextModel(Qwen2VLTextConfig(**_TEXT, rope_parameters=_rope(SECTIONS["qwen2"])))


def _qwen25() -> nn.Module:
    from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    rope = _rope(SECTIONS["qwen2.5"])
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_TEXT, rope_parameters=rope))


def _qwen3() -> nn.Module:
    from transformers.models.qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    rope = _rope(SECTIONS["qwen3"], interleaved=True)
    return Qwen3VLTextModel(Qwen3VLTextConfig(**_TEXT, head_dim=8, rope_parameters=rope))


_MAKERS = {"llama": _llama, "qwen2": _qwen2, "qwen2.5": _qwen25, "qwen3": _qwen3}


class Canonical(nn.Module):
    """Rotary tables by the canonical form, from positions set beforehand or from the ids."""

    def __init__(self, inv_freq: Tensor, axis_map: Sequence[int]) -> None:
        super().__init__()
        self.inv_freq, self.axis_map = inv_freq, list(axis_map)
        self.positions: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, D]."""
        rows = position_ids if self.positions is None else self.positions
        rows = rows if rows.dim() == 3 else rows[None].expand(3, -1, -1)
        angles = torch.stack(
            [
                rows[-3:][axis].float() * f
                for axis, f in zip(self.axis_map, self.inv_freq.float(), strict=True)
            ],
            -1,
        )
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def eager_videorope(model: nn.Module, axis_map: Sequence[int]) -> nn.Module:
    """The same weights with the rotary module replaced."""
    other = copy.deepcopy(model)
    owner = next(m for m in other.modules() if hasattr(m, "rotary_emb"))
    owner.rotary_emb = Canonical(owner.rotary_emb.inv_freq, axis_map)  # type: ignore[assignment]
    return other


def run_eager(model: nn.Module, positions: Tensor, **inputs: Any) -> Any:
    """Call an eager VideoRoPE; a plain model takes its positions on the side."""
    rotary = next(m for m in model.modules() if isinstance(m, Canonical))
    rotary.positions = positions
    with torch.no_grad():
        return model(**inputs)
