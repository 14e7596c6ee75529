"""Triton programs of the global column attention; what they do together is described in ``global_attention``.

Tiles are BLOCK_M rows (b, s, n), or BLOCK_S sequences of BLOCK_R residue columns. Row index and column tiles stay in
32 bits because 64-bit division is slow; offsets of elements are 64 bits wide. Gates are ``tl.sigmoid``, rounded
otherwise than ``instructions.sigmoid``, which would change the bits of runs.
"""
# pyright: reportGeneralTypeIssues=false
# The type checker does not see Triton's ranges.

import triton
import triton.language as tl

from scalefold.kernels.instructions import program, rounded_product, wait_for_predecessors
from scalefold.kernels.rows import load_vector, normalise, normalise_gradient, scale_and_shift


@triton.jit
def _matrix(pointer, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])


@triton.jit
def _gates(normed, weight, bias, PRECISION: tl.constexpr):
    """sigmoid(W_g normed + b_g), fp32 [rows, HD]; weight: [HD, C]; bias: fp32 [HD]."""
    logits = tl.dot(normed, tl.trans(weight), input_precision=PRECISION)
    return tl.sigmoid(logits + bias[None, :])


@triton.jit
def _column_tile(start, last, rows_s, n, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr):
    """Indices of a tile of BLOCK_S sequences x BLOCK_R columns: sequence, column, row of m, and which rows exist."""
    index = tl.arange(0, BLOCK_S * BLOCK_R)
    s = start + index // BLOCK_R
    column = tl.program_id(0) * BLOCK_R + index % BLOCK_R
    row = (tl.program_id(2) * rows_s + s).to(tl.int64) * n + column
    return s, column, row, (s < last) & (column < n)


