"""Which op has which host function, and how ops come to use them on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.functional_tensor import FunctionalTensorMode

from resplice.ops import NAMESPACE, Op, _library, all_ops
from resplice.registry import load, load_ops

HOSTS = {
    "code_linear": "resplice.kernels.cuda.code_linear:code_linear",
    "hadamard": "resplice.kernels.cuda.hadamard:hadamard",
    "merge_frames": "resplice.kernels.cuda.merge_frames:merge_frames",
    "moe_ffn": "resplice.kernels.cuda.moe_ffn:moe_ffn",
    "quant_linear": "resplice.kernels.cuda.quant_linear:quant_linear",
    "quest_codes": "resplice.kernels.cuda.quest_quantize:quest_codes",
    "quest_quantize": "resplice.kernels.cuda.quest_quantize:quest_quantize",
    "rope3d": "resplice.kernels.cuda.rope3d:rope3d",
    "tile_attention": "resplice.kernels.cuda.tile_attention:tile_attention",
    "unmerge_frames": "resplice.kernels.cuda.merge_frames:unmerge_frames",
}
"""Op -> its host function, which has the op's signature."""


@cache
def host_functions() -> dict[str, Callable[..., Any]]:
    """The host functions by op."""
    return {name: load(place) for name, place in HOSTS.items()}


@cache
def register() -> None:
    """Let every op with a kernel use it on CUDA (and ROCm) tensors; on CPUs nothing changes.

    Importing the dialect does this where Triton is installed; Triton itself is imported by the
    first call on a GPU. torch.compile and AOTInductor trace through the host function and see its
    kernels; torch.export keeps the op.
    """
    load_ops()
    if find_spec("triton") is None:
        return
    for name, place in HOSTS.items():
        see_through(name, _checked(all_ops()[name], place))
    load("resplice.kernels.cuda.tile_autograd:register")()


def _checked(op: Op, place: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if op.verify is not None:
            op.verify(*args, **kwargs)
        return load(place)(*args, **kwargs)

    return run


def see_through(name: str, run: Callable[..., Any], key: str = "CUDA") -> None:
    """Implement an operator of ours by a host function, which compilers trace through.

    Args:
        name: Of the operator.
        run: Takes its arguments.
        key: The dispatch key to implement it for.
    """

    def traced(mode: Any, overload: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled() or not _on_gpu((args, kwargs)):
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return run(*args, **(kwargs or {}))

    _library().impl(name, run, key)
    torch.library.register_torch_dispatch(
        f"{NAMESPACE}::{name}", FunctionalTensorMode, traced, lib=_library()
    )


def _on_gpu(values: Any) -> bool:
    return any(
        isinstance(value, torch.Tensor) and value.device.type == "cuda"
        for value in pytree.tree_leaves(values)
    )
