"""Global column attention of the extra-MSA stack (Supplement Algorithm 19), forward and backward, in Triton.

Same meaning as ``reference.global_attention``. The layer norm is recomputed wherever it is needed (a row has only 64
channels), so the large tensor m is read twice forward and twice backward and nothing of its size is saved.

Forward:  ``_project`` m -> keys, values and partial sums for the mean query of each column;
          ``_attend`` one program per column: mean, query, softmax over the sequences, output o [B, N, H * D];
          ``_gate_rows`` m + W_o (sigmoid(gate) * o) + b_o.
Backward: ``_gate_columns_backward`` partial sums of the gradient of o; ``_attend_backward`` gradients of keys, values
          and mean per column; ``_rows_backward`` gradients of m and, as partial sums per program, of all weights.

Sums over the sequences of a column run as products with a 0/1 matrix that says which row of a tile belongs to which
of 16 columns. Keys and values lie as [B, N, S, 2 D], so that a column is one contiguous piece.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The type checker sees neither Triton's launch syntax nor its ranges.

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalefold.kernels import reference, tuning
from scalefold.kernels.attention import LOG2_E, matmul_precision

COLUMNS = 16  # columns per program of the kernels that sum over sequences: the smallest side of a product
EPS_NORM = tl.constexpr(reference.LAYER_NORM_EPS)


@triton.jit
def _normalise(x, C: tl.constexpr):
    """Rows without mean and with unit variance, and the reciprocal deviation. x: fp32 [rows, C]."""
    mean = tl.sum(x, 1) / C
    centred = x - mean[:, None]
    reciprocal = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS_NORM)
    return centred * reciprocal[:, None], reciprocal


@triton.jit
def _vector(pointer, C: tl.constexpr):
    return tl.load(pointer + tl.arange(0, C)).to(tl.float32)


@triton.jit
def _matrix(pointer, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])


@triton.jit
def _column_tile(start, last, rows_s, n, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr):
    """Indices of a tile of BLOCK_S sequences x COLUMNS columns: sequence, column, row of m, and which rows exist."""
    index = tl.arange(0, BLOCK_S * COLUMNS)
    s = start + index // COLUMNS
    column = tl.program_id(0) * COLUMNS + index % COLUMNS
    row = (tl.program_id(2) * rows_s + s).to(tl.int64) * n + column
    return s, column, row, (s < last) & (column < n)


@triton.jit(do_not_specialize=["rows_s", "n", "rows_per_program"])
def _project(
    m, mask, norm_weight, norm_bias, weight_kv, kv, partial, rows_s, n, rows_per_program,
    C: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys and values, and partial sums over sequences of keep * LN(m): fp32 [chunks, B, n, C]."""
    b = tl.program_id(2)
    channels = tl.arange(0, C)
    scale, offset = _vector(norm_weight, C), _vector(norm_bias, C)
    weight = _matrix(weight_kv, KV, C)
    total = tl.zeros([COLUMNS, C], tl.float32)
    member = tl.arange(0, BLOCK_S * COLUMNS)[None, :] % COLUMNS == tl.arange(0, COLUMNS)[:, None]
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_s)
    for start in tl.range(first, last, BLOCK_S):
        s, column, row, exists = _column_tile(start, last, rows_s, n, BLOCK_S, COLUMNS)
        x = tl.load(m + row[:, None] * C + channels[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
        normed, _ = _normalise(x, C)
        normed = (normed * scale[None, :] + offset[None, :]).to(m.dtype.element_ty)
        keep = tl.load(mask + row, mask=exists, other=0.0).to(m.dtype.element_ty)
        total = tl.dot(tl.where(member, keep[None, :], 0.0), normed, total, input_precision=PRECISION)
        pair = tl.dot(normed, tl.trans(weight), input_precision=PRECISION)
        where = ((b * n + column).to(tl.int64) * rows_s + s)[:, None] * KV + tl.arange(0, KV)[None, :]
        tl.store(kv + where, pair.to(kv.dtype.element_ty), mask=exists[:, None])
    _store_column_sums(partial, total, n, C, COLUMNS)


@triton.jit
def _store_column_sums(partial, total, n, C: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
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
    logits = tl.sum(keys[:, None, :] * q[None, :, :], 2) + (keep * inf_log2 - inf_log2)[:, None]
    return tl.where((s < rows_s)[:, None], logits, float("-inf"))


@triton.jit(do_not_specialize=["rows_s", "n", "chunks"])
def _attend(
    partial, mask, weight_q, kv, mean, q, o, statistics, rows_s, n, chunks, inf_log2, eps, scale_log2,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One column: mean, query and softmax over all sequences. statistics: fp32 [B, n, 3, H] (lse, rest, 1/count)."""
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
    projected = tl.sum(_matrix(weight_q, H * D, C).to(tl.float32) * average.to(tl.float32)[None, :], 1)
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


@triton.jit(do_not_specialize=["rows", "rows_s", "n"])
def _gate_rows(
    m, norm_weight, norm_bias, weight_g, bias_g, weight_o, bias_o, o, out, rows, rows_s, n,
    C: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = m + W_o (sigmoid(W_g LN(m) + b_g) * o) + b_o for a tile of rows (b, s, n)."""
    channels, width = tl.arange(0, C), tl.arange(0, HD)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = (row < rows)[:, None]
    x = tl.load(m + row[:, None] * C + channels[None, :], mask=exists, other=0.0).to(tl.float32)
    normed, _ = _normalise(x, C)
    normed = (normed * _vector(norm_weight, C)[None, :] + _vector(norm_bias, C)[None, :]).to(m.dtype.element_ty)
    gate = tl.dot(normed, tl.trans(_matrix(weight_g, HD, C)), input_precision=PRECISION)
    gate = tl.sigmoid(gate + _vector(bias_g, HD)[None, :])
    column = row // (rows_s * n) * n + row % n
    attended = tl.load(o + column[:, None] * HD + width[None, :], mask=exists, other=0.0).to(tl.float32)
    gated = (gate * attended).to(m.dtype.element_ty)
    update = tl.dot(gated, tl.trans(_matrix(weight_o, C, HD)), input_precision=PRECISION)
    update += x + _vector(bias_o, C)[None, :]
    tl.store(out + row[:, None] * C + channels[None, :], update.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows_s", "n", "rows_per_program"])
def _gate_columns_backward(
    m, norm_weight, norm_bias, weight_g, bias_g, weight_o, d_out, partial, rows_s, n, rows_per_program,
    C: tl.constexpr, HD: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over sequences of the gradient of o: fp32 [chunks, B, n, HD]."""
    channels = tl.arange(0, C)
    scale, offset, shift = _vector(norm_weight, C), _vector(norm_bias, C), _vector(bias_g, HD)
    gate_weight, output_weight = _matrix(weight_g, HD, C), _matrix(weight_o, C, HD)
    member = tl.arange(0, BLOCK_S * COLUMNS)[None, :] % COLUMNS == tl.arange(0, COLUMNS)[:, None]
    member = tl.where(member, 1.0, 0.0).to(m.dtype.element_ty)
    total = tl.zeros([COLUMNS, HD], tl.float32)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_s)
    for start in tl.range(first, last, BLOCK_S):
        _, _, row, exists = _column_tile(start, last, rows_s, n, BLOCK_S, COLUMNS)
        where = row[:, None] * C + channels[None, :]
        normed, _ = _normalise(tl.load(m + where, mask=exists[:, None], other=0.0).to(tl.float32), C)
        normed = (normed * scale[None, :] + offset[None, :]).to(m.dtype.element_ty)
        gate = tl.dot(normed, tl.trans(gate_weight), input_precision=PRECISION)
        grad = tl.load(d_out + where, mask=exists[:, None], other=0.0)
        d_gated = tl.dot(grad, output_weight, input_precision=PRECISION)
        product = (d_gated * tl.sigmoid(gate + shift[None, :])).to(m.dtype.element_ty)
        total = tl.dot(member, product, total, input_precision=PRECISION)
    _store_column_sums(partial, total, n, HD, COLUMNS)


@triton.jit(do_not_specialize=["rows_s", "n", "chunks"])
def _attend_backward(
    partial, mask, weight_q, kv, q, o, statistics, d_kv, d_q, d_mean, rows_s, n, chunks, inf_log2, scale, scale_log2,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One column: gradients of keys and values, of the query, and of the sum under the mean (fp32 [B, n, C])."""
    column = tl.program_id(0)
    mask += (column // n).to(tl.int64) * rows_s * n + column % n
    kv += column.to(tl.int64) * rows_s * KV
    d_kv += column.to(tl.int64) * rows_s * KV
    flat = column * (H * D) + tl.arange(0, H * D)
    heads = column * (3 * H) + tl.arange(0, H)
    lse, rest = tl.load(statistics + heads), tl.load(statistics + heads + H)
    d_o = _sum_partials(partial, chunks, column, tl.num_programs(0), H * D)
    delta = tl.sum(tl.reshape(d_o * tl.load(o + flat).to(tl.float32), [H, D]), 1)
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
        d_weights = tl.sum(values[:, None, :] * d_o[None, :, :], 2)
        d_logits = weights * (d_weights - delta[None, :]) * scale
        d_query += d_logits[:, :, None] * keys[:, None, :]
        d_values = tl.sum(weights[:, :, None] * d_o[None, :, :], 1)
        d_keys = tl.sum(d_logits[:, :, None] * query[None, :, :], 1)
        where = s[:, None] * KV + tl.arange(0, D)[None, :]
        inside = (s < rows_s)[:, None]
        tl.store(d_kv + where, d_keys.to(d_kv.dtype.element_ty), mask=inside)
        tl.store(d_kv + where + D, d_values.to(d_kv.dtype.element_ty), mask=inside)
    gradient = tl.reshape(tl.sum(d_query, 0), [H * D]).to(d_q.dtype.element_ty)
    tl.store(d_q + flat, gradient)
    d_average = tl.sum(_matrix(weight_q, H * D, C).to(tl.float32) * gradient.to(tl.float32)[:, None], 0)
    reciprocal = tl.load(statistics + column * (3 * H) + 2 * H)
    tl.store(d_mean + column * C + tl.arange(0, C), d_average * reciprocal)


@triton.jit(do_not_specialize=["rows", "rows_s", "n"])
def _rows_backward(
    m, mask, norm_weight, norm_bias, weight_g, bias_g, weight_o, weight_kv, o, d_out, d_kv, d_mean, d_m, partial,
    rows, rows_s, n,
    C: tl.constexpr, HD: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of m, tile by tile, and sums over this program's tiles of all weight gradients.

    partial: fp32 [programs, C * HD + HD * C + KV * C + 3 * C + HD]: W_o, W_g, W_kv, norm weight and bias, b_o, b_g.
    """
    channels, width, pair = tl.arange(0, C), tl.arange(0, HD), tl.arange(0, KV)
    scale, offset, shift = _vector(norm_weight, C), _vector(norm_bias, C), _vector(bias_g, HD)
    storage = m.dtype.element_ty
    ones = tl.full([16, BLOCK], 1.0, tl.float32).to(storage)
    d_weight_o = tl.zeros([C, HD], tl.float32)
    d_weight_g = tl.zeros([HD, C], tl.float32)
    d_weight_kv = tl.zeros([KV, C], tl.float32)
    d_scale = tl.zeros([16, C], tl.float32)
    d_offset = tl.zeros([16, C], tl.float32)
    d_bias_o = tl.zeros([16, C], tl.float32)
    d_bias_g = tl.zeros([16, HD], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        exists = (row < rows)[:, None]
        where = row[:, None] * C + channels[None, :]
        standard, reciprocal = _normalise(tl.load(m + where, mask=exists, other=0.0).to(tl.float32), C)
        normed = (standard * scale[None, :] + offset[None, :]).to(storage)
        grad = tl.load(d_out + where, mask=exists, other=0.0)
        gate = tl.dot(normed, tl.trans(_matrix(weight_g, HD, C)), input_precision=PRECISION)
        gate = tl.sigmoid(gate + shift[None, :])
        d_gated = tl.dot(grad, _matrix(weight_o, C, HD), input_precision=PRECISION)
        column = row // (rows_s * n) * n + row % n
        attended = tl.load(o + column[:, None] * HD + width[None, :], mask=exists, other=0.0).to(tl.float32)
        d_weight_o = tl.dot(tl.trans(grad), (gate * attended).to(storage), d_weight_o, input_precision=PRECISION)
        d_gate = (d_gated * attended * gate * (1.0 - gate)).to(storage)
        d_weight_g = tl.dot(tl.trans(d_gate), normed, d_weight_g, input_precision=PRECISION)
        s = row // n % rows_s
        where_kv = (column * rows_s + s)[:, None] * KV + pair[None, :]
        d_pair = tl.load(d_kv + where_kv, mask=exists, other=0.0)
        d_weight_kv = tl.dot(tl.trans(d_pair), normed, d_weight_kv, input_precision=PRECISION)
        keep = tl.load(mask + row, mask=row < rows, other=0.0).to(tl.float32)
        d_normed = tl.load(d_mean + column[:, None] * C + channels[None, :], mask=exists, other=0.0) * keep[:, None]
        d_normed = tl.dot(d_pair, _matrix(weight_kv, KV, C), d_normed, input_precision=PRECISION)
        d_normed = tl.dot(d_gate, _matrix(weight_g, HD, C), d_normed, input_precision=PRECISION)
        d_bias_o = tl.dot(ones, grad, d_bias_o, input_precision=PRECISION)
        d_bias_g = tl.dot(ones, d_gate, d_bias_g, input_precision=PRECISION)
        d_offset = tl.dot(ones, d_normed.to(storage), d_offset, input_precision=PRECISION)
        d_scale = tl.dot(ones, (d_normed * standard).to(storage), d_scale, input_precision=PRECISION)
        inner = d_normed * scale[None, :]
        along = tl.sum(inner * standard, 1) / C
        d_x = (inner - (tl.sum(inner, 1) / C)[:, None] - standard * along[:, None]) * reciprocal[:, None]
        tl.store(d_m + where, (d_x + grad.to(tl.float32)).to(storage), mask=exists)
    partial += tl.program_id(0) * (2 * C * HD + KV * C + 3 * C + HD)
    tl.store(partial + channels[:, None] * HD + width[None, :], d_weight_o)
    partial += C * HD
    tl.store(partial + width[:, None] * C + channels[None, :], d_weight_g)
    partial += C * HD
    tl.store(partial + pair[:, None] * C + channels[None, :], d_weight_kv)
    partial += KV * C
    tl.store(partial + channels, tl.sum(d_scale, 0) / 16)
    tl.store(partial + C + channels, tl.sum(d_offset, 0) / 16)
    tl.store(partial + 2 * C + channels, tl.sum(d_bias_o, 0) / 16)
    tl.store(partial + 3 * C + width, tl.sum(d_bias_g, 0) / 16)


def global_attention(
    m: Tensor,
    mask: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    weight_g: Tensor,
    bias_g: Tensor,
    weight_o: Tensor,
    bias_o: Tensor,
    num_heads: int,
    inf: float,
    eps: float,
) -> Tensor:
    """Triton version of ``reference.global_attention``, once differentiable.

    Widths must suit the matrix units: c, H * D and 2 D powers of two of at least 16 and at most 128; other widths take
    the plain definition.
    """
    arguments = (m, mask, norm_weight, norm_bias, weight_q, weight_k, weight_v, weight_g, bias_g, weight_o, bias_o)
    if not _widths_fit(m.shape[-1], weight_q.shape[0], 2 * weight_k.shape[0]):
        return reference.global_attention(*arguments, num_heads, inf, eps)
    return _GlobalAttention.apply(*arguments, num_heads, inf, eps)


def _widths_fit(*widths: int) -> bool:
    return all(16 <= width <= 128 and width & (width - 1) == 0 for width in widths)


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        *weights, num_heads, inf, eps = rest
        m, mask = m.contiguous(), mask.contiguous()
        norm_weight, norm_bias, weight_q, weight_k, weight_v, weight_g, bias_g, weight_o, bias_o = (
            weight.contiguous() for weight in weights
        )
        weight_kv = torch.cat((weight_k, weight_v))
        kv, partial = _projected(m, mask, norm_weight, norm_bias, weight_kv)
        mean, q, o, statistics = _attended(m, mask, weight_q, kv, partial, num_heads, inf, eps)
        out = _gated(m, norm_weight, norm_bias, weight_g, bias_g, weight_o, bias_o, o)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(
                m, mask, norm_weight, norm_bias, weight_q, weight_kv, weight_g, bias_g, weight_o, kv, mean, q, o,
                statistics,
            )  # fmt: skip
            ctx.num_heads, ctx.inf = num_heads, inf
            ctx.types = [weight.dtype for weight in weights]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (
            m,
            mask,
            norm_weight,
            norm_bias,
            weight_q,
            weight_kv,
            weight_g,
            bias_g,
            weight_o,
            kv,
            mean,
            q,
            o,
            statistics,
        ) = ctx.saved_tensors
        d_out = d_out.contiguous()
        partial = _output_gradient(m, norm_weight, norm_bias, weight_g, bias_g, weight_o, d_out)
        d_kv, d_q, d_mean = _attended_backward(
            mask, weight_q, kv, q, o, statistics, partial, m.shape[-1], ctx.num_heads, ctx.inf
        )
        d_m, sums = _rows_gradient(
            m, mask, norm_weight, norm_bias, weight_g, bias_g, weight_o, weight_kv, o, d_out, d_kv, d_mean
        )
        c, hd, pair = m.shape[-1], weight_q.shape[0], weight_kv.shape[0]
        d_weight_o, d_weight_g, d_weight_kv, d_scale, d_offset, d_bias_o, d_bias_g = sums.split(
            [c * hd, hd * c, pair * c, c, c, c, hd]
        )
        d_weight_q = d_q.flatten(0, 1).T @ mean.flatten(0, 1)
        d_weight_k, d_weight_v = d_weight_kv.view(2, pair // 2, c).unbind()
        gradients = (
            d_scale, d_offset, d_weight_q, d_weight_k, d_weight_v, d_weight_g.view(hd, c), d_bias_g,
            d_weight_o.view(c, hd), d_bias_o,
        )  # fmt: skip
        typed = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.types, strict=True))
        return d_m, None, *typed, None, None, None


def _fields(m: Tensor) -> dict[str, int | str]:
    """What launch parameters depend on; sizes that vary in evaluation are rounded up."""
    return {
        "sequences": tuning.power_of_two(m.shape[0] * m.shape[1]),
        "n": tuning.power_of_two(m.shape[2]),
        "c": m.shape[3],
        "dtype": str(m.dtype).removeprefix("torch."),
    }


def _column_grid(m: Tensor, sequences_per_program: int) -> tuple[int, int, int]:
    batch, sequences, n, _ = m.shape
    return tuning.ceil_div(n, COLUMNS), tuning.ceil_div(sequences, sequences_per_program), batch


def _projected(
    m: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_kv: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N, S, 2 D] and partial sums for the mean, fp32 [chunks, B, N, c]."""
    batch, sequences, n, c = m.shape
    config = tuning.lookup("global_attention_columns", **_fields(m))
    grid = _column_grid(m, config["SEQUENCES"])
    kv = m.new_empty(batch, n, sequences, weight_kv.shape[0])
    partial = m.new_empty(grid[1], batch, n, c, dtype=torch.float32)
    _project[grid](
        m, mask, norm_weight, norm_bias, weight_kv, kv, partial, sequences, n, config["SEQUENCES"],
        C=c, KV=weight_kv.shape[0], BLOCK_S=config["BLOCK_S"], COLUMNS=COLUMNS, PRECISION=matmul_precision(m),
        num_warps=config["num_warps"],
    )  # fmt: skip
    return kv, partial


def _attended(
    m: Tensor, mask: Tensor, weight_q: Tensor, kv: Tensor, partial: Tensor, num_heads: int, inf: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean [B, N, c], query and output [B, N, H * D], statistics fp32 [B, N, 3, H]."""
    batch, sequences, n, c = m.shape
    config = tuning.lookup("global_attention_attend", **_fields(m))
    width = kv.shape[-1] // 2
    mean = m.new_empty(batch, n, c)
    q, o = m.new_empty(2, batch, n, num_heads * width).unbind()
    statistics = m.new_empty(batch, n, 3, num_heads, dtype=torch.float32)
    _attend[(batch * n,)](
        partial, mask, weight_q, kv, mean, q, o, statistics, sequences, n, partial.shape[0], inf * LOG2_E.value, eps,
        LOG2_E.value * width**-0.5, C=c, H=num_heads, D=width, KV=2 * width, BLOCK_S=config["BLOCK_S"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return mean, q, o, statistics


def _gated(
    m: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_g: Tensor, bias_g: Tensor, weight_o: Tensor,
    bias_o: Tensor, o: Tensor,
) -> Tensor:  # fmt: skip
    _, sequences, n, c = m.shape
    rows = m.numel() // c
    config = tuning.lookup("global_attention_gate", **_fields(m))
    out = torch.empty_like(m)
    _gate_rows[(tuning.ceil_div(rows, config["BLOCK"]),)](
        m, norm_weight, norm_bias, weight_g, bias_g, weight_o, bias_o, o, out, rows, sequences, n,
        C=c, HD=o.shape[-1], BLOCK=config["BLOCK"], PRECISION=matmul_precision(m), num_warps=config["num_warps"],
    )  # fmt: skip
    return out


def _output_gradient(
    m: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_g: Tensor, bias_g: Tensor, weight_o: Tensor, d_out: Tensor
) -> Tensor:
    """Partial sums of the gradient of o, fp32 [chunks, B, N, H * D]."""
    batch, sequences, n, c = m.shape
    config = tuning.lookup("global_attention_columns_backward", **_fields(m))
    grid = _column_grid(m, config["SEQUENCES"])
    partial = m.new_empty(grid[1], batch, n, weight_g.shape[0], dtype=torch.float32)
    _gate_columns_backward[grid](
        m, norm_weight, norm_bias, weight_g, bias_g, weight_o, d_out, partial, sequences, n, config["SEQUENCES"],
        C=c, HD=weight_g.shape[0], BLOCK_S=config["BLOCK_S"], COLUMNS=COLUMNS, PRECISION=matmul_precision(m),
        num_warps=config["num_warps"],
    )  # fmt: skip
    return partial


def _attended_backward(
    mask: Tensor, weight_q: Tensor, kv: Tensor, q: Tensor, o: Tensor, statistics: Tensor, partial: Tensor, c: int,
    num_heads: int, inf: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of keys and values [B, N, S, 2 D], of q [B, N, H * D], of the sum under the mean fp32 [B, N, c]."""
    batch, n, sequences, pair = kv.shape
    fields = {
        "sequences": tuning.power_of_two(batch * sequences),
        "n": tuning.power_of_two(n),
        "c": c,
        "dtype": str(kv.dtype).removeprefix("torch."),
    }
    config = tuning.lookup("global_attention_attend_backward", **fields)
    width = pair // 2
    d_kv, d_q = torch.empty_like(kv), torch.empty_like(q)
    d_mean = kv.new_empty(batch, n, c, dtype=torch.float32)
    _attend_backward[(batch * n,)](
        partial, mask, weight_q, kv, q, o, statistics, d_kv, d_q, d_mean, sequences, n, partial.shape[0],
        inf * LOG2_E.value, width**-0.5, LOG2_E.value * width**-0.5,
        C=c, H=num_heads, D=width, KV=pair, BLOCK_S=config["BLOCK_S"], num_warps=config["num_warps"],
    )  # fmt: skip
    return d_kv, d_q, d_mean


def _rows_gradient(
    m: Tensor, mask: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight_g: Tensor, bias_g: Tensor,
    weight_o: Tensor, weight_kv: Tensor, o: Tensor, d_out: Tensor, d_kv: Tensor, d_mean: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of m, and the sums of ``_rows_backward`` over all rows, fp32, in its order."""
    _, sequences, n, c = m.shape
    rows, hd, pair = m.numel() // c, weight_g.shape[0], weight_kv.shape[0]
    config = tuning.lookup("global_attention_rows_backward", **_fields(m))
    programs = min(config["PROGRAMS"], tuning.ceil_div(rows, config["BLOCK"]))
    d_m = torch.empty_like(m)
    partial = m.new_empty(programs, 2 * c * hd + pair * c + 3 * c + hd, dtype=torch.float32)
    _rows_backward[(programs,)](
        m, mask, norm_weight, norm_bias, weight_g, bias_g, weight_o, weight_kv, o, d_out, d_kv, d_mean, d_m, partial,
        rows, sequences, n, C=c, HD=hd, KV=pair, BLOCK=config["BLOCK"], PRECISION=matmul_precision(m),
        num_warps=config["num_warps"],
    )  # fmt: skip
    return d_m, partial.sum(0)


def _columns_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    """About two programs per multiprocessor of an H200 (132), so that a DAP share still fills the GPU."""
    tiles = max(1, int(fields["n"]) // COLUMNS)
    chunk = int(fields["sequences"]) * tiles // 256
    return {"BLOCK_S": 8, "SEQUENCES": min(64, max(8, chunk)), "num_warps": 4}


def _columns_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [
        {"BLOCK_S": block, "SEQUENCES": sequences, "num_warps": warps}
        for block in (4, 8, 16)
        for sequences in (16, 32, 64, 128)
        for warps in (4, 8)
        if sequences >= block
    ]


def _attend_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK_S": 128, "num_warps": 4}


def _attend_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [
        {"BLOCK_S": block, "num_warps": warps} for block in (64, 128, 256) for warps in (4, 8) if block >= 16 * warps
    ]


def _gate_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK": 128, "num_warps": 4}


def _gate_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [{"BLOCK": block, "num_warps": warps} for block in (64, 128, 256) for warps in (4, 8)]


def _rows_default(fields: tuning.Fields, capability: int) -> tuning.Config:
    return {"BLOCK": 64, "PROGRAMS": 264, "num_warps": 4}


def _rows_candidates(fields: tuning.Fields) -> list[tuning.Config]:
    return [
        {"BLOCK": block, "PROGRAMS": programs, "num_warps": warps}
        for block in (64, 128)
        for programs in (132, 264, 396, 528)
        for warps in (4, 8)
    ]


tuning.register("global_attention_columns", _columns_default, _columns_candidates)
tuning.register("global_attention_columns_backward", _columns_default, _columns_candidates)
tuning.register("global_attention_attend", _attend_default, _attend_candidates)
tuning.register("global_attention_attend_backward", _attend_default, _attend_candidates)
tuning.register("global_attention_gate", _gate_default, _gate_candidates)
tuning.register("global_attention_rows_backward", _rows_default, _rows_candidates)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """Forward and backward at the benchmark's shape on meta tensors; see ``tuning``."""
    return [("global_attention", _meta_run)]


def _meta_run() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    mask = torch.empty((1, 1024, 256), dtype=torch.bfloat16, device="meta")
    weights = [empty(64), empty(64), empty(64, 64), empty(8, 64), empty(8, 64), empty(64, 64), empty(64)]
    global_attention(empty(1, 1024, 256, 64), mask, *weights, empty(64, 64), empty(64), 8, 1e9, 1e-8).sum().backward()
