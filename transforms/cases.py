"""Fresh random inputs for a program, at the captured size and at another one.

Integer inputs stay within the range of the sample (token ids), masks stay masks, and floats are
drawn like the sample (same mean and spread).
"""

from __future__ import annotations

import math

import sympy
import torch

from resplice.dims import Dim, expression
from resplice.program import Program


def fresh_inputs(
    program: Program, *, seed: int = 0, second_size: bool = False
) -> dict[str, torch.Tensor]:
    """Draw inputs.

    Args:
        program: The program.
        seed: Seed of the draw.
        second_size: Use another size on every dynamic dimension, within its bounds.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = _sizes(program, second_size)
    drawn = {}
    for node in program.placeholders:
        shape = [int(expression(s).subs(sizes)) for s in node.meta["val"].shape]
        drawn[node.name] = _draw(program.samples[node.name], shape, generator)
    return drawn


def fresh_cases(program: Program, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """One case at the captured size and, for a dynamic program, one at a second size."""
    cases = [fresh_inputs(program, seed=seed)]
    if program.dims:
        cases.append(fresh_inputs(program, seed=seed + 1, second_size=True))
    return cases


def _sizes(program: Program, second: bool) -> dict[object, int]:
    """Value of every free shape symbol."""
    found: dict[object, int] = {}
    for node in program.placeholders:
        sample = program.samples[node.name]
        for size, actual in zip(node.meta["val"].shape, sample.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = actual
    for symbol in [s for s in _all_symbols(program) if s not in found]:
        found[symbol] = _solved(program, symbol)
    if second:
        found = {symbol: _other(program, str(symbol), value) for symbol, value in found.items()}
        found.update(_products(program, found))
    return found


def _products(program: Program, sizes: dict[object, int]) -> dict[object, int]:
    """Sizes declared as products of names, `frames*rows`, follow from those names."""
    by_name, products = dict[str, int](), dict[object, list[str]]()
    for symbol, size in sizes.items():
        dim = program.dims.get(program.symbols.get(str(symbol), ""))
        if dim and "*" in dim.name:
            products[symbol] = dim.name.split("*")
        elif dim:
            by_name[dim.name] = size // dim.factor
    known = {s: names for s, names in products.items() if all(name in by_name for name in names)}
    return {symbol: math.prod(by_name[name] for name in names) for symbol, names in known.items()}


def _all_symbols(program: Program) -> set[object]:
    sizes = [
        s for n in program.placeholders for s in n.meta["val"].shape if isinstance(s, torch.SymInt)
    ]
    return {symbol for size in sizes for symbol in size.node.expr.free_symbols}


def _solved(program: Program, symbol: object) -> int:
    """A symbol that stands in expressions only (h = 2*_h): solve for it."""
    for node in program.placeholders:
        for size, actual in zip(
            node.meta["val"].shape, program.samples[node.name].shape, strict=True
        ):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols == {symbol}:
                return int(sympy.solve(size.node.expr - actual, symbol)[0])
    return 2


def _other(program: Program, symbol: str, value: int) -> int:
    """Another admissible size, larger where bounds allow."""
    dim = program.dims.get(program.symbols.get(symbol, "")) or Dim("size", min=1)
    base = value // dim.factor
    larger, smaller = base + max(1, base // 2), base - max(1, base // 3)
    return dim.factor * (larger if dim.admits(larger * dim.factor) else max(dim.min, smaller))


def _draw(sample: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if sample.dtype == torch.bool or _is_mask(sample) or _is_counting(sample):
        return _resized(sample, shape)
    if not sample.is_floating_point():
        low, high = int(sample.min()), int(sample.max()) + 1
        return torch.randint(low, high, shape, generator=generator, dtype=sample.dtype)
    wide = sample.float()
    if not wide.isfinite().all():
        return _resized(sample, shape)  # an additive mask
    center, least, most = float(wide.mean()), float(wide.min()), float(wide.max())
    spread = float(wide.std()) if sample.numel() > 1 else abs(center) * 0.3
    drawn = torch.randn(shape, generator=generator) * (spread or 1.0) + center
    within = drawn.clamp(least, most) if least < most else drawn  # positive stays positive
    return within.to(sample.dtype)


def _is_mask(sample: torch.Tensor) -> bool:
    return (
        not sample.is_floating_point()
        and bool(((sample == 0) | (sample == 1)).all())
        and sample.dim() > 1
    )


def _is_counting(sample: torch.Tensor) -> bool:
    """Positions 0, 1, 2, ... along the last axis must keep counting."""
    size = sample.shape[-1] if sample.dim() else 0
    return size > 2 and torch.equal(sample.long(), torch.arange(size).expand(sample.shape))


def _resized(sample: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Cut or repeat the sample's last values, so that a padded mask stays a padded mask."""
    if _is_counting(sample):
        return torch.arange(shape[-1], dtype=sample.dtype).expand(shape).clone()
    result = sample
    for axis, size in enumerate(shape):
        index = torch.arange(size).clamp(max=sample.shape[axis] - 1)
        result = result.index_select(axis, index)
    return result
