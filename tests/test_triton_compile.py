"""Ahead-of-time compilation without a GPU, and what is read out of the compiled code."""

from __future__ import annotations

import re

import pytest
import torch
import triton.language as tl
from triton_toys import axpy, axpy_launch, product_launch

from resplice.backends.triton import compile as compiling
from resplice.backends.triton.compile import compile_launch, compile_variants
from resplice.backends.triton.disassembly import amd_report, nvidia_instructions, nvidia_resources
from resplice.backends.triton.hardware import HARDWARE, occupancy
from resplice.backends.triton.performance import kernel_figures, roofline
from resplice.backends.triton.targets import DEFAULT, Target, targets
from resplice.backends.triton.variants import variant_of
from resplice.cost import Cost
from resplice.errors import LoweringError


def _target(name: str) -> Target:
    return Target(name, 64 if name.startswith("gfx") else 32)


def test_the_toy_kernel_is_what_it_says() -> None:
    x, y = torch.randn(1000), torch.randn(1000)
    torch.testing.assert_close(axpy(x, y, 2.0, bias=torch.ones(1)), 2 * x + y + 1)


def test_interpreting_leaves_the_compiler_as_it_was() -> None:
    axpy(torch.randn(8), torch.randn(8), 1.0)
    from triton.compiler.code_generator import CodeGenerator

    assert CodeGenerator.builtin_namespace["min"] is tl.core.builtin_min
    assert CodeGenerator.builtin_namespace["max"] is tl.core.builtin_max


@pytest.mark.parametrize("name", DEFAULT)
def test_a_kernel_compiles_for_every_target(name: str) -> None:
    launch = axpy_launch()
    made = compile_launch(launch, _target(name))
    assert made.threads == 4 * made.target.warp
    assert [n for n, _ in made.variant.parameters] == ["x", "y", "out", "n", "alpha"]
    if made.target.amd:
        kinds = re.findall(r"\.value_kind:\s+(\S+)", made.assembly)
        assert kinds == ["global_buffer"] * 3 + ["by_value"] * 2 + ["global_buffer"] * 2
        assert f".max_flat_workgroup_size: {made.threads}" in made.assembly
    else:
        kinds = re.findall(r"\.param \.(\w+)(?: \.ptr)?", made.assembly)
        assert kinds == ["u64"] * 3 + ["u32", "f32"] + ["u64"] * 2  # two scratch pointers follow
        assert f".reqntid {made.threads}" in made.assembly
        assert made.symbol.encode() in made.binary


def test_ones_and_nones_are_compiled_in_and_multiples_of_16_are_told() -> None:
    plain, wide = variant_of(axpy_launch(1000)), variant_of(axpy_launch(1024))
    assert dict(plain.constants) == {"bias": None, "stride": 1, "block": 256}
    assert plain.divisible == (0, 1, 2)
    assert wide.divisible == (0, 1, 2, 4)
    strided = variant_of(axpy_launch(1000, stride=2, bias=torch.empty(1, device="meta")))
    assert dict(strided.constants) == {"block": 256}
    assert dict(strided.signature)["stride"] == "i32"
    assert len({plain.title, wide.title, strided.title}) == 3


def test_an_offset_that_is_no_multiple_of_16_bytes_is_not_promised() -> None:
    x = torch.empty(1001, device="meta")
    launch = axpy_launch()
    moved = type(launch)(**{**vars(launch), "arguments": {**launch.arguments, "x": x[1:]}})
    assert variant_of(moved).divisible == (1, 2)


def test_equal_variants_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = compiling.compile_variant
    monkeypatch.setattr(
        compiling, "compile_variant", lambda v, t: calls.append(v.title) or real(v, t)
    )
    variants = [variant_of(axpy_launch(n)) for n in (1000, 1001, 1000, 1024)]
    assert len(compile_variants(variants, _target("sm_90"))) == len(calls) == 2


def test_more_shared_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "shared_limit", lambda _: 1000)
    with pytest.raises(LoweringError, match=r"toy_product for sm_90 .* bytes of shared memory"):
        compile_launch(product_launch(), _target("sm_90"))


def test_what_the_compiler_refuses_is_named() -> None:
    with pytest.raises(LoweringError, match=r"toy_axpy for sm_90 \(.*block=100"):
        compile_launch(axpy_launch(block=100), _target("sm_90"))


