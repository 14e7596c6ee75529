"""Triton programs of the attention; what they do together is described in ``attention``.

Tensors come as views: q, k, v, outputs and their gradients with strides over batch b, rows s, positions n and heads h
(partial sums with one over slices c in front), scores over b, h, keys or queries, channels side by side.
"""
# pyright: reportGeneralTypeIssues=false
# The type checker does not see Triton's ranges.

import math

import triton
import triton.language as tl

from scalefold.kernels.instructions import INTERPRETED, program, to_fp32, to_product_layout, wait_for_predecessors

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _head(h, stride, ALIGN: tl.constexpr):
    """Offset of head h. ALIGN tells the compiler what it cannot know of heads of 8 channels: 16-byte alignment."""
    return tl.multiple_of(h * stride, ALIGN)


@triton.jit
def _of_head(view, b, h, ALIGN: tl.constexpr):
    """Where head h of sample b begins."""
    return view.pointer + (b * view.strides[0] + _head(h, view.strides[3], ALIGN))


@triton.jit
def _of_row(view, b, s, h, ALIGN: tl.constexpr):
    """Where head h of row s of sample b begins."""
    return view.pointer + (b * view.strides[0] + s * view.strides[1] + _head(h, view.strides[3], ALIGN))


@triton.jit
def _of_slice(view, c, b, s, h, ALIGN: tl.constexpr):
    """``_of_row`` in slice c of partial sums."""
    strides = view.strides
    return view.pointer + (c * strides[0] + b * strides[1] + s * strides[2] + _head(h, strides[4], ALIGN))


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
        return to_fp32(tl.load(base + offsets * stride)) * inf_log2 - inf_log2
    keep = to_fp32(tl.load(base + offsets * stride, mask=offsets < n, other=0.0))
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
def _store_scores(base, tile, lines, columns, stride, n, EVEN: tl.constexpr):
    """Tile [lines, columns] of a matrix [n, n] with dense rows: [keys, queries] or the other way round."""
    pointers = base + lines[:, None] * stride + columns[None, :]
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(lines < n)[:, None] & (columns < n)[None, :])


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
            first = to_product_layout(first)
            second = first
            if pair * 2 + 1 < STEPS:
                second = _load_bias(base, offs_q, start + BLOCK_K + offs_k, stride_q, stride_k, n, EVEN)
                second = to_product_layout(second)
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


