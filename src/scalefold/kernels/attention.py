"""Softmax attention with and without a pair bias, forward and backward, in Triton.

Same meaning as ``reference.attention``. The benchmark's rows are short (128 or 256 keys), so one program holds whole
rows of scores on chip and no score is ever written to memory:

* forward: a program owns one tile of queries of one head and walks over several rows s; the bias tile, the same for
  all rows, is read once per program. Longer rows (evaluation) are walked in key tiles with a running maximum.
* backward of q, k, v: a program owns one (row, head); probabilities are recomputed tile by tile from saved statistics.
* backward of the bias: a program owns one (head, query tile, key tile), walks over a group of rows and keeps the sum
  in fp32 registers; the few partial sums (one per group) are added afterwards. No atomics.

Softmax runs in base 2. Per row of scores the forward saves ``lse`` = max + log2(sum) and
``rest`` = 2^(lse - max) / sum. ``rest`` is 1 except in rows without any key left: there max is about -inf * log2(e),
whose fp32 spacing swallows the log2(sum), and ``rest`` restores the factor, so that these rows keep their uniform
weights in the backward too.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The type checker sees neither Triton's launch syntax nor its ranges.

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import tuning

LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _load_rows(base, offsets, stride, n, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """Rows of one head, [len(offsets), BLOCK_D]; zeros beyond n and D. EVEN: no offset reaches n."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] * stride + d[None, :]
    if EVEN and BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(offsets < n)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_rows(base, offsets, stride, n, values, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] * stride + d[None, :]
    values = values.to(base.dtype.element_ty)
    if EVEN and BLOCK_D == D:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=(offsets < n)[:, None] & (d < D)[None, :])


@triton.jit
def _load_shift(base, offsets, stride, n, inf_log2, EVEN: tl.constexpr):
    """Additive mask in base 2 per key: 0 or -inf_log2, and minus infinity beyond n."""
    if EVEN:
        return (tl.load(base + offsets * stride).to(tl.float32) - 1.0) * inf_log2
    keep = tl.load(base + offsets * stride, mask=offsets < n, other=0.0).to(tl.float32)
    return tl.where(offsets < n, (keep - 1.0) * inf_log2, float("-inf"))


@triton.jit
def _load_bias(base, offs_q, offs_k, stride_q, stride_k, n, EVEN: tl.constexpr):
    """Bias tile [queries, keys] in storage type."""
    pointers = base + offs_q[:, None] * stride_q + offs_k[None, :] * stride_k
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(offs_q < n)[:, None] & (offs_k < n)[None, :], other=0.0)


@triton.jit
def _unpack(tile):
    """bf16 tile -> fp32, done anew in each iteration: hoisted out of the loop, it would take twice the registers."""
    if INTERPRETED or tile.dtype != tl.bfloat16:
        return tile.to(tl.float32)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], dtype=tl.float32, is_pure=False, pack=2
    )


@triton.jit
def _logits(products, shift, SCALE: tl.constexpr):
    """Scores in base 2 without a bias: one fused multiply-add per score."""
    return products * (SCALE * LOG2_E) + shift[None, :]


@triton.jit
def _biased_logits(products, tile, shift, SCALE: tl.constexpr):
    """(q.k * SCALE + bias) * log2(e) + shift: two fused multiply-adds per score."""
    return (products * SCALE + tile) * LOG2_E + shift[None, :]


@triton.jit
def _accumulate(logits, values, maximum, total, result, PRECISION: tl.constexpr):
    """One step of the softmax with a running maximum: new maximum, sum of weights and weighted sum of values."""
    larger = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - larger[:, None])
    decay = tl.exp2(maximum - larger)
    total = total * decay + tl.sum(weights, 1)
    result = tl.dot(weights.to(values.dtype), values, result * decay[:, None], input_precision=PRECISION)
    return larger, total, result


@triton.jit
def _store_statistics(lse, rest, offset, offs_q, n, maximum, total):
    log_total = tl.log2(total)
    value = maximum + log_total
    tl.store(lse + offset + offs_q, value, mask=offs_q < n)
    tl.store(rest + offset + offs_q, tl.exp2((value - maximum) - log_total), mask=offs_q < n)


