"""Compiled kernels for packed linear layers: exact, optional, safe to build and to share."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resplice.compare import difference
from resplice.kernels import code_linear, hadamard, quant_fast, quant_linear, quest_codes
from resplice.kernels.cpu import kernels, kernels_status, library, use_kernels
from resplice.kernels.packing import pack, unpack
from resplice.kernels.quant_fast import SMALL
from resplice.kernels.quant_linear import BITS, dequantize, group_count

needs_kernels = pytest.mark.skipif(kernels() is None, reason=kernels_status())
FLOAT = 2e-6
"""Of the largest result: float32 sums, and rows held in 24 bits."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weight(rows: int, size: int, bits: int, group: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random packed codes and steps."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, size), generator=generator)
    return pack(codes, bits), torch.rand(rows, group_count(size, group), generator=generator) + 0.1


def exact(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """quant_linear in float64."""
    dense = dequantize(codes, step.double(), bits, group, x.shape[-1])
    return torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())


# ---- float activations -------------------------------------------------------------------

SHAPES = [
    (1, 640, 0), (3, 641, 0), (2, 1000, 8), (2, 1000, 48), (5, 515, 0), (1, 33000, 0),
    (2, 700, 4096),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("tokens", "size", "group"), SHAPES)
def test_products_are_those_of_float64(bits: int, tokens: int, size: int, group: int) -> None:
    rows = SMALL // size + 13
    codes, step = weight(rows, size, bits, group)
    x, bias = torch.randn(tokens, size), torch.randn(rows)
    found = quant_linear(x, codes, step, bias, bits, group)
    assert difference(exact(x, codes, step, bias, bits, group), found).relative < FLOAT


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_unpacked_tiles_compute_the_same(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_fast, "_most_tokens", lambda *_: 0)
    codes, step = weight(300, 4100, bits, 40)
    x, bias = torch.randn(2, 9, 4100), torch.randn(300)
    found = quant_linear(x, codes, step, bias, bits, 40)
    assert difference(exact(x, codes, step, bias, bits, 40), found).relative < 4 * FLOAT


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_results_depend_on_no_number_of_threads_or_tokens(bits: int) -> None:
    codes, step = weight(67, 1001, bits)
    x = torch.randn(3, 1001)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(quant_linear(x, codes, step, None, bits, 0))
    assert torch.equal(*found)
    alone = torch.stack([quant_linear(row, codes, step, None, bits, 0) for row in x])
    assert torch.equal(found[0], alone)


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("largest", [1e3, 1e-3, 1e30, 1e-30, 0.0])
def test_rows_with_one_large_value_lose_nothing(bits: int, largest: float) -> None:
    """What stands out is given more bits; sums then differ less from float64 than float32 does."""
    codes, step = weight(64, 1024, bits)
    x = torch.randn(2, 1024) * (1e-30 if largest == 1e-30 else 1)
    x[1] = x[1] * 0 if largest == 0 else x[1]
    x[1, 77] = largest
    found = quant_linear(x, codes, step, None, bits, 0)
    reference = exact(x, codes, step, None, bits, 0)
    norm = x.double().norm(dim=-1, keepdim=True) * step.double().t() * 2**bits
    assert ((found - reference).abs() <= 1e-6 * norm + 1e-7 * reference.abs()).all()


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_values_that_are_not_finite_go_through_the_reference(bits: int, bad: float) -> None:
    codes, step = weight(64, 1024, bits)
    x = torch.randn(2, 1024)
    x[1, 5] = bad
    found = quant_linear(x, codes, step, None, bits, 0)
    expected = quant_linear.reference(x, codes, step, None, bits, 0)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[1].nan_to_num(), expected[1].nan_to_num())


