"""The embedders: features and linear layers as one program each way, for whatever is added up in one representation.

All layers that add to a representation are one product of their features side by side with their weights side by side,
biases being weights of ones: features exist in registers only, and the representation is written once. So are all
gradients of these weights one product; that of its features is taken in ranges of rows, which are added up in fixed
order. A layer norm of the previous pass is added where its rows are, and has a launch of its own for its gradients.
Nothing but parameters has a gradient.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalefold.kernels import tuning
from scalefold.kernels.around import aside
from scalefold.kernels.around.features import (
    Edges,
    Extra,
    Letters,
    Pairs,
    TemplatePairs,
    extra_features,
    letter_features,
    note_pairs,
    note_templates,
    pair_features,
    template_features,
)
from scalefold.kernels.instructions import program, to_fp32, wait_for_predecessors
from scalefold.kernels.rows import dot, normalise, sum_all

WIDEST, WIDEST_FEATURES = 256, 255  # channels; features with biases, whose places are noted in 8 bits
WIDEST_BLOCK = 64  # of channels in a backward: of wider ones a multiprocessor's registers hold one program
NUM_PROGRAMS, NUM_NARROW = 264, 528  # of a backward: two per multiprocessor of an H200, or four where little is held

Linears = Sequence[tuple[Tensor, Tensor]]  # weight [C, width] and bias [C] each


class Previous(NamedTuple):
    """What a layer norm adds to the rows of every ``period``-th outer number."""

    x: Tensor  # [outer numbers with a norm, inner numbers, C]
    weight: Tensor
    bias: Tensor
    period: int


class Task(NamedTuple):
    """What a launch works off."""

    features: Any  # a program of ``around.features``
    given: Any  # what that reads
    shape: tuple[int, ...]  # of the representation without channels: outer numbers, then inner ones


@triton.jit
def _normed(x, outer, inner, width, exists, c, C: tl.constexpr):
    """Normalised rows of what the previous pass found, those of its outer number: [rows, *] fp32."""
    keep = exists[:, None] & (c < C)[None, :]
    hat, _ = normalise(to_fp32(tl.load(x + _places(outer, inner, width, c, C), mask=keep, other=0.0)), C, keep)
    return hat


@triton.jit
def _tile(number, tiles, width, BLOCK_M: tl.constexpr):
    """Outer and inner numbers of a tile of rows, and which exist. tiles: of one outer number; width: inner numbers."""
    inner = number % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return number // tiles, inner, inner < width


@triton.jit
def _places(outer, inner, width, c, C: tl.constexpr):
    """Elements of a tile of the representation."""
    return (outer.to(tl.int64) * width + inner)[:, None] * C + c[None, :]


@program
@triton.jit
def _forward_kernel(
    given, weights, previous, out, tiles, width,
    FEATURES: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tile of rows: features times weights [C, K], plus the layer norm of what the previous pass found."""
    wait_for_predecessors()
    outer, inner, exists = _tile(tl.program_id(0), tiles, width, BLOCK_M)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, K)
    features = FEATURES(given, outer, inner, exists, k).to(weights.dtype.element_ty)
    weight = tl.load(weights + c[:, None] * K + k[None, :], mask=(c < C)[:, None], other=0.0)
    acc = dot(features, tl.trans(weight), tl.zeros([BLOCK_M, BLOCK_C], tl.float32))
    if previous is not None:  # noqa: SIM102  (known when it is compiled, unlike the number)
        if outer % previous.period == 0:
            scale = tl.load(previous.weight + c, mask=c < C, other=0.0).to(tl.float32)
            shift = tl.load(previous.bias + c, mask=c < C, other=0.0).to(tl.float32)
            hat = _normed(previous.x, outer // previous.period, inner, width, exists, c, C)
            acc += hat * scale[None, :] + shift[None, :]
    keep = exists[:, None] & (c < C)[None, :]
    tl.store(out + _places(outer, inner, width, c, C), acc.to(out.dtype.element_ty), mask=keep)


@program
@triton.jit
def _norm_kernel(
    previous, d, partials, num_tiles, per_program, tiles, width,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Range of tiles of rows with a norm -> partials[range, 2 C]: gradients of its weight and bias."""
    wait_for_predecessors()
    first = tl.program_id(0) * per_program
    c = tl.arange(0, BLOCK_C)
    scale = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    shift = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for number in range(first, tl.minimum(first + per_program, num_tiles)):
        outer, inner, exists = _tile(number, tiles, width, BLOCK_M)
        keep = exists[:, None] & (c < C)[None, :]
        places = _places(outer * previous.period, inner, width, c, C)
        tile = to_fp32(tl.load(d + places, mask=keep, other=0.0))
        scale += tile * _normed(previous.x, outer, inner, width, exists, c, C)
        shift += tile
    partials += tl.program_id(0).to(tl.int64) * (2 * C) + c
    tl.store(partials, tl.sum(scale, 0), mask=c < C)
    tl.store(partials + C, tl.sum(shift, 0), mask=c < C)


@program
@triton.jit
def _backward_kernel(
    given, d, partials, num_tiles, per_program, tiles, width, TOTAL: tl.constexpr,
    FEATURES: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (range of tiles, block of channels) -> partials[range, TOTAL]: gradients of the weights, each dense.

    FIRST: columns at which weights begin, and where the last one ends.
    """
    wait_for_predecessors()
    first = tl.program_id(0) * per_program
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, K)
    acc = tl.zeros([BLOCK_N, K], tl.float32)
    for number in range(first, tl.minimum(first + per_program, num_tiles)):
        outer, inner, exists = _tile(number, tiles, width, BLOCK_M)
        keep = exists[:, None] & (n < C)[None, :]
        tile = tl.load(d + _places(outer, inner, width, n, C), mask=keep, other=0.0)
        acc = dot(tl.trans(tile), FEATURES(given, outer, inner, exists, k).to(tile.dtype), acc)
    place = tl.zeros([K], tl.int32)
    length = tl.zeros([K], tl.int32)
    for i in tl.static_range(len(FIRST) - 1):
        own = (k >= FIRST[i]) & (k < FIRST[i + 1])
        place = tl.where(own, C * FIRST[i] + k - FIRST[i], place)
        length = tl.where(own, FIRST[i + 1] - FIRST[i], length)
    places = place[None, :] + n[:, None] * length[None, :]
    partials += tl.program_id(0).to(tl.int64) * TOTAL
    tl.store(partials + places, acc, mask=(n < C)[:, None] & (k < FIRST[len(FIRST) - 1])[None, :])


@functools.cache
def _padding(c: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(c, width, dtype=dtype, device=device)


def _columns(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Weights as they are, biases as weights of one column."""
    return [parameter if parameter.dim() == 2 else parameter[:, None] for parameter in parameters]


def _sizes(parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Columns at which parameters begin, padded widths of features and representation, and tiles for these."""
    widths, c = [column.shape[1] for column in _columns(parameters)], parameters[0].shape[0]
    first = tuple(sum(widths[:n]) for n in range(len(widths) + 1))
    block = max(16, tuning.power_of_two(c))
    return {"FIRST": first, "K": max(16, tuning.power_of_two(first[-1])), "C": c, "BLOCK_C": block}


def _rows_of_tile(x: Tensor, sizes: dict[str, Any]) -> int:
    return 32 if x.dtype == torch.float32 else 64 if sizes["BLOCK_C"] > 64 else 128


def _run_forward(task: Task, previous: Previous | None, parameters: Sequence[Tensor]) -> Tensor:
    sizes, first, width = _sizes(parameters), parameters[0], task.shape[-1]
    padding = _padding(sizes["C"], sizes["K"] - sizes.pop("FIRST")[-1], first.dtype, first.device)
    weights = torch.cat([*_columns(parameters), padding], dim=1)
    out, rows = first.new_empty(*task.shape, sizes["C"]), _rows_of_tile(first, sizes)
    tiles = tuning.ceil_div(width, rows)
    _forward_kernel[(out.shape[:-2].numel() * tiles,)](
        task.given, weights, previous, out, tiles, width, FEATURES=task.features, BLOCK_M=rows,
        num_warps=max(8, sizes["BLOCK_C"] // 16), **sizes,
    )  # fmt: skip
    return out


def _ranges(num_tiles: int, num_programs: int) -> tuple[int, int]:
    """Tiles per program, and the number of programs."""
    per_program = tuning.ceil_div(num_tiles, num_programs)
    return per_program, tuning.ceil_div(num_tiles, per_program)


def _weight_partials(task: Task, parameters: Sequence[Tensor], d: Tensor) -> Tensor:
    """Partial gradients of all parameters side by side: fp32 [programs, total]."""
    sizes, width = _sizes(parameters), task.shape[-1]
    rows, c, block = _rows_of_tile(d, sizes), sizes["C"], min(sizes.pop("BLOCK_C"), WIDEST_BLOCK)
    tiles, blocks = tuning.ceil_div(width, rows), tuning.ceil_div(c, block)
    num_tiles = d.shape[:-2].numel() * tiles
    per_program, ranges = _ranges(num_tiles, (NUM_NARROW if sizes["K"] <= 32 else NUM_PROGRAMS) // blocks)
    total = sum(parameter.numel() for parameter in parameters)
    partials = torch.empty(ranges, total, dtype=torch.float32, device=d.device)
    _backward_kernel[(ranges, blocks)](
        task.given, d, partials, num_tiles, per_program, tiles, width, TOTAL=total, FEATURES=task.features,
        BLOCK_M=rows, BLOCK_N=block, num_warps=8, num_stages=2, **sizes,
    )  # fmt: skip
    return partials


def _norm_partials(previous: Previous, d: Tensor) -> Tensor:
    """Partial gradients of the norm's weight and bias: fp32 [programs, 2 C]."""
    width, c = d.shape[-2:]
    block = max(16, tuning.power_of_two(c))
    rows = max(1, 4096 // block)
    tiles = tuning.ceil_div(width, rows)
    num_tiles = d.shape[:-2].numel() // previous.period * tiles
    per_program, ranges = _ranges(num_tiles, NUM_NARROW)
    partials = torch.empty(ranges, 2 * c, dtype=torch.float32, device=d.device)
    _norm_kernel[(ranges,)](
        previous, d, partials, num_tiles, per_program, tiles, width, C=c, BLOCK_C=block, BLOCK_M=rows, num_warps=8
    )
    return partials


def _run_backward(task: Task, previous: Previous | None, parameters: Sequence[Tensor], d: Tensor) -> list[Tensor]:
    """Gradients of the parameters, then of the norm's."""
    partials, lengths = [_weight_partials(task, parameters, d)], [parameter.numel() for parameter in parameters]
    if previous is not None:
        partials.append(_norm_partials(previous, d))
    found = sum_all(partials, d.dtype)
    return [*found[0].split(lengths), *(gradient for sums in found[1:] for gradient in sums.chunk(2))]


class _Embedding(torch.autograd.Function):
    """Arguments: what to do, what the previous pass found, then parameters of all layers, then of the norm if any."""

    @staticmethod
    def forward(ctx: Any, task: Task, previous: Previous | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        ctx.task, ctx.previous = task, previous
        return _run_forward(task, previous, parameters[:-2] if previous else parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        parameters, previous = ctx.saved_tensors, ctx.previous
        d = d.contiguous()

        def gradients() -> list[Tensor]:
            found = _run_backward(ctx.task, previous, parameters[:-2] if previous else parameters, d)
            return [gradient.view_as(parameter) for gradient, parameter in zip(found, parameters, strict=True)]

        read = [x for x in (*ctx.task.given, *(previous or ())) if isinstance(x, Tensor)]
        return None, None, *aside.gradients(parameters, [d, *read], gradients)


def _embed(task: Task, linears: Linears, previous: Previous | None = None) -> Tensor:
    parameters = [*(weight for weight, _ in linears), *(bias for _, bias in linears)]
    norm = [previous.weight, previous.bias] if previous else []
    return _Embedding.apply(task, previous, *parameters, *norm)  # type: ignore[return-value]


def obstacle(*inputs: Any, linears: Linears, norm: object = None) -> str | None:
    """Why the operations of this file do not take these arguments, or None."""
    width, c = sum(weight.shape[1] + 1 for weight, _ in linears), linears[0][0].shape[0]
    if c > WIDEST or width > WIDEST_FEATURES:
        return f"{width} features of {c} channels are more than {WIDEST_FEATURES} of {WIDEST}"
    parts = [part for x in inputs for part in (x if isinstance(x, tuple) else (x,)) if isinstance(part, Tensor)]
    if any(part.requires_grad for part in parts):
        return "an input wants a gradient"
    return None if all(part.numel() for part in parts) else "an argument is empty"


def embed_pairs(
    target: Tensor,
    residue_index: Tensor,
    aatype: Tensor,
    previous: tuple[Tensor, Tensor],
    largest: int,
    edges: Edges,
    *,
    norm: tuple[Tensor, Tensor],
    linears: Linears,
) -> Tensor:
    """Pair representation of ``model.embedders``: [B, N, N, c_z].

    target: [B, N, 22]; residue_index, aatype: int64 [B, N]; previous: pair representation [B, N, N, c_z] and atoms
    [B, N, 37, 3] of the previous pass; norm: weight and bias of its layer norm; linears: of target i and j, of offsets
    up to ``largest``, of distances between ``edges``.
    """
    z, positions = previous
    ones = note_pairs(residue_index, aatype, positions, edges, largest)
    n, first_bias = target.shape[1], sum(weight.shape[1] for weight, _ in linears)
    task = Task(pair_features, Pairs(target.contiguous(), ones, n, first_bias), tuple(ones.shape))
    return _embed(task, linears, Previous(z.contiguous(), *norm, 1))


def embed_letters(
    letters: Tensor, target: Tensor, previous: Tensor, *, norm: tuple[Tensor, Tensor], linears: Linears
) -> Tensor:
    """MSA representation of ``model.embedders``: [B, S, N, c_m].

    letters: [B, S, N, 49]; target: [B, N, 22]; previous: first row of the previous pass [B, N, c_m]; norm: weight and
    bias of its layer norm; linears: of letters and of targets.
    """
    sequences, n = letters.shape[1:3]
    given = Letters(letters.contiguous(), target.contiguous(), n, sequences)
    task = Task(letter_features, given, tuple(letters.shape[:3]))
    return _embed(task, linears, Previous(previous.contiguous(), *norm, sequences))


def embed_extra(classes: Tensor, has_deletion: Tensor, deletion_value: Tensor, *, linears: Linears) -> Tensor:
    """``model.embedders.ExtraMSAEmbedder`` of its features: int64 and twice fp32 [B, S, N] -> [B, S, N, c_e]."""
    given = Extra(*(x.contiguous() for x in (classes, has_deletion, deletion_value)), classes.shape[-1])
    return _embed(Task(extra_features, given, tuple(classes.shape)), linears)


def embed_template_pairs(
    aatype: Tensor, pseudo_beta: Tensor, beta_mask: Tensor, atom_mask: Tensor, edges: Edges, *, linears: Linears
) -> Tensor:
    """``model.templates.TemplatePairEmbedder`` of its features.

    aatype: int64 [B, T, N]; pseudo_beta: [B, T, N, 3]; beta_mask: [B, T, N]; atom_mask: [B, T, N, 37] ->
    [B, T, N, N, c_t].
    """
    ones = note_templates(aatype, pseudo_beta, beta_mask, atom_mask, edges)
    return _embed(Task(template_features, TemplatePairs(ones, ones.shape[-1]), tuple(ones.shape)), linears)


def compile_cases() -> list[tuple[str, Callable[[], None]]]:
    """A benchmark crop; see ``tuning``."""

    def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def leaves(c: int, *widths: int) -> list[tuple[Tensor, Tensor]]:
        return [(leaf(c, width), leaf(c)) for width in widths]

    def leaf(*shape: int) -> Tensor:
        return data(*shape, dtype=torch.bfloat16).requires_grad_()

    def run(out: Tensor) -> None:
        out.backward(torch.empty_like(out))

    n, whole, low = 256, torch.int64, torch.bfloat16
    target, index, extra, pairs = data(1, n, 22), data(1, n, dtype=whole), (1, 1024, n), (1, 4, n)
    found, first = (data(1, n, n, 128, dtype=low), data(1, n, 37, 3)), data(1, n, 256, dtype=low)
    of_pairs = {"norm": (leaf(128), leaf(128)), "linears": leaves(128, 22, 22, 65, 15)}
    of_letters = {"norm": (leaf(256), leaf(256)), "linears": leaves(256, 49, 22)}
    template = (data(*pairs, dtype=whole), data(*pairs, 3), data(*pairs), data(*pairs, 37), (3.25, 50.75, 39, 1e5))
    calls: dict[str, Callable[[], Tensor]] = {
        "embed_pairs": lambda: embed_pairs(target, index, index, found, 32, (3.25, 20.75, 15, 1e8), **of_pairs),
        "embed_letters": lambda: embed_letters(data(1, 124, n, 49), target, first, **of_letters),
        "embed_extra": lambda: embed_extra(
            data(*extra, dtype=whole), data(*extra), data(*extra), linears=leaves(64, 25)
        ),
        "embed_template_pairs": lambda: embed_template_pairs(*template, linears=leaves(64, 88)),
    }
    return [(name, lambda call=call: run(call())) for name, call in calls.items()]
