"""Repair of transformers' mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resplice.repairs.base import Repair, imported, replaced

_EXPERTS_MODULE = "transformers.integrations.moe"
_DENSE = "resplice_dense"


def _expert_configs(model: nn.Module) -> list[Any]:
    """The distinct configs that choose the experts implementation of modules in ``model``."""
    if imported(_EXPERTS_MODULE) is None:
        return []
    marks = ("has_gate", "is_transposed", "_is_expert_parallel")
    found = {
        id(module.config): module.config
        for module in model.modules()
        if all(hasattr(module, mark) for mark in marks) and hasattr(module, "config")
    }
    return list(found.values())


@contextmanager
def _experts_run_with(model: nn.Module, implementation: str) -> Iterator[None]:
    attribute = "_experts_implementation_internal"
    with ExitStack() as stack:
        for config in _expert_configs(model):
            stack.enter_context(replaced(config, attribute, implementation))
        yield


@contextmanager
def _static_experts(model: nn.Module) -> Iterator[None]:
    moe = imported(_EXPERTS_MODULE)
    if moe is None:
        yield
        return
    interface = moe.ALL_EXPERTS_FUNCTIONS
    interface[_DENSE] = dense_experts
    try:
        with _experts_run_with(model, _DENSE):
            yield
    finally:
        del interface[_DENSE]


def dense_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """All experts on all tokens, summed with the routing weights. An experts implementation."""
    routing = hidden_states.new_zeros(hidden_states.shape[0], self.num_experts)
    routing = routing.scatter_add(1, top_k_index, top_k_weights.to(routing.dtype))
    inner = _per_expert(self, "gate_up_proj" if self.has_gate else "up_proj", hidden_states)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = _per_expert(self, "down_proj", inner)
    if self.has_post_expert_norm:
        outer = self.post_expert_norm(outer)
    weighted = outer * routing.transpose(0, 1).unsqueeze(-1)  # [expert, token, width]
    return weighted.sum(dim=0).to(hidden_states.dtype)


def _per_expert(experts: Any, name: str, inputs: Tensor) -> Tensor:
    """Multiply [token, in] or [expert, token, in] by every expert's weights called ``name``."""
    weight = getattr(experts, name)
    weight = weight if experts.is_transposed else weight.transpose(1, 2)
    product = torch.matmul(inputs, weight)
    if experts.has_bias:
        product = product + getattr(experts, f"{name}_bias").unsqueeze(1)
    return product


STATIC_EXPERTS = Repair(
    "static-experts",
    what="runs transformers' mixtures of experts as one dense batched matrix product per layer",
    why="The default sorts tokens by expert and multiplies slices whose lengths depend on the data "
    "(`grouped_mm` after `histc`), and 'eager' loops over the experts that were hit; neither has "
    "an ONNX or Core ML form. Running every expert on every token and weighting by the routing "
    "matrix, which is zero outside the top k, gives the same sum with static shapes.",
    applies=lambda model: bool(_expert_configs(model)),
    patch=_static_experts,
)
