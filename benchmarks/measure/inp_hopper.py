"""Trial form in Gluon: both input gradients of a triangle's output in one launch, weights resident."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scalefold.kernels.hopper import rows as hopper
from scalefold.kernels.hopper.gradients.norm import sum_columns, sum_tile
from scalefold.kernels.hopper.pieces import CONSUMERS, group_barrier, publish, tiles_for
from scalefold.kernels.hopper.row_pieces import (
    ROWS,
    fetch,
    free_slot,
    leave,
    new_ring,
    one_arrival,
    per_column,
    product_layout,
    read,
    receive,
    standardised,
    wait_until_sent,
)
from scalefold.kernels.rows import Norm, memory_order


@gluon.jit
def _fetch(loaded, rings, weight_slot, there, second, tiles):
    x, z, d, through, weight_x, weight_z = loaded
    ring, d_ring, t_ring = rings
    C: gl.constexpr = weight_x.block_type.shape[0]
    mbarrier.expect(there, weight_x.block_type.nbytes)
    if second == 0:
        tma.async_copy_global_to_shared(weight_x, [0, 0], there, weight_slot)
    else:
        tma.async_copy_global_to_shared(weight_z, [0, 0], there, weight_slot)
    n = 0
    step = gl.num_programs(0) // 2
    for first in range(gl.program_id(0) // 2, tiles, CONSUMERS * step):
        for side in gl.static_range(CONSUMERS):
            tile = first + side * step
            if tile < tiles:
                fetch(d_ring, d, tile * ROWS, second * C, side, n)
                if second == 0:
                    slot = free_slot(ring, x.block_type.nbytes, side, n)
                    own = ring.slots.index(slot)._reinterpret(gl.bfloat16, x.block_type.shape, x.layout)
                    tma.async_copy_global_to_shared(x, [0, tile * ROWS], ring.full.index(slot), own)
                else:
                    fetch(ring, z, tile * ROWS, 0, side, n)
                    fetch(t_ring, through, tile * ROWS, 0, side, n)
        n += 1


@gluon.jit
def _run(shared, SIDE: gl.constexpr, FIRST: gl.constexpr):
    x, outs, norms, partials, rings, spare, weight, there, tiles = shared
    ring, d_ring, t_ring = rings
    C: gl.constexpr = weight.shape[0]
    if FIRST:
        norm = norms[0]
        pointer = partials[0]
        normed_out = outs[1]
    else:
        norm = norms[1]
        pointer = partials[1]
        normed_out = outs[3]
    mbarrier.wait(there, 0)
    own = spare.index(SIDE)
    step = gl.num_programs(0) // 2
    n = 0
    for tile in range(gl.program_id(0) // 2 + SIDE * step, tiles, CONSUMERS * step):
        sums = pointer + tile.to(gl.int64) * (3 * C)
        d_tile = receive(d_ring, SIDE, n)
        acc = gl.zeros([ROWS, C], gl.float32, product_layout(C))
        acc = warpgroup_mma(d_tile, weight, acc, use_acc=False, is_async=True)
        if n > 0:
            wait_until_sent(0)
            leave(ring, SIDE, n - 1)
        slot = receive(ring, SIDE, n)
        if FIRST:
            place = slot._reinterpret(gl.bfloat16, x.block_type.shape, x.layout)
            value = read(place.permute((1, 0)))
        else:
            place = slot
            value = read(place)
        hat, rstd = standardised(value)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        sum_tile(d_tile, sums + 2 * C)
        leave(d_ring, SIDE, n)
        sum_columns(acc * hat, own, sums)
        sum_columns(acc, own, sums + C)
        weights = per_column(norm.weight, 0, C)
        group_barrier()
        own.store((hat * weights + per_column(norm.bias, 0, C)).to(gl.bfloat16))
        acc *= weights
        along = (gl.sum(acc * hat, 1) * (1.0 / C))[:, None]
        gradient = (acc - (gl.sum(acc, 1) * (1.0 / C))[:, None] - hat * along) * rstd[:, None]
        if not FIRST:
            gradient += read(receive(t_ring, SIDE, n))
            leave(t_ring, SIDE, n)
        if FIRST:
            place.permute((1, 0)).store(gradient.to(gl.bfloat16))
        else:
            place.store(gradient.to(gl.bfloat16))
        fence_async_shared()
        group_barrier()
        if FIRST:
            tma.async_copy_shared_to_global(outs[0], [0, tile * ROWS], place)
        else:
            tma.async_copy_shared_to_global(outs[2], [tile * ROWS, 0], place)
        tma.async_copy_shared_to_global(normed_out, [tile * ROWS, 0], own)
        n += 1
    tma.store_wait(0)


@gluon.jit
def _differentiate(shared, second, SIDE: gl.constexpr):
    if second == 0:
        _run(shared, SIDE, True)
    else:
        _run(shared, SIDE, False)


@gluon.jit(do_not_specialize=["tiles"])
def hopper_both_kernel(x, z, d, through, weight_x, weight_z, dx, normed_x, dz, normed_z, norms, partials, tiles):
    ring, d_ring, t_ring = new_ring(z, 2), new_ring(d, 2), new_ring(through, 1)
    spare = tiles_for(z, CONSUMERS)
    weight = tiles_for(weight_x, 1).index(0)
    there = one_arrival(1).index(0)
    publish()
    second = gl.program_id(0) % 2
    rings = (ring, d_ring, t_ring)
    shared = (x, (dx, normed_x, dz, normed_z), norms, partials, rings, spare, weight, there, tiles)
    gl.warp_specialize(
        [
            (_differentiate, (shared, second, 0)),
            (_differentiate, (shared, second, 1)),
            (_fetch, ((x, z, d, through, weight_x, weight_z), rings, weight, there, second, tiles)),
        ],
        [4, 4],
        [240, 24],
    )


def hopper_both(x, z, norm_x, norm_z, weight_x, weight_z, projected, d_out):
    order, c, count = memory_order(z), z.shape[-1], z.shape[:-1].numel()
    dx, dz = torch.empty_like(x), torch.empty_like(z)
    normed_x, normed_z = torch.empty_like(z), torch.empty_like(z)
    partials = torch.empty(2, count // 64, 3 * c, dtype=torch.float32, device=z.device)
    hopper_both_kernel[hopper.programs(z, 1, 2)](
        hopper.matrix(hopper._by_channels(x, order), c, 64), hopper.row_tiles(z, order),
        hopper.matrix(hopper.by_rows(projected, order), 64, c), hopper.row_tiles(d_out, order),
        hopper.weight_tiles(weight_x), hopper.weight_tiles(weight_z),
        hopper.matrix(hopper._by_channels(dx, order), c, 64), hopper.row_tiles(normed_x, order),
        hopper.row_tiles(dz, order), hopper.row_tiles(normed_z, order), (Norm(*norm_x), Norm(*norm_z)),
        (partials[0], partials[1]), count // 64, num_warps=4,
    )  # fmt: skip
    return (dx, normed_x, partials[0]), (dz, normed_z, partials[1])
