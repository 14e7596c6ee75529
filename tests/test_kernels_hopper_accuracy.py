"""Row-wise programs in Gluon on a GPU of compute capability 9.0: what they compute, and that its bits repeat."""

from contextlib import nullcontext
from itertools import product
from math import gcd

import pytest
import torch

from hopper_programs import C, every_program, recomputed_transitions
from scalefold.kernels.destination import Destination
from scalefold.kernels.ops import gated_output, linear, outer_product, transition, triangle

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
NO_BIASES = [None, None, None]


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


def outer_product_of(draw, sequences, i, j):
    """An outer product whose pairs have several counts of common rows."""
    from scalefold.tune import operation_cases as cases

    z, a, b = draw(1, i, j, C), draw(1, sequences, i, 32), draw(1, sequences, j, 32)
    counts = 1.0 + 9 * draw.dropout(1, i, j)
    weight, bias = draw.weight(C, 1024), draw(C)
    return cases.Inputs(draw.leaves, lambda ops: ops.outer_product_update(z, a, b, counts, weight, bias))


def transition_of(draw, shape, c, transposed):
    from scalefold.tune import operation_cases as cases

    x, norm = draw(*shape, c, transposed=transposed), draw.norm(c)
    linears = [draw.weight(4 * c, c), draw(4 * c), draw.weight(c, 4 * c), draw(c)]
    return cases.Inputs(draw.leaves, lambda ops: ops.transition(x, *norm, *linears))


