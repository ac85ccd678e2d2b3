"""quant_linear as Triton kernels: the op's meaning in the interpreter, and what is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, cast, compiled, error, launches, meta, poison, wide

from resplice.kernels.cuda import quant_linear as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.packing import pack, packed_bytes
from resplice.kernels.quant_linear import BITS, dequantize, group_count, quant_linear

SAMPLES = [sample for sample in quant_linear.samples() if not sample.refused]


def call(m: int, k: int, n: int, bits: int, group: int = 0, bias: bool = True) -> list[Any]:
    codes = pack(torch.randint(0, 2**bits, (n, k)), bits)
    step = torch.rand(n, group_count(k, group)) + 0.1
    return [torch.randn(m, k), codes, step, torch.randn(n) if bias else None, bits, group]


def holds(args: list[Any], dtype: torch.dtype = torch.float32) -> bool:
    """The kernel is the reference in float64, on results that were poisoned before."""
    args[0], args[3] = cast([args[0], args[3]], dtype)
    with poison():
        found = cuda.quant_linear(*args)
    assert found.dtype == dtype
    return error(found, quant_linear.reference(*wide(args))) <= bar(dtype)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    assert holds(list(sample.args))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 32, 12, 256])
def test_any_size(bits: int, group: int) -> None:
    m, k, n = (int(size) for size in torch.randint(3, (3,)) + torch.tensor([4, 270, 66]))
    assert holds(call(m, k, n, bits, group))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_16_bit_activations(bits: int, dtype: torch.dtype) -> None:
    assert holds(call(3, 72, 40, bits), dtype)
    assert holds(call(3, 72, 40, bits, 24), dtype)


@pytest.mark.parametrize("block", [(16, 16, 16), (16, 64, 32), (32, 32, 16), (64, 16, 64)])
def test_block_sizes(block: tuple[int, int, int]) -> None:
    sizes = dict(zip(("block_m", "block_n", "words"), block, strict=True))
    with using(quant_linear_tiles=Config(sizes, 4, 2)):
        assert holds(call(37, 150, 70, 4, 64))
        assert holds(call(70, 65, 33, 3))


def test_k_is_divided_among_programs_and_added_in_order() -> None:
    """Long rows of few outputs: several parts, and the same bits from run to run."""
    args = call(2, 1700, 20, 4, 128)
    parts, total = launches(cuda.quant_linear, args, "sm_90")
    assert (parts.name, total.name) == ("quant_linear_tiles", "quant_linear_parts")
    assert parts.grid[2] == total.arguments["count"] > 1
    assert torch.equal(cuda.quant_linear(*args), cuda.quant_linear(*args))
    assert holds(args)
    assert holds(call(2, 2300, 5, 1))


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_exact_in_16_bits(bits: int) -> None:
    """With one-hot activations and steps of one, outputs are the levels themselves."""
    _, codes, step, *_ = call(1, 48, 40, bits)
    step = torch.ones_like(step)
    for dtype in (torch.float16, torch.bfloat16):
        found = cuda.quant_linear(torch.eye(48, dtype=dtype), codes, step, None, bits, 0)
        assert torch.equal(found.double().t(), dequantize(codes, step, bits, 0, 48).double())


def test_what_is_left_to_the_reference() -> None:
    args = wide(call(3, 20, 10, 4))
    assert torch.equal(cuda.quant_linear(*args), quant_linear.reference(*args))
    empty = cuda.quant_linear(torch.randn(0, 20), *call(3, 20, 10, 4)[1:])
    assert empty.shape == (0, 10)


def test_leading_axes_and_strides() -> None:
    args = call(6, 40, 10, 4)
    spread = args[0].repeat_interleave(2, -1)[..., ::2].unflatten(0, (2, 3))
    found = cuda.quant_linear(spread, *args[1:])
    assert torch.equal(found.flatten(0, 1), cuda.quant_linear(*args))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "gfx942"])
def test_all_candidates_run(arch: str, tmp_path: Path) -> None:
    """Shared memory is within the architecture's (`compiled` asserts it) for every candidate."""
    for bits in (1, 4):
        args = [meta(4096, 1024), meta(512, 128 * bits, dtype=torch.uint8)]
        args += [meta(512, 1, dtype=torch.float32), None, bits, 0]
        for config in cuda.configs(arch, torch.bfloat16, bits, 4096):
            with using(quant_linear_tiles=config):
                (item,) = launches(cuda.quant_linear, args, arch)
            assert compiled(item, arch, tmp_path).tensor_core > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", BITS)
def test_compiled_code(arch: str, bits: int, tmp_path: Path) -> None:
    """Tensor cores, and no spilled register, for one token and for many, plain and grouped."""
    k, n = 4096, 4096
    codes = meta(n, packed_bytes(k, bits), dtype=torch.uint8)
    cases = [(torch.bfloat16, 0), (torch.bfloat16, 128), (torch.float16, 0), (torch.float32, 128)]
    for m in (1, 30, 60, 4096):
        for dtype, group in cases:
            step = meta(n, group_count(k, group), dtype=torch.float32)
            args = [meta(m, k, dtype=dtype), codes, step, meta(n, dtype=dtype), bits, group]
            first, *_ = found = launches(cuda.quant_linear, args, arch)
            made = [compiled(item, arch, tmp_path) for item in found]
            assert [code.spills for code in made] == [0] * len(made), (m, group, dtype)
            assert first.name == "quant_linear_tiles"
            assert made[0].tensor_core > 0
