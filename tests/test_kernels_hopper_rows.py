"""Row-wise programs in Gluon: which calls take them and that they compile, without a GPU.

Triton's interpreter cannot run Gluon; what the programs compute is tested in ``test_kernels_hopper_accuracy.py``.
"""

import logging
import subprocess
import sys

import pytest
import torch
import triton.language as tl

from hopper_programs import C, empty, every_program
from processes import script_environment
from scalefold.kernels import choice, tuning
from scalefold.kernels.gradients import input_gradient
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.hopper import gated_attention, rows, triangle_product
from scalefold.kernels.ops import linear, outer_product, transition, triangle

NO_BIASES = [None, None, None]


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def projections_obstacle(x, row_mask=None, widths=(C, C, C, C, 4), biases=None):
    weights = [empty(width, x.shape[-1]) for width in widths]
    return gated_attention.projections_obstacle(x, row_mask, weights, biases or [*NO_BIASES, empty(C), None])


def output_obstacle(z, x=None, dropout=None, d_out=None):
    x = empty(1, C, *z.shape[1:3]) if x is None else x
    return rows.output_obstacle(z, x.permute(0, 2, 3, 1), [empty(C, C)] * 2, dropout, d_out)


def outer_obstacle(sequences, i, j, z=None, b=None):
    z = empty(i, j, C) if z is None else z
    b = empty(sequences, j, 32) if b is None else b
    return rows.outer_product_obstacle(z, empty(sequences, i, b.shape[2]), b, empty(C, b.shape[2] ** 2))


def transition_obstacle(x, hidden=512, d_out=None):
    c = x.shape[-1]
    return rows.transition_obstacle(x, [empty(hidden, c), empty(c, hidden)], d_out)


def product_obstacle(channels, n=256, d=None, dtype=torch.bfloat16):
    a, b = (empty(1, channels, n, n, dtype=dtype) for _ in range(2))
    return triangle_product.product_obstacle(a, b, d)


WIDE_BIASES = [None, None, None, empty(256)]


@pytest.mark.parametrize("x", [empty(1, 4, 64, 256), empty(1, 64, 4, 256).transpose(1, 2)], ids=["row", "column"])
def test_projections_of_the_msa_have_no_obstacle(compiled, x):
    with every_program(1):
        assert projections_obstacle(x, widths=[256] * 4, biases=WIDE_BIASES) is None
    found = projections_obstacle(x, widths=[256] * 4, biases=WIDE_BIASES)
    assert found == "the table prefers the Triton program"


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
        (lambda: transition_obstacle(empty(1, 16, 64, 64)), "64 channels with 512 hidden ones"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), 128), "128 channels with 128 hidden ones"),
        (lambda: transition_obstacle(empty(1, 3, 21, C)), "rows do not come in tiles of 64"),
        (lambda: transition_obstacle(empty(1, 16, 128, C)[:, :, :64]), "rows do not lie densely"),
        (lambda: transition_obstacle(empty(1, 16, 64, C, dtype=torch.float32)), "float32 is not bfloat16"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), d_out=empty(1, 64, 16, C).transpose(1, 2)), "gradients of"),
        (lambda: transition_obstacle(empty(1, 16, 64, C), d_out=empty(1, 16, 64, C, dtype=torch.float32)), "float32"),
        (lambda: projections_obstacle(empty(1, 4, 64, 256), widths=[256] * 4), "not projections of which the last"),
        (
            lambda: projections_obstacle(empty(1, 4, 64, 256), empty(1, 4, 64), [256] * 4, WIDE_BIASES),
            "not projections of which the last",
        ),
        (lambda: projections_obstacle(empty(1, 4, 64, 256), None, [256, 32], [None, empty(32)]), "weights are not 256"),
        (lambda: projections_obstacle(empty(1, 3, 21, 256), None, [256] * 4, WIDE_BIASES), "rows do not come in"),
        (lambda: product_obstacle(64, 320), "operands are not squares of 256"),
        (lambda: product_obstacle(64, d=empty(1, 64, 256, 320)), "operands are not squares of 256"),
        (lambda: product_obstacle(0), "operands do not lie densely"),
        (lambda: product_obstacle(64, d=empty(1, 256, 256, 64).permute(0, 3, 1, 2)), "operands do not lie densely"),
        (lambda: product_obstacle(64, dtype=torch.float32), "float32 is not bfloat16"),
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
    [((1, 256, 256), True, True), ((1, 128, 256), True, True), ((1, 320, 320), False, False)],
    ids=["one GPU", "DAP 2", "evaluation"],
)
def test_programs_are_preferred_where_they_were_found_faster(compiled, shape, starting, ending):
    z = empty(*shape, C)
    assert (projections_obstacle(z) is None) == starting
    assert (projections_obstacle(empty(1, *shape[:0:-1], C).transpose(1, 2)) is None) == ending
    assert (rows.operands_obstacle(z, [empty(C, C)] * 4) is None) == starting
    assert (output_obstacle(z) is None) == starting
    assert (output_obstacle(z, d_out=torch.empty_like(z)) is None) == starting


