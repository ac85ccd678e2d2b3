"""hadamard as a Triton kernel: products with a matrix of signs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cuda_tools import ARCHS, bar, compiled, error, launches, meta, poison

from resplice.kernels.cuda import hadamard as cuda
from resplice.kernels.cuda.launch import Config, using
from resplice.kernels.hadamard import hadamard

SAMPLES = [sample for sample in hadamard.samples() if not sample.refused]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def holds(x: torch.Tensor, block: int) -> bool:
    with poison():
        found = cuda.hadamard(x, block)
    assert found.dtype == x.dtype
    return error(found, hadamard.reference(x.double(), block)) <= bar(x.dtype)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_samples(sample: Any) -> None:
    assert holds(*sample.args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "block"), [(6, 2), (20, 4), (24, 8), (48, 16), (384, 128), (768, 256), (2048, 2048)]
)
def test_any_size(size: int, block: int, dtype: torch.dtype) -> None:
    assert holds((5 * torch.randn(3, size)).to(dtype), block)


def test_32_bit_values_lose_nothing_in_16_bit_parts() -> None:
    """Integers of 20 bits come through exactly: sums of 16 of them fit into float32."""
    x = torch.randint(-(2**19), 2**19, (8, 16)).float()
    assert torch.equal(cuda.hadamard(x, 16).double(), hadamard.reference(x.double(), 16))


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_block_sizes(rows: int) -> None:
    with using(hadamard_blocks=Config({"block_rows": rows}, 4, 1)):
        assert holds(torch.randn(7, 96), 32)
        assert holds(torch.randn(3, 512), 512)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_code(arch: str, tmp_path: Path) -> None:
    for dtype in DTYPES:
        for block in (8, 128, 1024):
            for item in launches(cuda.hadamard, (meta(64, 4096, dtype=dtype), block), arch):
                code = compiled(item, arch, tmp_path)
                assert code.spills == 0, (dtype, block)
                assert code.tensor_core > 0
