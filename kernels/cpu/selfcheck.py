"""Small products whose exact results are known: a library that gets one wrong is not used."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from resplice.kernels.packing import pack

_ROWS = 5


def first_fault(library: ctypes.CDLL) -> str:
    """What the library computes wrongly; empty if nothing."""
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 2, 3, 4, 8):
        for tokens, size, group in ((1, 600, 0), (13, 200, 40)):
            if not _agrees(library, bits, tokens, size, group, generator):
                return f"the compiled kernel for {bits} bits computes wrongly on this processor"
    x = torch.randn(3, 128, generator=generator)
    turned = torch.empty_like(x)
    library.resplice_hadamard(x.data_ptr(), 3, 128, 128, turned.data_ptr(), 1)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    if float((turned.double() - x.double() @ matrix.double() / 128**0.5).abs().max()) > 1e-5:
        return "the compiled Hadamard transform computes wrongly on this processor"
    if not _layer_agrees(library, generator):
        return "the compiled layer of experts computes wrongly on this processor"
    return ""


def _layer_agrees(library: ctypes.CDLL, generator: torch.Generator) -> bool:
    """Integers through always-on ReLU neurons: exact, whatever the order."""

    def draw(*sizes: int) -> Tensor:
        return torch.randint(-9, 10, sizes, generator=generator).float()

    x, first, second = draw(70), draw(45, 70), draw(5, 45)
    out, scratch = torch.empty(5), torch.empty(45)
    relu = 4
    library.resplice_moe_one_token(
        x.data_ptr(), first.data_ptr(), None, second.data_ptr(), *[None] * 8, out.data_ptr(),
        scratch.data_ptr(), 70, 5, 45, 0, 0, 0, 0, relu, 0, 0, 1,
    )  # fmt: skip
    return bool(out.equal(second @ (first @ x).relu()))


def _agrees(
    library: ctypes.CDLL, bits: int, tokens: int, size: int, group: int, generator: torch.Generator
) -> bool:
    """Integer activations: both products are exact, whatever their order."""
    codes = torch.randint(0, 2**bits, (_ROWS, size), generator=generator)
    packed = pack(codes, bits)
    step = torch.full((_ROWS, -(-size // group) if group else 1), 0.5)
    weight = codes.double() - (2**bits - 1) / 2
    found = torch.empty(tokens, _ROWS)

    def close(x: Tensor, failed: int) -> bool:
        expected = x.double() @ weight.t() / 2
        return not failed and float((found - expected).abs().max()) <= 1e-6 * float(
            expected.abs().max()
        )

    x = torch.randint(-99, 100, (tokens, size), generator=generator).float()
    failed = library.resplice_linear(
        x.data_ptr(), tokens, size, 3, packed.data_ptr(), _ROWS, bits, step.data_ptr(), group,
        None, found.data_ptr(), 1,
    )  # fmt: skip
    if not close(x, failed):
        return False
    for act_bits in (1, 8):
        half = 2 ** (act_bits - 1)
        a = torch.randint(-half, half, (tokens, size), generator=generator).to(torch.int8)
        unit = torch.ones(tokens)
        failed = library.resplice_code_linear(
            a.data_ptr(), unit.data_ptr(), act_bits, tokens, size, packed.data_ptr(), _ROWS, bits,
            step.data_ptr(), group, None, found.data_ptr(), 1,
        )  # fmt: skip
        if not close(a + 0.5, failed):
            return False
    return True