def test_targets_that_triton_cannot_compile_are_refused_by_name() -> None:
    with pytest.raises(LoweringError) as refused:
        targets(("sm_90", "sm_12", "gfx777", "volta"))
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        "target sm_12", "target gfx777", "target volta",
    ]  # fmt: skip
    assert [t.name for t in targets(("sm_90", "gfx942", "sm_90"))] == ["sm_90", "gfx942"]
    assert [t.warp for t in targets(("sm_90", "gfx942"))] == [32, 64]


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("sm_90", "HGMMA.64x128x16.F32.BF16"),
        ("gfx942", "v_mfma_f32_32x32x8_bf16"),
        pytest.param("sm_80", "HMMA.16816.F32.BF16", marks=pytest.mark.slow),
        pytest.param("sm_100", "UTCHMMA", marks=pytest.mark.slow),
    ],
)
def test_matrix_instructions_are_found_in_compiled_code(name: str, instruction: str) -> None:
    made = compile_launch(product_launch(), _target(name))
    found = kernel_figures(made)
    assert any(key.startswith(instruction) for key in found["matrix_instructions"])
    assert found["spilled"] == found["instructions"].get("local memory", 0) == 0
    wide = found["instructions"]
    assert wide.get("16-byte asynchronous copy", 0) + wide.get("16-byte global load", 0) > 0
    assert found["instructions"]["all"] > sum(found["matrix_instructions"].values()) > 0
    if made.target.amd:  # what the compiler itself says of the registers
        waves = int(re.findall(r"; Occupancy: (\d+)", made.assembly)[0])
        alone = occupancy(
            HARDWARE[name], threads=256, warp=64, registers=found["registers"], shared=0
        )
        assert alone.warps == 4 * waves


def test_occupancy_follows_from_each_limit() -> None:
    a100, h100 = HARDWARE["sm_80"], HARDWARE["sm_90"]
    free = occupancy(a100, threads=256, warp=32, registers=32, shared=0)
    assert (free.blocks, free.share, free.limits) == (8, 1.0, ("registers", "warps"))
    full = occupancy(a100, threads=256, warp=32, registers=255, shared=0)
    assert (full.blocks, full.share, full.limits) == (1, 0.125, ("registers",))
    large = occupancy(h100, threads=128, warp=32, registers=168, shared=98_304)
    assert (large.blocks, large.warps, large.limits) == (2, 8, ("shared memory",))
    assert occupancy(h100, threads=32, warp=32, registers=16, shared=0).limits == ("blocks",)
    assert occupancy(h100, threads=1024, warp=32, registers=128, shared=0).blocks == 0


def test_the_roofline_takes_the_slower_of_the_two_rates() -> None:
    h100 = HARDWARE["sm_90"]
    heavy = roofline(Cost(flops=10**15, read=10**9, written=0), "half", h100)
    assert heavy["bound_by"] == "arithmetic"
    assert heavy["seconds_at_best"] == pytest.approx(1 / 0.9894)
    light = roofline(Cost(flops=10**6, read=3_350_000_000, written=0), "half", h100)
    assert (light["bound_by"], light["seconds_at_best"]) == ("memory", pytest.approx(1e-3))


_SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                          /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @UP1 LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   STL.64 [R1+0x8], R2 ;
        /*0050*/                   IMMA.16832.S8.S8 R4, R8.ROW, R6.COL, R4 ;
        /*0060*/                   NOP;
"""


def test_instructions_are_counted_with_predicates_and_suffixes() -> None:
    mix, matrix = nvidia_instructions(_SASS)
    assert mix == {
        "all": 7, "16-byte global load": 1, "global load": 2, "16-byte asynchronous copy": 1,
        "asynchronous copy": 1, "local memory": 1, "tensor core": 1,
    }  # fmt: skip
    assert matrix == {"IMMA.16832.S8.S8": 1}


def test_stack_counts_as_spilled() -> None:
    text = " Function k:\n  REG:255 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:576 TEXTURE:0"
    found = nvidia_resources(text)
    assert (found.registers, found.spilled, found.static_shared) == (255, 32, 1024)
    with pytest.raises(LoweringError, match="no resource usage"):
        nvidia_resources("cuobjdump info: nothing here")
    with pytest.raises(LoweringError, match="vgpr_count"):
        amd_report("\ts_endpgm\n")
