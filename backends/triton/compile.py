"""Ahead-of-time compilation of kernel variants; no GPU is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from resplice.backends.triton.targets import Target
from resplice.backends.triton.trial import said
from resplice.backends.triton.variants import Variant, variant_of
from resplice.errors import LoweringError, UsageError
from resplice.kernels.cuda.launch import Launch, shared_limit

_UNUSUAL = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
"""Metadata of launches that the launcher can make; others ask for another driver call."""


@dataclass(frozen=True)
class Compiled:
    """One variant for one target.

    Attributes:
        variant: What was compiled.
        target: What for.
        binary: The cubin or hsaco.
        assembly: The PTX or AMD assembly.
        symbol: Name of the entry point.
        threads: Of a block.
        shared: Dynamic shared memory of a block, bytes.
        scratch: Of the two trailing pointers, `global_scratch` and `profile_scratch`: bytes per
            block, and alignment.
    """

    variant: Variant
    target: Target
    binary: bytes
    assembly: str
    symbol: str
    threads: int
    shared: int
    scratch: dict[str, tuple[int, int]]

    def write(self, folder: Path) -> dict[str, dict[str, str]]:
        """Write both files to `folder`/kernels/TARGET; returns where, with their hashes."""
        place = Path("kernels") / self.target.name
        (folder / place).mkdir(parents=True, exist_ok=True)
        files = {}
        contents = {
            self.target.binary: self.binary, self.target.assembly: self.assembly.encode()
        }  # fmt: skip
        for kind, content in contents.items():
            path = place / f"{self.variant.title}.{kind}"
            (folder / path).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files[kind] = {"path": path.as_posix(), "sha256": digest}
        return files


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile what a launch needs.

    Raises:
        LoweringError: The compiler refuses it.
    """
    return compile_variant(variant_of(launch), target)


def compile_variants(variants: Iterable[Variant], target: Target) -> dict[str, Compiled]:
    """Compile every variant once; by title.

    Raises:
        LoweringError: Lists all that the compiler refuses.
    """
    found: dict[str, Compiled] = {}
    problems: list[str] = []
    for title, variant in {variant.title: variant for variant in variants}.items():
        try:
            found[title] = compile_variant(variant, target)
        except LoweringError as error:
            problems += error.problems
    if problems:
        raise LoweringError("triton", problems)
    return found


def compile_variant(variant: Variant, target: Target) -> Compiled:
    """Compile one variant.

    Raises:
        LoweringError: The compiler refuses it, or a block asks for more shared memory than the
            target has.
        UsageError: Kernels are interpreted in this process.
    """
    if not isinstance(variant.function, JITFunction):
        raise UsageError("TRITON_INTERPRET is set, so this process can't compile", hint="unset it")
    source = ASTSource(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs=variant.attributes,
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,  # what Triton does by default today, said aloud
    }
    try:
        made = triton.compile(source, target=GPUTarget(*target.for_triton), options=options)
    except Exception as error:
        raise LoweringError("triton", [_problem(variant, target, said(error))]) from error
    return _checked(variant, target, made)


def _checked(variant: Variant, target: Target, made: Any) -> Compiled:
    facts = made.metadata
    for name, usual in _UNUSUAL.items():
        if getattr(facts, name, usual) != usual:
            what = f"it needs {name}={getattr(facts, name)}, which the launcher can't give"
            raise LoweringError("triton", [_problem(variant, target, what)])
    limit = shared_limit(target.name)
    if facts.shared > limit:
        what = f"a block needs {facts.shared} bytes of shared memory, there are {limit}"
        raise LoweringError("triton", [_problem(variant, target, what)])
    scratch = {
        name: (int(getattr(facts, f"{name}_size", 0)), int(getattr(facts, f"{name}_align", 1)))
        for name in ("global_scratch", "profile_scratch")
    }
    return Compiled(
        variant, target, made.asm[target.binary], made.asm[target.assembly], facts.name,
        facts.num_warps * target.warp, facts.shared, scratch,
    )  # fmt: skip


def _problem(variant: Variant, target: Target, what: str) -> str:
    constants = ", ".join(f"{n}={v}" for n, v in variant.constants)
    return (
        f"{variant.name} for {target.name} ({constants}, {variant.num_warps} warps, "
        f"{variant.num_stages} stages): {what}"
    )
