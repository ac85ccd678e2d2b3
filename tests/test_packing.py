"""Packing of codes into bytes: a bit stream, pinned by hand-made examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resplice.kernels.packing import pack, packed_bytes, unpack

ALL_BITS = range(1, 9)


@st.composite
def codes_of(draw: Any) -> tuple[int, list[list[int]]]:
    """Bits and a matrix of codes."""
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=rows, max_size=rows)) or [[0] * count]


def stream(codes: list[int], bits: int) -> list[int]:
    """The definition: one long number, code i at bit i * bits, cut into bytes."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(codes_of())
def test_codes_come_back(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(rows), packed_bytes(codes.shape[1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes.to(torch.uint8))


@given(codes_of())
def test_bytes_are_the_bit_stream(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1), bits)
    assert packed.tolist() == [stream(row, bits) for row in rows]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], [0b10001101]),
        (1, [1, 1, 1], [0b00000111]),
        (1, [0] * 8 + [1], [0, 1]),
        (2, [1, 2, 3, 0], [0b00111001]),
        (2, [3, 3, 3, 3, 1], [255, 1]),
        (3, [1, 2, 3], [0b11010001, 0b0]),
        (3, [7, 0, 7, 0, 7, 0, 7, 0], [0b11000111, 0b01110001, 0b00011100]),
        (3, [0, 0, 4], [0, 1]),
        (4, [10, 11], [0xBA]),
        (4, [1, 2, 3], [0x21, 0x03]),
        (5, [31, 0, 31], [0b00011111, 0b01111100]),
        (8, [0, 128, 255], [0, 128, 255]),
        (4, [], []),
    ],
)
def test_examples_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.int64), bits).tolist() == expected
    assert unpack(torch.tensor(expected, dtype=torch.uint8), bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 101])
def test_sizes_in_bytes(bits: int, count: int) -> None:
    assert packed_bytes(count, bits) == -(-count * bits // 8)
    assert pack(torch.zeros(2, 3, count, dtype=torch.int64), bits).shape == (
        2, 3, packed_bytes(count, bits),
    )  # fmt: skip


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_largest_code_fits(bits: int) -> None:
    codes = torch.full((24,), 2**bits - 1)
    assert pack(codes, bits).tolist() == [255] * (3 * bits)
    assert torch.equal(unpack(pack(codes, bits), bits, 24).long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype: torch.dtype) -> None:
    codes = torch.arange(16)
    assert torch.equal(pack(codes.to(dtype), 4), pack(codes, 4))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_rows_are_packed_on_their_own(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 13), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    for i, j in ((0, 0), (2, 4)):
        assert torch.equal(packed[i, j], pack(codes[i, j], bits))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_padding_bits_are_zero(bits: int) -> None:
    packed = pack(torch.full((3,), 2**bits - 1), bits)
    used = 3 * bits % 8
    assert int(packed[-1]) == (2**used - 1 if used else 255)


def test_inputs_that_are_not_contiguous_pack_alike() -> None:
    codes = torch.randint(0, 8, (10, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(codes.t(), 3), pack(codes.t().contiguous(), 3))
    packed = pack(codes, 3)
    assert torch.equal(unpack(packed.repeat(1, 2)[:, : packed.shape[1]], 3, 6).long(), codes)
