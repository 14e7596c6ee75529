"""A triangle's output in Gluon: how tiles are dealt out and where dropout's scales lie, without a GPU."""

import pytest
import torch

from hopper_programs import C, empty
from scalefold.kernels.hopper import rows, triangle_output
from scalefold.kernels.rows import Affine, Norm


class Launched:
    """In the place of a program: keeps its grid and its arguments."""

    def __getitem__(self, grid):
        self.grid = grid[0]
        return self

    def __call__(self, *arguments, **_):
        self.arguments = arguments


def output_launch(monkeypatch, i, j, dropout):
    """Programs, scales in shared memory, scales in memory, tiles and period of a triangle's output."""
    launched = Launched()
    monkeypatch.setattr(rows, "hopper_output", launched)
    z, x = empty(1, i, j, C), empty(1, C, i, j).permute(0, 2, 3, 1)
    norm, linear = Norm(empty(C), empty(C)), Affine(empty(C, C), empty(C))
    rows.output(z, x, dropout, None, z, norm, norm, linear, linear)
    scales, from_memory, tiles, period = (launched.arguments[n] for n in (5, 9, 11, 12))
    return launched.grid, scales, from_memory, tiles, period


def walked(program, programs, side, tiles, period):
    first, step, count = triangle_output.walk.fn(program, programs, side, tiles, period)
    first, step, count = (int(getattr(n, "value", n)) for n in (first, step, count))
    return [first + n * step for n in range(count)]


@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 132])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("j", [32, 64, 192, 256, 320, 704])
@pytest.mark.parametrize("i", [2, 4, 6, 10, 32, 64, 254, 256])
def test_each_tile_of_a_triangle_s_output_has_one_consumer(monkeypatch, i, j, dropped, multiprocessors):
    """Scales that stay in shared memory are those of all tiles of a program; no program is without a tile."""
    monkeypatch.setattr(rows, "multiprocessors", lambda device: multiprocessors)
    dropout = empty(1, 1, j, C, dtype=torch.float32) if dropped else None
    programs, scales, from_memory, tiles, period = output_launch(monkeypatch, i, j, dropout)
    assert (scales is not None, from_memory is not None) == (dropped and period * 64 == j, dropped and scales is None)
    assert (programs <= multiprocessors, tiles) == (True, i * j // 64)
    found = [[walked(program, programs, side, tiles, period) for side in (0, 1)] for program in range(programs)]
    assert sorted(tile for sides in found for own in sides for tile in own) == list(range(tiles))
    assert all(sides[0] for sides in found)
    assert all(tile % period == n % period for n, sides in enumerate(found) for own in sides for tile in own)


@pytest.mark.parametrize(
    ("shape", "wide"),
    [((1, 1, 256, C), 0), ((1, 16, 256, C), 0), ((1, 16, 1, C), 0), ((1, 1, 1, C), 0), ((1, 1, 256, C), C)],
)
def test_scales_stay_where_all_i_share_them_and_they_lie_densely(monkeypatch, shape, wide):
    whole = empty(*shape[:3], C + wide, dtype=torch.float32)
    *_, scales, from_memory, _, period = output_launch(monkeypatch, 16, 256, whole[..., :C])
    stays = shape == (1, 1, 256, C) and not wide
    assert (scales is not None, from_memory is None, period) == (stays, stays, 4 if stays else 1)
