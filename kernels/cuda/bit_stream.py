"""Reading packed codes inside a kernel: parts shared by the kernels of packed weights.

A row of codes is a little-endian bit stream (`resplice.kernels.packing`). It is read by periods:
the fewest bytes that hold a whole number of codes, `per` codes in `width` bytes (8 codes in 3 bytes
for 3 bits). One period is one integer, a "word", and codes with the same place in their words are
one slice of K: a product over K is the sum over slices, so that neither codes nor activations
change places in memory. Activations are taken apart in registers, by splitting pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl


def period(bits: int) -> tuple[int, int]:
    """Codes and bytes of a word: 8 codes in 3 bytes for 3 bits, else those of one byte."""
    return (8, 3) if bits == 3 else (8 // bits, 1)


@triton.jit
def load_words(
    codes: tl.tensor, rows: tl.tensor, places: tl.tensor, inside: tl.tensor, row_bytes: tl.tensor,
    width: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Words [rows, places] as int32; zero outside.

    `codes` points to bytes, or to int32 where `width` is 4 and rows are whole numbers of those.
    """
    if width == 3:
        first = rows * row_bytes + 3 * places
        left = row_bytes - 3 * places
        low = tl.load(codes + first, inside & (left > 0), other=0).to(tl.int32)
        mid = tl.load(codes + first + 1, inside & (left > 1), other=0).to(tl.int32)
        high = tl.load(codes + first + 2, inside & (left > 2), other=0).to(tl.int32)
        word = low | (mid << 8) | (high << 16)
    elif width == 4 and codes.dtype.element_ty == tl.uint8:
        first = rows * row_bytes + 4 * places
        left = row_bytes - 4 * places
        word = tl.load(codes + first, inside & (left > 0), other=0).to(tl.int32)
        for byte in tl.static_range(1, 4):
            more = tl.load(codes + first + byte, inside & (left > byte), other=0).to(tl.int32)
            word |= more << (8 * byte)
    elif width == 4:
        at = rows * (row_bytes // 4) + places
        word = tl.load(codes + at, inside & (4 * places < row_bytes), other=0)
    else:
        at = rows * row_bytes + places
        word = tl.load(codes + at, inside & (places < row_bytes), other=0).to(tl.int32)
    return word


@triton.jit
def level(
    word: tl.tensor, place: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Levels in units of the step: code - 2**(bits-1) + 1/2, exact in `kind`.

    The code becomes the low bits of a number whose last bit is worth 1/2: an integer `or` and one
    subtraction instead of a conversion. bfloat16 has too few bits for 8-bit codes in that form.
    """
    code = (word >> place) & (2**bits - 1)
    middle: tl.constexpr = 2 ** (bits - 1) - 0.5
    if kind == tl.float16:
        found = ((code << 1) | 0x6000).to(tl.int16).to(tl.float16, bitcast=True) - (512 + middle)
    elif kind == tl.bfloat16 and bits <= 4:
        found = ((code << 1) | 0x4280).to(tl.int16).to(tl.bfloat16, bitcast=True) - (64 + middle)
    else:
        found = ((code << 1) | 0x4A800000).to(tl.float32, bitcast=True) - (4194304 + middle)
    return found.to(kind)


@triton.jit
def evens_and_odds(values: tl.tensor) -> tl.tuple:
    """Columns 0, 2, 4 ... and 1, 3, 5 ... of [rows, columns]."""
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))
