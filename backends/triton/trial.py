"""A script that compiles a small kernel for every target it is given; it needs Triton alone.

    python trial.py cuda:90:32:cubin hip:gfx942:64:hsaco

prints a JSON list per target, as soon as it is known: the argument, and why it does not compile,
or "".
"""

from __future__ import annotations

import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _square(a, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(a + rows * SIZE + columns)
    tl.store(out + rows * SIZE + columns, tl.dot(x, x))


def reason(text: str) -> str:
    """Why the kernel does not compile for `BACKEND:ARCHITECTURE:WARP:BINARY`, or ""."""
    backend, arch, warp, binary = text.split(":")
    source = ASTSource(
        fn=_square,
        signature={"a": "*fp16", "out": "*fp32", "SIZE": "constexpr"},
        constexprs={"SIZE": 32},
    )
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp))
    try:
        compiled = triton.compile(source, target=target, options={"num_warps": 4})
    except Exception as error:
        return said(error)
    return "" if binary in compiled.asm else f"Triton makes no {binary} for it"


def said(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(?:error|fatal)\b", line, re.IGNORECASE)]
    chosen = [*(line for line in telling if len(line) > 40), *reversed(lines), "no reason given"]
    return f"{type(error).__name__}: {chosen[0][:300]}"


def main() -> None:
    """Answer for the command line's targets, one line each."""
    for text in sys.argv[1:]:
        print(json.dumps([text, reason(text)]), flush=True)


if __name__ == "__main__":
    main()
