"""Tiles in order and across of the Gluon programs of a gated attention: who lies how, and that each row has one.

Without a GPU; what the programs compute is tested in ``test_kernels_hopper_accuracy.py``.
"""

import pytest
import torch
import triton.language as tl

from hopper_programs import C, empty, every_program
from scalefold.kernels import tuning
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.hopper import gated_attention, row_pieces, rows
from scalefold.kernels.rows import Affine, Norm

TRITON = "the table prefers the Triton program"


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def turned(*shape, dtype=torch.bfloat16):
    """Of this shape, stored with dimensions 1 and 2 exchanged."""
    return empty(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)


def scales(*shape, dtype=torch.float32):
    return empty(*shape, dtype=dtype)


def gated_obstacle(x, dropout=None, o=None, weight=None, name="gated_output_hopper"):
    o, weight = torch.empty_like(x) if o is None else o, empty(x.shape[-1], x.shape[-1]) if weight is None else weight
    return gated_attention.gated_output_obstacle(x, o, torch.empty_like(x), weight, dropout, name)


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
def test_gated_outputs_of_training_have_no_obstacle_but_an_ending_node_s_share_of_eight(compiled, dap_size):
    share = 256 // dap_size
    pair, msa = scales(1, 1, 256, C), scales(1, 1, 256, 256)
    with every_program(1):
        assert gated_obstacle(empty(1, share, 256, C), pair) is None
        assert gated_obstacle(empty(1, 128 // dap_size, 256, 256), msa) is None
        assert gated_obstacle(turned(1, share, 128, 256)) is None, "columns of the MSA have no dropout"
        found = gated_obstacle(turned(1, share, 256, C), pair)
    assert found == (None if dap_size < 8 else "dropout scales are not the same along whole tiles")


@pytest.mark.parametrize(
    ("dap_size", "pair", "msa"), [(1, True, True), (2, True, True), (4, False, False), (8, False, False)]
)
def test_gated_outputs_take_gluon_where_it_was_found_faster(compiled, dap_size, pair, msa):
    x, m = empty(1, 256 // dap_size, 256, C), empty(1, 128 // dap_size, 256, 256)
    assert (gated_obstacle(x, scales(1, 1, 256, C)) is None) == pair
    assert (gated_obstacle(turned(*x.shape), scales(1, 1, 256, C)) is None) == pair
    assert gated_obstacle(x) == TRITON, "without dropout the Triton program of pairs is as fast"
    assert (gated_obstacle(m, scales(1, 1, 256, 256)) is None) == msa
    assert (gated_obstacle(turned(1, 256 // dap_size, 128, 256)) is None) == msa


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
def test_gradients_of_gated_outputs_take_gluon_in_every_share(compiled, dap_size):
    name, share = "gated_output_hopper_gradient", 256 // dap_size
    pair, msa = scales(1, 1, 256, C), scales(1, 1, 256, 256)
    assert gated_obstacle(empty(1, share, 256, C), pair, name=name) is None
    assert gated_obstacle(empty(1, 128 // dap_size, 256, 256), msa, name=name) is None
    assert gated_obstacle(turned(1, share, 128, 256), name=name) is None
    assert gated_obstacle(turned(1, share, 256, C), pair, name=name) is None


@pytest.mark.parametrize("length", [320, 704])
def test_gated_outputs_of_whole_chains_keep_the_triton_programs(compiled, length):
    found = [gated_obstacle(x) for x in (empty(1, length, length, C), empty(1, 128, length, 256))]
    assert found == [TRITON] * 2


@pytest.mark.parametrize(
    ("x", "dropout", "more", "reason"),
    [
        (empty(1, 16, 64, 64), None, {}, "the weight is not 128 x 128 or 256 x 256"),
        (empty(1, 16, 64, C), None, {"weight": empty(C, 64)}, "the weight is not"),
        (empty(1, 16, 64, C, dtype=torch.float32), None, {}, "float32 is not bfloat16"),
        (empty(1, 16, 64, C), None, {"o": turned(1, 16, 64, C)}, "o and gate do not lie densely"),
        (empty(1, 3, 21, C), None, {}, "rows do not come in tiles of 64"),
        (empty(1, 16, 128, C)[:, :, :64], None, {}, "rows do not lie densely"),
        (empty(1, 16, 64, C), scales(1, 1, 64, C, dtype=torch.bfloat16), {}, "dropout scales are not fp32"),
        (empty(1, 16, 64, C), scales(1, 1, 64, 2 * C)[..., ::2], {}, "dropout scales are not fp32, dense"),
        (empty(1, 124, 256, 256), scales(1, 1, 256, 256), {}, "not the same along whole tiles"),
        (empty(1, 32, 34, C), scales(1, 1, 34, C), {}, "not the same along whole tiles"),
        (empty(1, 1, 64, C), scales(1, 1, 64, C), {}, "not the same along whole tiles"),
        (turned(1, 32, 64, C), scales(1, 1, 64, C), {}, "not the same along whole tiles"),
        (empty(1, 16, 64, C), scales(1, 16, 64, C), {}, "not the same along whole tiles"),
        (empty(1, 16, 64, C), scales(1, 1, 1, C), {}, "not the same along whole tiles"),
    ],
)
def test_what_a_gated_output_cannot_take_is_named(compiled, x, dropout, more, reason):
    with every_program(1):
        assert reason in str(gated_obstacle(x, dropout, **more))


@pytest.mark.parametrize(
    ("x", "dropout", "by_row"),
    [
        (turned(1, 32, 256, C), (1, 1, 256, C), True),
        (turned(1, 64, 32, C), (1, 1, 32, C), False),
        (empty(1, 32, 64, C), (1, 1, 64, C), False),
        (empty(1, 32, 34, C), (1, 1, 34, C), True),
        (empty(1, 16, 64, C), (1, 16, 64, C), True),
        (empty(1, 32, 64, C), None, False),
    ],
    ids=str,
)
def test_gradients_read_scales_by_row_where_lines_are_shorter_than_a_tile(compiled, monkeypatch, x, dropout, by_row):
    dropout = None if dropout is None else scales(*dropout)
    with every_program(1):
        assert gated_obstacle(x, dropout, name="gated_output_hopper_gradient") is None
    _, named, _ = launched(
        monkeypatch,
        "hopper_gated_gradient",
        lambda: gated_attention.gated_output_gradient(x, x, x, dropout, empty(C, C)),
    )
    assert named["BY_ROW"] == by_row
    assert not (by_row and named["ACROSS"])


def launched(monkeypatch, name, call):
    """Arguments of a program's launch, by position and by name, and its grid."""
    found = []

    class Program:
        def __getitem__(self, grid):
            return lambda *given, **named: found.append((given, named, grid))

    monkeypatch.setattr(gated_attention, name, Program())
    call()
    return found[0]


@pytest.mark.parametrize(
    ("x", "dropout", "across"),
    [
        (empty(1, 32, 64, C), (1, 1, 64, C), True),
        (empty(1, 128, 256, 256), (1, 1, 256, 256), True),
        (empty(2, 32, 12, C), (2, 1, 12, C), True),
        (empty(2, 32, 12, C), (1, 1, 12, C), True),
        (turned(1, 64, 32, C), (1, 1, 32, C), False),
        (turned(2, 64, 3, C), (2, 1, 3, C), False),
        (empty(1, 16, 64, 256), (1, 1, 64, 256), True),
        (empty(1, 16, 64, C), (1, 16, 1, C), False),
        (empty(1, 16, 64, C), None, False),
        (turned(1, 17, 64, 256), None, False),
    ],
    ids=str,
)
def test_tiles_lie_across_where_a_line_s_rows_share_their_dropout(compiled, monkeypatch, x, dropout, across):
    dropout, c = None if dropout is None else scales(*dropout), x.shape[-1]
    with every_program(1):
        assert gated_obstacle(x, dropout) is None
    name = "hopper_gated_output" if c == C else "hopper_wide_gated_output"
    linear, out = Affine(empty(c, c), empty(c)), torch.empty_like(x)
    given, named, grid = launched(
        monkeypatch, name, lambda: gated_attention.gated_output(x, x, x, dropout, linear, [out])
    )
    assert named["ACROSS"] == across
    assert [len(descriptor.shape) for descriptor in (*given[:3], given[4])] == [3 if across else 2] * 4
    tiles = x.shape[:-1].numel() // 64
    assert (given[-2:], given[5], grid[0]) == ((tiles, 0), None, min(tiles, 132))
    given, named, grid = launched(
        monkeypatch,
        "hopper_gated_gradient",
        lambda: gated_attention.gated_output_gradient(x, x, x, dropout, linear.weight),
    )
    assert named["ACROSS"] == across
    assert [descriptor and len(descriptor.shape) for descriptor in (*given[:3], *given[4:8])] == [
        *[3 if across else 2] * 3,
        None if dropout is None else 3 if across else 2,
        *[3 if across else 2] * 3,
    ]
    assert given[-1] == tiles, "and two programs of the MSA share one"
    assert grid[0] == (min(tiles, 132) if c == C else 2 * min(tiles, 66))


@pytest.mark.parametrize(
    ("x", "across"),
    [
        (empty(1, 32, 64, C), False),
        (turned(1, 32, 64, C), True),
        (turned(2, 4, 16, C), True),
        (turned(1, 32, 256, C), True),
        (turned(1, 17, 64, C), False),
        (turned(1, 64, 18, C), False),
    ],
    ids=["in order", "transposed", "batch", "DAP 8", "past the edge", "half a sector"],
)
def test_projections_lie_across_where_their_bias_does(compiled, monkeypatch, x, across):
    narrow_out = x.new_empty(x.shape[0], 4, *x.shape[1:-1]).movedim(1, -1)
    linear, out = Affine(empty(4 * C, C), empty(C)), empty(4, x.shape[:-1].numel(), C)
    given, named, _ = launched(
        monkeypatch,
        "hopper_projections",
        lambda: gated_attention.project(x, Norm(empty(C), empty(C)), linear, empty(4, C), out, (narrow_out,)),
    )
    assert named["ACROSS"] == across
    assert [len(descriptor.shape) for descriptor in (given[0], given[3])] == [3 if across else 2] * 2


@pytest.fixture
def plain_sizes(monkeypatch):
    """The programs' arithmetic in Python's integers."""
    for name in ("ROWS", "LINES", "SECTOR", "CONSUMERS"):
        monkeypatch.setattr(row_pieces, name, getattr(row_pieces, name).value)


@pytest.mark.parametrize(
    ("middle", "inner", "across"), [(16, 4, True), (48, 20, True), (2 * 32, 12, True), (5, 64, False), (64, 3, False)]
)
@pytest.mark.parametrize("segments", [1, 3])
def test_every_row_lies_in_one_tile_and_the_copy_engine_finds_it_there(plain_sizes, middle, inner, across, segments):
    count = middle * inner
    walk = row_pieces.Walk(0, 1, count // 64, inner // 4, (middle, inner))
    stored = torch.arange(segments * count * 8).view(-1, 8)
    descriptor = gated_attention.tiles_of_rows(stored.bfloat16(), 8, inner if across else None)
    view = stored.as_strided(descriptor.shape, descriptor.strides)
    met = []
    for segment in range(segments):
        for tile in range(walk.tiles):
            at = row_pieces.corner.fn(walk, tile, segment, 0, across)
            block = view[tuple(slice(a, a + b) for a, b in zip(at, descriptor.block_shape, strict=True))]
            numbers = [row_pieces.row_numbers.fn(walk, tile, n, across) for n in range(64)]
            assert (block.reshape(64, 8)[:, 0] // 8).tolist() == [segment * count + number for number in numbers]
            if across:  # a line's rows differ in level 1 alone
                assert {(n // 16, number % inner) for n, number in enumerate(numbers)} == {
                    (line, numbers[0] % inner + line) for line in range(4)
                }
            met += [segment * count + number for number in numbers]
    assert sorted(met) == list(range(segments * count))


@pytest.mark.parametrize("tiles", [1, 2, 17, 131, 132, 133, 290, 1024])
def test_every_tile_has_one_consumer(plain_sizes, tiles):
    (grid,) = rows.programs(empty(tiles, 64, C), 1)
    assert grid == min(tiles, 132)
    met = []
    for program in range(grid):
        walk = row_pieces.Walk(program, grid, tiles, 1, (1, 1))
        for side in range(2):
            met += range(row_pieces.begin.fn(walk, side), tiles, row_pieces.pace.fn(walk))
    assert sorted(met) == list(range(tiles))
