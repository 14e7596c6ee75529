"""Row-wise programs in Gluon: which calls take them and that they compile, without a GPU; what they compute, on 9.0.

Triton's interpreter cannot run Gluon.
"""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
import torch
import triton.language as tl

from scalefold.kernels import choice, tuning
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.hopper import rows
from scalefold.kernels.ops import linear, outer_product, transition, triangle

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
KERNELS = (
    *("norm_linear_hopper", "triangle_hopper_gates", "triangle_hopper_operands", "triangle_hopper_output"),
    *("outer_product_hopper", "transition_hopper", "transition_hopper_gradient", "norm_linear_hopper_wide"),
)
C = 128
NO_BIASES = [None, None, None]


@contextmanager
def every_program(hopper: int):
    """The tables prefer Gluon (1) or Triton (0) for all rows."""
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(tuning.override(name, {"HOPPER": hopper}))
        yield


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def projections_obstacle(x, row_mask=None, widths=(C, C, C, C, 4), biases=None):
    weights = [empty(width, x.shape[-1]) for width in widths]
    return rows.projections_obstacle(x, row_mask, weights, biases or [*NO_BIASES, empty(C), None])


def output_obstacle(z, x=None, dropout=None, d_out=None):
    x = empty(1, C, *z.shape[1:3]) if x is None else x
    return rows.output_obstacle(z, x.permute(0, 2, 3, 1), [empty(C, C)] * 2, dropout, d_out)


def outer_obstacle(sequences, i, j, z=None, b=None):
    z = empty(i, j, C) if z is None else z
    b = empty(sequences, j, 32) if b is None else b
    return rows.outer_product_obstacle(z, empty(sequences, i, b.shape[2]), b, empty(C, b.shape[2] ** 2))


@pytest.mark.parametrize("transposed", [False, True])
def test_wide_projections_have_no_obstacle(compiled, transposed):
    x, weights = empty(1, 16, 64, 256), {"widths": [256] * 4, "biases": [*NO_BIASES, empty(256)]}
    with every_program(1):
        assert projections_obstacle(x.transpose(1, 2) if transposed else x, **weights) is None


def wide_obstacle(x, row_mask=None, widths=(256,) * 4, biased=3):
    biases = [empty(256) if n == biased else None for n in range(len(widths))]
    return projections_obstacle(x, row_mask, widths, biases)


def transition_obstacle(x, hidden=512, d_out=None):
    c = x.shape[-1]
    return rows.transition_obstacle(x, [empty(hidden, c), empty(c, hidden)], d_out)


@pytest.mark.parametrize("x", [empty(1, 16, 64, C), empty(1, 4, 16, 256), empty(1, 16, 8, C).transpose(1, 2)], ids=str)
def test_a_transition_has_no_obstacle(compiled, x):
    with every_program(1):
        assert transition_obstacle(x) is None
        assert transition_obstacle(x, d_out=torch.empty_like(x)) is None


