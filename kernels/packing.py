"""Packing of b-bit codes into bytes: a little-endian bit stream along the last axis.

Code i occupies bits [i*b, (i+1)*b) of its row; 1, 2, 4 and 8 bits never straddle a byte, 3 may.
Rows are padded to whole bytes, so a row of K codes takes ceil(K*b/8) bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: Integers in [0, 2**bits), any integer dtype, shape [..., K].
        bits: 1 to 8.

    Returns:
        uint8, shape [..., ceil(K*bits/8)].
    """
    per, width = _period(bits)
    padded = torch.nn.functional.pad(codes.to(_wide(bits)), (0, -codes.shape[-1] % per))
    packed = _split(_join(padded, per, 2**bits), width, 256)
    return packed[..., : packed_bytes(codes.shape[-1], bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 codes of shape [..., count].

    Plain integer arithmetic, because every backend has it.
    """
    per, width = _period(bits)
    padded = torch.nn.functional.pad(packed.to(_wide(bits)), (0, -packed.shape[-1] % width))
    return _split(_join(padded, width, 256), per, 2**bits)[..., :count].to(torch.uint8)


def _join(digits: Tensor, per: int, base: int) -> Tensor:
    """Runs of `per` digits, least significant first -> numbers: [..., K] -> [..., K/per]."""
    lanes = digits.unflatten(-1, (-1, per)).unbind(-1)
    return torch.stack([lane * base**i for i, lane in enumerate(lanes)]).sum(0, dtype=digits.dtype)


def _split(numbers: Tensor, per: int, base: int) -> Tensor:
    """Inverse of `_join`."""
    lanes = [torch.div(numbers, base**i, rounding_mode="floor") % base for i in range(per)]
    return torch.stack(lanes, -1).flatten(-2)


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the bit stream is aligned again."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _wide(bits: int) -> torch.dtype:
    """An integer that holds a whole period: 24 bits, but 40 for 5 and 56 for 7 bits."""
    return torch.int64 if bits in (5, 7) else torch.int32
