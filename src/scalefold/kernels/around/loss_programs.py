"""Triton programs of all loss terms but FAPE: ranges of programs, packed into one launch, work off one term each.

Arguments in groups are those of ``losses``; all is fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from scalefold.kernels.instructions import program, wait_for_predecessors

CHI, TORSIONS = tl.constexpr(3), tl.constexpr(7)  # first of the torsions that belong to side chains; all of them


@triton.jit
def _logits(pointer, rows, exists, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of a tile of rows [rows, BLOCK], -inf where there is no class; largest and sum of exponentials [rows]."""
    c = tl.arange(0, BLOCK)
    x = tl.load(
        pointer + rows[:, None] * CLASSES + c[None, :], mask=exists[:, None] & (c < CLASSES)[None, :], other=0.0
    )
    x = tl.where((c < CLASSES)[None, :], x, float("-inf"))
    top = tl.max(x, 1)
    return x, top, tl.sum(tl.exp(x - top[:, None]), 1)


@triton.jit
def _cross_entropy(pointer, rows, exists, truth, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Cross entropy [rows]; NaN for an impossible class."""
    x, top, total = _logits(pointer, rows, exists, CLASSES, BLOCK)
    picked = tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == truth[:, None], x, 0.0), 1)
    return tl.where((truth >= 0) & (truth < CLASSES), tl.log(total) + top - picked, float("nan"))


@triton.jit
def _store_gradient(pointer, out, rows, exists, truth, scale, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of ``_cross_entropy`` times ``scale`` [rows]: zero where that is zero."""
    x, top, total = _logits(pointer, rows, exists, CLASSES, BLOCK)
    c = tl.arange(0, BLOCK)
    d = tl.exp(x - top[:, None]) / total[:, None] - tl.where(c[None, :] == truth[:, None], 1.0, 0.0)
    d = tl.where(scale[:, None] != 0.0, d * scale[:, None], 0.0)
    tl.store(out + rows[:, None] * CLASSES + c[None, :], d, mask=exists[:, None] & (c < CLASSES)[None, :])


@triton.jit
def _vector(pointer, index, exists):
    """Three neighbouring numbers at each index."""
    x = tl.load(pointer + 3 * index, mask=exists, other=0.0)
    y = tl.load(pointer + 3 * index + 1, mask=exists, other=0.0)
    return x, y, tl.load(pointer + 3 * index + 2, mask=exists, other=0.0)


@triton.jit
def _squared(a, b):
    """Squared distance of points."""
    x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return x * x + y * y + z * z


@triton.jit
def _pair_bins(pairs, edges, rows, exists, n, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Bins of a tile of pairs, and how much each counts: [rows] both."""
    i, j = rows // n, rows % n
    distance = _squared(_vector(pairs.positions, i, exists), _vector(pairs.positions, j, exists))
    c = tl.arange(0, BLOCK)
    bounds = tl.load(edges + c, mask=c < CLASSES - 1, other=float("inf"))
    bins = tl.sum((distance[:, None] > bounds[None, :]).to(tl.int32), 1)
    mask = tl.load(pairs.mask + i, mask=exists, other=0.0) * tl.load(pairs.mask + j, mask=exists, other=0.0)
    return bins, mask


@triton.jit
def _lddt(confidence, rows, exists, n, constants, ROWS: tl.constexpr):
    """lDDT-Cα of a tile of residues [rows]."""
    predicted, truth = _vector(confidence.predicted, rows, exists), _vector(confidence.truth, rows, exists)
    px, py, pz = predicted[0][:, None], predicted[1][:, None], predicted[2][:, None]
    tx, ty, tz = truth[0][:, None], truth[1][:, None], truth[2][:, None]
    own = tl.load(confidence.mask + rows, mask=exists, other=0.0)[:, None]
    score = tl.zeros([ROWS, ROWS], tl.float32)
    counted = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, n, ROWS):
        j = start + tl.arange(0, ROWS)
        x, y, z = _vector(confidence.predicted, j, j < n)
        found = tl.sqrt(_squared((px, py, pz), (x[None, :], y[None, :], z[None, :])) + constants.lddt_eps)
        x, y, z = _vector(confidence.truth, j, j < n)
        true = tl.sqrt(_squared((tx, ty, tz), (x[None, :], y[None, :], z[None, :])) + constants.lddt_eps)
        other = tl.load(confidence.mask + j, mask=j < n, other=0.0)[None, :]
        counts = tl.where((true < constants.cutoff_angstrom) & (rows[:, None] != j[None, :]), own * other, 0.0)
        error, hits = tl.abs(true - found), tl.zeros([ROWS, ROWS], tl.float32)
        for k in tl.static_range(4):
            hits += tl.where(error < constants.thresholds[k], 0.25, 0.0)
        score += hits * counts
        counted += counts
    return (1.0 / (constants.lddt_eps + tl.sum(counted, 1))) * (constants.lddt_eps + tl.sum(score, 1))


@triton.jit
def _torsion_error(torsions, index, exists, n):
    """Of torsions in the order [I, N, 7]: error, its gradient by sin and cos, and how much it counts."""
    t, residue = index % TORSIONS, (index // TORSIONS) % n
    is_chi = exists & (t >= CHI)
    k = residue * (TORSIONS - CHI) + t - CHI
    sin = tl.load(torsions.angles + 2 * index, mask=is_chi, other=0.0)
    cos = tl.load(torsions.angles + 2 * index + 1, mask=is_chi, other=0.0)
    true_sin = tl.load(torsions.truth + 2 * k, mask=is_chi, other=0.0)
    true_cos = tl.load(torsions.truth + 2 * k + 1, mask=is_chi, other=0.0)
    kind = tl.load(torsions.aatype + residue, mask=exists, other=0)
    asp_phe_tyr, glu = (kind == 3) | (kind == 13) | (kind == 18), kind == 6
    shift = tl.where((asp_phe_tyr & (t == CHI + 1)) | (glu & (t == CHI + 2)), -1.0, 1.0)
    du, dv = sin - true_sin, cos - true_cos
    du_, dv_ = sin - true_sin * shift, cos - true_cos * shift
    plain, turned = du * du + dv * dv, du_ * du_ + dv_ * dv_
    share = tl.where(plain < turned, 1.0, tl.where(plain > turned, 0.0, 0.5))  # of the first in the gradient
    mask = tl.load(torsions.chi_mask + k, mask=is_chi, other=0.0)
    least = tl.where(plain != plain, plain, tl.minimum(plain, turned))
    return least, 2.0 * (share * du + (1.0 - share) * du_), 2.0 * (share * dv + (1.0 - share) * dv_), mask


@triton.jit
def _length(torsions, index, exists, n, eps):
    """Of torsions in the order [I, N, 7]: sin and cos before normalisation, their length, how much it counts."""
    sin = tl.load(torsions.unnormalised + 2 * index, mask=exists, other=0.0)
    cos = tl.load(torsions.unnormalised + 2 * index + 1, mask=exists, other=0.0)
    mask = tl.load(torsions.seq_mask + (index // TORSIONS) % n, mask=exists, other=0.0)
    return sin, cos, tl.sqrt(sin * sin + cos * cos + eps), mask


@triton.jit
def _masked_sums(values, mask, exists):
    """Sums of mask * values and of mask."""
    return tl.sum(tl.where(exists, mask * values, 0.0), 0), tl.sum(tl.where(exists, mask, 0.0), 0)


@triton.jit
def _presence_error(presence, index, exists):
    """Logits, truth and how much it counts, of single atoms."""
    x = tl.load(presence.logits + index, mask=exists, other=0.0)
    seen = tl.load(presence.seen + index, mask=exists, other=0.0)
    return x, seen, tl.load(presence.exists + index, mask=exists, other=0.0)


@program
@triton.jit
def sums_kernel(
    torsions, pairs, sequences, confidence, presence, constants, edges, bins, sums, n, num_torsions,
    num_letters, num_atoms,
    FIRST: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Program: a part of one term -> sums[program]: masked sum, sum of masks; of torsions also those of the lengths.

    FIRST: first program of the confidence, torsions, presence, sequences, pairs, and their number. CLASSES and BLOCKS:
    of confidence, sequences, pairs.
    """
    wait_for_predecessors()
    program = tl.program_id(0)
    own = sums + 4 * program
    if program < FIRST[1]:
        rows = program * ROWS + tl.arange(0, ROWS)
        lddt = _lddt(confidence, rows, rows < n, n, constants, ROWS)
        truth = tl.minimum(tl.floor(lddt * CLASSES[0]).to(tl.int32), CLASSES[0] - 1)
        tl.store(bins + rows, truth, mask=rows < n)
        errors = _cross_entropy(confidence.logits, rows, rows < n, truth, CLASSES[0], BLOCKS[0])
        mask = tl.load(confidence.mask + rows, mask=rows < n, other=0.0)
        total, count = _masked_sums(errors, mask, rows < n)
        tl.store(own, total)
        tl.store(own + 1, count)
    if (program >= FIRST[1]) & (program < FIRST[2]):
        index = (program - FIRST[1]) * ELEMENTS + tl.arange(0, ELEMENTS)
        errors, _, _, mask = _torsion_error(torsions, index, index < num_torsions, n)
        total, count = _masked_sums(errors, mask, index < num_torsions)
        tl.store(own, total)
        tl.store(own + 1, count)
        _, _, length, mask = _length(torsions, index, index < num_torsions, n, constants.norm_eps)
        total, count = _masked_sums(tl.abs(length - 1.0), mask, index < num_torsions)
        tl.store(own + 2, total)
        tl.store(own + 3, count)
    if (program >= FIRST[2]) & (program < FIRST[3]):
        index = (program - FIRST[2]) * ELEMENTS + tl.arange(0, ELEMENTS)
        x, seen, mask = _presence_error(presence, index, index < num_atoms)
        log_sigmoid = tl.where(x != x, x, tl.minimum(x, 0.0)) - tl.log(1.0 + tl.exp(-tl.abs(x)))
        total, count = _masked_sums((1.0 - seen) * x - log_sigmoid, mask, index < num_atoms)
        tl.store(own, total)
        tl.store(own + 1, count)
    if (program >= FIRST[3]) & (program < FIRST[4]):
        rows = (program - FIRST[3]) * ROWS + tl.arange(0, ROWS)
        truth = tl.load(sequences.truth + rows, mask=rows < num_letters, other=0)
        errors = _cross_entropy(sequences.logits, rows, rows < num_letters, truth, CLASSES[1], BLOCKS[1])
        mask = tl.load(sequences.mask + rows, mask=rows < num_letters, other=0.0)
        total, count = _masked_sums(errors, mask, rows < num_letters)
        tl.store(own, total)
        tl.store(own + 1, count)
    if program >= FIRST[4]:
        rows = (program - FIRST[4]) * ROWS + tl.arange(0, ROWS)
        exists = rows < n * n
        truth, mask = _pair_bins(pairs, edges, rows, exists, n, CLASSES[2], BLOCKS[2])
        errors = _cross_entropy(pairs.logits, rows, exists, truth, CLASSES[2], BLOCKS[2])
        total, count = _masked_sums(errors, mask, exists)
        tl.store(own, total)
        tl.store(own + 1, count)


@triton.jit
def _total(sums, start, stop, SUMMED: tl.constexpr):
    """Sum of every fourth number of programs start..stop, in fixed order."""
    total = tl.zeros([SUMMED], tl.float32)
    for first in range(start, stop, SUMMED):
        program = first + tl.arange(0, SUMMED)
        total += tl.load(sums + 4 * program, mask=program < stop, other=0.0)
    return tl.sum(total, 0)


@program
@triton.jit
def values_kernel(sums, resolution, constants, values, factors, FIRST: tl.constexpr, SUMMED: tl.constexpr):
    """The only program: values [torsions, pairs, sequences, confidence, presence], and what one unit of each masked sum
    adds to them: factors [torsions, lengths, pairs, sequences, confidence, presence]."""
    wait_for_predecessors()
    angstrom = tl.load(resolution)
    gate = tl.where((angstrom >= constants.first_angstrom) & (angstrom <= constants.last_angstrom), 1.0, 0.0)
    factor = constants.chi_weight / (constants.torsion_eps + _total(sums + 1, FIRST[1], FIRST[2], SUMMED))
    tl.store(factors, factor)
    torsions = factor * _total(sums, FIRST[1], FIRST[2], SUMMED)
    factor = constants.norm_weight / (constants.torsion_eps + _total(sums + 3, FIRST[1], FIRST[2], SUMMED))
    tl.store(factors + 1, factor)
    tl.store(values, torsions + factor * _total(sums + 2, FIRST[1], FIRST[2], SUMMED))
    factor = 1.0 / (constants.mean_eps + _total(sums + 1, FIRST[4], FIRST[5], SUMMED))
    tl.store(factors + 2, factor)
    tl.store(values + 1, factor * _total(sums, FIRST[4], FIRST[5], SUMMED))
    factor = 0.5 / (constants.mean_eps + 0.5 * _total(sums + 1, FIRST[3], FIRST[4], SUMMED))
    tl.store(factors + 3, factor)
    tl.store(values + 2, factor * _total(sums, FIRST[3], FIRST[4], SUMMED))
    factor = gate / (constants.mean_eps + _total(sums + 1, 0, FIRST[1], SUMMED))
    tl.store(factors + 4, factor)
    tl.store(values + 3, factor * _total(sums, 0, FIRST[1], SUMMED))
    factor = gate / (constants.mean_eps + _total(sums + 1, FIRST[2], FIRST[3], SUMMED))
    tl.store(factors + 5, factor)
    tl.store(values + 4, factor * _total(sums, FIRST[2], FIRST[3], SUMMED))


@program
@triton.jit
def gradients_kernel(
    torsions, pairs, sequences, confidence, presence, constants, edges, bins, d_values, factors, d_angles,
    d_unnormalised, d_pairs, d_sequences, d_confidence, d_presence, n, num_torsions, num_letters, num_atoms,
    FIRST: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The programs of ``sums_kernel``: gradients of all logits and angles; a term that gets none gives exact zeros."""
    wait_for_predecessors()
    program = tl.program_id(0)
    if program < FIRST[1]:
        rows = program * ROWS + tl.arange(0, ROWS)
        scale = tl.load(confidence.mask + rows, mask=rows < n, other=0.0)
        scale *= tl.load(d_values + 3) * tl.load(factors + 4)
        truth = tl.load(bins + rows, mask=rows < n, other=0)
        _store_gradient(confidence.logits, d_confidence, rows, rows < n, truth, scale, CLASSES[0], BLOCKS[0])
    if (program >= FIRST[1]) & (program < FIRST[2]):
        index = (program - FIRST[1]) * ELEMENTS + tl.arange(0, ELEMENTS)
        exists, d = index < num_torsions, tl.load(d_values)
        _, du, dv, mask = _torsion_error(torsions, index, exists, n)
        scale = mask * (d * tl.load(factors))
        tl.store(d_angles + 2 * index, tl.where(scale != 0.0, du * scale, 0.0), mask=exists)
        tl.store(d_angles + 2 * index + 1, tl.where(scale != 0.0, dv * scale, 0.0), mask=exists)
        sin, cos, length, mask = _length(torsions, index, exists, n, constants.norm_eps)
        scale = mask * (d * tl.load(factors + 1))
        slope = tl.where(length > 1.0, scale, tl.where(length < 1.0, -scale, 0.0 * length)) / length
        tl.store(d_unnormalised + 2 * index, tl.where(scale != 0.0, sin * slope, 0.0), mask=exists)
        tl.store(d_unnormalised + 2 * index + 1, tl.where(scale != 0.0, cos * slope, 0.0), mask=exists)
    if (program >= FIRST[2]) & (program < FIRST[3]):
        index = (program - FIRST[2]) * ELEMENTS + tl.arange(0, ELEMENTS)
        x, seen, mask = _presence_error(presence, index, index < num_atoms)
        scale = mask * (tl.load(d_values + 4) * tl.load(factors + 5))
        d = (1.0 / (1.0 + tl.exp(-x)) - seen) * scale
        tl.store(d_presence + index, tl.where(scale != 0.0, d, 0.0), mask=index < num_atoms)
    if (program >= FIRST[3]) & (program < FIRST[4]):
        rows = (program - FIRST[3]) * ROWS + tl.arange(0, ROWS)
        exists = rows < num_letters
        truth = tl.load(sequences.truth + rows, mask=exists, other=0)
        scale = tl.load(sequences.mask + rows, mask=exists, other=0.0)
        scale *= tl.load(d_values + 2) * tl.load(factors + 3)
        _store_gradient(sequences.logits, d_sequences, rows, exists, truth, scale, CLASSES[1], BLOCKS[1])
    if program >= FIRST[4]:
        rows = (program - FIRST[4]) * ROWS + tl.arange(0, ROWS)
        exists = rows < n * n
        truth, mask = _pair_bins(pairs, edges, rows, exists, n, CLASSES[2], BLOCKS[2])
        scale = mask * (tl.load(d_values + 1) * tl.load(factors + 2))
        _store_gradient(pairs.logits, d_pairs, rows, exists, truth, scale, CLASSES[2], BLOCKS[2])
