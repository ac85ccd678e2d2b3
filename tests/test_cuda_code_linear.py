"""Products between codes as Triton kernels: exact integers, tensor cores, counted bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, compiled, error, launches, meta, poison

from resplice.kernels.code_linear import code_linear
from resplice.kernels.cuda import code_linear as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.gaussian_grid import from_codes
from resplice.kernels.packing import pack, packed_bytes
from resplice.kernels.quant_linear import BITS, dequantize

SAMPLES = [sample for sample in code_linear.samples() if not sample.refused]


def product(m: int, k: int, n: int, act_bits: int, bits: int) -> tuple[Tensor, Tensor]:
    """Found by the kernels, and in float64, on steps of all sizes and a poisoned result."""
    x = torch.randint(0, 2**act_bits, (m, k), dtype=torch.uint8)
    signed = (x.int() - 2 ** (act_bits - 1)).to(torch.int8)
    weight = torch.randint(0, 2**bits, (n, k))
    x_step, step, bias = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1, torch.randn(n)
    with poison():
        y = cuda.code_linear(signed, x_step, pack(weight, bits), step, bias, bits, 0, act_bits)
    left = from_codes(x, x_step.double(), act_bits)
    return y, left @ from_codes(weight, step.double(), bits).t() + bias.double()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    with poison():
        found = cuda.code_linear(*sample.args)
    assert error(found, code_linear.reference(*sample.args)) <= bar(torch.float32)


@pytest.mark.parametrize("act_bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("bits", BITS)
def test_any_size(bits: int, act_bits: int) -> None:
    m, k, n = (int(size) for size in torch.randint(3, (3,)) + torch.tensor([9, 270, 18]))
    assert error(*product(m, k, n, act_bits, bits)) <= bar(torch.float32)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 40), (3, 100, 18), (8, 513, 7), (2, 8, 3)])
def test_one_bit_is_counted(m: int, k: int, n: int) -> None:
    """Rows of whole words and not, and what lies behind the last code."""
    assert error(*product(m, k, n, 1, 1)) <= bar(torch.float32)


def test_a_long_row_is_divided() -> None:
    assert error(*product(2, 3000, 20, 8, 8)) <= bar(torch.float32)
    assert error(*product(1, 5000, 20, 4, 4)) <= bar(torch.float32)


@pytest.mark.parametrize("block", [(16, 16, 32), (32, 64, 64), (64, 16, 32)])
def test_block_sizes(block: tuple[int, int, int]) -> None:
    sizes = dict(zip(("block_m", "block_n", "words"), block, strict=True))
    with using(code_linear_tiles=Config(sizes, 4, 2)):
        for act_bits, bits in ((4, 4), (8, 8), (8, 2), (1, 1)):
            assert error(*product(37, 150, 20, act_bits, bits)) <= bar(torch.float32)


def w1a1(m: int) -> tuple[Any, ...]:
    k = n = 4096
    f32 = torch.float32
    x = meta(m, k, dtype=torch.int8), meta(m, 1, dtype=f32)
    weight = meta(n, packed_bytes(k, 1), dtype=torch.uint8), meta(n, 1, dtype=f32)
    return (*x, *weight, None, 1, 0, 1)


def test_rows_too_long_for_integers_of_32_bits_are_left_to_quant_linear() -> None:
    x = torch.full((1, 33_100), 127, dtype=torch.int8)
    codes, one = torch.full((2, 33_100), 255, dtype=torch.uint8), torch.ones(2, 1)
    found = cuda.code_linear(x, one[:1], codes, one, None, 8, 0, 8)
    assert error(found, torch.full((1, 2), 33_100 * 127.5**2)) <= bar(torch.float32)


@pytest.mark.parametrize("group", [32, 7])
@pytest.mark.parametrize("bits", BITS)
def test_groups_are_left_to_quant_linear(bits: int, group: int) -> None:
    m, k, n = 3, 80, 20
    x = torch.randint(-8, 8, (m, k), dtype=torch.int8)
    weight, step = torch.randint(0, 2**bits, (n, k)), torch.rand(n, -(-k // group)) + 0.1
    x_step = torch.rand(m, 1) + 0.1
    with poison():
        found = cuda.code_linear(x, x_step, pack(weight, bits), step, None, bits, group, 4)
    exact = dequantize(pack(weight, bits), step.double(), bits, group, k)
    assert error(found, (x.double() + 0.5) * x_step.double() @ exact.t()) <= bar(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_counting_bits_pays_for_few_tokens_only(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue slots per product of two signs, by the compiled code of both forms.

    A tile takes its program's instructions times its threads; a population count takes eight slots
    (16 a clock where there are 128 additions: CUDA C++ Programming Guide, arithmetic instructions).
    """

    def slots(m: int, counted: bool) -> float:
        monkeypatch.setattr(cuda, "FEW", m if counted else 0)
        name = "code_linear_bits" if counted else "code_linear_tiles"
        (item,) = (
            found for found in launches(cuda.code_linear, w1a1(m), arch) if found.name == name
        )
        code, sizes = compiled(item, arch, tmp_path), item.constants
        columns = sizes["words"] * sizes.get("per", 32)
        products = min(sizes["block_m"], m) * sizes["block_n"] * columns
        issued = sum(code.instructions.values()) + 7 * code.count("POPC")
        return issued * 32 * item.num_warps / products

    assert slots(1, True) < slots(1, False) / 4
    assert slots(8, True) < slots(8, False)
    assert slots(4096, False) < slots(4096, True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", BITS)
def test_compiled_code(arch: str, bits: int, tmp_path: Path) -> None:
    k = n = 4096
    f32 = torch.float32
    codes = meta(n, packed_bytes(k, bits), dtype=torch.uint8), meta(n, 1, dtype=f32)
    for m in (1, 4096):
        for act_bits in {bits, 4}:
            x = meta(m, k, dtype=torch.int8), meta(m, 1, dtype=f32)
            args = (*x, *codes, meta(n), bits, 0, act_bits)
            for item in launches(cuda.code_linear, args, arch):
                code = compiled(item, arch, tmp_path)
                assert code.spills == 0, (item.name, m, act_bits)
                if item.name == "code_linear_tiles":
                    assert code.tensor_core > 0
                if item.name == "code_linear_bits" and arch.startswith("sm_"):
                    assert code.count("POPC") > 0
