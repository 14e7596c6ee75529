"""All loss terms but FAPE (Supplement 1.9) in two launches forward and one backward; the mathematics is in fp32.

The terms have nothing in common but that each is a masked mean. Their programs are packed into one launch, each range
of programs working off one term; a second launch adds up the programs' sums in fixed order and divides. Distances,
bins, one-hot classes and probabilities stay in registers; the backward finds them again. Saved: the inputs, the bins of
the confidence head, and six factors.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around.features import squared_edges
from scalefold.kernels.around.loss_programs import gradients_kernel, sums_kernel, values_kernel

ROWS, ELEMENTS, SUMMED = 32, 512, 1024  # per program: rows of classes, single numbers; programs added up at once


class Torsions(NamedTuple):
    """Side-chain torsions and lengths of the angle vectors: sin and cos."""

    angles: Tensor  # [I, N, 7, 2]
    unnormalised: Tensor  # [I, N, 7, 2]
    truth: Tensor  # [N, 4, 2]
    chi_mask: Tensor  # [N, 4]
    seq_mask: Tensor  # [N]
    aatype: Tensor  # int64 [N]


class Pairs(NamedTuple):
    """Logits of binned distances."""

    logits: Tensor  # [N, N, C]
    positions: Tensor  # [N, 3], angstrom
    mask: Tensor  # [N]


class Sequences(NamedTuple):
    """Logits of masked letters of the alignment, their true classes and how much each counts."""

    logits: Tensor  # [S, N, C]
    truth: Tensor  # int64 [S, N]
    mask: Tensor  # [S, N]


class Confidence(NamedTuple):
    """Logits of binned lDDT-Cα."""

    logits: Tensor  # [N, C]
    predicted: Tensor  # [N, 3], angstrom
    truth: Tensor  # [N, 3]
    mask: Tensor  # [N]


class Presence(NamedTuple):
    """Logits of atoms that the experiment saw."""

    logits: Tensor  # [N, A]
    seen: Tensor  # [N, A]
    exists: Tensor  # [N, A]


class Constants(NamedTuple):
    """Numbers of the definitions, in ``model.loss`` and ``model.metrics``."""

    torsion_eps: float
    mean_eps: float
    norm_eps: float
    chi_weight: float
    norm_weight: float
    first_angstrom: float  # range of resolutions in which structures count
    last_angstrom: float
    cutoff_angstrom: float  # of lDDT
    thresholds: tuple[float, ...]
    lddt_eps: float
    first_edge_angstrom: float  # of binned distances
    last_edge_angstrom: float


class Groups(NamedTuple):
    """What the terms of one sample read."""

    torsions: Torsions
    pairs: Pairs
    sequences: Sequences
    confidence: Confidence
    presence: Presence


def _sizes(groups: Groups) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Numbers of residues, torsions, letters and atoms, and the constants of both packed launches."""
    torsions, pairs, sequences, confidence, presence = groups
    sizes = (pairs.mask.numel(), torsions.angles.numel() // 2, sequences.truth.numel(), presence.seen.numel())
    n, num_torsions, num_letters, num_atoms = sizes
    programs = [
        tuning.ceil_div(count, each)
        for count, each in (
            *((n, ROWS), (num_torsions, ELEMENTS), (num_atoms, ELEMENTS)),
            *((num_letters, ROWS), (n * n, ROWS)),
        )
    ]
    classes = tuple(logits.shape[-1] for logits in (confidence.logits, sequences.logits, pairs.logits))
    return sizes, {
        "FIRST": tuple(sum(programs[:k]) for k in range(len(programs) + 1)),
        "CLASSES": classes,
        "BLOCKS": tuple(max(16, tuning.power_of_two(count)) for count in classes),
        "ROWS": ROWS,
        "ELEMENTS": ELEMENTS,
        "num_warps": 4,
    }


def _grouped(tensors: Sequence[Tensor]) -> Groups:
    """Tensors one after the other, in the groups that they belong to."""
    given = iter(tensors)
    return Groups(*(kind(*(next(given) for _ in kind._fields)) for kind in Groups.__annotations__.values()))


class _SideLosses(torch.autograd.Function):
    """Arguments: constants, edges, resolution [1], then tensors of all groups; gradients for logits and angles."""

    @staticmethod
    def forward(ctx: Any, constants: Constants, edges: Tensor, resolution: Tensor, *tensors: Tensor) -> Tensor:
        groups = _grouped(tensors)
        sizes, options = _sizes(groups)
        first, fresh = options["FIRST"], groups.pairs.mask.new_empty
        bins, sums, values, factors = fresh(sizes[0], dtype=torch.int32), fresh(first[-1], 4), fresh(5), fresh(6)
        sums_kernel[(first[-1],)](*groups, constants, edges, bins, sums, *sizes, **options)
        values_kernel[(1,)](sums, resolution, constants, values, factors, FIRST=first, SUMMED=SUMMED, num_warps=8)
        ctx.save_for_backward(edges, bins, factors, *tensors)
        ctx.constants = constants
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        edges, bins, factors, *tensors = ctx.saved_tensors
        groups, found = _grouped(tensors), [None] * len(tensors)
        sizes, options = _sizes(groups)
        outputs = [groups.torsions.angles, groups.torsions.unnormalised, *(group.logits for group in groups[1:])]
        gradients = [torch.empty_like(output) for output in outputs]
        gradients_kernel[(options["FIRST"][-1],)](
            *groups, ctx.constants, edges, bins, d.contiguous(), factors, *gradients, *sizes, **options
        )
        places = [0, 1, *(sum(len(group) for group in groups[:k]) for k in range(1, len(groups)))]
        for place, gradient in zip(places, gradients, strict=True):
            found[place] = gradient
        return None, None, None, *found


def obstacle(groups: Sequence[Sequence[Tensor]], resolution: Tensor, constants: Sequence[Any]) -> str | None:
    """Why ``side_losses`` does not take these arguments, or None."""
    floats = [x for group in groups for x in group if x.is_floating_point()]
    if any(x.dtype != torch.float32 for x in (*floats, resolution)):
        return "not everything is float32"
    return None if all(x.numel() for group in groups for x in group) else "an argument is empty"


def side_losses(groups: Sequence[Sequence[Tensor]], resolution: Tensor, constants: Sequence[Any]) -> Tensor:
    """All loss terms but FAPE: two launches forward and one backward for each sample.

    The definitions are the functions of ``model.loss``. groups: those of ``Groups``, samples first;
    resolution: [B], angstrom; constants: ``Constants`` -> [5, B], one line per group. A term whose gradient is zero
    gives gradients of exactly zero, even where its own would be NaN.
    """
    numbers, tensors = Constants(*constants), [x.contiguous() for group in groups for x in group]
    first, last, logits = numbers.first_edge_angstrom, numbers.last_edge_angstrom, groups[1][0]
    edges = squared_edges((first, last, logits.shape[-1] - 1, math.inf), logits.device)

    def of_sample(*own: Tensor) -> Tensor:
        return _SideLosses.apply(numbers, edges, *own)  # type: ignore[return-value]

    if len(resolution) == 1:  # views: autograd would put together the gradients of what it takes apart
        return of_sample(resolution, *(x.squeeze(0) for x in tensors))[:, None]
    return torch.stack([of_sample(*sample) for sample in zip(resolution.split(1), *tensors, strict=True)], dim=1)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """A benchmark crop; see ``tuning``."""
    return [("side_losses", lambda: _meta_call(256, 8, 124, (64, 23, 50, 37)))]


def _meta_call(n: int, iterations: int, sequences: int, classes: tuple[int, int, int, int]) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device="meta", requires_grad=True)

    def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    angles, bins, letters, confidence, atoms = (iterations, n, 7, 2), *classes
    groups = (
        Torsions(leaf(*angles), leaf(*angles), data(n, 4, 2), data(n, 4), data(n), data(n, dtype=torch.int64)),
        Pairs(leaf(n, n, bins), data(n, 3), data(n)),
        Sequences(leaf(sequences, n, letters), data(sequences, n, dtype=torch.int64), data(sequences, n)),
        Confidence(leaf(n, confidence), data(n, 3), data(n, 3), data(n)),
        Presence(leaf(n, atoms), data(n, atoms), data(n, atoms)),
    )
    constants = Constants(1e-4, 1e-8, 1e-8, 0.5, 0.01, 0.1, 3.0, 15.0, (0.5, 1.0, 2.0, 4.0), 1e-8, 2.3, 21.7)
    side_losses(groups, data(), constants).sum().backward()
