"""How programs follow each other, and arithmetic in as few instructions as the chip has for it.

A ``program`` begins with ``wait_for_predecessors``. Where it is launched early (programmatic dependent launch, from
compute capability 9.0 on), it comes to the multiprocessors as soon as the programs of the kernel before it in its
stream have ended, while what they wrote is still on its way, and waits for that. A program that did not wait would read
what is not written yet, and could end before its predecessor, so that the kernel after it would run too early as well.
Kernels of others are launched when all before them has ended.

The compiler takes several times as many instructions as the chip needs for some arithmetic, and many kernels here wait
for instructions and barriers more than for memory (docs/performance.md). The first line of each such function says its
plain meaning, which is also what the interpreter runs.
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
TO_FP32 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
EARLY_FROM = 90  # compute capability
_early = [False]


def launch_early(on: bool) -> None:
    """Whether programs of this process are launched early from now on, where the GPU can."""
    _early[0] = on


def program(kernel: Any) -> Any:
    """A jitted function that is launched, ``kernel[grid](...)``, and not called by others."""
    if not INTERPRETED.value:
        kernel.run = lambda *arguments, **named: type(kernel).run(
            kernel, *arguments, launch_pdl=_early[0] and tuning.capability() >= EARLY_FROM, **named
        )
    return kernel


@tl.core.builtin
def _is_early(_semantic: Any = None):
    """Whether the launch that is compiled for is an early one."""
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
        return tl.inline_asm_elementwise(TO_FP32, "=&r,=r,r", [x], tl.float32, True, 2)


@triton.jit
def rounded_product(a, b):
    """a * b in fp32, broadcast, rounded by itself.

    Where lanes add up products, the compiler contracts each lane's own into its first addition: lanes then hold copies
    of the sum that differ in the last bit. If they all store it, which one stays is nobody's choice.
    """
    if INTERPRETED:
        return a * b
    else:  # noqa: RET505
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)


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