@pytest.mark.parametrize("sequences", [5, 128])
def test_an_outer_product_of_few_sequences_has_no_obstacle(compiled, sequences):
    with every_program(1):
        assert outer_obstacle(sequences, 64, 12) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_projections_of_a_triangle_s_attention_have_no_obstacle(compiled, transposed):
    x = empty(1, 16, 64, C)
    with every_program(1):
        assert projections_obstacle(x.transpose(1, 2) if transposed else x) is None


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (lambda: projections_obstacle(empty(1, 16, 64, C), row_mask=empty(1, 16, 64)), "not queries, keys"),
        (lambda: projections_obstacle(empty(1, 16, 64, C), widths=[C] * 4), "not queries, keys"),
        (lambda: projections_obstacle(empty(1, 16, 64, C), widths=[16], biases=[None]), "not queries, keys"),
        (lambda: projections_obstacle(empty(1, 16, 64, C), widths=[C] * 4 + [12]), "not queries, keys"),
        (lambda: projections_obstacle(empty(1, 16, 64, C), biases=[*NO_BIASES, empty(C), empty(4)]), "not queries"),
        (lambda: projections_obstacle(empty(1, 16, 64, 64), widths=[64] * 4 + [4]), "weights are not 128 x 128"),
        (lambda: projections_obstacle(empty(1, 16, 65, C)), "rows do not come in tiles of 64"),
        (lambda: projections_obstacle(empty(1, 16, 128, C)[:, :, :33]), "rows do not come"),
        (lambda: projections_obstacle(empty(1, 16, 128, C)[:, :, :64]), "rows do not lie densely"),
        (lambda: projections_obstacle(empty(1, 16, 64, C, dtype=torch.float32)), "float32 is not bfloat16"),
        (lambda: rows.operands_obstacle(empty(2, 16, 64, C), [empty(C, C)] * 4), "not one contiguous"),
        (lambda: rows.operands_obstacle(empty(1, 64, 16, C).transpose(1, 2), [empty(C, C)] * 4), "not one"),
        (lambda: rows.operands_obstacle(empty(1, 16, 64, 64), [empty(64, 64)] * 4), "weights are not 128 x 128"),
        (lambda: rows.operands_obstacle(empty(1, 0, 64, C), [empty(C, C)] * 4), "rows do not come in tiles"),
        (lambda: output_obstacle(empty(1, 16, 64, C), empty(1, 16, 64, C).permute(0, 3, 1, 2)), "channels first"),
        (lambda: output_obstacle(empty(1, 64, 16, C).transpose(1, 2)), "not one contiguous"),
        (lambda: output_obstacle(empty(2, 16, 64, C), empty(2, C, 16, 64)), "not one contiguous"),
        (lambda: output_obstacle(empty(1, 16, 64, C), dropout=empty(1, 1, 64, C)), "dropout scales are not fp32"),
        (lambda: output_obstacle(empty(1, 16, 64, C), d_out=empty(1, 1, 1, C).expand(1, 16, 64, C)), "gradients of"),
        (lambda: output_obstacle(empty(1, 16, 64, C), d_out=empty(1, 64, 16, C).transpose(1, 2)), "gradients of"),
        (lambda: output_obstacle(empty(1, 16, 64, C), d_out=empty(1, 16, 64, C, dtype=torch.float32)), "float32"),
        (
            lambda: wide_obstacle(empty(1, 16, 64, 256), empty(1, 16, 64)),
            "not projections of which the last has a bias",
        ),
        (lambda: wide_obstacle(empty(1, 16, 64, 256), biased=1), "not projections of which the last has a bias"),
        (lambda: wide_obstacle(empty(1, 16, 64, 256), widths=(256, 64)), "not projections of which the last"),
        (lambda: wide_obstacle(empty(1, 16, 64, 256), widths=[64] * 4), "weights are not 256 x 256"),
        (lambda: wide_obstacle(empty(1, 3, 21, 256)), "rows do not come in tiles of 64"),
        (lambda: wide_obstacle(empty(1, 16, 64, 256, dtype=torch.float32)), "float32 is not bfloat16"),
        (lambda: transition_obstacle(empty(1, 16, 64, 64)), "64 channels with 512 hidden ones"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), 128), "128 channels with 128 hidden ones"),
        (lambda: transition_obstacle(empty(1, 3, 21, C)), "rows do not come in tiles of 64"),
        (lambda: transition_obstacle(empty(1, 16, 128, C)[:, :, :64]), "rows do not lie densely"),
        (lambda: transition_obstacle(empty(1, 16, 64, C, dtype=torch.float32)), "float32 is not bfloat16"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), d_out=empty(1, 64, 16, C).transpose(1, 2)), "gradients of"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), d_out=empty(1, 16, 64, C, dtype=torch.float32)), "float32"),
        (lambda: outer_obstacle(129, 64, 64), "not up to 128 sequences"),
        (lambda: outer_obstacle(8, 64, 64, b=empty(8, 64, 16)), "not up to 128 sequences of 32 channels"),
        (lambda: outer_obstacle(8, 64, 64, z=empty(64, 64, 64)), "for pairs of 128"),
        (lambda: outer_obstacle(8, 96, 64), "pairs do not come in tiles of 64 x 4"),
        (lambda: outer_obstacle(8, 64, 66), "pairs do not come in tiles"),
        (lambda: outer_obstacle(8, 64, 64, b=empty(64, 8, 32).transpose(0, 1)), "do not lie densely"),
        (lambda: outer_obstacle(8, 64, 64, z=empty(64, 64, C, dtype=torch.float32)), "float32 is not bfloat16"),
    ],
)
def test_what_the_programs_cannot_take_is_named(compiled, obstacle, reason):
    with every_program(1):
        assert reason in str(obstacle())


