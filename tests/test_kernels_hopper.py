"""Attention in Gluon: which calls it takes and that it compiles, without a GPU; what it computes, on one of 9.0.

Triton's interpreter cannot run Gluon.
"""

import os
import subprocess
import sys

import pytest
import torch

from scalefold.kernels import tuning
from scalefold.kernels.hopper import attention as hopper

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
PREFERRED = {"HOPPER": 1}


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper, "INTERPRETED", False)
    with tuning.assume_capability(90):
        yield


def rows_of(rows=3, n=256, heads=2, width=32, dtype=torch.bfloat16):
    return torch.empty(1, rows, n, heads, width, dtype=dtype, device="meta")


def forward_obstacle(x, inf=1e9):
    with tuning.override("attention_hopper_forward", PREFERRED):
        return hopper.forward_obstacle(x, x, x, None, inf)


@pytest.mark.parametrize("n", [65, 128, 201, 256])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_rows_of_up_to_256_keys_have_no_obstacle(compiled, n, width):
    assert forward_obstacle(rows_of(n=n, width=width)) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_and_transposed_views_have_no_obstacle(compiled, transposed):
    x = torch.empty(1, 256, 3, 256, 2, 32, dtype=torch.bfloat16, device="meta").unbind(2)[1]
    assert forward_obstacle(x.transpose(1, 2) if transposed else x) is None


@pytest.mark.parametrize(
    ("x", "inf", "reason"),
    [
        (rows_of(dtype=torch.float32), 1e9, "float32 is not bfloat16"),
        (rows_of(n=257), 1e9, "rows of 257 keys"),
        (rows_of(n=64), 1e9, "rows of 64 keys"),
        (rows_of(width=64), 1e9, "64 channels"),
        (rows_of(), 1e5, "a mask of 100000 does not swallow scores"),
        (torch.empty(1, 3, 256, 2, 36, dtype=torch.bfloat16, device="meta")[..., :32], 1e9, "16 bytes"),
        (torch.empty(1, 3, 1, 2, 32, dtype=torch.bfloat16, device="meta").expand(1, 3, 256, 2, 32), 1e9, "16 bytes"),
    ],
    ids=["float32", "long", "short", "wide", "inf", "strides", "expanded"],
)
def test_what_the_programs_cannot_take_is_named(compiled, x, inf, reason):
    assert reason in str(forward_obstacle(x, inf))


@pytest.mark.parametrize("target", [80, 100])
def test_other_compute_capabilities_keep_triton(monkeypatch, target):
    monkeypatch.setattr(hopper, "INTERPRETED", False)
    with tuning.assume_capability(target):
        assert forward_obstacle(rows_of()) == f"compute capability {target / 10} is not 9.0"


def test_the_interpreter_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(hopper, "INTERPRETED", True)
    assert forward_obstacle(rows_of()) == "the interpreter cannot run Gluon"


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
def test_without_an_entry_in_the_tables_triton_is_preferred(compiled, monkeypatch, kernel):
    monkeypatch.setattr(tuning, "table", lambda target: {})
    tuning._settled.cache_clear()
    x, bias, ds = rows_of(), torch.empty(1, 2, 256, 256, device="meta"), rows_of(width=256)
    found = {
        "forward": hopper.forward_obstacle(x, x, x, bias, 1e9),
        "keys": hopper.keys_obstacle(x, x, x, x, bias, 1e9),
        "queries": hopper.queries_obstacle(x, x, bias, ds),
    }
    tuning._settled.cache_clear()
    assert found[kernel] == "the table prefers the Triton program"


@pytest.mark.parametrize(
    ("rows", "heads", "width", "preferred"),
    [(256, 4, 32, True), (128, 4, 32, True), (124, 8, 32, True), (64, 8, 32, True), (1024, 8, 8, False)],
)
def test_key_gradients_are_preferred_where_they_were_found_faster(compiled, rows, heads, width, preferred):
    x, bias = rows_of(rows=rows, heads=heads, width=width), torch.empty(1, heads, 256, 256, device="meta")
    assert (hopper.keys_obstacle(x, x, x, x, bias, 1e9) is None) == preferred


@pytest.mark.parametrize("rows", [1, 5, 124, 128, 256])
@pytest.mark.parametrize("wanted", [1, 4, 16, 33])
def test_no_group_of_rows_is_empty(rows, wanted):
    groups, per_program = hopper._groups(rows, {"GROUPS": wanted})
    assert groups <= wanted
    assert (groups - 1) * per_program < rows <= groups * per_program


def test_without_gluon_everything_imports_and_the_reason_is_known(repository):
    program = (
        "import sys; sys.modules['triton.experimental.gluon.language'] = None\n"
        "import torch\n"
        "from scalefold.kernels.hopper import attention\n"
        "x = torch.empty(1, 2, 256, 2, 32, dtype=torch.bfloat16, device='meta')\n"
        "print(attention.forward_obstacle(x, x, x, None, 1e9))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert "this Triton's Gluon is another one" in finished.stdout, finished.stderr


def test_the_programs_compile_without_a_gpu_and_their_products_are_not_serialized(repository, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "benchmarks/measure/compile_hopper.py", "--only", "msa_row", "--first"]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = [line.split() for line in finished.stdout.splitlines()]
    assert [line[1] for line in lines[:3]] == ["forward", "keys", "queries"]


LOOPS = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P0 FFMA R1, R1, R2, R3 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""


def test_instructions_are_counted_in_the_innermost_loop(scripts):
    pytest.importorskip("triton")
    import compile_hopper

    assert [len(loop) for loop in compile_hopper.innermost_loops(LOOPS)] == [3]
    each, kinds = compile_hopper.per_score(LOOPS, keys=2)  # 64 lines of 2 keys: one score per thread
    assert each == 3.0
    assert kinds == "HGMMA:1.00 FFMA:1.00 BRA:1.00"


def case_of(name):
    import hopper_cases

    return next(case for case in hopper_cases.CASES if case.name == name)


GPU_CASES = [
    "triangle_start",
    "triangle_end",
    "msa_row_124",
    "msa_column_dap2",
    "awkward",
    "awkward_column",
    "template",
]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", GPU_CASES)
def test_gluon_is_as_exact_as_its_twin_and_repeats_its_bits(scripts, name):
    import bits
    import hopper_cases as cases

    case = case_of(name)
    inputs = cases.inputs_of(case, "cuda")
    exact, saved = cases.exact_results(inputs), cases.saved_results(inputs)
    for pass_ in (*case.passes, "all"):
        call = cases.call_of(pass_, cases.HOPPER, inputs, saved)
        found = call()
        own, other = (cases.errors(x, exact, inputs.mask) for x in (found, {k: saved[k] for k in found}))
        assert cases.too_large(own, other) == [], (pass_, own, other)
        assert bits.repeat(lambda call=call: list(call().values()), 3) == [], pass_


@pytest.mark.gpu
@on_hopper
def test_rows_without_any_key_have_the_statistics_of_the_twin(scripts):
    import hopper_cases as cases

    inputs = cases.inputs_of(case_of("triangle_masked"), "cuda")
    found, expected = (cases.run_forward(how, inputs) for how in (cases.HOPPER, cases.TWIN))
    empty = ~inputs.mask.any(-1)
    for name in ("lse", "rest"):
        torch.testing.assert_close(found[name][empty], expected[name][empty], rtol=1e-5, atol=0, msg=name)
