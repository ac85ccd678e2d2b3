"""Token-by-token decoding of a causal language model whose cache is part of the program.

`Decoder` runs an unmodified transformers model over a static key/value cache kept in registered
buffers. Captured twice, for one token and for a chunk, it gives a program of two functions over one
set of weights and one state; a stateful backend keeps the cache on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import resplice

Call = tuple[str, dict[str, torch.Tensor]]
"""Function name, and its inputs: `input_ids` [1, S], `position` [S]."""
Step = Callable[[str, Mapping[str, torch.Tensor]], torch.Tensor]
"""Makes a call: function name, inputs -> logits [1, S, vocabulary]."""


class Decoder(nn.Module):
    """A causal language model over a static cache of `length` positions, batch 1.

    Args:
        model: From transformers, unmodified; shares its weights.
        length: Positions that the cache holds.
    """

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        config = model.config.get_text_config()
        heads = config.num_key_value_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        for index in range(config.num_hidden_layers):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{index}", torch.zeros(1, heads, length, width))

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Write the tokens' keys and values into the cache, attend to all up to each of them.

        Args:
            input_ids: Token ids, int64 [1, S].
            position: Their positions in the text and in the cache, int64 [S].

        Returns:
            Logits, float32 [1, S, vocabulary].
        """
        seen = torch.arange(self.length) <= position[:, None]
        found = self.model(
            input_ids=input_ids,
            position_ids=position[None],
            attention_mask=seen[None, None],
            past_key_values=_cache(self, position),
            use_cache=True,
        )
        logits: torch.Tensor = found.logits
        return logits

    def reset(self) -> None:
        """Forget the text: zeros everywhere."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()


def _cache(decoder: Decoder, position: torch.Tensor) -> Any:
    """A transformers cache that writes into the decoder's buffers at given positions."""
    from transformers.cache_utils import Cache, StaticLayer

    class Layer(StaticLayer):
        def __init__(self, index: int) -> None:
            super().__init__(decoder.length)
            self.keys = getattr(decoder, f"keys_{index}")
            self.values = getattr(decoder, f"values_{index}")
            self.is_initialized = True

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.keys.index_copy_(2, position, key_states)
            self.values.index_copy_(2, position, value_states)
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            return position[0]

    layers = decoder.model.config.get_text_config().num_hidden_layers
    return Cache(layers=[Layer(index) for index in range(layers)])


def capture(model: Any, *, length: int, chunk: int) -> resplice.Program:
    """Capture decoding of one token, `main`, and of `chunk` tokens, `prefill`.

    Args:
        model: A causal language model from transformers.
        length: Positions that the cache holds.
        chunk: Tokens that `prefill` reads at once.
    """
    decoder = Decoder(model, length).eval()
    token = torch.tensor([[model.config.get_text_config().vocab_size - 1]])
    one = resplice.capture(decoder, {"input_ids": token, "position": torch.tensor([3])})
    ids = torch.arange(chunk)[None] % token
    many = resplice.capture(decoder, {"input_ids": ids, "position": torch.arange(chunk)})
    one.functions["prefill"] = many
    return one


def steps_of(artifact: Any) -> Step:
    """The functions of a Core ML artefact over one fresh state."""
    state = artifact.make_state()

    def step(function: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (logits,) = artifact.run(inputs, function=function, state=state).values()
        return logits  # type: ignore[no-any-return]  # artefacts are untyped here

    return step


def reads(prompt: torch.Tensor, chunk: int) -> list[Call]:
    """The calls that read a prompt [1, S] in chunks, the last one padded.

    What padding writes lies beyond the prompt, and each later token overwrites its own position
    before anything attends to it. The cache must hold whole chunks.
    """
    padded = torch.nn.functional.pad(prompt, (0, -prompt.shape[1] % chunk))
    return [
        (
            "prefill",
            {"input_ids": padded[:, at : at + chunk], "position": torch.arange(at, at + chunk)},
        )
        for at in range(0, padded.shape[1], chunk)
    ]


def decodes(token: int, position: int) -> Call:
    """The call that reads one token."""
    return "main", {"input_ids": torch.tensor([[token]]), "position": torch.tensor([position])}


def greedy(step: Step, prompt: torch.Tensor, count: int, *, chunk: int) -> list[int]:
    """Read a prompt, int64 [1, S], then write `count` tokens one by one."""
    size = prompt.shape[1]
    for call in reads(prompt, chunk):
        logits = step(*call)
    written = [int(logits[0, (size - 1) % chunk].argmax())]
    for position in range(size, size + count - 1):
        logits = step(*decodes(written[-1], position))
        written.append(int(logits[0, -1].argmax()))
    return written


def greedy_without_cache(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    """What the model itself writes when it reads the whole text again for each token."""
    ids = prompt
    for _ in range(count):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat((ids, best.view(1, 1)), 1)
    return [int(token) for token in ids[0, prompt.shape[1] :]]