def test_the_interpreter_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(True))
    with every_program(1):
        assert projections_obstacle(empty(1, 16, 64, C)) == "the interpreter cannot run Gluon"


@pytest.mark.parametrize("target", [80, 100])
def test_other_compute_capabilities_keep_triton(monkeypatch, target):
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(target), every_program(1):
        assert projections_obstacle(empty(1, 16, 64, C)) == f"compute capability {target / 10} is not 9.0"


def test_without_an_entry_in_the_tables_triton_is_preferred(compiled, monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda target: {})
    tuning._resolved.cache_clear()
    found = projections_obstacle(empty(1, 256, 256, C))
    tuning._resolved.cache_clear()
    assert found == "the table prefers the Triton program"


@pytest.mark.parametrize(
    ("shape", "starting", "ending"),
    [((1, 256, 256), True, False), ((1, 128, 256), True, True), ((1, 320, 320), False, False)],
    ids=["one GPU", "DAP 2", "evaluation"],
)
def test_programs_are_preferred_where_they_were_found_faster(compiled, shape, starting, ending):
    z = empty(*shape, C)
    assert (projections_obstacle(z) is None) == starting
    assert (projections_obstacle(empty(1, *shape[:0:-1], C).transpose(1, 2)) is None) == ending
    assert (rows.operands_obstacle(z, [empty(C, C)] * 4) is None) == starting
    assert (output_obstacle(z) is None) == starting
    assert (output_obstacle(z, d_out=torch.empty_like(z)) is None) == starting


def launched(monkeypatch, shape):
    """Which programs the operations of a pair representation launch, forward and backward."""
    from scalefold.kernels.compile_cases import projections, triangle_output, triangle_project

    calls = []
    for module, name in ((rows, "project"), (rows, "operands"), (rows, "output")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: calls.append(f"Gluon {name}"))
    monkeypatch.setattr(linear, "launch", lambda program, *_, **__: calls.append(program.fn.__name__))
    monkeypatch.setattr(triangle, "launch", lambda program, *_, **__: calls.append(program.fn.__name__))
    for module in (linear, triangle):
        monkeypatch.setattr(module, "launch_with_sums", lambda *_, **__: empty(4, 8))
        monkeypatch.setattr(module, "weight_partials", lambda products: [])
        monkeypatch.setattr(module, "sum_all", lambda *_: pytest.skip("gradients of parameters are not wanted"))
    for call in (
        lambda: projections(shape, C, [C] * 4 + [4]),
        lambda: triangle_project(shape, C),
        lambda: triangle_output(shape, C),
    ):
        with pytest.raises(pytest.skip.Exception):
            call()
    return calls


TRITON = ["_forward_kernel", "_project_forward_kernel", "_output_forward_kernel", "_output_gradient_kernel"]


