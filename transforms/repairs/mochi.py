"""Repair of Mochi's attention (diffusers)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resplice.repairs.base import Repair, imported, replaced

_ATTENTION_MODULE = "diffusers.models.attention_processor"


def _has_mochi_attention(model: nn.Module) -> bool:
    module = imported(_ATTENTION_MODULE)
    if module is None:
        return False
    processors = (getattr(child, "processor", None) for child in model.modules())
    return any(isinstance(found, module.MochiAttnProcessor2_0) for found in processors)


@contextmanager
def _batched_mochi_attention(model: nn.Module) -> Iterator[None]:
    module = imported(_ATTENTION_MODULE)
    if module is None:
        yield
        return
    with replaced(module.MochiAttnProcessor2_0, "__call__", mochi_attention):
        yield


def mochi_attention(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint attention of video and text tokens, without a loop over the batch."""
    valid = attention_mask.bool()
    query, key, value = _mochi_heads(attn, hidden_states, ("to_q", "to_k", "to_v"), "norm_{}")
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    text_query, text_key, text_value = _mochi_heads(
        attn, encoder_hidden_states, added, "norm_added_{}"
    )
    if image_rotary_emb is not None:
        query, key = (_rotate_pairs(states, *image_rotary_emb) for states in (query, key))
    video_tokens = query.shape[1]
    query, key, value = (
        torch.cat(pair, dim=1).transpose(1, 2)
        for pair in ((query, text_query), (key, text_key), (value, text_value))
    )
    video_valid = valid.new_ones(valid.shape[0], video_tokens)
    keys = torch.cat([video_valid, valid], dim=1)[:, None, None, :]
    result = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
    result = result.transpose(1, 2).flatten(2, 3)
    video, text = result[:, :video_tokens], _valid_rows_first(result[:, video_tokens:], valid)
    for layer in attn.to_out:
        video = layer(video)
    return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _mochi_heads(
    attn: Any, states: Tensor, projections: tuple[str, ...], norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as [batch, token, head, channel], with their norms applied."""
    query, key, value = (
        getattr(attn, name)(states).unflatten(2, (attn.heads, -1)) for name in projections
    )
    norm_query, norm_key = getattr(attn, norm.format("q")), getattr(attn, norm.format("k"))
    query = query if norm_query is None else norm_query(query)
    key = key if norm_key is None else norm_key(key)
    return query, key, value


def _rotate_pairs(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs."""
    even, odd = states[..., 0::2].float(), states[..., 1::2].float()
    rotated = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


def _valid_rows_first(rows: Tensor, valid: Tensor) -> Tensor:
    """Move each item's valid rows to the front, in order, and set the remaining rows to zero."""
    rank = valid.long().cumsum(dim=1)
    invalid_rank = (~valid).long().cumsum(dim=1)
    target = torch.where(valid, rank - 1, rank[:, -1:] + invalid_rank - 1)
    kept = rows * valid.unsqueeze(-1).to(rows.dtype)
    return torch.zeros_like(rows).scatter(1, target.unsqueeze(-1).expand_as(rows), kept)


BATCHED_MOCHI_ATTENTION = Repair(
    "batched-mochi-attention",
    what="computes Mochi's joint attention for the whole batch at once, with a key mask",
    why="Mochi loops over the batch in Python and picks each item's valid text tokens with "
    "`nonzero`: the batch size is fixed by unrolling, and shapes depend on the data. Masking the "
    "invalid keys gives the same softmax; the valid text results are then moved to the front and "
    "the rest zeroed, which is what the loop's padding does.",
    applies=_has_mochi_attention,
    patch=_batched_mochi_attention,
)
