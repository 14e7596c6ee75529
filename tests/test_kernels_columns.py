"""Grids over parts of the output columns: the bits of one program for all columns, and where they are looked up."""

import subprocess
import sys

import pytest
import torch

from kernel_accuracy import DEVICE, TILE, Draw, count_launched, of_parts, same_bits, turned
from processes import compiling_environment
from scalefold.kernels import tuning
from scalefold.kernels.ops import gated_output, linear, triangle
from scalefold.tune.candidates import CANDIDATES

TALL = TILE | {"BLOCK_M": 64}


@pytest.fixture
def grids(monkeypatch):
    """PARTS of every launch of the two forward kernels, of problems of any size."""
    monkeypatch.setattr(tuning, "LEAST_SHARED_WEIGHT", 0)
    found = []
    for module in (linear, gated_output, triangle):
        original = module.launch

        def launch(program, config, tensors, original=original, **arguments):
            found.append(config["PARTS"])
            original(program, config, tensors, **arguments)

        monkeypatch.setattr(module, "launch", launch)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths", "biased", "transposed", "tile"),
    [
        ((1, 5, 7, 16), (32, 32, 32, 32, 4), (False, False, False, True, False), False, TILE),  # a ragged tile
        ((1, 4, 24, 16), (64, 64, 64, 64, 8), (True, False, False, True, True), True, TILE),
        ((2, 12, 48, 16), (64, 64, 4), (False, True, True), True, TALL),  # tiles across
        ((1, 4, 8, 256), (32, 32), (True, True), False, TILE),  # by the copy engine
        ((1, 2, 9, 32), (256, 256), (False, True), True, TILE | {"BLOCK_N": 64}),  # one block is a part
    ],
    ids=str,
)
def test_projections_in_parts_have_the_bits_of_one_program(
    shape, widths, biased, transposed, tile, masked, dtype, grids
):
    draw = Draw(sum(shape))
    x, mask = turned(draw(*shape).to(dtype), transposed), draw.mask(*shape[:-1]).to(dtype)
    norm = [p.to(dtype) for p in draw.norm(shape[-1])]
    weights = [draw.weight(width, shape[-1]).to(dtype) for width in widths]
    biases = [draw(width).to(dtype) if has else None for width, has in zip(widths, biased, strict=True)]

    def call():
        if masked:
            return linear.masked_projections(x, mask, *norm, weights, biases)
        return linear.layer_norm_linear(x, *norm, weights, biases)

    one, *others = of_parts("norm_linear_columns", tile, (1, 2, 4, 8), call)
    total = sum(width for width in widths if width >= 16)
    assert grids == [min(parts, total // 16) for parts in (1, 2, 4, 8)]
    for found in others:
        assert all(map(same_bits, found, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [None, "rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "heads", "width"), [((1, 3, 19, 128), 2, 16), ((2, 4, 8, 64), 4, 32)], ids=str)
def test_a_gated_output_in_parts_has_the_bits_of_one_program(shape, heads, width, transposed, dropped, dtype, grids):
    """Products of few binary digits: the interpreter's library may sum narrower ones in another order."""
    draw = Draw(sum(shape))
    batch, rows, n, c = shape

    def whole(*sizes):
        return torch.randint(-2, 3, sizes, generator=draw.generator).to(DEVICE, dtype)

    x = turned(draw(*shape).to(dtype), transposed)
    gate = turned(100 * whole(batch, rows, n, heads * width).abs().clamp(max=1), transposed)
    sizes = {"rows": (batch, 1, n, c), "columns": (batch, rows, 1, c)}
    dropout = draw.dropout(*sizes[dropped]) if dropped else None
    o, weight, bias = whole(batch, rows, n, heads, width), whole(c, heads * width), draw(c).to(dtype)
    one, *others = of_parts(
        "gated_output_columns", TILE, (1, 2, 4, 8), lambda: gated_output.gated_output(x, o, gate, weight, bias, dropout)
    )
    assert grids == [min(parts, c // 16) for parts in (1, 2, 4, 8)]
    assert one[0].abs().max() > 1
    for found in others:
        assert all(map(same_bits, found, one))


FEW_ROWS = ((1, 16, 256, 256), (1, 32, 128, 256))  # an eighth of the MSA, by rows and by columns


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "widths", "masked"),
    [
        *((shape, (256,) * 4, False) for shape in FEW_ROWS),
        ((1, 16, 256, 256), (128,) * 4 + (8,), False),
        ((1, 128, 32, 256), (32, 32), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_all_candidates_of_projections_in_parts_have_the_bits_of_one_program(shape, widths, masked, transposed, grids):
    draw, c = Draw(1), shape[-1]
    x, mask = turned(draw(*shape).bfloat16(), transposed), draw.mask(*shape[:-1]).bfloat16()
    norm = [p.bfloat16() for p in draw.norm(c)]
    weights = [draw.weight(width, c).bfloat16() for width in widths]
    biases = [draw(width).bfloat16() if n == 3 or masked else None for n, width in enumerate(widths)]

    def call():
        if masked:
            return linear.masked_projections(x, mask, *norm, weights, biases)
        return linear.layer_norm_linear(x, *norm, weights, biases)

    compare_candidates("norm_linear_columns", sum(width for width in widths if width >= 16), call, grids)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*FEW_ROWS, (1, 32, 256, 128)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_all_candidates_of_gated_outputs_in_parts_have_the_bits_of_one_program(shape, transposed, grids):
    draw, (*rows, c) = Draw(1), shape
    x, gate = (turned(draw(*shape).bfloat16(), transposed) for _ in range(2))
    o, weight, bias = draw(*rows, c // 32, 32).bfloat16(), draw.weight(c, c).bfloat16(), draw(c).bfloat16()
    dropout = draw.dropout(rows[0], 1, rows[2], c)
    compare_candidates(
        "gated_output_columns", c, lambda: gated_output.gated_output(x, o, gate, weight, bias, dropout), grids
    )


def compare_candidates(name, n, call, grids):
    def check(config):
        one, parts = of_parts(name, config, (1, config["PARTS"]), call)
        assert grids[-2:] == [1, config["PARTS"]]
        assert all(map(same_bits, one, parts)), config

    assert count_launched(CANDIDATES[name]({"n": n})[1:], check) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "width"), [((1, 5, 7, 32), 64), ((2, 4, 8, 16), 16)], ids=str)
def test_operands_of_a_triangle_in_parts_have_the_bits_of_one_program(shape, width, transposed, dtype, grids):
    draw = Draw(sum(shape))
    z, mask = turned(draw(*shape).to(dtype), transposed), draw.mask(*shape[:-1]).to(dtype)
    parameters = [p.to(dtype) for _ in range(4) for p in (draw.weight(width, shape[-1]), draw(width))]
    norm = [p.to(dtype) for p in draw.norm(shape[-1])]
    one, *others = of_parts(
        "triangle_project_columns", TILE, (1, 2, 4, 8), lambda: triangle.triangle_project(z, mask, *norm, *parameters)
    )
    assert grids == [min(parts, 2 * width // 16) for parts in (1, 2, 4, 8)]
    for found in others:
        assert all(map(same_bits, found, one))


def looked_up(monkeypatch, x, n, entry, limit=256, **more):
    """The choice for projections of x, and the names that were asked for, where a table has such an entry."""
    names, original = [], tuning.lookup
    monkeypatch.setattr(tuning, "lookup", lambda name, **fields: names.append(name) or original(name, **fields))
    with tuning.assume_capability(90), tuning.override("norm_linear_columns", entry):
        return tuning.chosen_parts("norm_linear_columns", "norm_linear_forward", x, n, limit, **more), names


def rows_of(count, c, dtype=torch.bfloat16):
    return torch.empty(count, c, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    ("rows", "c", "n", "asked"),
    [
        (4096, 256, 1024, True),
        (16384, 256, 64, True),
        (16385, 256, 1024, False),  # tiles of rows are enough
        (32768, 256, 1024, False),
        (4096, 64, 64, False),  # the weight is small
    ],
)
def test_parts_are_looked_up_where_rows_are_few_and_the_weight_is_not_small(rows, c, n, asked, monkeypatch):
    entry = {"PARTS": 4, **TILE}
    config, names = looked_up(monkeypatch, rows_of(rows, c), n, entry)
    assert names == (["norm_linear_columns"] if asked else ["norm_linear_forward"])
    assert config["PARTS"] == (4 if asked else 1)
    assert asked == (config == entry)


def test_one_part_takes_the_tiles_of_the_kernel_without_parts(monkeypatch):
    x = rows_of(4096, 256)
    with tuning.assume_capability(90):
        own = tuning.chosen_tiles("norm_linear_forward", x, 1024, 256)
        assert tuning._defaults["norm_linear_columns"]({}, 90) == tuning._defaults["gated_output_columns"]({}, 90)
    config, names = looked_up(monkeypatch, x, 1024, tuning._defaults["norm_linear_columns"]({}, 90))
    assert names == ["norm_linear_columns", "norm_linear_forward"]
    assert config == {**own, "PARTS": 1}


@pytest.mark.parametrize(
    ("n", "limit", "parts", "expected"),
    [
        (1024, 256, 4, (4, 128)),
        (256, 64, 2, (2, 64)),  # of one projection
        (256, 256, 8, (8, 32)),  # of one part
        (768, 256, 8, (8, 32)),  # three projections: the largest blocks that fit a part
        (48, 16, 4, (1, 16)),
        (64, 32, 8, (4, 16)),
    ],
)
def test_blocks_cross_neither_parts_nor_projections(n, limit, parts, expected, monkeypatch):
    monkeypatch.setattr(tuning, "LEAST_SHARED_WEIGHT", 0)
    entry = {"PARTS": parts, **TILE, "BLOCK_N": 128}
    config, _ = looked_up(monkeypatch, rows_of(4096, 256), n, entry, limit)
    assert (config["PARTS"], config["BLOCK_N"]) == expected
    assert n % (config["PARTS"] * config["BLOCK_N"]) == limit % config["BLOCK_N"] == 0


def test_blocks_of_a_sum_are_those_of_the_table(monkeypatch):
    entry = {"PARTS": 8, **TILE, "BLOCK_N": 128}
    config, _ = looked_up(monkeypatch, rows_of(4096, 256), 128, entry, 128, columns=64, blocked=False)
    assert (config["PARTS"], config["BLOCK_N"]) == (4, 128)


COMPILED = """
from scalefold.tune import programs
from scalefold.tune.candidates import CANDIDATES
programs.start_worker([8], [], 90, "sm_90")
cases = programs._worker_cases
names = ("norm_linear", "norm_linear_backward", "gated_output", "triangle_project", "transition")
names = [f"{name}_columns" for name in names]
found = [p for n in range(len(cases)) for p in programs.find_problems(cases, n) if p.kernel in names]
problems = {problem.key: problem for problem in found}
for (kernel, key), problem in problems.items():
    config = next(c for c in CANDIDATES[kernel](problem.fields) if c["PARTS"] == 2 and c["BLOCK_M"] == 64)
    program, rows = programs.compile_task(problem, config), int(problem.fields["rows"])
    assert program.programs == 2 * rows // 64 and program.registers and not program.error, (kernel, key, program)
    print(kernel, key)
"""


@pytest.mark.long
def test_a_search_finds_and_compiles_parts_where_a_rank_has_an_eighth_of_the_rows(tmp_path):
    environment = compiling_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "gated_output_columns c=128 dtype=bfloat16 n=128 rows=8192",
        "gated_output_columns c=256 dtype=bfloat16 n=256 rows=4096",
        "norm_linear_backward_columns c=128 dtype=bfloat16 n=128 rows=8192",
        "norm_linear_backward_columns c=128 dtype=bfloat16 n=512 rows=8192",
        "norm_linear_backward_columns c=256 dtype=bfloat16 n=1024 rows=4096",
        "norm_linear_backward_columns c=256 dtype=bfloat16 n=64 rows=4096",
        "norm_linear_columns c=256 dtype=bfloat16 n=1024 rows=4096",
        "norm_linear_columns c=256 dtype=bfloat16 n=64 rows=4096",
        "transition_columns c=128 dtype=bfloat16 n=512 rows=8192",
        "transition_columns c=256 dtype=bfloat16 n=1024 rows=4096",
        "triangle_project_columns c=128 dtype=bfloat16 n=128 rows=8192",
    ]