@program
@triton.jit(do_not_specialize=["rows_s", "n", "rows_per_program"])
def project_columns(
    m, mask, norm, weight_kv, kv, partial, rows_s, n, rows_per_program,
    C: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys and values, and partial sums over sequences of keep * LN(m): fp32 [chunks, B, n, C]."""
    wait_for_predecessors()
    b = tl.program_id(2)
    channels = tl.arange(0, C)
    scale, offset = load_vector(norm.weight, C), load_vector(norm.bias, C)
    weight = _matrix(weight_kv, KV, C)
    total = tl.zeros([BLOCK_R, C], tl.float32)
    member = tl.arange(0, BLOCK_S * BLOCK_R)[None, :] % BLOCK_R == tl.arange(0, BLOCK_R)[:, None]
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_s)
    for start in tl.range(first, last, BLOCK_S):
        s, column, row, exists = _column_tile(start, last, rows_s, n, BLOCK_S, BLOCK_R)
        x = tl.load(m + row[:, None] * C + channels[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
        hat, _ = normalise(x, C)
        normed = scale_and_shift(hat, scale, offset, m.dtype.element_ty)
        keep = tl.load(mask + row, mask=exists, other=0.0).to(m.dtype.element_ty)
        total = tl.dot(tl.where(member, keep[None, :], 0.0), normed, total, input_precision=PRECISION)
        pair = tl.dot(normed, tl.trans(weight), input_precision=PRECISION)
        where = ((b * n + column).to(tl.int64) * rows_s + s)[:, None] * KV + tl.arange(0, KV)[None, :]
        tl.store(kv + where, pair.to(kv.dtype.element_ty), mask=exists[:, None])
    _store_column_sums(partial, total, n, C, BLOCK_R)


@triton.jit
def _store_column_sums(partial, total, n, C: tl.constexpr, BLOCK_R: tl.constexpr):
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * n + column
    tl.store(partial + slot[:, None] * C + tl.arange(0, C)[None, :], total, mask=(column < n)[:, None])


@triton.jit
def _sum_partials(partial, chunks, column, count, C: tl.constexpr):
    """Sum over chunks of one column of fp32 [chunks, count, C]."""
    total = tl.zeros([16, C], tl.float32)
    for start in tl.range(0, chunks, 16):
        chunk = start + tl.arange(0, 16)
        where = (chunk * count + column)[:, None] * C + tl.arange(0, C)[None, :]
        total += tl.load(partial + where, mask=(chunk < chunks)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _keys_or_values(base, s, rows_s, KV: tl.constexpr, D: tl.constexpr):
    """fp32 [len(s), D] of one column; ``base`` points at its keys or at its values."""
    where = s[:, None] * KV + tl.arange(0, D)[None, :]
    return tl.load(base + where, mask=(s < rows_s)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _scores(keys, q, keep, s, rows_s, inf_log2):
    """Logits in base 2, fp32 [len(s), H]; q holds scale and log2(e)."""
    logits = tl.sum(rounded_product(keys[:, None, :], q[None, :, :]), 2) + (keep * inf_log2 - inf_log2)[:, None]
    return tl.where((s < rows_s)[:, None], logits, float("-inf"))


@program
@triton.jit(do_not_specialize=["rows_s", "n", "chunks"])
def attend_columns(
    partial, mask, weight_q, kv, mean, q, o, statistics, rows_s, n, chunks, inf_log2, eps, scale_log2,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One column: mean, query and softmax over all sequences. statistics: fp32 [B, n, 3, H] (lse, rest, 1/count)."""
    wait_for_predecessors()
    column = tl.program_id(0)
    b = column // n
    mask += b.to(tl.int64) * rows_s * n + column % n
    kv += column.to(tl.int64) * rows_s * KV
    count = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(0, rows_s, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        count += tl.load(mask + s * n, mask=s < rows_s, other=0.0).to(tl.float32)
    reciprocal = 1.0 / (tl.sum(count, 0) + eps)
    average = _sum_partials(partial, chunks, column, tl.num_programs(0), C) * reciprocal
    average = average.to(mean.dtype.element_ty)
    tl.store(mean + column * C + tl.arange(0, C), average)
    projected = tl.sum(rounded_product(_matrix(weight_q, H * D, C).to(tl.float32), average.to(tl.float32)[None, :]), 1)
    projected = projected.to(q.dtype.element_ty)
    tl.store(q + column * (H * D) + tl.arange(0, H * D), projected)
    query = tl.reshape(projected.to(tl.float32), [H, D]) * scale_log2
    highest = tl.full([BLOCK_S, H], float("-inf"), tl.float32)
    for start in tl.range(0, rows_s, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keep = tl.load(mask + s * n, mask=s < rows_s, other=0.0).to(tl.float32)
        keys = _keys_or_values(kv, s, rows_s, KV, D)
        highest = tl.maximum(highest, _scores(keys, query, keep, s, rows_s, inf_log2))
    maximum = tl.max(highest, 0)
    total = tl.zeros([BLOCK_S, H], tl.float32)
    result = tl.zeros([BLOCK_S, H, D], tl.float32)
    for start in tl.range(0, rows_s, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keep = tl.load(mask + s * n, mask=s < rows_s, other=0.0).to(tl.float32)
        keys = _keys_or_values(kv, s, rows_s, KV, D)
        weights = tl.exp2(_scores(keys, query, keep, s, rows_s, inf_log2) - maximum[None, :])
        total += weights
        result += weights[:, :, None] * _keys_or_values(kv + D, s, rows_s, KV, D)[:, None, :]
    sums = tl.sum(total, 0)
    output = tl.sum(result, 0) / sums[:, None]
    tl.store(o + column * (H * D) + tl.arange(0, H * D), tl.reshape(output, [H * D]).to(o.dtype.element_ty))
    lse = maximum + tl.log2(sums)
    heads = column * (3 * H) + tl.arange(0, H)
    tl.store(statistics + heads, lse)
    tl.store(statistics + heads + H, tl.exp2((lse - maximum) - tl.log2(sums)))
    tl.store(statistics + heads + 2 * H, tl.zeros([H], tl.float32) + reciprocal)


@program
@triton.jit(do_not_specialize=["rows", "rows_s", "n"])
def gate_rows(
    m, norm, gate, output, o, out, rows, rows_s, n,
    C: tl.constexpr, HD: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = m + W_o (sigmoid(W_g LN(m) + b_g) * o) + b_o for a tile of rows (b, s, n)."""
    wait_for_predecessors()
    channels = tl.arange(0, C)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    where = row.to(tl.int64)[:, None] * C + channels[None, :]
    x = tl.load(m + where, mask=exists[:, None], other=0.0).to(tl.float32)
    hat, _ = normalise(x, C)
    normed = scale_and_shift(hat, load_vector(norm.weight, C), load_vector(norm.bias, C), m.dtype.element_ty)
    opening = _gates(normed, _matrix(gate.weight, HD, C), load_vector(gate.bias, HD), PRECISION)
    column = row // (rows_s * n) * n + row % n
    gated = (opening * _attended_tile(o, column, exists, HD)).to(m.dtype.element_ty)
    update = tl.dot(gated, tl.trans(_matrix(output.weight, C, HD)), input_precision=PRECISION)
    update += x + load_vector(output.bias, C)[None, :]
    tl.store(out + where, update.to(out.dtype.element_ty), mask=exists[:, None])


@program
@triton.jit(do_not_specialize=["rows_s", "n", "rows_per_program"])
def gate_columns_backward(
    m, norm, gate, weight_o, o, d_out, partial, weight_sums, rows_s, n, rows_per_program,
    C: tl.constexpr, HD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over sequences of the gradient of o, fp32 [chunks, B, n, HD], and of gate and output weights.

    weight_sums: fp32 [programs, C * HD + HD * C + C + HD] for W_o, W_g, b_o, b_g.
    """
    wait_for_predecessors()
    channels, width = tl.arange(0, C), tl.arange(0, HD)
    scale, offset, shift = load_vector(norm.weight, C), load_vector(norm.bias, C), load_vector(gate.bias, HD)
    gate_weight, output_weight = _matrix(gate.weight, HD, C), _matrix(weight_o, C, HD)
    storage = m.dtype.element_ty
    member = tl.arange(0, BLOCK_S * BLOCK_R)[None, :] % BLOCK_R == tl.arange(0, BLOCK_R)[:, None]
    member = tl.where(member, 1.0, 0.0).to(storage)
    total = tl.zeros([BLOCK_R, HD], tl.float32)
    d_weight_o = tl.zeros([C, HD], tl.float32)
    d_weight_g = tl.zeros([HD, C], tl.float32)
    d_bias_o = tl.zeros([BLOCK_R, C], tl.float32)  # per column of the tile, added up at the end
    d_bias_g = tl.zeros([BLOCK_R, HD], tl.float32)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_s)
    for start in tl.range(first, last, BLOCK_S):
        _, column, row, exists = _column_tile(start, last, rows_s, n, BLOCK_S, BLOCK_R)
        where = row[:, None] * C + channels[None, :]
        hat, _ = normalise(tl.load(m + where, mask=exists[:, None], other=0.0).to(tl.float32), C)
        normed = scale_and_shift(hat, scale, offset, storage)
        opening = _gates(normed, gate_weight, shift, PRECISION)
        grad = tl.load(d_out + where, mask=exists[:, None], other=0.0)
        d_gated = tl.dot(grad, output_weight, input_precision=PRECISION)
        total = tl.dot(member, (d_gated * opening).to(storage), total, input_precision=PRECISION)
        attended = _attended_tile(o, tl.program_id(2) * n + column, exists, HD)
        d_weight_o = tl.dot(tl.trans(grad), (opening * attended).to(storage), d_weight_o, input_precision=PRECISION)
        d_gate = (d_gated * attended * opening * (1.0 - opening)).to(storage)
        d_weight_g = tl.dot(tl.trans(d_gate), normed, d_weight_g, input_precision=PRECISION)
        d_bias_o = tl.dot(member, grad, d_bias_o, input_precision=PRECISION)
        d_bias_g = tl.dot(member, d_gate, d_bias_g, input_precision=PRECISION)
    _store_column_sums(partial, total, n, HD, BLOCK_R)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    weight_sums += program * (2 * C * HD + C + HD)
    tl.store(weight_sums + channels[:, None] * HD + width[None, :], d_weight_o)
    tl.store(weight_sums + C * HD + width[:, None] * C + channels[None, :], d_weight_g)
    tl.store(weight_sums + 2 * C * HD + channels, tl.sum(d_bias_o, 0))
    tl.store(weight_sums + 2 * C * HD + C + width, tl.sum(d_bias_g, 0))


@triton.jit
def _attended_tile(o, column, exists, HD: tl.constexpr):
    """Output of the attention for each row of a tile, fp32 [rows, HD]; column: b * n + column."""
    where = column[:, None] * HD + tl.arange(0, HD)[None, :]
    return tl.load(o + where, mask=exists[:, None], other=0.0).to(tl.float32)


@program
@triton.jit(do_not_specialize=["rows_s", "n", "chunks"])
def attend_columns_backward(
    partial, mask, weight_q, kv, q, o, statistics, d_kv, d_q, d_mean, rows_s, n, chunks, inf_log2, scale, scale_log2,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One column: gradients of keys and values, of the query, and of the sum under the mean (fp32 [B, n, C])."""
    wait_for_predecessors()
    column = tl.program_id(0)
    mask += (column // n).to(tl.int64) * rows_s * n + column % n
    kv += column.to(tl.int64) * rows_s * KV
    d_kv += column.to(tl.int64) * rows_s * KV
    flat = column * (H * D) + tl.arange(0, H * D)
    heads = column * (3 * H) + tl.arange(0, H)
    lse, rest = tl.load(statistics + heads), tl.load(statistics + heads + H)
    d_o = _sum_partials(partial, chunks, column, tl.num_programs(0), H * D)
    delta = tl.sum(tl.reshape(rounded_product(d_o, tl.load(o + flat).to(tl.float32)), [H, D]), 1)
    d_o = tl.reshape(d_o, [H, D])
    query = tl.reshape(tl.load(q + flat).to(tl.float32), [H, D])
    d_query = tl.zeros([BLOCK_S, H, D], tl.float32)
    for start in tl.range(0, rows_s, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keep = tl.load(mask + s * n, mask=s < rows_s, other=0.0).to(tl.float32)
        keys = _keys_or_values(kv, s, rows_s, KV, D)
        values = _keys_or_values(kv + D, s, rows_s, KV, D)
        logits = _scores(keys, query * scale_log2, keep, s, rows_s, inf_log2)
        weights = tl.exp2(logits - lse[None, :]) * rest[None, :]
        d_weights = tl.sum(rounded_product(values[:, None, :], d_o[None, :, :]), 2)
        d_logits = weights * (d_weights - delta[None, :]) * scale
        d_query += d_logits[:, :, None] * keys[:, None, :]
        d_values = tl.sum(rounded_product(weights[:, :, None], d_o[None, :, :]), 1)
        d_keys = tl.sum(rounded_product(d_logits[:, :, None], query[None, :, :]), 1)
        where = s[:, None] * KV + tl.arange(0, D)[None, :]
        inside = (s < rows_s)[:, None]
        tl.store(d_kv + where, d_keys.to(d_kv.dtype.element_ty), mask=inside)
        tl.store(d_kv + where + D, d_values.to(d_kv.dtype.element_ty), mask=inside)
    gradient = tl.reshape(tl.sum(d_query, 0), [H * D]).to(d_q.dtype.element_ty)
    tl.store(d_q + flat, gradient)
    d_average = tl.sum(rounded_product(_matrix(weight_q, H * D, C).to(tl.float32), gradient.to(tl.float32)[:, None]), 0)
    reciprocal = tl.load(statistics + column * (3 * H) + 2 * H)
    tl.store(d_mean + column * C + tl.arange(0, C), d_average * reciprocal)


@program
@triton.jit(do_not_specialize=["rows", "rows_s", "n"])
def rows_backward(
    m, mask, norm, gate, weight_o, weight_kv, o, d_out, d_kv, d_mean, d_m, weight_sums, rows, rows_s, n,
    C: tl.constexpr, HD: tl.constexpr, KV: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of m, tile by tile, and sums over this program's tiles for W_kv and the layer norm.

    weight_sums: fp32 [programs, KV * C + 2 * C] for W_kv, norm weight and bias.
    """
    wait_for_predecessors()
    channels, pair = tl.arange(0, C), tl.arange(0, KV)
    scale, offset, shift = load_vector(norm.weight, C), load_vector(norm.bias, C), load_vector(gate.bias, HD)
    storage = m.dtype.element_ty
    ones = tl.full([16, BLOCK_M], 1.0, tl.float32).to(storage)
    d_weight_kv = tl.zeros([KV, C], tl.float32)
    d_scale = tl.zeros([16, C], tl.float32)
    d_offset = tl.zeros([16, C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = row < rows
        where = row.to(tl.int64)[:, None] * C + channels[None, :]
        hat, rstd = normalise(tl.load(m + where, mask=exists[:, None], other=0.0).to(tl.float32), C)
        normed = scale_and_shift(hat, scale, offset, storage)
        grad = tl.load(d_out + where, mask=exists[:, None], other=0.0)
        opening = _gates(normed, _matrix(gate.weight, HD, C), shift, PRECISION)
        d_gated = tl.dot(grad, _matrix(weight_o, C, HD), input_precision=PRECISION)
        column = row // (rows_s * n) * n + row % n
        d_gate = (d_gated * _attended_tile(o, column, exists, HD) * opening * (1.0 - opening)).to(storage)
        s = row // n % rows_s
        where_kv = (column.to(tl.int64) * rows_s + s)[:, None] * KV + pair[None, :]
        d_pair = tl.load(d_kv + where_kv, mask=exists[:, None], other=0.0)
        d_weight_kv = tl.dot(tl.trans(d_pair), normed, d_weight_kv, input_precision=PRECISION)
        keep = tl.load(mask + row, mask=exists, other=0.0).to(tl.float32)
        average = tl.load(d_mean + column[:, None] * C + channels[None, :], mask=exists[:, None], other=0.0)
        d_normed = tl.dot(d_pair, _matrix(weight_kv, KV, C), average * keep[:, None], input_precision=PRECISION)
        d_normed = tl.dot(d_gate, _matrix(gate.weight, HD, C), d_normed, input_precision=PRECISION)
        d_offset = tl.dot(ones, d_normed.to(storage), d_offset, input_precision=PRECISION)
        d_scale = tl.dot(ones, (d_normed * hat).to(storage), d_scale, input_precision=PRECISION)
        d_x = normalise_gradient(d_normed * scale[None, :], hat, rstd, C)
        tl.store(d_m + where, (d_x + grad.to(tl.float32)).to(storage), mask=exists[:, None])
    weight_sums += tl.program_id(0) * (KV * C + 2 * C)
    tl.store(weight_sums + pair[:, None] * C + channels[None, :], d_weight_kv)
    tl.store(weight_sums + KV * C + channels, tl.sum(d_scale, 0) / 16)
    tl.store(weight_sums + KV * C + C + channels, tl.sum(d_offset, 0) / 16)
