"""The fast CPU paths of `quant_linear`, `code_linear`, `hadamard` and `quest_codes`.

Each returns None where it does not apply, and the reference runs instead: another device or dtype,
groups that are no multiple of 8, values that are not finite, no compiled kernels. Layers of fewer
than 2**15 weights stay with the reference, so that there `freeze` is equal bit for bit.

Results differ from the reference by rounding only: a row of floats is held in 24 bits relative to
its largest value (32 bits where that is more than 16 times the row's root mean square), which adds
at most 6e-7 of the row's norm, and is then summed exactly; halves are held in 16 bits (24 where the
largest is over 8 times that), which adds less than a tenth of what they lack. Codes are multiplied
exactly.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from resplice.kernels.cpu import kernels

SMALL = 1 << 15
"""Weights below which a layer keeps the reference's arithmetic."""
_LONGEST_ROW = 1 << 16
"""Codes whose sum of products stays within 32 bits."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE_BYTES = 4 << 20


def linear(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor | None:
    """`quant_linear`, or None."""
    size, rows = x.shape[-1], codes.shape[0]
    if x.dtype not in _FLOATS or rows * size < SMALL or not _suits(codes, step, size, group):
        return None
    library = kernels()
    if library is None:
        return None
    tokens, step = x.numel() // size, _floats(step)
    offset = None if bias is None else _floats(bias)
    limbs = 3 if x.dtype == torch.float32 else 2
    if tokens > _most_tokens(_speed(library), limbs, bits):
        return _by_tiles(library, x, codes, step, offset, bits, group)
    flat = x.contiguous() if x.dtype == torch.bfloat16 else _floats(x)
    y = torch.empty(*x.shape[:-1], rows, dtype=flat.dtype)
    rest = (codes.data_ptr(), rows, bits, step.data_ptr(), group,
            None if offset is None else offset.data_ptr(), y.data_ptr(),
            torch.get_num_threads())  # fmt: skip
    if x.dtype == torch.bfloat16:
        failed = library.resplice_linear_bfloat16(flat.data_ptr(), tokens, size, *rest)
    else:
        failed = library.resplice_linear(flat.data_ptr(), tokens, size, limbs, *rest)
    if failed:
        return None
    return y if x.dtype == flat.dtype else y.to(x.dtype)


def code_linear(
    x: Tensor, x_step: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int, x_bits: int,
) -> Tensor | None:  # fmt: skip
    """`code_linear`, or None."""
    size, rows = x.shape[-1], codes.shape[0]
    if not _suits(codes, step, size, group):
        return None
    library = kernels()
    if library is None:
        return None
    flat, unit, step = x.contiguous(), _floats(x_step), _floats(step)
    offset = None if bias is None else _floats(bias)
    y = torch.empty(*x.shape[:-1], rows)
    failed = library.resplice_code_linear(
        flat.data_ptr(), unit.data_ptr(), x_bits, unit.numel(), size, codes.data_ptr(), rows, bits,
        step.data_ptr(), group, None if offset is None else offset.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return None if failed else y


def hadamard(x: Tensor, block: int) -> Tensor | None:
    """`hadamard` by butterflies, float32 only, or None."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    library = kernels()
    if library is None:
        return None
    x, size = _floats(x), x.shape[-1]
    y = torch.empty(x.shape)
    rows, threads = x.numel() // max(size, 1), torch.get_num_threads()
    library.resplice_hadamard(
        x.data_ptr(), rows, size, block, y.data_ptr(), threads if x.numel() > SMALL else 1
    )
    return y


def quest_codes(
    x: Tensor, bits: int, block: int, alpha: float, tiny: float, outlier: float
) -> tuple[Tensor, Tensor] | None:
    """`quest_codes` in one pass over `x`, or None."""
    if x.dtype not in _FLOATS or x.device.type != "cpu" or not x.numel():
        return None
    library = kernels()
    if library is None:
        return None
    flat, size = _floats(x), x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8)
    step = torch.empty(*x.shape[:-1], 1)
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    failed = library.resplice_quest_codes(
        flat.data_ptr(), step.numel(), size, bits, block, alpha, tiny, outlier,
        codes.data_ptr(), step.data_ptr(), threads,
    )  # fmt: skip
    return None if failed else (codes, step)


@functools.cache
def _speed(library: ctypes.CDLL) -> int:
    found: int = library.resplice_dots_bytes()
    return found


def _most_tokens(speed: int, limbs: int, bits: int) -> float:
    """Tokens up to which a product with packed codes beats unpacking tiles for a dense one.

    Measured on two processors, with instructions for products of bytes (2) and with AVX2 (1).
    """
    if speed == 2 or (speed == 1 and limbs == 2 and bits < 8):
        return math.inf
    if bits == 8:
        return 20 if limbs == 2 else 10
    return 40 if speed == 1 else 16


def _suits(codes: Tensor, step: Tensor, size: int, group: int) -> bool:
    whole = group == 0 or group % 8 == 0 or group >= size
    return (
        codes.device.type == "cpu"
        and codes.is_contiguous()
        and step.dtype in _FLOATS
        and whole
        and 0 < size <= _LONGEST_ROW
    )


def _floats(x: Tensor) -> Tensor:
    """As the kernels read them; only its memory is used, so gradients do not matter."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.detach().to(torch.float32).contiguous()


def _by_tiles(
    library: ctypes.CDLL, x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, bits: int,
    group: int,
) -> Tensor:  # fmt: skip
    """Some rows of weights at a time as floats that stay in the cache, times all tokens."""
    rows, size = codes.shape[0], x.shape[-1]
    flat = _floats(x).reshape(-1, size)
    y = torch.empty(len(flat), rows)
    tile = max(16, _TILE_BYTES // (4 * size))
    weight = torch.empty(min(tile, rows), size)
    for first in range(0, rows, tile):
        part, steps = codes[first : first + tile], step[first : first + tile]
        count = part.shape[0]
        library.resplice_dequantize(
            part.data_ptr(), count, size, bits, steps.data_ptr(), group, weight.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        y[:, first : first + count] = flat @ weight[:count].t()
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)