@needs_kernels
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_dtypes_and_strides(kind: torch.dtype, tokens: int) -> None:
    codes, step = weight(65, 1024, 3)
    x = torch.randn(1024, tokens).to(kind).t()
    bias = torch.randn(65).to(kind)
    found = quant_linear(x, codes, step, bias, 3, 0)
    assert (found.shape, found.dtype) == ((tokens, 65), kind)
    wanted = exact(x, codes, step, bias, 3, 0)
    bar = 4 * torch.finfo(kind).eps + 4 * FLOAT  # weights are float32 for float64 as well
    strided = codes.repeat_interleave(2, 0)[::2]
    for result in (found, quant_linear(x, strided, step, bias, 3, 0)):
        assert not tokens or difference(wanted, result).relative < bar


@needs_kernels
def test_gradients_beside_the_kernel() -> None:
    codes, step = weight(64, 1024, 4)
    x = torch.randn(2, 1024, requires_grad=True)
    bias = torch.randn(64, requires_grad=True)
    upstream = torch.randn(2, 64)
    result = (quant_linear(x, codes, step, bias, 4, 0) * upstream).sum()
    found = torch.autograd.grad(result, (x, bias))
    dense = dequantize(codes, step, 4, 0, 1024)
    assert difference(upstream @ dense, found[0]).relative < FLOAT
    assert difference(upstream.sum(0), found[1]).relative < FLOAT


def test_small_layers_keep_the_arithmetic_of_the_reference() -> None:
    codes, step = weight(16, 1024, 4)
    x = torch.randn(3, 1024)
    args = (x, codes, step, None, 4, 0)
    assert torch.equal(quant_linear(*args), quant_linear.reference(*args))


# ---- integer activations -----------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x_bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("size", "group"), [(4096, 0), (999, 0), (1001, 56), (7, 0)])
def test_integers_are_multiplied_exactly(bits: int, x_bits: int, size: int, group: int) -> None:
    """Against int64, with steps that are powers of two, so that only the last cast rounds."""
    rows, half = 11, 2 ** (x_bits - 1)
    codes, _ = weight(rows, size, bits, seed=size)
    generator = torch.Generator().manual_seed(x_bits)
    x = torch.randint(-half, half, (3, size), generator=generator)
    x[1], x[2] = -half, half - 1  # the largest sums
    groups = group_count(size, group)
    step, x_step = torch.full((rows, groups), 0.5), torch.full((3, 1), 2.0)
    odd = 2 * unpack(codes, bits, size).long() - (2**bits - 1)
    expected = (2 * x + 1) @ odd.t()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = code_linear(x.to(torch.int8), x_step, codes, step, None, bits, group, x_bits)
        assert torch.equal(found, (expected.double() / 4).float())


def test_one_bit_products_count_differing_signs() -> None:
    """K - 2 popcount(xor), in quarters of a squared step."""
    size = 777
    x = torch.randint(-1, 1, (2, size)).to(torch.int8)
    codes, _ = weight(5, size, 1)
    found = code_linear(x, torch.ones(2, 1), codes, torch.ones(5, 1), None, 1, 0, 1)
    differing = ((x >= 0)[:, None] ^ unpack(codes, 1, size).bool()).sum(-1)
    assert torch.equal(found, (size - 2 * differing) / 4)


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_reference(bits: int, kind: torch.dtype) -> None:
    x = torch.randn(50, 1152).to(kind)
    found, step = quest_codes(x, bits, 128)
    expected, wanted = quest_codes.reference(x, bits, 128)
    assert difference(wanted, step).relative < 1e-6
    assert (found != expected).float().mean() < 1e-4, "values at the border of two levels"
    assert int((found.int() - expected).abs().max()) <= 1
    half = 2 ** (bits - 1)
    assert -half <= int(found.min()) <= int(found.max()) < half


@needs_kernels
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 64, 128, 512])
def test_butterflies_are_the_product_with_the_matrix(block: int) -> None:
    x = torch.randn(3, 5, 3 * block)
    found, expected = hadamard(x, block), hadamard.reference(x.double(), block)
    assert difference(expected, found).relative < 1e-6


# ---- compiled, or not --------------------------------------------------------------------