@triton.jit(do_not_specialize=["rows", "n", "rows_per_program"])
def _forward_rows(
    q, k, v, mask, bias, o, lse, rest,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, rows_per_program, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Short rows in STEPS unrolled key tiles; the bias of all of them stays in registers while rows pass by."""
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    o += b * o_b + h * o_h
    mask += b * mask_b
    tiles = ()
    if HAS_BIAS:
        for step in tl.static_range(STEPS):
            offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tiles += (_load_bias(bias + b * bias_b + h * bias_h, offs_q, offs_k, bias_q, bias_k, n, EVEN),)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        s = tl.cast(row, tl.int64)
        queries = _load_rows(q + s * q_s, offs_q, q_n, n, D, BLOCK_D, EVEN)
        maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for step in tl.static_range(STEPS):
            offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            keys = _load_rows(k + s * k_s, offs_k, k_n, n, D, BLOCK_D, EVEN)
            values = _load_rows(v + s * v_s, offs_k, v_n, n, D, BLOCK_D, EVEN)
            shift = _load_shift(mask + s * mask_s, offs_k, mask_n, n, inf_log2, EVEN)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if HAS_BIAS:
                logits = _biased_logits(products, _unpack(tiles[step]), shift, SCALE)
            else:
                logits = _logits(products, shift, SCALE)
            maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
        _store_rows(o + s * o_s, offs_q, o_n, n, result / total[:, None], D, BLOCK_D, EVEN)
        if SAVE:
            _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@triton.jit(do_not_specialize=["rows", "n"])
def _forward_tiled(
    q, k, v, mask, bias, o, lse, rest,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any length in key tiles with a running maximum; one row and query tile per program."""
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    s = tl.program_id(1).to(tl.int64)
    k += b * k_b + s * k_s + h * k_h
    v += b * v_b + s * v_s + h * v_h
    mask += b * mask_b + s * mask_s
    queries = _load_rows(q + b * q_b + s * q_s + h * q_h, offs_q, q_n, n, D, BLOCK_D, EVEN)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = _load_rows(k, offs_k, k_n, n, D, BLOCK_D, EVEN)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shift = _load_shift(mask, offs_k, mask_n, n, inf_log2, EVEN)
        if HAS_BIAS:
            tile = _load_bias(bias + b * bias_b + h * bias_h, offs_q, offs_k, bias_q, bias_k, n, EVEN)
            logits = _biased_logits(products, tile.to(tl.float32), shift, SCALE)
        else:
            logits = _logits(products, shift, SCALE)
        values = _load_rows(v, offs_k, v_n, n, D, BLOCK_D, EVEN)
        maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
    _store_rows(o + b * o_b + s * o_s + h * o_h, offs_q, o_n, n, result / total[:, None], D, BLOCK_D, EVEN)
    if SAVE:
        _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@triton.jit(do_not_specialize=["rows", "n"])
def _backward_rows(
    q, k, v, mask, bias, o, do, lse, rest, delta, dq, dk, dv,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h, do_b, do_s, do_n, do_h,
    dq_b, dq_s, dq_n, dq_h, dk_c, dk_b, dk_s, dk_n, dk_h, dv_c, dv_b, dv_s, dv_n, dv_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, inf_log2, scale,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v of one row and head for one chunk of queries; SAVE: keep delta for the bias gradient.

    With several chunks (n > BLOCK_Q) dk and dv are fp32 partial sums, one slice c per chunk.
    """
    chunk = tl.program_id(1)
    offs_q = chunk * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    k += b * k_b + s * k_s + h * k_h
    v += b * v_b + s * v_s + h * v_h
    dk += chunk * dk_c + b * dk_b + s * dk_s + h * dk_h
    dv += chunk * dv_c + b * dv_b + s * dv_s + h * dv_h
    mask += b * mask_b + s * mask_s
    statistics = ((b * rows + s) * heads + h) * n + offs_q
    row_lse = tl.load(lse + statistics, mask=offs_q < n, other=float("inf"))
    row_rest = tl.load(rest + statistics, mask=offs_q < n, other=0.0)
    outputs = _load_rows(o + b * o_b + s * o_s + h * o_h, offs_q, o_n, n, D, BLOCK_D, EVEN)
    grads = _load_rows(do + b * do_b + s * do_s + h * do_h, offs_q, do_n, n, D, BLOCK_D, EVEN)
    row_delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    if SAVE:
        tl.store(delta + statistics, row_delta, mask=offs_q < n)
    grads = (grads.to(tl.float32) * row_rest[:, None]).to(grads.dtype)
    row_delta *= row_rest
    queries = _load_rows(q + b * q_b + s * q_s + h * q_h, offs_q, q_n, n, D, BLOCK_D, EVEN)
    dq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = _load_rows(k, offs_k, k_n, n, D, BLOCK_D, EVEN)
        values = _load_rows(v, offs_k, v_n, n, D, BLOCK_D, EVEN)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shift = _load_shift(mask, offs_k, mask_n, n, inf_log2, EVEN)
        if HAS_BIAS:
            tile = _load_bias(bias + b * bias_b + h * bias_h, offs_q, offs_k, bias_q, bias_k, n, EVEN)
            logits = _biased_logits(products, tile.to(tl.float32), shift, SCALE)
        else:
            logits = _logits(products, shift, SCALE)
        weights = tl.exp2(logits - row_lse[:, None])
        dv_tile = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        _store_rows(dv, offs_k, dv_n, n, dv_tile, D, BLOCK_D, EVEN)
        d_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        d_logits = (weights * (d_weights - row_delta[:, None])).to(keys.dtype)
        dk_tile = tl.dot(tl.trans(d_logits), queries, input_precision=PRECISION) * scale
        _store_rows(dk, offs_k, dk_n, n, dk_tile, D, BLOCK_D, EVEN)
        dq_sum = tl.dot(d_logits, keys, dq_sum, input_precision=PRECISION)
    _store_rows(dq + b * dq_b + s * dq_s + h * dq_h, offs_q, dq_n, n, dq_sum * scale, D, BLOCK_D, EVEN)


@triton.jit(do_not_specialize=["rows", "n", "rows_per_program"])
def _backward_bias(
    q, k, v, mask, bias, do, lse, rest, delta, partial,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, do_b, do_s, do_n, do_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, rows_per_program, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one bias tile, summed over a group of rows in registers. partial: fp32 [groups, B, H, n, n]."""
    tiles_k = tl.cdiv(n, BLOCK_K)
    offs_q = (tl.program_id(0) // tiles_k) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    do += b * do_b + h * do_h
    mask += b * mask_b
    tile = _load_bias(bias + b * bias_b + h * bias_h, offs_q, offs_k, bias_q, bias_k, n, EVEN)
    gradient = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        s = tl.cast(row, tl.int64)
        statistics = ((b * rows + s) * heads + h) * n + offs_q
        queries = _load_rows(q + s * q_s, offs_q, q_n, n, D, BLOCK_D, EVEN)
        keys = _load_rows(k + s * k_s, offs_k, k_n, n, D, BLOCK_D, EVEN)
        values = _load_rows(v + s * v_s, offs_k, v_n, n, D, BLOCK_D, EVEN)
        grads = _load_rows(do + s * do_s, offs_q, do_n, n, D, BLOCK_D, EVEN)
        shift = _load_shift(mask + s * mask_s, offs_k, mask_n, n, inf_log2, EVEN)
        row_lse = tl.load(lse + statistics, mask=offs_q < n, other=float("inf"))
        row_rest = tl.load(rest + statistics, mask=offs_q < n, other=0.0)
        row_delta = tl.load(delta + statistics, mask=offs_q < n, other=0.0)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        logits = _biased_logits(products, _unpack(tile), shift, SCALE)
        weights = tl.exp2(logits - row_lse[:, None])
        d_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        gradient += weights * (d_weights - row_delta[:, None]) * row_rest[:, None]
    batch_heads = tl.num_programs(2).to(tl.int64)
    partial += (tl.program_id(1) * batch_heads + tl.program_id(2)) * n * n
    inside = (offs_q < n)[:, None] & (offs_k < n)[None, :]
    pointers = partial + offs_q[:, None] * n + offs_k[None, :]
    tl.store(pointers, gradient.to(partial.dtype.element_ty), mask=inside)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float) -> Tensor:
    """Triton version of ``reference.attention``; gradients of q, k, v and bias, once differentiable.

    q, k, v: [B, S, N, H, D] with any strides over B, S, N, H (copied if D is not contiguous), D <= 128; mask:
    [B, S, N]; bias: [B, H, N, N] or None -> [B, S, N, H, D] in the type and memory order of q.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, mask, bias, inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float) -> Tensor:
        save = any(ctx.needs_input_grad)
        o, lse, rest = _forward(q, k, v, mask, bias, inf, save)
        if save:
            ctx.save_for_backward(q, k, v, mask, bias, o, lse, rest)
            ctx.inf = inf
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, o, lse, rest = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        with_bias = bias is not None and ctx.needs_input_grad[4]
        dq, dk, dv, delta = _backward_qkv(q, k, v, mask, bias, o, do, lse, rest, ctx.inf, with_bias)
        d_bias = None
        if bias is not None and with_bias:
            d_bias = _bias_gradient(q, k, v, mask, bias, do, lse, rest, delta, ctx.inf)
        return dq, dk, dv, None, d_bias, None


def _fields(q: Tensor, bias: Tensor | None) -> dict[str, int | str]:
    """What launch parameters depend on. Sizes that vary in evaluation are rounded up, so that tables stay short."""
    batch, rows, n, heads, width = q.shape
    return {
        "rows": tuning.power_of_two(batch * rows),
        "n": max(16, tuning.power_of_two(n)),
        "heads": heads,
        "d": width,
        "bias": int(bias is not None),
        "dtype": str(q.dtype).removeprefix("torch."),
    }


def _blocks(config: tuning.Config, n: int, width: int) -> tuple[int, int, int, bool]:
    """Tile sizes cut down to the row length, and whether tiles cover rows and channels exactly."""
    longest = max(16, tuning.power_of_two(n))
    block_q, block_k = min(config["BLOCK_Q"], longest), min(config["BLOCK_K"], longest)
    return block_q, block_k, max(16, tuning.power_of_two(width)), n % block_q == 0 and n % block_k == 0


def _precision(x: Tensor) -> str:
    """fp32 products follow PyTorch's switch for its own; it does not concern 16-bit types."""
    return "tf32" if x.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _mask_and_bias(mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The two additive inputs and their strides; without a bias any pointer will do, it is not read."""
    strides = (0, 0, 0, 0) if bias is None else bias.stride()
    return mask, mask if bias is None else bias, (*mask.stride(), *strides)


def _constants(q: Tensor, config: tuning.Config, blocks: tuple[int, int, int, bool]) -> dict[str, Any]:
    block_q, block_k, block_d, even = blocks
    return {
        "SCALE": q.shape[-1] ** -0.5,
        "D": q.shape[-1],
        "BLOCK_D": block_d,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "EVEN": even,
        "PRECISION": _precision(q),
        "STAGES": config["STAGES"],
        "num_warps": config["num_warps"],
    }


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, inf: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_forward", **_fields(q, bias))
    blocks = _blocks(config, n, width)
    block_q, block_k = blocks[:2]
    o = torch.empty_like(q)
    lse, rest = q.new_empty((2, batch, rows, heads, n) if save else (2, 1), dtype=torch.float32).unbind()
    mask_, bias_, extra_strides = _mask_and_bias(mask, bias)
    tensors = (q, k, v, mask_, bias_, o, lse, rest)
    strides = (*q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *o.stride()[:4], *extra_strides)
    options = _constants(q, config, blocks) | {"HAS_BIAS": bias is not None, "SAVE": save}
    if n <= config["UNROLLED"]:
        group = min(config["ROWS"], rows)
        grid = (tuning.ceil_div(n, block_q), tuning.ceil_div(rows, group), batch * heads)
        options["STEPS"] = tuning.ceil_div(n, block_k)
        _forward_rows[grid](*tensors, *strides, rows, n, heads, group, inf * LOG2_E.value, **options)
    else:
        grid = (tuning.ceil_div(n, block_q), rows, batch * heads)
        _forward_tiled[grid](*tensors, *strides, rows, n, heads, inf * LOG2_E.value, **options)
    return (o, lse, rest) if save else (o, None, None)


def _backward_qkv(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, o: Tensor, do: Tensor, lse: Tensor,
    rest: Tensor, inf: float, save_delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and, where the bias gradient needs it, delta = sum(o * do) [B, S, H, N] (else left unwritten)."""
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_backward", **_fields(q, bias))
    blocks = _blocks(config, n, width)
    chunks = tuning.ceil_div(n, blocks[0])
    dq = torch.empty_like(q)
    if chunks == 1:
        dk, dv = torch.empty_like(k)[None], torch.empty_like(v)[None]
    else:
        dk, dv = (torch.empty((chunks, *x.shape), dtype=torch.float32, device=x.device) for x in (k, v))
    delta = torch.empty_like(lse) if save_delta else lse
    mask_, bias_, extra_strides = _mask_and_bias(mask, bias)
    strides = tuple(stride for x in (q, k, v, o, do, dq) for stride in x.stride()[:4])
    _backward_rows[(rows * heads, chunks, batch)](
        q, k, v, mask_, bias_, o, do, lse, rest, delta, dq, dk, dv, *strides, *dk.stride()[:5], *dv.stride()[:5],
        *extra_strides, rows, n, heads, inf * LOG2_E.value, width**-0.5,
        HAS_BIAS=bias is not None, SAVE=save_delta, **_constants(q, config, blocks),
    )  # fmt: skip
    if chunks == 1:
        return dq, dk[0], dv[0], delta
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype), delta


def _bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, do: Tensor, lse: Tensor, rest: Tensor,
    delta: Tensor, inf: float,
) -> Tensor:  # fmt: skip
    batch, rows, n, heads, width = q.shape
    config = tuning.lookup("attention_backward_bias", **_fields(q, bias))
    blocks = _blocks(config, n, width)
    group = tuning.ceil_div(rows, min(config["GROUPS"], rows))
    groups = tuning.ceil_div(rows, group)
    partial = torch.empty((groups, batch, heads, n, n), dtype=torch.float32, device=q.device)
    mask_, bias_, extra_strides = _mask_and_bias(mask, bias)
    strides = tuple(stride for x in (q, k, v, do) for stride in x.stride()[:4])
    _backward_bias[(tuning.ceil_div(n, blocks[0]) * tuning.ceil_div(n, blocks[1]), groups, batch * heads)](
        q, k, v, mask_, bias_, do, lse, rest, delta, partial, *strides, *extra_strides,
        rows, n, heads, group, inf * LOG2_E.value, **_constants(q, config, blocks),
    )  # fmt: skip
    return partial.sum(0).to(bias.dtype)


def _config(block_q: int, block_k: int, num_warps: int, stages: int, **extra: int) -> tuning.Config:
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": num_warps, "STAGES": stages, **extra}


def _forward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    if fields["dtype"] == "float32":
        return _config(64, 64, 4, 1, ROWS=1, UNROLLED=0)
    if int(fields["n"]) > 256:
        return _config(64, 64, 4, 2, ROWS=1, UNROLLED=0)
    return _config(64, 64, 4, 2, ROWS=8 if int(fields["rows"]) >= 128 else 2, UNROLLED=256)


def _forward_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 256, 8)]
    tiled = [_config(*tile, stages, ROWS=1, UNROLLED=0) for tile in tiles for stages in (2, 3)]
    if int(fields["n"]) > 256:
        return tiled
    return tiled + [
        _config(*tile, stages, ROWS=rows, UNROLLED=256)
        for tile in tiles
        for stages in (1, 2, 3)
        for rows in (1, 4, 8, 16, 32)
    ]