@program
@triton.jit(do_not_specialize=["rows", "n", "rows_per_program"])
def forward_rows(
    q, k, v, mask, bias, o, lse, rest, rows, n, heads, rows_per_program, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Short rows in STEPS unrolled key tiles; the bias of all of them stays in registers while rows pass by."""
    wait_for_predecessors()
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    own_q, own_k, own_v = _of_head(q, b, h, ALIGN), _of_head(k, b, h, ALIGN), _of_head(v, b, h, ALIGN)
    own_o, own_mask = _of_head(o, b, h, ALIGN), mask.pointer + b * mask.strides[0]
    offs_k = tl.arange(0, BLOCK_K)
    tiles = ()
    if bias is not None:
        own_bias = bias.pointer + b * bias.strides[0] + h * bias.strides[1]
        tiles = _bias_tiles(own_bias, offs_q, bias.strides[2], bias.strides[3], n, BLOCK_Q, BLOCK_K, STEPS, EVEN)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):
        s = tl.cast(row, tl.int64)
        queries = _load_rows(own_q + s * q.strides[1], offs_q, q.strides[2], n, D, BLOCK_D, EVEN)
        maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for step in tl.static_range(STEPS):
            start = step * BLOCK_K  # in the base, not in the offsets, which all steps then share
            k_n, v_n, mask_n = k.strides[2], v.strides[2], mask.strides[2]
            keys = _load_rows(own_k + s * k.strides[1] + start * k_n, offs_k, k_n, n - start, D, BLOCK_D, EVEN)
            values = _load_rows(own_v + s * v.strides[1] + start * v_n, offs_k, v_n, n - start, D, BLOCK_D, EVEN)
            base = own_mask + s * mask.strides[1] + start * mask_n
            shift = _load_shift(base, offs_k, mask_n, n - start, inf_log2, EVEN)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if bias is not None:
                if bias.pointer.dtype.element_ty == tl.bfloat16:
                    logits = _biased_logits(products, _unpack(tiles[step // 2], step % 2 == 1), shift, SCALE)
                else:
                    logits = _biased_logits(products, tiles[step], shift, SCALE)
            else:
                logits = _logits(products, shift, SCALE)
            maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
        _store_rows(own_o + s * o.strides[1], offs_q, o.strides[2], n, result / total[:, None], D, BLOCK_D, EVEN)
        if SAVE:
            _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@program
@triton.jit(do_not_specialize=["rows", "n"])
def forward_tiled(
    q, k, v, mask, bias, o, lse, rest, rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any length in key tiles with a running maximum; one row and query tile per program."""
    wait_for_predecessors()
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    s = tl.program_id(1).to(tl.int64)
    own_k, own_v = _of_row(k, b, s, h, ALIGN), _of_row(v, b, s, h, ALIGN)
    own_mask = mask.pointer + (b * mask.strides[0] + s * mask.strides[1])
    queries = _load_rows(_of_row(q, b, s, h, ALIGN), offs_q, q.strides[2], n, D, BLOCK_D, EVEN)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = _load_rows(own_k, offs_k, k.strides[2], n, D, BLOCK_D, EVEN)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shift = _load_shift(own_mask, offs_k, mask.strides[2], n, inf_log2, EVEN)
        if bias is not None:
            base = bias.pointer + b * bias.strides[0] + h * bias.strides[1]
            tile = _load_bias(base, offs_q, offs_k, bias.strides[2], bias.strides[3], n, EVEN)
            logits = _biased_logits(products, to_fp32(tile), shift, SCALE)
        else:
            logits = _logits(products, shift, SCALE)
        values = _load_rows(own_v, offs_k, v.strides[2], n, D, BLOCK_D, EVEN)
        maximum, total, result = _accumulate(logits, values, maximum, total, result, PRECISION)
    _store_rows(_of_row(o, b, s, h, ALIGN), offs_q, o.strides[2], n, result / total[:, None], D, BLOCK_D, EVEN)
    if SAVE:
        _store_statistics(lse, rest, ((b * rows + s) * heads + h) * n, offs_q, n, maximum, total)


@program
@triton.jit(do_not_specialize=["rows", "n"])
def backward_rows(
    q, k, v, mask, o, do, lse, rest, dq, dk, dv, rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Without a bias: gradients of q, k, v of one row and head for one chunk of queries.

    With several chunks (n > BLOCK_Q) dk and dv are fp32 partial sums, one slice c per chunk.
    """
    wait_for_predecessors()
    chunk = tl.program_id(1)
    offs_q = chunk * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    own_k, own_v = _of_row(k, b, s, h, ALIGN), _of_row(v, b, s, h, ALIGN)
    own_dk, own_dv = _of_slice(dk, chunk, b, s, h, ALIGN), _of_slice(dv, chunk, b, s, h, ALIGN)
    own_mask = mask.pointer + (b * mask.strides[0] + s * mask.strides[1])
    statistics = ((b * rows + s) * heads + h) * n
    row_lse = _load_statistic(lse + statistics, offs_q, n, float("inf"), EVEN)
    row_rest = _load_statistic(rest + statistics, offs_q, n, 0.0, EVEN)
    outputs = _load_rows(_of_row(o, b, s, h, ALIGN), offs_q, o.strides[2], n, D, BLOCK_D, EVEN)
    grads = _load_rows(_of_row(do, b, s, h, ALIGN), offs_q, do.strides[2], n, D, BLOCK_D, EVEN)
    row_delta = tl.sum(to_fp32(outputs) * to_fp32(grads), 1)
    grads = (to_fp32(grads) * row_rest[:, None]).to(grads.dtype)
    row_delta *= row_rest
    queries = _load_rows(_of_row(q, b, s, h, ALIGN), offs_q, q.strides[2], n, D, BLOCK_D, EVEN)
    dq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_K, num_stages=STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = _load_rows(own_k, offs_k, k.strides[2], n, D, BLOCK_D, EVEN)
        values = _load_rows(own_v, offs_k, v.strides[2], n, D, BLOCK_D, EVEN)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        shift = _load_shift(own_mask, offs_k, mask.strides[2], n, inf_log2, EVEN)
        weights = tl.exp2(_logits(products, shift, SCALE) - row_lse[:, None])
        dv_tile = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        _store_rows(own_dv, offs_k, dv.strides[3], n, dv_tile, D, BLOCK_D, EVEN)
        d_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        d_logits = (weights * (d_weights - row_delta[:, None])).to(keys.dtype)
        dk_tile = tl.dot(tl.trans(d_logits), queries, input_precision=PRECISION) * SCALE
        _store_rows(own_dk, offs_k, dk.strides[3], n, dk_tile, D, BLOCK_D, EVEN)
        dq_sum = tl.dot(d_logits, keys, dq_sum, input_precision=PRECISION)
    _store_rows(_of_row(dq, b, s, h, ALIGN), offs_q, dq.strides[2], n, dq_sum * SCALE, D, BLOCK_D, EVEN)


@program
@triton.jit(do_not_specialize=["rows", "n"])
def backward_keys(
    q, k, v, mask, bias, o, do, lse, rest, ds, dk, dv, rows, n, heads, inf_log2,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With a bias: gradients of one tile of keys and values of one row and head, and of its scores.

    Scores, ds and bias are [keys, queries]: weights and their gradients are then left operands where they are, in
    registers.
    """
    wait_for_predecessors()
    tiles = tl.cdiv(n, BLOCK_K)
    offs_k = (tl.program_id(0) % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) // tiles
    own_q, own_o, own_do = _of_row(q, b, s, h, ALIGN), _of_row(o, b, s, h, ALIGN), _of_row(do, b, s, h, ALIGN)
    own_bias = bias.pointer + (b * bias.strides[0] + h * bias.strides[1])
    statistics = ((b * rows + s) * heads + h) * n
    own_ds = ds.pointer + (b * ds.strides[0] + s * ds.strides[1] + h * ds.strides[2])
    keys = _load_rows(_of_row(k, b, s, h, ALIGN), offs_k, k.strides[2], n, D, BLOCK_D, EVEN)
    values = _load_rows(_of_row(v, b, s, h, ALIGN), offs_k, v.strides[2], n, D, BLOCK_D, EVEN)
    own_mask = mask.pointer + b * mask.strides[0] + s * mask.strides[1]
    shift = _load_shift(own_mask, offs_k, mask.strides[2], n, inf_log2, EVEN)
    dk_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_Q, num_stages=STAGES):
        offs_q = start + tl.arange(0, BLOCK_Q)
        queries = _load_rows(own_q, offs_q, q.strides[2], n, D, BLOCK_D, EVEN)
        grads = to_fp32(_load_rows(own_do, offs_q, do.strides[2], n, D, BLOCK_D, EVEN))
        row_lse = _load_statistic(lse + statistics, offs_q, n, float("inf"), EVEN)
        grads *= _load_statistic(rest + statistics, offs_q, n, 0.0, EVEN)[:, None]
        delta = tl.sum(to_fp32(_load_rows(own_o, offs_q, o.strides[2], n, D, BLOCK_D, EVEN)) * grads, 1)
        grads = grads.to(do.pointer.dtype.element_ty)
        products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        tile = _load_bias(own_bias, offs_k, offs_q, bias.strides[2], bias.strides[3], n, EVEN)
        logits = (products * SCALE + to_fp32(tile)) * LOG2_E + shift[:, None]
        weights = tl.exp2(logits - row_lse[None, :])
        dv_sum = tl.dot(weights.to(grads.dtype), grads, dv_sum, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        d_logits = (weights * (d_weights - delta[None, :])).to(queries.dtype)
        dk_sum = tl.dot(d_logits, queries, dk_sum, input_precision=PRECISION)
        _store_scores(own_ds, d_logits, offs_k, offs_q, ds.strides[3], n, EVEN)
    _store_rows(_of_row(dk, b, s, h, ALIGN), offs_k, dk.strides[2], n, dk_sum * SCALE, D, BLOCK_D, EVEN)
    _store_rows(_of_row(dv, b, s, h, ALIGN), offs_k, dv.strides[2], n, dv_sum, D, BLOCK_D, EVEN)


@program
@triton.jit(do_not_specialize=["rows", "n"])
def backward_queries(
    k, ds, dq, partial, rows, n, heads,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ALONG_KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries of one head, for a group of rows, and the sum of their gradients of scores.

    With several tiles of keys (n > BLOCK_K) dq are fp32 partial sums, one slice c per tile. The sums of gradients of
    scores lie along queries, or ALONG_KEYS.
    """
    wait_for_predecessors()
    tiles = tl.cdiv(n, BLOCK_Q)
    offs_q = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    part = tl.program_id(0) // tiles
    offs_k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    b = (tl.program_id(2) // heads).to(tl.int64)
    h = tl.program_id(2) % heads
    own_k = _of_head(k, b, h, ALIGN)
    own_ds = ds.pointer + (b * ds.strides[0] + h * ds.strides[2])
    own_dq = dq.pointer + (part * dq.strides[0] + b * dq.strides[1] + _head(h, dq.strides[4], ALIGN))
    total = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for before in tl.range(tl.program_id(1), rows, tl.num_programs(1), num_stages=STAGES):
        s = tl.cast(rows - 1 - before, tl.int64)  # what was written last may still be in the cache
        tile = _load_bias(own_ds + s * ds.strides[1], offs_k, offs_q, ds.strides[3], 1, n, EVEN)
        keys = _load_rows(own_k + s * k.strides[1], offs_k, k.strides[2], n, D, BLOCK_D, EVEN)
        gradient = tl.dot(tl.trans(tile), keys, input_precision=PRECISION) * SCALE
        _store_rows(own_dq + s * dq.strides[2], offs_q, dq.strides[3], n, gradient, D, BLOCK_D, EVEN)
        total += to_fp32(tile)
    group = tl.program_id(1).to(tl.int64)
    strides = partial.strides
    own_partial = partial.pointer + (group * strides[0] + b * strides[1] + h * strides[2])
    if ALONG_KEYS:
        _store_scores(own_partial, tl.trans(total), offs_q, offs_k, strides[3], n, EVEN)
    else:
        _store_scores(own_partial, total, offs_k, offs_q, strides[3], n, EVEN)