@pytest.mark.parametrize(
    ("shares", "pair", "msa", "outer"), [(1, True, True, True), (2, False, True, True), (4, False, False, True)]
)
def test_transitions_and_outer_products_take_gluon_where_it_was_found_faster(compiled, shares, pair, msa, outer):
    z, m = empty(1, 256 // shares, 256, C), empty(1, 128, 256 // shares, 256)
    assert (transition_obstacle(z) is None) == pair
    assert transition_obstacle(z, d_out=torch.empty_like(z)) is not None
    assert (transition_obstacle(m, 1024) is None) == msa
    assert (transition_obstacle(m, 1024, torch.empty_like(m)) is None) == msa
    assert (outer_obstacle(128, 256 // shares, 256) is None) == outer


@pytest.mark.parametrize(
    ("channels", "forward", "backward"), [(128, True, True), (64, False, True), (32, False, False), (16, False, False)]
)
def test_products_take_gluon_where_it_was_found_faster(compiled, channels, forward, backward):
    assert (product_obstacle(channels) is None) == forward
    assert (product_obstacle(channels, d=empty(1, channels, 256, 256)) is None) == backward


def test_whole_chains_keep_the_triton_programs(compiled):
    pair, msa = empty(1, 320, 320, C), empty(1, 128, 320, 256)
    assert None not in [transition_obstacle(pair), transition_obstacle(msa, 1024), outer_obstacle(128, 320, 320)]


def launched(monkeypatch, shape):
    """Which programs the operations of a pair representation launch, forward and backward."""
    from scalefold.kernels.compile_cases import projections, triangle_output, triangle_project

    calls = []
    for module, name in ((gated_attention, "project"), (rows, "operands"), (rows, "output")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: calls.append(f"Gluon {name}"))
    monkeypatch.setattr(linear, "launch", lambda program, *_, **__: calls.append(program.fn.__name__))
    monkeypatch.setattr(triangle, "launch", lambda program, *_, **__: calls.append(program.fn.__name__))
    for module in (input_gradient, triangle):
        monkeypatch.setattr(module, "launch_with_sums", lambda *_, **__: empty(4, 8))
    for module in (linear, triangle):
        monkeypatch.setattr(module, "weight_partials", lambda products: [])
        monkeypatch.setattr(module, "sum_all", lambda *_: pytest.skip("gradients of parameters are not wanted"))
    monkeypatch.setattr(triangle, "projected_partials", lambda *_: [])
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


@pytest.mark.parametrize("hopper", [0, 1])
def test_other_operations_take_what_the_tables_prefer(compiled, monkeypatch, hopper):
    calls = []
    for name in ("outer_product", "transition"):
        monkeypatch.setattr(rows, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(transition, "launch", lambda *_, **__: calls.append("Triton"))
    monkeypatch.setattr(outer_product, "_contract", lambda *_: calls.append("Triton"))
    x, norm, weights = empty(1, 128, 256, 256), [empty(256)] * 2, [empty(1024, 256), empty(1024), empty(256, 1024)]
    z, a, b, counts = empty(1, 64, 16, C), empty(1, 8, 64, 32), empty(1, 8, 16, 32), empty(1, 64, 16)
    with every_program(hopper):
        outer_product.outer_product_update(z, a, b, counts, empty(C, 1024), empty(C))
        transition.transition(x, *norm, *weights, empty(256))
    assert calls == (["outer_product", "transition"] if hopper else ["Triton"] * 2)


def test_operations_say_once_why_they_stay_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    with caplog.at_level(logging.INFO), every_program(0):
        assert launched(monkeypatch, (1, 256, 256)) + launched(monkeypatch, (1, 256, 256)) == 2 * TRITON
    names = ["projections", "operands of a triangle's product", "output of a triangle", "gates of a triangle's output"]
    assert caplog.messages == [f"kernels: Triton {name}: the table prefers the Triton program" for name in names]


def test_where_gluon_is_another_one_operations_stay_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    for module in (gated_attention, rows):
        monkeypatch.setattr(module, "MISSING", "this Triton's Gluon is another one: no `tma`")
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
        rows.by_rows(x.transpose(1, 2), (0, 2, 1)),
        rows.by_rows(half, (0, 1, 2)),
        rows._by_channels(first.permute(0, 2, 3, 1), (0, 1, 2)),
    ]
    wanted = [x.view(6, 8), half.reshape(4, 16), first.view(8, 16)]
    assert [None if a is None else a.tolist() for a in found] == [b.tolist() for b in wanted]
    assert rows.by_rows(x.transpose(1, 2), (0, 1, 2)) is None


COMPILED = """
from contextlib import ExitStack
import torch
from compile_hopper import SERIALIZED, assembler_log
from compile_targets import SHARED_LIMIT, compile_launch, recorded_launches
from scalefold.kernels import compile_cases as cases
from scalefold.kernels import tuning
from scalefold.kernels.hopper import gradients
pair = (1, 256, 256)
with tuning.assume_capability(90), recorded_launches() as launches:
    cases.triangle_project(pair, 128)
    cases.triangle_products(128, False)
    cases.triangle_products(128, True)
    cases.triangle_output(pair, 128)
    with ExitStack() as stack:
        names = ("outer_product_hopper", "transition_hopper", "transition_hopper_gradient", "gated_output_hopper")
        names += ("norm_linear_hopper_wide", *gradients.NAMES)
        for name in (*names, "transition_hopper_hidden"):
            stack.enter_context(tuning.override(name, {"HOPPER": int(name != "transition_hopper_hidden")}))
        cases.outer_product_update(128, 256)
        cases.transitions(pair, 128, 4)
        cases.transitions((1, 128, 256), 256, 4)
        for name, choice in (("gradient", 0), ("input", 1), ("weights", 1), ("hidden", 1)):
            stack.enter_context(tuning.override(f"transition_hopper_{name}", {"HOPPER": choice}))
        cases.transitions(pair, 128, 4)
        stack.enter_context(tuning.override("transition_hopper_gradient", {"HOPPER": 1}))
        cases.transitions((1, 128, 256), 256, 4)
        cases.outer_product_project((1, 128, 256), 256)
        for transposed in (False, True):
            cases.projections(pair, 128, [128] * 4 + [4], transposed)
            cases.gated(pair, 128, 4, 32, transposed)
        cases.gated((1, 128, 256), 256, 8, 32)
        cases.projections((1, 128, 256), 256, [256] * 4)
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
    environment = script_environment(repository, tmp_path)
    finished = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    programs = ["hopper_operands", *["hopper_product"] * 4, "hopper_output", "hopper_output"]
    programs += [
        *["hopper_outer_product", "hopper_outer_weight", "hopper_outer_operand", "hopper_outer_operand"],
        *["hopper_transition", "hopper_transition_gradient"] * 2,
        "hopper_weight_gradients",
        *("hopper_transition", "hopper_transition_input", "hopper_transition_weights"),
        *("hopper_transition", "hopper_transition_hidden", "hopper_weight_gradients", "hopper_weight_gradients"),
        *["hopper_projections", "hopper_gated_output", "hopper_gated_gradient"] * 2,
        *("hopper_wide_gated_output", "hopper_gated_gradient"),
        "hopper_wide_projections",
    ]
    assert finished.stdout.splitlines() == [f"{program} 0" for program in programs]