def _backward_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    if fields["dtype"] == "float32":
        return _config(64, 32, 4, 1)
    return _config(256, 64, 8, 1)


def _backward_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [_config(q, k, w, s) for q in (128, 256) for k in (32, 64, 128) for w in (4, 8, 16) for s in (1, 2)]


def _bias_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    if fields["dtype"] == "float32":
        return _config(32, 32, 4, 1, GROUPS=8)
    return _config(64, 64, 4, 2, GROUPS=6)


def _bias_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    tiles = [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8), (32, 64, 4)]
    return [_config(*tile, s, GROUPS=g) for tile in tiles for s in (1, 2, 3) for g in (3, 4, 6, 8, 12, 16)]


tuning.register("attention_forward", _forward_default, _forward_candidates)
tuning.register("attention_backward", _backward_default, _backward_candidates)
tuning.register("attention_backward_bias", _bias_default, _bias_candidates)

COMPILE_SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "triangle": ((1, 256, 256, 4, 32), True),
    "msa_row": ((1, 128, 256, 8, 32), True),
    "msa_column": ((1, 256, 128, 8, 32), False),
    "template": ((4, 256, 256, 4, 16), True),
    "extra_msa_row": ((1, 1024, 256, 8, 8), True),
    "evaluation": ((1, 700, 700, 4, 32), True),
}


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward at the benchmark's shapes on meta tensors; see ``tuning``."""
    return [
        (f"attention_{name}", lambda shape=shape, with_bias=with_bias: _meta_run(shape, with_bias))
        for name, (shape, with_bias) in COMPILE_SHAPES.items()
    ]


def _meta_run(shape: tuple[int, ...], with_bias: bool) -> None:
    batch, rows, n, heads, _ = shape
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty((batch, rows, n), dtype=torch.bfloat16, device="meta")
    bias = torch.empty((batch, heads, n, n), dtype=torch.bfloat16, device="meta", requires_grad=True)
    attention(q, k, v, mask, bias if with_bias else None, 1e9).sum().backward()
