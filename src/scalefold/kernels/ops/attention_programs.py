"""Triton programs of the attention; what they do together is described in ``attention``."""
# pyright: reportGeneralTypeIssues=false
# The type checker does not see Triton's ranges.

import math

import triton
import triton.language as tl

from scalefold.kernels.instructions import INTERPRETED, settle, widen

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _head(h, stride, ALIGN: tl.constexpr):
    """Offset of head h. ALIGN tells the compiler what it cannot know of heads of 8 channels: 16-byte alignment."""
    return tl.multiple_of(h * stride, ALIGN)


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
        return widen(tl.load(base + offsets * stride)) * inf_log2 - inf_log2
    keep = widen(tl.load(base + offsets * stride, mask=offsets < n, other=0.0))
    return tl.where(offsets < n, keep * inf_log2 - inf_log2, float("-inf"))


@triton.jit
def _load_statistic(base, offs_q, n, beyond, EVEN: tl.constexpr):
    """One fp32 value per row of scores; ``beyond`` past n. An even tile needs no mask, which costs registers."""
    if EVEN:
        return tl.load(base + offs_q)
    return tl.load(base + offs_q, mask=offs_q < n, other=beyond)


@triton.jit
def _load_bias(base, offs_q, offs_k, stride_q, stride_k, n, EVEN: tl.constexpr):
    """Tile of a matrix of scores in storage type: [len(offs_q), len(offs_k)]."""
    pointers = base + offs_q[:, None] * stride_q + offs_k[None, :] * stride_k
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(offs_q < n)[:, None] & (offs_k < n)[None, :], other=0.0)


@triton.jit
def _store_scores(base, tile, offs_k, offs_q, stride_k, n, EVEN: tl.constexpr):
    """Tile [keys, queries] of a matrix [n, n] with dense rows."""
    pointers = base + offs_k[:, None] * stride_k + offs_q[None, :]
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(offs_k < n)[:, None] & (offs_q < n)[None, :])


@triton.jit
def _pack(first, second):
    """Two fp32 tiles that hold bf16 values -> one of 32-bit words, ``first`` in the lower halves."""
    lower = first.to(tl.uint32, bitcast=True) >> 16
    return lower | (second.to(tl.uint32, bitcast=True) & 0xFFFF0000)


@triton.jit
def _unpack(words, UPPER: tl.constexpr):
    """One tile of ``_pack``, in fp32.

    As opaque assembly it is done anew in each iteration (one operation per score); otherwise the compiler takes it
    out of the loop, and the bias needs twice the registers.
    """
    if INTERPRETED:
        return ((words & 0xFFFF0000) if UPPER else (words << 16)).to(tl.float32, bitcast=True)
    if UPPER:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0xffff0000;", "=r,r", [words], tl.float32, False, 1)
    return tl.inline_asm_elementwise("shl.b32 $0, $1, 16;", "=r,r", [words], tl.float32, False, 1)


