"""Triton programs around the layer norms of an iteration: residual connection, dropout, norm, and the frames' update.

Rows are residues of all samples, fp32 [rows, C], dense; BLOCK_C is C rounded up.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from scalefold.kernels.instructions import program, wait_for_predecessors
from scalefold.kernels.rows import normalise, normalise_gradient
from scalefold.kernels.structure.frames import (
    length_of,
    load_quaternion,
    load_vector,
    load_vector_to_change,
    rotation_of,
    store_quaternion,
    store_vector,
    turn,
    turn_back,
    turned_by,
    turning_gradient,
)


@triton.jit
def _along_row(tile, linear, k, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Output k of a linear layer for a tile of rows: [rows]."""
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(linear.weight + k * C + columns, mask=columns < C, other=0.0)
    return tl.sum(tile * weight[None, :], 1) + tl.load(linear.bias + k)


@triton.jit
def _back_to_row(d, linear, k, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Share of output k of a linear layer in the gradient of its input: [rows, BLOCK_C]."""
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(linear.weight + k * C + columns, mask=columns < C, other=0.0)
    return d[:, None] * weight[None, :]


@program
@triton.jit
def norm_kernel(
    s, update, dropout, norm, linear, quaternion, translation, before, out, moves, new_quaternion, new_translation,
    num_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """before = (s + update) times dropout (None: nothing is dropped); out = its layer norm.

    With ``linear`` [6, C], the backbone update: its outputs are ``moves`` [rows, 6], which move the frames.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    keep = (rows < num_rows)[:, None] & (columns < C)[None, :]
    at = rows[:, None].to(tl.int64) * C + columns[None, :]
    value = tl.load(s + at, mask=keep, other=0.0) + tl.load(update + at, mask=keep, other=0.0)
    if dropout is not None:
        value *= tl.load(dropout + at, mask=keep, other=0.0)
    tl.store(before + at, value, mask=keep)
    hat, _ = normalise(value, C, keep)
    scale = tl.load(norm.weight + columns, mask=columns < C, other=0.0)
    normed = hat * scale[None, :] + tl.load(norm.bias + columns, mask=columns < C, other=0.0)[None, :]
    tl.store(out + at, normed, mask=keep)
    if linear is not None:
        exists = rows < num_rows
        b = _along_row(normed, linear, 0, C, BLOCK_C)
        c = _along_row(normed, linear, 1, C, BLOCK_C)
        d = _along_row(normed, linear, 2, C, BLOCK_C)
        x = _along_row(normed, linear, 3, C, BLOCK_C)
        y = _along_row(normed, linear, 4, C, BLOCK_C)
        z = _along_row(normed, linear, 5, C, BLOCK_C)
        store_vector(moves, 2 * rows, (b, c, d), exists)
        store_vector(moves, 2 * rows + 1, (x, y, z), exists)
        frame = load_quaternion(quaternion, rows, exists)
        tx, ty, tz = load_vector(translation, rows, exists)
        x, y, z = turn(rotation_of(frame), (x, y, z))
        store_vector(new_translation, rows, (x + tx, y + ty, z + tz), exists)
        w, x, y, z = turned_by(frame, (b, c, d))
        length = length_of((w, x, y, z))
        store_quaternion(new_quaternion, rows, (w / length, x / length, y / length, z / length), exists)


@program
@triton.jit
def norm_backward_kernel(
    before, d_out, through, beside, dropout, norm, linear, quaternion, moves, d_quaternion, d_translation, d_carried,
    d_moves, d_before, partials, num_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of s + update, for d_out plus what came ``through`` and ``beside`` the next layers (or None).

    With ``linear``: d_carried, the gradient of the next frames' translations, gets that of this iteration's added, and
    d_moves is stored. Quaternions carry no gradient from one iteration to the next. partials[tile]: sums for the norm.
    """
    wait_for_predecessors()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_C)
    keep = (rows < num_rows)[:, None] & (columns < C)[None, :]
    at = rows[:, None].to(tl.int64) * C + columns[None, :]
    d = tl.load(d_out + at, mask=keep, other=0.0)
    if through is not None:
        d += tl.load(through + at, mask=keep, other=0.0)
    if beside is not None:
        d += tl.load(beside + at, mask=keep, other=0.0)
    if linear is not None:
        exists = rows < num_rows
        frame = load_quaternion(quaternion, rows, exists)
        tx, ty, tz = load_vector(d_translation, rows, exists)
        ux, uy, uz = load_vector_to_change(d_carried, rows, exists)
        tx, ty, tz = tx + ux, ty + uy, tz + uz
        store_vector(d_carried, rows, (tx, ty, tz), exists)
        x, y, z = turn_back(rotation_of(frame), (tx, ty, tz))
        turning = load_vector(moves, 2 * rows, exists)
        b, c, e = turning_gradient(frame, turning, load_quaternion(d_quaternion, rows, exists))
        store_vector(d_moves, 2 * rows, (b, c, e), exists)
        store_vector(d_moves, 2 * rows + 1, (x, y, z), exists)
        d += _back_to_row(b, linear, 0, C, BLOCK_C) + _back_to_row(c, linear, 1, C, BLOCK_C)
        d += _back_to_row(e, linear, 2, C, BLOCK_C) + _back_to_row(x, linear, 3, C, BLOCK_C)
        d += _back_to_row(y, linear, 4, C, BLOCK_C) + _back_to_row(z, linear, 5, C, BLOCK_C)
    hat, rstd = normalise(tl.load(before + at, mask=keep, other=0.0), C, keep)
    own = partials + tl.program_id(0).to(tl.int64) * (2 * C)
    tl.store(own + columns, tl.sum(d * hat, 0), mask=columns < C)
    tl.store(own + C + columns, tl.sum(d, 0), mask=columns < C)
    scale = tl.load(norm.weight + columns, mask=columns < C, other=0.0)
    gradient = normalise_gradient(d * scale[None, :], hat, rstd, C)
    if dropout is not None:
        gradient *= tl.load(dropout + at, mask=keep, other=0.0)
    tl.store(d_before + at, gradient, mask=keep)
