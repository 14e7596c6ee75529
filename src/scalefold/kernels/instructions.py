"""How programs are launched, and arithmetic in as few instructions as the chip has for it.

Every program is launched by ``run_program`` and begins with ``wait_for_predecessors``. From compute capability 9.0 on
it is brought to the multiprocessors while the kernel before it in its stream ends (programmatic dependent launch) and
stands ready when that one's results are there. A program that did not wait would read what is not written yet; and it
could end before its predecessor, so that the kernel after it would run too early as well.

Many kernels here wait for instructions and barriers more than for memory (docs/performance.md), and the compiler takes
several times as many as the chip needs. The first line of each function says its plain meaning, which is also what the
interpreter runs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import os
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda

from scalefold.kernels import tuning

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SIGMOID = tl.constexpr(  # -log2(e) x; 2^; + 1; 1 /
    "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;"
)
_TO_FP32 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


def run_program(program: Any, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
    """Launch ``program``, which begins with ``wait_for_predecessors``; ``named``: launch parameters too."""
    if tuning.capability() >= 90 and not INTERPRETED.value:
        named["launch_pdl"] = True
    program[grid](*arguments, **named)


@tl.core.builtin
def _is_early(_semantic: Any = None):
    """Whether the launch that is compiled for may begin before its predecessor ends."""
    return tl.constexpr(bool(_semantic.builder.options.launch_pdl))


@triton.jit
def wait_for_predecessors():
    """Until all that earlier kernels of the stream have written is there; the first statement of every program."""
    if not INTERPRETED and _is_early():
        cuda.gdc_wait()


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), x fp32, by the chip's own power of two and reciprocal."""
    if INTERPRETED:
        return tl.sigmoid(x)
    else:  # noqa: RET505  (the compiler looks at what follows an untaken return)
        return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def to_fp32(x):
    """x in fp32: bf16 is the upper half of it, so a shift or a mask per value will do."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(_TO_FP32, "=&r,=r,r", [x], tl.float32, True, 2)


@triton.jit
def complete(acc):
    """acc, a product's fp32 result, once the product is complete: it cannot stay unfinished past an instruction."""
    if INTERPRETED:
        return acc
    else:  # noqa: RET505
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, False, 1)


@triton.jit
def to_product_layout(tile):
    """tile in fp32, in the register layout of a product's result, moved there once and as 16-bit values.

    The compiler leaves values in the layout in which they were loaded and moves what becomes of them, in fp32, next to
    each use together with a product. A product with zeros pins the layout.
    """
    if tile.dtype == tl.float32:
        return tile
    else:  # noqa: RET505
        left = tl.zeros([tile.shape[0], 16], tl.float32).to(tile.dtype)
        right = tl.zeros([16, tile.shape[1]], tl.float32).to(tile.dtype)
        return tl.dot(left, right, tile.to(tl.float32))