def test_operations_take_gluon_where_nothing_stands_in_its_way(compiled, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert launched(monkeypatch, (1, 256, 256)) == [
            "Gluon project",
            "Gluon operands",
            "Gluon output",
            "Gluon output",
        ]
    assert caplog.messages == []


def test_operations_say_once_why_they_stay_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    with caplog.at_level(logging.INFO), every_program(0):
        assert launched(monkeypatch, (1, 256, 256)) + launched(monkeypatch, (1, 256, 256)) == 2 * TRITON
    names = ["projections", "operands of a triangle's product", "output of a triangle", "gates of a triangle's output"]
    assert caplog.messages == [f"kernels: Triton {name}: the table prefers the Triton program" for name in names]


def test_where_gluon_is_another_one_operations_stay_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    monkeypatch.setattr(rows, "MISSING", "this Triton's Gluon is another one: no `tma`")
    with caplog.at_level(logging.INFO):
        assert launched(monkeypatch, (1, 256, 256)) == TRITON
    assert all(rows.MISSING in message for message in caplog.messages)
    assert len(caplog.messages) == 4


def test_on_other_gpus_there_is_nothing_to_say(monkeypatch, caplog):
    choice._explained.clear()
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with caplog.at_level(logging.INFO), tuning.assume_capability(80):
        assert launched(monkeypatch, (1, 256, 256)) == TRITON
    assert caplog.messages == []


def test_rows_and_channels_become_matrices_for_the_copy_engine():
    x = torch.arange(2 * 3 * 8).view(1, 2, 3, 8)
    half = torch.arange(4 * 32).view(1, 2, 2, 32).chunk(2, -1)[1]
    first = torch.arange(8 * 2 * 8).view(1, 8, 2, 8)
    found = [
        rows._by_rows(x.transpose(1, 2), (0, 2, 1)),
        rows._by_rows(half, (0, 1, 2)),
        rows._by_channels(first.permute(0, 2, 3, 1), (0, 1, 2)),
    ]
    wanted = [x.view(6, 8), half.reshape(4, 16), first.view(8, 16)]
    assert [None if a is None else a.tolist() for a in found] == [b.tolist() for b in wanted]
    assert rows._by_rows(x.transpose(1, 2), (0, 1, 2)) is None


COMPILED = """
from contextlib import ExitStack
import torch
from compile_hopper import SERIALIZED, assembler_log
from compile_targets import SHARED_LIMIT, compile_launch, recorded_launches
from scalefold.kernels import compile_cases as cases
from scalefold.kernels import tuning
pair = (1, 256, 256)
with tuning.assume_capability(90), recorded_launches() as launches:
    cases.projections(pair, 128, [128] * 4 + [4])
    cases.triangle_project(pair, 128)
    cases.triangle_output(pair, 128)
    with ExitStack() as stack:
        names = ("outer_product_hopper", "transition_hopper", "transition_hopper_gradient", "norm_linear_hopper_wide")
        for name in names:
            stack.enter_context(tuning.override(name, {"HOPPER": 1}))
        cases.projections((1, 128, 256), 256, [256] * 4)
        cases.outer_product_update(128, 256)
        cases.transitions(pair, 128, 4)
        cases.transitions((1, 128, 256), 256, 4)
for launch in launches:
    if launch.kernel.fn.__name__.startswith("hopper_"):
        compiled = compile_launch(launch, 90)
        assert compiled.metadata.shared <= SHARED_LIMIT[90]
        log = assembler_log(compiled.asm["ptx"])
        print(launch.kernel.fn.__name__, sum(log.count(code) for code in SERIALIZED))
"""


@pytest.mark.long
def test_the_programs_compile_without_a_gpu_and_their_products_are_not_serialized(repository, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(repository / "benchmarks" / "measure"), environment.get("PYTHONPATH", "")])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    finished = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    programs = ["hopper_projections", "hopper_operands", "hopper_output", "hopper_output"]
    programs += [
        "hopper_wide_projections",
        "hopper_outer_product",
        *["hopper_transition", "hopper_transition_gradient"] * 2,
    ]
    assert finished.stdout.splitlines() == [f"{program} 0" for program in programs]


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