@triton.jit
def _bias_tiles(
    base, offs_q, stride_q, stride_k, n,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Bias of all keys: a tuple of fp32 tiles, or for bf16 of packed pairs of them."""
    offs_k = tl.arange(0, BLOCK_K)
    tiles = ()
    if base.dtype.element_ty == tl.bfloat16:
        for pair in tl.static_range((STEPS + 1) // 2):
            start = pair * 2 * BLOCK_K
            first = _load_bias(base, offs_q, start + offs_k, stride_q, stride_k, n, EVEN)
            first = settle(first)
            second = first
            if pair * 2 + 1 < STEPS:
                second = _load_bias(base, offs_q, start + BLOCK_K + offs_k, stride_q, stride_k, n, EVEN)
                second = settle(second)
            tiles += (_pack(first, second),)
    else:
        for step in tl.static_range(STEPS):
            tile = _load_bias(base, offs_q, step * BLOCK_K + offs_k, stride_q, stride_k, n, EVEN)
            tiles += (tile.to(tl.float32),)
    return tiles


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
def forward_rows(
    q, k, v, mask, bias, o, lse, rest,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, rows_per_program, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Short rows in STEPS unrolled key tiles; the bias of all of them stays in registers while rows pass by."""
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    q += b * q_b + _head(h, q_h, ALIGN)
    k += b * k_b + _head(h, k_h, ALIGN)
    v += b * v_b + _head(h, v_h, ALIGN)
    o += b * o_b + _head(h, o_h, ALIGN)
    mask += b * mask_b
    offs_k = tl.arange(0, BLOCK_K)
    tiles = ()
    if HAS_BIAS:
        tiles = _bias_tiles(bias + b * bias_b + h * bias_h, offs_q, bias_q, bias_k, n, BLOCK_Q, BLOCK_K, STEPS, EVEN)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        s = tl.cast(row, tl.int64)
        queries = _load_rows(q + s * q_s, offs_q, q_n, n, D, BLOCK_D, EVEN)
        maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for step in tl.static_range(STEPS):
            start = step * BLOCK_K  # in the base, not in the offsets, which all steps then share
            keys = _load_rows(k + s * k_s + start * k_n, offs_k, k_n, n - start, D, BLOCK_D, EVEN)
            values = _load_rows(v + s * v_s + start * v_n, offs_k, v_n, n - start, D, BLOCK_D, EVEN)
            shift = _load_shift(mask + s * mask_s + start * mask_n, offs_k, mask_n, n - start, inf_log2, EVEN)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if HAS_BIAS and bias.dtype.element_ty == tl.bfloat16:
                logits = _biased_logits(products, _unpack(tiles[step // 2], step % 2 == 1), shift, SCALE)
            elif HAS_BIAS:
                logits = _biased_logits(products, tiles[step], shift, SCALE)
            else:
                logits = _logits(products, shift, SCALE)
            maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
        _store_rows(o + s * o_s, offs_q, o_n, n, result / total[:, None], D, BLOCK_D, EVEN)
        if SAVE:
            _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@triton.jit(do_not_specialize=["rows", "n"])
def forward_tiled(
    q, k, v, mask, bias, o, lse, rest,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_q, bias_k,
    rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any length in key tiles with a running maximum; one row and query tile per program."""
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    s = tl.program_id(1).to(tl.int64)
    k += b * k_b + s * k_s + _head(h, k_h, ALIGN)
    v += b * v_b + s * v_s + _head(h, v_h, ALIGN)
    mask += b * mask_b + s * mask_s
    queries = _load_rows(q + b * q_b + s * q_s + _head(h, q_h, ALIGN), offs_q, q_n, n, D, BLOCK_D, EVEN)
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
            logits = _biased_logits(products, widen(tile), shift, SCALE)
        else:
            logits = _logits(products, shift, SCALE)
        values = _load_rows(v, offs_k, v_n, n, D, BLOCK_D, EVEN)
        maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
    _store_rows(o + b * o_b + s * o_s + _head(h, o_h, ALIGN), offs_q, o_n, n, result / total[:, None], D, BLOCK_D, EVEN)
    if SAVE:
        _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@triton.jit(do_not_specialize=["rows", "n"])
def backward_rows(
    q, k, v, mask, o, do, lse, rest, dq, dk, dv,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h, do_b, do_s, do_n, do_h,
    dq_b, dq_s, dq_n, dq_h, dk_c, dk_b, dk_s, dk_n, dk_h, dv_c, dv_b, dv_s, dv_n, dv_h,
    mask_b, mask_s, mask_n,
    rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Without a bias: gradients of q, k, v of one row and head for one chunk of queries.

    With several chunks (n > BLOCK_Q) dk and dv are fp32 partial sums, one slice c per chunk.
    """
    chunk = tl.program_id(1)
    offs_q = chunk * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    k += b * k_b + s * k_s + _head(h, k_h, ALIGN)
    v += b * v_b + s * v_s + _head(h, v_h, ALIGN)
    dk += chunk * dk_c + b * dk_b + s * dk_s + _head(h, dk_h, ALIGN)
    dv += chunk * dv_c + b * dv_b + s * dv_s + _head(h, dv_h, ALIGN)
    mask += b * mask_b + s * mask_s
    statistics = ((b * rows + s) * heads + h) * n
    row_lse = _load_statistic(lse + statistics, offs_q, n, float("inf"), EVEN)
    row_rest = _load_statistic(rest + statistics, offs_q, n, 0.0, EVEN)
    outputs = _load_rows(o + b * o_b + s * o_s + _head(h, o_h, ALIGN), offs_q, o_n, n, D, BLOCK_D, EVEN)
    grads = _load_rows(do + b * do_b + s * do_s + _head(h, do_h, ALIGN), offs_q, do_n, n, D, BLOCK_D, EVEN)
    row_delta = tl.sum(widen(outputs) * widen(grads), 1)
    grads = (widen(grads) * row_rest[:, None]).to(grads.dtype)
    row_delta *= row_rest
    queries = _load_rows(q + b * q_b + s * q_s + _head(h, q_h, ALIGN), offs_q, q_n, n, D, BLOCK_D, EVEN)
    dq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = _load_rows(k, offs_k, k_n, n, D, BLOCK_D, EVEN)
        values = _load_rows(v, offs_k, v_n, n, D, BLOCK_D, EVEN)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shift = _load_shift(mask, offs_k, mask_n, n, inf_log2, EVEN)
        weights = tl.exp2(_logits(products, shift, SCALE) - row_lse[:, None])
        dv_tile = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        _store_rows(dv, offs_k, dv_n, n, dv_tile, D, BLOCK_D, EVEN)
        d_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        d_logits = (weights * (d_weights - row_delta[:, None])).to(keys.dtype)
        dk_tile = tl.dot(tl.trans(d_logits), queries, input_precision=PRECISION) * SCALE
        _store_rows(dk, offs_k, dk_n, n, dk_tile, D, BLOCK_D, EVEN)
        dq_sum = tl.dot(d_logits, keys, dq_sum, input_precision=PRECISION)
    _store_rows(dq + b * dq_b + s * dq_s + _head(h, dq_h, ALIGN), offs_q, dq_n, n, dq_sum * SCALE, D, BLOCK_D, EVEN)


@triton.jit(do_not_specialize=["rows", "n"])
def backward_keys(
    q, k, v, mask, bias, o, do, lse, rest, ds, dk, dv,
    q_b, q_s, q_n, q_h, k_b, k_s, k_n, k_h, v_b, v_s, v_n, v_h, o_b, o_s, o_n, o_h, do_b, do_s, do_n, do_h,
    ds_b, ds_s, ds_h, ds_k, dk_b, dk_s, dk_n, dk_h, dv_b, dv_s, dv_n, dv_h,
    mask_b, mask_s, mask_n, bias_b, bias_h, bias_k, bias_q,
    rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With a bias: gradients of one tile of keys and values of one row and head, and of its scores.

    Scores, ds and bias are [keys, queries]: weights and their gradients are then left operands where they are, in
    registers.
    """
    tiles = tl.cdiv(n, BLOCK_K)
    offs_k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) // tiles
    q += b * q_b + s * q_s + _head(h, q_h, ALIGN)
    o += b * o_b + s * o_s + _head(h, o_h, ALIGN)
    do += b * do_b + s * do_s + _head(h, do_h, ALIGN)
    bias += b * bias_b + h * bias_h
    statistics = ((b * rows + s) * heads + h) * n
    ds += b * ds_b + s * ds_s + h * ds_h
    keys = _load_rows(k + b * k_b + s * k_s + _head(h, k_h, ALIGN), offs_k, k_n, n, D, BLOCK_D, EVEN)
    values = _load_rows(v + b * v_b + s * v_s + _head(h, v_h, ALIGN), offs_k, v_n, n, D, BLOCK_D, EVEN)
    shift = _load_shift(mask + b * mask_b + s * mask_s, offs_k, mask_n, n, inf_log2, EVEN)
    dk_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_Q, num_stages=STAGES):
        offs_q = start + tl.arange(0, BLOCK_Q)
        queries = _load_rows(q, offs_q, q_n, n, D, BLOCK_D, EVEN)
        grads = widen(_load_rows(do, offs_q, do_n, n, D, BLOCK_D, EVEN))
        row_lse = _load_statistic(lse + statistics, offs_q, n, float("inf"), EVEN)
        grads *= _load_statistic(rest + statistics, offs_q, n, 0.0, EVEN)[:, None]
        delta = tl.sum(widen(_load_rows(o, offs_q, o_n, n, D, BLOCK_D, EVEN)) * grads, 1)
        grads = grads.to(do.dtype.element_ty)
        products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        tile = _load_bias(bias, offs_k, offs_q, bias_k, bias_q, n, EVEN)
        logits = (products * SCALE + widen(tile)) * LOG2_E + shift[:, None]
        weights = tl.exp2(logits - row_lse[None, :])
        dv_sum = tl.dot(weights.to(grads.dtype), grads, dv_sum, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        d_logits = (weights * (d_weights - delta[None, :])).to(queries.dtype)
        dk_sum = tl.dot(d_logits, queries, dk_sum, input_precision=PRECISION)
        _store_scores(ds, d_logits, offs_k, offs_q, ds_k, n, EVEN)
    _store_rows(dk + b * dk_b + s * dk_s + _head(h, dk_h, ALIGN), offs_k, dk_n, n, dk_sum * SCALE, D, BLOCK_D, EVEN)
    _store_rows(dv + b * dv_b + s * dv_s + _head(h, dv_h, ALIGN), offs_k, dv_n, n, dv_sum, D, BLOCK_D, EVEN)


@triton.jit(do_not_specialize=["rows", "n", "rows_per_program"])
def backward_queries(
    k, ds, dq, partial,
    k_b, k_s, k_n, k_h, ds_b, ds_s, ds_h, ds_k, dq_c, dq_b, dq_s, dq_n, dq_h,
    partial_g, partial_b, partial_h, partial_k,
    rows, n, heads, rows_per_program,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries of one head, for a group of rows, and the sum of their gradients of scores.

    With several tiles of keys (n > BLOCK_K) dq are fp32 partial sums, one slice c per tile.
    """
    tiles = tl.cdiv(n, BLOCK_Q)
    offs_q = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    part = tl.program_id(0) // tiles
    offs_k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    k += b * k_b + _head(h, k_h, ALIGN)
    ds += b * ds_b + h * ds_h
    dq += part * dq_c + b * dq_b + _head(h, dq_h, ALIGN)
    total = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        s = tl.cast(row, tl.int64)
        tile = _load_bias(ds + s * ds_s, offs_k, offs_q, ds_k, 1, n, EVEN)
        keys = _load_rows(k + s * k_s, offs_k, k_n, n, D, BLOCK_D, EVEN)
        gradient = tl.dot(tl.trans(tile), keys, input_precision=PRECISION) * SCALE
        _store_rows(dq + s * dq_s, offs_q, dq_n, n, gradient, D, BLOCK_D, EVEN)
        total += widen(tile)
    partial += tl.program_id(1).to(tl.int64) * partial_g + b * partial_b + h * partial_h
    _store_scores(partial, total, offs_k, offs_q, partial_k, n, EVEN)
