"""Packing of b-bit codes into bytes: a little-endian bit stream along the last axis.

Code i occupies bits [i*b, (i+1)*b) of its row; 1, 2, 4 and 8 bits never straddle a byte, 3 bits may.
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
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per))
    lanes = padded.unflatten(-1, (-1, per)).to(torch.int64)
    shifts = torch.arange(per) * bits
    word = (lanes << shifts).sum(-1, keepdim=True)
    bytes_ = (word >> (8 * torch.arange(width))) & 0xFF
    return bytes_.flatten(-2)[..., : packed_bytes(codes.shape[-1], bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 codes of shape [..., count]."""
    per, width = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % width))
    lanes = padded.unflatten(-1, (-1, width)).to(torch.int64)
    word = (lanes << (8 * torch.arange(width))).sum(-1, keepdim=True)
    codes = (word >> (torch.arange(per) * bits)) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the bit stream is aligned again."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8