def outer_product_of(draw, sequences, i, j):
    """An outer product whose pairs have several counts of common rows."""
    import operation_cases as cases

    z, a, b = draw(1, i, j, C), draw(1, sequences, i, 32), draw(1, sequences, j, 32)
    counts = 1.0 + 9 * draw.dropout(1, i, j)
    weight, bias = draw.weight(C, 1024), draw(C)
    return cases.Inputs(draw.leaves, lambda ops: ops.outer_product_update(z, a, b, counts, weight, bias))


def transition_of(draw, shape, c, transposed):
    import operation_cases as cases

    x, norm = draw(*shape, c, transposed=transposed), draw.norm(c)
    linears = [draw.weight(4 * c, c), draw(4 * c), draw.weight(c, 4 * c), draw(c)]
    return cases.Inputs(draw.leaves, lambda ops: ops.transition(x, *norm, *linears))


def wide_of(draw, shape, count, transposed):
    import operation_cases as cases

    x, norm = draw(*shape, 256, transposed=transposed), draw.norm(256)
    weights, biases = [draw.weight(256, 256) for _ in range(count)], [*[None] * (count - 1), draw(256)]
    return cases.Inputs(draw.leaves, lambda ops: ops.layer_norm_linear(x, *norm, weights, biases))


def case_of(name, shape):
    """Builds the inputs of an operation, of a given type; masks and dropout in all the forms that the model has."""
    import operation_cases as cases

    batch, i, j = shape
    masks = {"pairs": shape, "column": (batch, 1, j)}
    scales = {"column": (batch, 1, j, C), "row": (batch, i, 1, C), "none": None}
    operation, form = name.split()

    def build(dtype):
        draw = cases.Draw(True, dtype)
        if operation == "outer":
            return outer_product_of(draw, int(form), 64 * min(i, 5), j)
        if operation == "transition":
            return transition_of(draw, shape, int(form.removesuffix("t")), form.endswith("t"))
        if operation == "wide":
            return wide_of(draw, shape, int(form.removesuffix("t")), form.endswith("t"))
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
    import operation_cases as cases

    inputs = build(dtype)
    outputs, probe = cases.outputs_of(inputs, ops), cases.Draw(False, dtype)
    probes = [probe(*output.shape) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs.leaves, probes, allow_unused=True)
    return [*(output.detach() for output in outputs), *(gradient for gradient in gradients if gradient is not None)]


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return {str(n): float((own.float() - true).norm() / true.norm()) for n, (own, true) in enumerate(pairs)}


OPERATIONS = [
    *("projections starting", "projections ending", "operands pairs", "operands column"),
    *("output column", "output row", "output none", "outer 128", "outer 37"),
    *("transition 128", "transition 128t", "transition 256"),
    *("wide 4", "wide 1t"),
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 17, 64), (1, 290, 64), (1, 128, 256)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gluon_is_as_exact_as_its_twin_and_repeats_its_bits(scripts, monkeypatch, name, shape):
    """One tile, an odd number of them, more than run at once, and a share of DAP 2; memory is poisoned in between."""
    import bits
    import hopper_cases as cases
    from scalefold.kernels.table import REFERENCE
    from scalefold.kernels.triton_ops import TRITON

    asked = []
    for module in (linear, outer_product, transition, triangle):
        monkeypatch.setattr(module, "chosen", lambda _, found: (asked.append(found), found is None)[1])
    build = case_of(name, shape)
    exact = results(build, REFERENCE, torch.float32)
    with every_program(0):
        twin = results(build, TRITON, torch.bfloat16)
    asked.clear()
    with every_program(1):
        own, other = errors(results(build, TRITON, torch.bfloat16), exact), errors(twin, exact)
        assert asked == [None] * len(asked) != []
        assert cases.too_large(own, other) == [], (own, other)
        assert bits.repeat(lambda: results(build, TRITON, torch.bfloat16), 20) == []
