"""Operands that the programs making them write to the memory of all ranks: there lies what an exchange would bring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DTYPES, TILE, Draw
from rank_tensors import group_of, memory
from scalefold.kernels import triton_ops, tuning
from scalefold.kernels.destination import Destination
from scalefold.kernels.ops import gated_output, linear, outer_product, triangle
from scalefold.parallel.dap.halves import ProductOfTwo
from scalefold.parallel.dap.points import BeginGather, ExchangeAhead, ExchangeOperands, GatherShared

pytestmark = [
    pytest.mark.skipif(
        not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="needs a GPU or Triton's interpreter"
    ),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("size", [2, 4]),
]
ROWS, COLUMNS, C = 3, 16, 16
FORWARD = ("norm_linear_forward", "gated_output_forward", "triangle_project_forward")


@pytest.fixture(params=[16, 32])
def tiles(request, monkeypatch) -> Iterator[None]:
    """Tiles of rows that cover the 48 of a rank, or go past them; columns are shared however few there are."""
    monkeypatch.setattr(tuning, "LEAST_SHARED_WEIGHT", 0)
    with ExitStack() as stack:
        for name in FORWARD:
            stack.enter_context(tuning.override(name, TILE | {"BLOCK_M": request.param}))
        yield


def groups(size: int) -> list[Any]:
    """What the points of each rank take for their group; all ranks are in this process."""
    ranks = group_of(size)
    for rank in ranks:
        rank.stages = [memory(1 << 20)]
    return [SimpleNamespace(direct=rank, size=size, rank=n) for n, rank in enumerate(ranks)]


def compare(
    groups: Sequence[Any],
    inputs: Sequence[Sequence[Tensor]],
    call: Callable[..., Sequence[Tensor]],
    ahead: Callable[[Any, Tensor], Sequence[Destination | None]],
    exchanged: Callable[[list[Tensor], int], Tensor],
) -> list[Tensor]:
    """Arrived at the first rank. ``call`` returns as many operands as ``ahead`` has destinations, behind other outputs.

    Each rank finds what ``exchanged`` makes of all ranks' operands; other outputs and gradients are as ever.
    """
    made, plain = [ahead(group, own[0]) for group, own in zip(groups, inputs, strict=True)], []
    for own, destinations in zip(inputs, made, strict=True):
        leaves = [x.requires_grad_() for x in own]
        outs = [call(*leaves, *given) for given in (destinations, [None] * len(destinations))]
        assert all(to is None or to.written for to in destinations)
        probes = [torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) for out in outs[1]]
        found, expected = (torch.autograd.grad(own_outs, leaves, probes) for own_outs in outs)
        assert all(map(torch.equal, found, expected))
        read = len(outs[0]) - len(destinations)
        assert all(map(torch.equal, outs[0][:read], outs[1][:read]))
        plain.append(outs[1][read:])
    for rank, (group, destinations) in enumerate(zip(groups, made, strict=True)):
        for n, to in enumerate(destinations):
            if to is not None:
                assert torch.equal(group.direct.arrived(to), exchanged([own[n] for own in plain], rank))
    return [groups[0].direct.arrived(to) for to in made[0] if to is not None]


@pytest.mark.parametrize("dropped", [False, True])
def test_each_rank_gets_its_columns_of_a_gated_output(tiles, size, dtype, dropped):
    draw, own = Draw(size), groups(size)
    weight, bias = draw.weight(C, C).to(dtype), draw(C).to(dtype)
    dropout = draw.dropout(1, 1, COLUMNS, C) if dropped else None

    def call(x, o, gate, destination):
        return [gated_output.gated_output(x, o.unflatten(-1, (2, C // 2)), gate, weight, bias, dropout, destination)]

    compare(
        own,
        [[draw(1, ROWS, COLUMNS, C).to(dtype) for _ in range(3)] for _ in own],
        call,
        lambda group, x: [ExchangeAhead(group, split_dim=2, concat_dim=1).destination(x, C)],
        lambda outs, rank: torch.cat([out.chunk(size, 2)[rank] for out in outs], 1),
    )


@pytest.mark.parametrize("widths", [(16, 16, 8), (8,)])
@pytest.mark.parametrize(("dim", "transposed"), [(1, False), (1, True), (2, False)])
def test_all_ranks_get_an_attention_bias_channels_first(tiles, size, dtype, widths, dim, transposed):
    draw, own = Draw(size), groups(size)
    norm = [x.to(dtype) for x in draw.norm(C)]
    weights = [draw.weight(width, C).to(dtype) for width in widths]

    def call(x, destination):
        x = x.transpose(1, 2) if transposed else x
        return linear.layer_norm_linear(x, *norm, weights, [None] * len(widths), destination)[1:]

    def point(group):
        return BeginGather(group, 2, {}, True) if dim == 2 else GatherShared(group, 1, True)

    shape = (1, COLUMNS, ROWS, C) if transposed else (1, ROWS, COLUMNS, C)
    (arrived,) = compare(
        own,
        [[draw(*shape).to(dtype)] for _ in own],
        call,
        lambda group, x: [point(group).destination(x.transpose(1, 2) if transposed else x, widths[-1])],
        lambda outs, rank: torch.cat(outs, dim),
    )
    assert arrived.permute(0, 3, 1, 2).is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_all_ranks_get_an_operand_of_the_outer_product(tiles, size, dtype, transposed):
    draw, own, width = Draw(size), groups(size), 16
    norm = [x.to(dtype) for x in draw.norm(C)]
    linears = [x.to(dtype) for _ in range(2) for x in (draw.weight(width, C), draw(width))]
    mask = draw.mask(1, ROWS, COLUMNS)

    def call(m, destination):
        m = m.transpose(1, 2) if transposed else m
        return outer_product.outer_product_project(m, mask, *norm, *linears, destination)[1:]

    shape = (1, COLUMNS, ROWS, C) if transposed else (1, ROWS, COLUMNS, C)
    compare(
        own,
        [[draw(*shape).to(dtype)] for _ in own],
        call,
        lambda group, m: [GatherShared(group, 2).destination(m.transpose(1, 2) if transposed else m, width)],
        lambda outs, rank: torch.cat(outs, 2),
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_rank_gets_its_channels_of_both_operands_of_a_triangle_or_all_of_one(tiles, size, dtype, parts):
    draw, own, width = Draw(size), groups(size), 32
    norm = [x.to(dtype) for x in draw.norm(C)]
    linears = [x.to(dtype) for _ in range(4) for x in (draw.weight(width, C), draw(width))]
    mask = draw.mask(1, ROWS, COLUMNS).to(dtype)

    def call(z, *destinations):
        return triangle.triangle_project(z, mask, *norm, *linears, destinations)[1:]

    inputs = [[draw(1, ROWS, COLUMNS, C).to(dtype)] for _ in own]
    with tuning.override("triangle_project_columns", TILE | {"PARTS": parts}):
        compare(
            own,
            inputs,
            call,
            lambda group, z: ExchangeOperands(group, split_dim=1, concat_dim=2).destinations(z, width),
            lambda outs, rank: torch.cat([out.chunk(size, 1)[rank] for out in outs], 2),
        )
        if size == 2:
            compare(
                own,
                inputs,
                call,
                lambda group, z: ProductOfTwo(group, outgoing=True).destinations(z, width),
                lambda outs, rank: torch.cat(outs, 2),
            )
