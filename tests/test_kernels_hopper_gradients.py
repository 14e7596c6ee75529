"""Gradients by programs in Gluon: which calls take them; what they compute: ``test_kernels_hopper_accuracy.py``."""

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

from hopper_programs import C, empty, every_program
from scalefold.kernels import tuning
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.hopper import gradients


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def transition_gradient_obstacle(x, hidden=512, d_out=None, name=gradients.TRANSITION_NAMES[0]):
    c, d_out = x.shape[-1], torch.empty_like(x) if d_out is None else d_out
    return gradients.transition_obstacle(name, x, d_out, [empty(hidden, c), empty(c, hidden)])


@pytest.mark.parametrize("name", gradients.TRANSITION_NAMES)
@pytest.mark.parametrize("x", [empty(1, 16, 64, C), empty(1, 16, 8, C).transpose(1, 2)], ids=["dense", "transposed"])
def test_gradients_of_a_transition_of_pairs_have_no_obstacle(compiled, x, name):
    with every_program(1):
        assert transition_gradient_obstacle(x, name=name) is None
    assert transition_gradient_obstacle(x, name=name) == "the table prefers the Triton program"


def outer_gradient_obstacle(sequences, i, j, a=None, name=gradients.NAMES[0]):
    a = empty(sequences, i, 32) if a is None else a
    return gradients.obstacle(name, empty(i, j, C), a, empty(sequences, j, 32), empty(C, 1024))


@pytest.mark.parametrize("name", gradients.NAMES)
@pytest.mark.parametrize("sequences", [5, 128])
def test_gradients_of_an_outer_product_of_few_sequences_have_no_obstacle(compiled, sequences, name):
    with every_program(1):
        assert outer_gradient_obstacle(sequences, 64, 128, name=name) is None
    found_faster = (sequences, name) == (128, "outer_product_hopper_weight")
    obstacle = outer_gradient_obstacle(sequences, 64, 128, name=name)
    assert obstacle == (None if found_faster else "the table prefers the Triton program")


WIDTHS = [(1024, 256), (32, 256)]  # that the program for weight gradients has tiles for


def products_obstacle(n=1024, c=256, d=None, a=None, count=2, rows=(1, 3, 21)):
    d, a = empty(*rows, n) if d is None else d, empty(*rows, c) if a is None else a
    return gradients.products_obstacle([empty(*rows, n)] * (count - 1) + [d], [a] * count)


@pytest.mark.parametrize(("n", "c"), WIDTHS)
def test_weight_gradients_over_any_number_of_rows_have_no_obstacle(compiled, n, c):
    with every_program(1):
        assert products_obstacle(n, c) is None
        transposed = [empty(1, 8, 16, width).transpose(1, 2) for width in (n, c)]
        assert gradients.products_obstacle(transposed[:1], transposed[1:]) is None
        assert products_obstacle(n, c, d=empty(1, 3, 21, 2 * n)[..., n:]) is None
    for sequences in (128, 64, 32, 16):
        assert products_obstacle(n, c, rows=(1, sequences, 256)) is None


class Computed:
    """In the place of the program for weight gradients: what its docstring says, with the launch's own tiles."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *arguments, COUNT, TRANSPOSED, STAGES, num_warps):
        ds, operands, (partials, width, c, num_rows, per_range) = arguments[:4], arguments[4:8], arguments[8:]
        (rows, lines), (_, columns) = ds[0].block_shape, operands[0].block_shape
        assert per_range % rows == 0
        assert (self.grid[1] - 1) * per_range < num_rows <= self.grid[1] * per_range
        assert (width % lines, c % columns, partials.shape[0]) == (0, 0, self.grid[1])
        assert (lines + columns) * rows * 2 * STAGES <= 216 * 1024
        for tile in range(self.grid[0]):
            i, within = divmod(tile, (width // lines) * (c // columns))
            line, column = within // (c // columns) * lines, within % (c // columns) * columns
            for part in range(self.grid[1]):
                own = slice(part * per_range, min((part + 1) * per_range, num_rows))
                block = ds[i].base[own, line : line + lines].t() @ operands[i].base[own, column : column + columns]
                out = partials[part].view(COUNT, -1)[i].view((c, width) if TRANSPOSED >> i & 1 else (width, c))
                out = out.t() if TRANSPOSED >> i & 1 else out
                out[line : line + lines, column : column + columns] = block


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True,)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 9), (2, 3, 100)], ids=str)
@pytest.mark.parametrize(("n", "c"), WIDTHS)
def test_tiles_and_ranges_of_weight_gradients_cover_them(monkeypatch, n, c, shape, transposed):
    monkeypatch.setattr(gradients, "hopper_weight_gradients", Computed())
    monkeypatch.setattr(gradients, "matrix", lambda x, *block: SimpleNamespace(base=x, block_shape=block))
    random = torch.Generator().manual_seed(n)
    ds, operands = ([torch.randn(*shape, width, generator=random) for _ in transposed] for width in (n, c))
    found = gradients.product_partials(ds, operands, transposed)
    for d, a, turned, partial in zip(ds, operands, transposed, found, strict=True):
        product = d.flatten(0, -2).t() @ a.flatten(0, -2)
        torch.testing.assert_close(partial.sum(0), (product.t() if turned else product).flatten(), rtol=1e-4, atol=1e-4)


def test_partial_gradients_of_an_outer_product_become_gradients_in_the_operands_own_order():
    total = torch.arange(32 * 3 * 128).view(32, 3, 128)
    found = gradients.operand_of(total.flatten(), torch.empty(5, 3, 32))
    assert torch.equal(found, total[:, :, :5].permute(2, 1, 0))


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (lambda: transition_gradient_obstacle(empty(1, 16, 64, 256), 1024), "256 channels with 1024 hidden ones"),
        (lambda: transition_gradient_obstacle(empty(1, 16, 64, C), 128), "128 channels with 128 hidden ones"),
        (lambda: transition_gradient_obstacle(empty(1, 3, 21, C)), "rows do not come in tiles of 64"),
        (
            lambda: transition_gradient_obstacle(empty(1, 16, 64, C), d_out=empty(1, 64, 16, C).transpose(1, 2)),
            "gradients of the output",
        ),
        (lambda: products_obstacle(count=5), "not up to 4 products of one shape"),
        (lambda: products_obstacle(d=empty(1, 3, 21, 32)), "not up to 4 products of one shape"),
        (lambda: products_obstacle(256), "no tiles for products of 256 with 256 channels"),
        (lambda: products_obstacle(32, 64), "no tiles for products of 32 with 64 channels"),
        (lambda: products_obstacle(d=empty(1, 21, 3, 1024).transpose(1, 2)), "rows of all factors do not lie densely"),
        (lambda: products_obstacle(d=empty(1, 3, 21, 1028)[..., 4:]), "rows of all factors do not lie densely"),
        (lambda: products_obstacle(rows=(1, 0, 21)), "rows of all factors do not lie densely"),
        (lambda: products_obstacle(a=empty(1, 3, 21, 256, dtype=torch.float32)), "float32 is not bfloat16"),
        (lambda: outer_gradient_obstacle(8, 64, 68), "pairs do not come in tiles of 64 x 64"),
        (lambda: outer_gradient_obstacle(129, 64, 64), "not up to 128 sequences"),
        (lambda: outer_gradient_obstacle(8, 64, 64, empty(64, 8, 32).transpose(0, 1)), "sequences or the weight do"),
    ],
)
def test_what_the_programs_cannot_take_is_named(compiled, obstacle, reason):
    with every_program(1):
        assert reason in str(obstacle())