def calls() -> list[Tensor]:
    """One call of every op."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1024, generator=generator)
    codes, step = weight(64, 1024, 4)
    a, unit = quest_codes(x, 4, 128)
    return [
        quant_linear(x, codes, step, None, 4, 0), hadamard(x, 128), unit,
        code_linear(a, unit, codes, step, None, 4, 0, 4),
        quant_linear(x.repeat(20, 1), codes, step, None, 4, 0),
    ]  # fmt: skip


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Up to rounding."""
    return all(difference(a, b).relative < 1e-5 for a, b in zip(expected, found, strict=True))


def test_plain_torch_computes_the_same() -> None:
    compiled = calls()
    with use_kernels(False):
        assert kernels() is None
        assert kernels_status() == "plain torch: switched off"
        assert agree(calls(), compiled)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a library that is looked for again."""
    before = (library._state.library, library._state.status)
    monkeypatch.setenv("RESPLICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RESPLICE_KERNELS", raising=False)
    library.forget()
    yield tmp_path / "cache"
    library._state.library, library._state.status = before


def test_a_variable_switches_kernels_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPLICE_KERNELS", "off")
    assert kernels() is None
    assert kernels_status() == "plain torch: switched off"
    assert len(calls()) == 5
    assert not anew.exists()


def test_without_a_compiler_everything_runs(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert kernels() is None
    assert kernels_status().startswith("plain torch: no C compiler")
    assert len(calls()) == 5


def test_a_compiler_that_fails_is_named(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n", encoding="ascii")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert kernels() is None
    assert "it is broken" in kernels_status()
    assert len(calls()) == 5


def test_a_library_that_computes_wrongly_is_not_used(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RESPLICE_CACHE")  # the one built already will do
    monkeypatch.setattr(library, "first_fault", lambda found: "the kernel for 4 bits is wrong")
    assert kernels() is None
    assert kernels_status() == "plain torch: the kernel for 4 bits is wrong"


@needs_kernels
def test_the_library_is_built_once_and_again_if_damaged(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "VARIANTS", (("-O1",),))  # compiled sooner
    assert kernels() is not None
    (file,) = anew.glob("*.so")
    stamp = file.stat().st_mtime_ns
    library.forget()
    assert kernels() is not None
    assert file.stat().st_mtime_ns == stamp, "found in the cache"
    whole = file.read_bytes()
    file.unlink()  # the loaded one stays as it is
    file.write_bytes(whole[: len(whole) // 2])
    library.forget()
    assert kernels() is not None
    (again,) = anew.glob("*.so")
    assert len(again.read_bytes()) == len(whole)
    assert agree(calls(), calls())


@needs_kernels
@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_obstacle(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="ascii")
    monkeypatch.setenv("RESPLICE_CACHE", str(tmp_path / "file" / "cache"))
    assert kernels() is not None


@needs_kernels
@pytest.mark.slow
def test_processes_may_build_at_the_same_time(tmp_path: Path) -> None:
    script = (
        "from resplice.kernels.cpu import kernels, kernels_status\n"
        "assert kernels() is not None, kernels_status()\n"
    )
    environment: dict[str, Any] = {**os.environ, "RESPLICE_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert list(tmp_path.glob("*.so"))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".so"]


def has(feature: str) -> bool:
    """Whether this processor names a feature."""
    return f" {feature} " in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")


@needs_kernels
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v2"])
def test_older_processors(anew: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    if not has("avx2" if target == "x86-64-v3" else "sse4_2"):
        pytest.skip(f"this processor is no {target}")
    native = calls()
    library.forget()
    monkeypatch.setattr(library, "VARIANTS", ((f"-march={target}", "-O1", "-fopenmp"),))
    assert kernels_status() == f"compiled: -march={target} -O1 -fopenmp"
    assert agree(calls(), native)


@needs_kernels
@pytest.mark.parametrize("target", ["ICELAKE", "CASCADELAKE", "AVXVNNI"])
def test_newer_processors(anew: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """What is compiled for newer instructions, these emulated: the same integers."""
    if not has("avx2"):
        pytest.skip("the emulation is itself compiled for AVX2, which this processor lacks")
    monkeypatch.setattr(quant_fast, "_most_tokens", lambda *_: math.inf)
    native = integer_calls()
    library.forget()
    header = str(Path(__file__).parent / "data" / "emulated_x86.h")
    flags = ("-march=x86-64-v3", "-Og", "-include", header, f"-DEMULATE_{target}")
    monkeypatch.setattr(library, "VARIANTS", (flags,))
    assert kernels_status() == f"compiled: {' '.join(flags)}"  # its own check passed as well
    assert library._state.library is not None
    assert library._state.library.resplice_dots_bytes() == 2
    for found, expected in zip(integer_calls(), native, strict=True):
        assert torch.equal(found, expected)


@needs_kernels
def test_bfloat16_results_are_rounded_to_the_nearest() -> None:
    """As torch rounds the same sums, ties to even among them."""
    codes = pack(torch.full((1 << 11, 512), 1), 1)
    step = 1 + torch.arange(1 << 11).remainder(128).unsqueeze(1) / 128  # bfloat16 numbers
    x = torch.zeros(3, 512, dtype=torch.bfloat16)
    x[0, 0], x[1, 3], x[2, 5] = 2, -2, 2.0**-120
    for more in (0.0, 2.0**-8, 2.0**-8 - 2.0**-20, 2.0**-8 + 2.0**-20):  # half-way, and beside it
        found = quant_linear(x, codes, step + more, None, 1, 0)
        expected = quant_linear(x.float(), codes, step + more, None, 1, 0).bfloat16()
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
    huge = quant_linear(x[:2], codes, torch.full_like(step, 3.4e38), None, 1, 0)
    assert torch.equal(huge.float(), torch.tensor([[math.inf], [-math.inf]]).expand_as(huge))


def integer_calls() -> list[Tensor]:
    """Products that every processor sums exactly, for all bits, few tokens and many."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for bits in BITS:
        for tokens, size, group in ((1, 1024, 0), (3, 1001, 0), (2, 1000, 48), (19, 520, 104)):
            rows = SMALL // size + 7
            codes, step = weight(rows, size, bits, group)
            x = torch.randn(tokens, size, generator=generator)
            found.append(quant_linear(x, codes, step, None, bits, group))
            found.append(quant_linear(x.bfloat16(), codes, step, None, bits, group))
            for x_bits in (1, 4, 8):
                half = 2 ** (x_bits - 1)
                a = torch.randint(-half, half, x.shape, generator=generator).to(torch.int8)
                unit = torch.rand(tokens, 1, generator=generator)
                found.append(code_linear(a, unit, codes, step, None, bits, group, x_bits))
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
def test_halves_lose_no_more_than_their_rounding(
    dtype: torch.dtype, tokens: int, outlier: float
) -> None:
    for bits in (1, 2, 3, 4, 8):
        codes, step = weight(72, 1000, bits)
        x = 0.01 * torch.randn(tokens, 1000)
        x[:, 7] *= outlier
        x = x.to(dtype)
        expected = x.double() @ dequantize(codes, step.double(), bits, 0, 1000).t()
        rounded = quant_linear(x, codes, step, None, bits, 0).double() - expected
        assert float(rounded.norm() / expected.norm()) < 0.4 * torch.finfo(dtype).eps


@needs_kernels
def test_torch_compile_calls_the_kernel() -> None:
    codes, step = weight(64, 1024, 2)
    packed, unit = weight(64, 1024, 1)

    def function(x: Tensor) -> Tensor:
        a, scale = quest_codes(x, 1, 128)
        return quant_linear(x, codes, step, None, 2, 0) + code_linear(
            a, scale, packed, unit, None, 1, 0, 1
        )

    x = torch.randn(2, 1024)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))
