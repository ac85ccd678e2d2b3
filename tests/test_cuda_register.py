"""Ops find their kernels on GPUs, in eager mode and when traced, and stay as they are on CPUs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from resplice.kernels.cuda.register import HOSTS, host_functions, register
from resplice.kernels.quant_linear import quant_linear
from resplice.ops import all_ops

register()


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_function_has_the_signature_of_its_op(name: str) -> None:
    own = inspect.signature(host_functions()[name]).parameters
    assert list(own) == list(inspect.signature(all_ops()[name].reference).parameters)


@pytest.mark.parametrize("name", HOSTS)
def test_an_op_has_a_kernel_for_gpus(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resplice::{name}", "CUDA")


def _call(device: str) -> tuple[Any, ...]:
    x = torch.randn(5, 32, device=device)
    codes = torch.zeros(16, 16, dtype=torch.uint8, device=device)
    return x, codes, torch.ones(16, 1, device=device)


def _targets(device: str) -> list[str]:
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    def run(x: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return quant_linear(x, codes, step, None, 4, 0)

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = _call(device)
        functional = dispatch_functionalize(run, FunctionalTensorMode(export=False))
        graph = make_fx(functional)(*given).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_tracing_for_a_gpu_sees_the_kernels_and_for_a_cpu_the_op() -> None:
    assert any("triton_kernel_wrapper" in name for name in _targets("cuda"))
    assert "resplice.quant_linear.default" not in _targets("cuda")
    assert "resplice.quant_linear.default" in _targets("cpu")