def gated_output_of(draw, shape, form):
    """Tiles across, in order with one row of scales or several, and without dropout; as many as the shape has."""
    from scalefold.tune import operation_cases as cases

    batch, i, j = shape
    kind, c = form.split("-")
    tiles = i * j // 64
    few = batch, 32, 2 * tiles + 2
    shape = {"row": (batch, 16 * i, j // 16), "ending": (batch, 64, tiles + 1), "few": few, "column": shape}[kind]
    c, dropped, transposed = int(c), kind != "column", kind != "row"
    x, o, gate = (draw(*shape, c, transposed=transposed) for _ in range(3))
    dropout = draw.dropout(batch, 1, shape[2], c) if dropped else None
    weight, bias = draw.weight(c, c), draw(c)
    return cases.Inputs(
        draw.leaves, lambda ops: ops.gated_output(x, o.unflatten(-1, (c // 32, 32)), gate, weight, bias, dropout)
    )


def wide_projections_of(draw, shape, form):
    from scalefold.tune import operation_cases as cases

    x, norm = draw(*shape, 256, transposed=form == "column"), draw.norm(256)
    weights, biases = [draw.weight(256, 256) for _ in range(4)], [*NO_BIASES, draw(256)]
    return cases.Inputs(draw.leaves, lambda ops: ops.layer_norm_linear(x, *norm, weights, biases))


def case_of(name, shape):
    """Builds the inputs of an operation, of a given type; masks and dropout in all the forms that the model has."""
    from scalefold.tune import operation_cases as cases

    batch, i, j = shape
    masks = {"pairs": shape, "column": (batch, 1, j)}
    scales = {"column": (batch, 1, j, C), "row": (batch, i, 1, C), "none": None}
    operation, form = name.split()

    def build(dtype):
        draw = cases.Draw(True, dtype)
        if operation == "outer":
            return outer_product_of(draw, int(form), 64 * min(i, 5), j)
        if operation == "transition":
            return transition_of(draw, shape, int(form.rstrip("rt")), form.endswith("t"))
        if operation == "product":
            a, b = draw(batch, i, j, j), draw(batch, i, j, j)
            return cases.Inputs(draw.leaves, lambda ops: ops.triangle_product(a, b, form == "outgoing"))
        if operation == "gated":
            return gated_output_of(draw, shape, form)
        if operation == "wide":
            return wide_projections_of(draw, shape, form)
        z, norms = draw(*shape, C, transposed=form == "ending"), [*draw.norm(C), *draw.norm(C)]
        linears = [tensor for _ in range(4) for tensor in (draw.weight(C, C), draw(C))]
        if operation == "projections":
            biases, weights = [*NO_BIASES, linears[1], None], [*linears[::2], draw.weight(4, C)]
            return cases.Inputs(draw.leaves, lambda ops: ops.layer_norm_linear(z, *norms[:2], weights, biases))
        if operation == "operands":
            mask = (draw.dropout(*masks[form]) > 0).to(dtype).expand(shape)
            return cases.Inputs(draw.leaves, lambda ops: ops.triangle_project(z, mask, *norms[:2], *linears))
        x, dropout = draw(batch, C, i, j), draw.dropout(*scales[form]) if scales[form] else None
        return cases.Inputs(draw.leaves, lambda ops: ops.triangle_output(z, x, *norms, *linears[:4], dropout))

    return build


def results(build, ops, dtype):
    """All outputs of an operation, z passed through included, then the gradients of its inputs for random ones."""
    from scalefold.tune import operation_cases as cases

    inputs = build(dtype)
    outputs, probe = cases.outputs_of(inputs, ops), cases.Draw(False, dtype)
    probes = [torch.empty_like(output).copy_(probe(*output.shape)) for output in outputs]  # they lie as outputs do
    gradients = torch.autograd.grad(outputs, inputs.leaves, probes, allow_unused=True)
    return [*(output.detach() for output in outputs), *(gradient for gradient in gradients if gradient is not None)]


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return {str(n): float((own.float() - true).norm() / true.norm()) for n, (own, true) in enumerate(pairs)}


OPERATIONS = [
    *("projections starting", "projections ending", "operands pairs", "operands column"),
    *("output column", "output row", "output none", "outer 128", "outer 37"),
    *("transition 128", "transition 128t", "transition 256", "transition 128r"),
    *("gated row-128", "gated ending-128", "gated column-128", "gated row-256", "gated ending-256", "gated column-256"),
    *("gated few-128", "gated few-256"),
    *("wide row", "wide column"),
]
PRODUCTS = product(["product outgoing", "product incoming"], [(1, 1, 256), (1, 66, 256), (1, 67, 256), (4, 64, 256)])
TWINS = {  # run for a part of these operations, and why
    "transition 128r": "the table prefers the Triton program",
    "gated few": "dropout scales are not the same along whole tiles",
}
SHAPES = [(1, 1, 64), (1, 17, 64), (1, 290, 64), (1, 128, 256)]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("name", "shape"),
    [*product(OPERATIONS, SHAPES), *product(["output column"], [(1, 1, 320), (1, 7, 320), (1, 2, 96)]), *PRODUCTS],
    ids=str,
)
def test_gluon_is_as_exact_as_its_twin_and_repeats_its_bits(scripts, monkeypatch, name, shape):
    """One tile, an odd number of them, more than run at once, and a share of DAP 2; memory is poisoned in between.

    A triangle's output also where dropout's scales stay in five blocks for few i, and where they do not stay; its
    products for one channel, as many as are split, one more, and those of templates.
    """
    import hopper_cases as cases
    from scalefold.kernels.table import REFERENCE
    from scalefold.kernels.triton_ops import TRITON
    from scalefold.tune.sound import bits

    asked = []
    for module in (gated_output, linear, outer_product, transition, triangle):
        monkeypatch.setattr(module, "chosen", lambda _, found: (asked.append(found), found is None)[1])
    build = case_of(name, shape)
    exact = results(build, REFERENCE, torch.float32)
    recomputed = recomputed_transitions if name.endswith("r") else nullcontext
    with every_program(0), recomputed():
        twin = results(build, TRITON, torch.bfloat16)
    asked.clear()
    with every_program(1), recomputed():
        own, other = errors(results(build, TRITON, torch.bfloat16), exact), errors(twin, exact)
        assert set(asked) == {None, *(reason for part, reason in TWINS.items() if part in name)}
        assert cases.too_large(own, other) == [], (own, other)
        assert bits.repeat(lambda: results(build, TRITON, torch.bfloat16), 20) == []


def gated_to(destination, c, dropped):
    """A gated output of a share of two ranks, with and without a destination, and its gradients."""
    from scalefold.kernels.triton_ops import TRITON
    from scalefold.tune import operation_cases as cases

    draw = cases.Draw(True, torch.bfloat16)
    shape = (1, 128, 256) if c == C else (1, 64, 256)
    x, o, gate = (draw(*shape, c) for _ in range(3))
    dropout = draw.dropout(1, 1, shape[2], c) if dropped else None
    out = TRITON.gated_output(x, o.unflatten(-1, (c // 32, 32)), gate, draw.weight(c, c), draw(c), dropout, destination)
    probe = cases.Draw(False, torch.bfloat16)(*out.shape)
    return out.detach(), torch.autograd.grad(out, draw.leaves, probe)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("c", [C, 256])
def test_a_gated_output_arrives_with_its_bits_in_both_places(scripts, c, dropped):
    shape = (1, 128, 128, c) if c == C else (1, 64, 128, c)
    parts = [torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    with every_program(1):
        ahead = Destination(0, torch.empty(0), parts)
        out, expected = gated_to(None, c, dropped)
        placeholder, found = gated_to(ahead, c, dropped)
    assert ahead.written
    assert placeholder.shape == out.shape
    assert torch.equal(torch.cat(parts, 2), out)
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@on_hopper
def test_an_operand_of_a_triangle_arrives_with_its_bits_in_two_places(scripts):
    from scalefold.kernels.triton_ops import TRITON
    from scalefold.tune import operation_cases as cases

    shape, both = (1, 128, 256), [torch.full((1, C, 256, 256), torch.nan, device="cuda").bfloat16() for _ in range(2)]
    parts = [whole[:, :, n * 128 : (n + 1) * 128] for n, whole in enumerate(both)]
    draw = cases.Draw(False, torch.bfloat16)
    z, norm = draw(*shape, C), draw.norm(C)
    linears = [tensor for _ in range(4) for tensor in (draw.weight(C, C), draw(C))]
    mask = (draw.dropout(1, 1, 256) > 0).bfloat16().expand(shape)
    with every_program(1):
        ahead = Destination(0, torch.empty(0), parts)
        _, a, b = TRITON.triangle_project(z, mask, *norm, *linears)
        _, own, _ = TRITON.triangle_project(z, mask, *norm, *linears, (None, ahead))
    assert ahead.written
    assert torch.equal(own, a)
    assert all(torch.equal(part, b) for part in parts)
    assert all(whole.isnan().sum() == whole.numel() // 2 for whole in both)


def weight_gradient_factors(n, c, rows, form):
    """Factors of two products over so many rows: rows that lie in another order, or every second one of a matrix."""
    random = torch.Generator(device="cuda").manual_seed(rows)

    def draw(width):
        whole = torch.full((2 * rows + 128, width), float("nan"), dtype=torch.bfloat16, device="cuda")
        own = whole[: 2 * rows : 2] if form == "spaced" else whole[:rows]  # what lies behind them is no number
        own.copy_(torch.randn(rows, width, generator=random, device="cuda"))
        return own.view(1, -1, gcd(rows, 56), width).transpose(1, 2) if form == "transposed" else own[None]

    return [draw(n) for _ in range(2)], [draw(c) for _ in range(2)]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("form", ["dense", "transposed", "spaced"])
@pytest.mark.parametrize("rows", [1, 63, 64, 8449, 16384, 32768])
@pytest.mark.parametrize(("n", "c", "transposed"), [(1024, 256, (False, True)), (32, 256, (False, False))])
def test_weight_gradients_in_gluon_are_exact_over_any_number_of_rows(scripts, n, c, transposed, rows, form):
    """Less than a slot, one range and many, and a last one with a single row; memory is poisoned in between."""
    from scalefold.kernels.gradients import weight_gradient
    from scalefold.kernels.hopper import gradients
    from scalefold.kernels.rows import sum_all
    from scalefold.tune.sound import bits

    ds, operands = weight_gradient_factors(n, c, rows, form)
    products = [weight_gradient.Product(*three) for three in zip(ds, operands, transposed, strict=True)]
    with every_program(1):
        assert gradients.products_obstacle(ds, operands) is None
        found = sum_all(weight_gradient.weight_partials(products), torch.float32)
        for own, product in zip(found, products, strict=True):
            d, a = (factor.flatten(0, -2).double() for factor in (product.d, product.a))
            exact = (a.t() @ d if product.transposed else d.t() @ a).flatten()
            assert (own - exact).norm() <= 1e-4 * exact.norm()  # no partial gradient is rounded to bf16
        assert bits.repeat(lambda: weight_gradient.weight_partials(products), 20) == []
