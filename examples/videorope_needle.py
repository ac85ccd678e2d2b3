"""Fine-tune a tiny model under RoPE, M-RoPE and VideoRoPE, then read videos longer than those.

A video of T frames, four tokens each, then a question. One frame, the needle, shows the asked key
with a value; every few frames a distractor shows another key with another value, always the same
distance apart. The answer is the needle's value. In the spirit of V-NIAH-D (arXiv 2502.05173,
section 5), on synthetic tokens; what it prints is about this toy only.

    python examples/videorope_needle.py --steps 600
    python examples/videorope_needle.py --steps 600 --lora 4
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import resplice
from resplice.passes.videorope import build_position_ids

KEYS, VALUES, FILLER, PATCHES, PERIOD = 8, 8, 16, 4, 5
ASK = KEYS + VALUES + FILLER
VOCAB = ASK + 1
SCHEMES = ("rope", "mrope", "videorope")


class Lora(nn.Module):
    """A linear layer with a low-rank correction that starts at zero."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        """Wrap a layer."""
        super().__init__()
        self.inner = inner
        self.lora_a = nn.Parameter(torch.randn(rank, inner.in_features) / inner.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        return self.inner(x) + x @ self.lora_a.T @ self.lora_b.T


class Reader(nn.Module):
    """Qwen2-VL's text stack over our tokens, answering at the last one."""

    def __init__(self, lora: int = 0) -> None:
        """A tiny configuration."""
        super().__init__()
        from transformers.models.qwen2_vl import Qwen2VLTextConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        self.text = Qwen2VLTextModel(
            Qwen2VLTextConfig(
                vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, rope_parameters=rope,
            )
        )  # fmt: skip
        self.answer = nn.Linear(64, VALUES)
        if lora:
            self.requires_grad_(False)
            for layer in self.text.layers:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    own = getattr(layer.self_attn, name)
                    setattr(layer.self_attn, name, Lora(own, lora))

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S] and [3, B, S] -> logits [B, values]."""
        hidden = self.text(input_ids=tokens, position_ids=position_ids, use_cache=False)
        return self.answer(hidden.last_hidden_state[:, -1])


@dataclass(frozen=True)
class Batch:
    """Tokens [B, S], types [B, S] and answers [B] of videos of one length."""

    tokens: Tensor
    types: Tensor
    answers: Tensor
    frames: int


def draw(count: int, frames: int, generator: torch.Generator) -> Batch:
    """Videos with one needle and periodic distractors."""

    def pick(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator)

    video = KEYS + VALUES + pick(FILLER, count, frames, PATCHES)
    asked, rows = pick(KEYS, count), torch.arange(count)
    start = int(pick(PERIOD, 1))
    for frame in range(start, frames, PERIOD):
        other = (asked + 1 + pick(KEYS - 1, count)) % KEYS
        video[:, frame, 0], video[:, frame, 1] = other, KEYS + pick(VALUES, count)
    place, answers = pick(frames, count), pick(VALUES, count)
    video[rows, place, 0], video[rows, place, 1] = asked, KEYS + answers
    question = torch.stack((torch.full((count,), ASK), asked), 1)
    tokens = torch.cat((video.flatten(1), question), 1)
    types = torch.zeros_like(tokens)
    types[:, : frames * PATCHES] = 2
    return Batch(tokens, types, answers, frames)


def positions(batch: Batch, scheme: Any) -> Tensor:
    """Positions of a batch, int64 [3, B, S]."""
    grids = [[(batch.frames, 2, 2)]] * len(batch.tokens)
    found, _ = build_position_ids(batch.types, grids, scheme=scheme, dtype=torch.int64)
    return found


def prepared(scheme: str, model: nn.Module, example: Batch) -> resplice.Optimized:
    """The captured model, rewritten for VideoRoPE; its weights are its own and trainable."""
    program = resplice.capture(
        model, (example.tokens, positions(example, "mrope")),
        dynamic_shapes={"tokens": ("batch", "seq"), "position_ids": {1: "batch", 2: "seq"}},
    )  # fmt: skip
    passes = "videorope" if scheme == "videorope" else None
    patterns = [name for name, p in model.named_parameters() if p.requires_grad]
    return resplice.optimize(program, passes, check=False).trainable(*patterns)


def train(model: resplice.Optimized, scheme: str, steps: int, frames: int, seed: int) -> float:
    """Adam on fresh batches of lengths up to `frames`; returns the last loss."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    value = float("nan")
    for _ in range(steps):
        length = int(torch.randint(frames // 2, frames + 1, (1,), generator=generator))
        batch = draw(32, length, generator)
        loss = nn.functional.cross_entropy(
            model(batch.tokens, positions(batch, scheme)), batch.answers
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        value = float(loss.detach())
    return value


@torch.no_grad()
def accuracy(model: resplice.Optimized, scheme: str, frames: int, seed: int, count: int) -> float:
    """Share of right answers on fresh videos of one length."""
    generator = torch.Generator().manual_seed(seed)
    batch = draw(count, frames, generator)
    right = model(batch.tokens, positions(batch, scheme)).argmax(-1) == batch.answers
    return float(right.float().mean())


def compare(steps: int, frames: int, lora: int, seed: int, count: int) -> dict[str, Any]:
    """All three schemes from the same weights; accuracy by length, chance is 1 / VALUES."""
    lengths = [frames * factor for factor in (1, 2, 4, 8)]
    found: dict[str, Any] = {}
    for scheme in SCHEMES:
        torch.manual_seed(seed)
        model, start = Reader(lora).eval(), time.perf_counter()
        tuned = prepared(scheme, model, draw(2, frames, torch.Generator().manual_seed(0)))
        loss = train(tuned, scheme, steps, frames, seed)
        scores = {n: accuracy(tuned, scheme, n, seed + 1, count) for n in lengths}
        found[scheme] = {"loss": loss, "accuracy": scores, "seconds": time.perf_counter() - start}
    return found


def main() -> None:
    """Print one row per scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--frames", type=int, default=16, help="longest video in training")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=256, help="videos per length in the test")
    options = parser.parse_args()
    found = compare(options.steps, options.frames, options.lora, options.seed, options.count)
    lengths = list(found["rope"]["accuracy"])
    print("scheme     loss   " + "  ".join(f"{n:>4} frames" for n in lengths))
    for scheme, row in found.items():
        scores = "  ".join(f"{row['accuracy'][n]:11.3f}" for n in lengths)
        print(f"{scheme:<10} {row['loss']:.3f}  {scores}   ({row['seconds']:.0f} s)")


if __name__ == "__main__":
    main()
