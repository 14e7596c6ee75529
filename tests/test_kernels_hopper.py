"""Attention in Gluon, forward and gradients, without a GPU: which calls the programs take and that they compile.

Triton's interpreter cannot run Gluon. What the programs compute: ``test_kernels_hopper_attention``.
"""

import logging
import subprocess
import sys

import pytest
import torch
import triton.language as tl

from processes import compiling_environment
from scalefold.kernels import choice, tuning
from scalefold.kernels.hopper import attention as hopper
from scalefold.kernels.hopper import choice as hopper_choice
from scalefold.kernels.ops import attention as twin

PREFERRED = {"HOPPER": 1}


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def rows_of(rows=3, n=256, heads=2, width=32, dtype=torch.bfloat16):
    return torch.empty(1, rows, n, heads, width, dtype=dtype, device="meta")


def bias_of(heads=2, n=256, dtype=torch.bfloat16):
    return torch.empty(1, heads, n, n, dtype=dtype, device="meta")


def obstacle(x, inf=1e9, bias=None):
    """That of keys' gradients."""
    with tuning.override("attention_hopper_keys", PREFERRED):
        return hopper.keys_obstacle(x, x, x, x, bias_of() if bias is None else bias, inf)


def rows_obstacle(x, inf=1e9):
    """That of the gradients without a bias."""
    with tuning.override("attention_hopper_rows", PREFERRED):
        return hopper.rows_obstacle(x, x, x, x, inf)


def forward_obstacle(x, bias=None):
    with tuning.override("attention_hopper_forward", PREFERRED):
        return hopper.forward_obstacle(x, x, x, bias)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("rows", [1, 5, 124, 256])
def test_a_forward_takes_rows_of_256_keys_with_a_bias_and_of_128_without(compiled, rows, width):
    assert forward_obstacle(rows_of(rows, n=256, width=width), bias_of()) is None
    assert forward_obstacle(rows_of(rows, n=128, width=width)) is None


@pytest.mark.parametrize(
    ("n", "bias"), [(128, bias_of(n=128)), (192, bias_of(n=192)), (704, bias_of(n=704)), (256, None)]
)
def test_a_forward_says_the_same_of_all_other_lengths(compiled, n, bias):
    """An evaluation has many, and the log gets a line per reason."""
    assert forward_obstacle(rows_of(n=n), bias) == "rows are not of 256 keys with a bias or 128 without"


def test_a_forward_takes_the_columns_of_a_projection_s_third(compiled):
    x = torch.empty(1, 128, 256, 3 * 256, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert [forward_obstacle(part.unflatten(-1, (8, 32))) for part in x.chunk(3, -1)] == [None] * 3


@pytest.mark.parametrize(
    ("x", "bias", "reason"),
    [
        (rows_of(dtype=torch.float32), bias_of(), "float32 is not bfloat16"),
        (rows_of(), bias_of(dtype=torch.float32), "float32 is not bfloat16"),
        (rows_of(width=64), bias_of(), "64 channels per head"),
        (torch.empty(1, 3, 256, 2, 36, dtype=torch.bfloat16, device="meta")[..., :32], bias_of(), "16 bytes"),
    ],
    ids=["float32", "float32 bias", "wide", "strides"],
)
def test_what_a_forward_cannot_take_is_named(compiled, x, bias, reason):
    assert reason in str(forward_obstacle(x, bias))


@pytest.mark.parametrize("n", [129, 201, 256])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_rows_of_129_to_256_keys_have_no_obstacle(compiled, n, width):
    assert obstacle(rows_of(n=n, width=width)) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_and_transposed_views_have_no_obstacle(compiled, transposed):
    x = torch.empty(1, 256, 3, 256, 2, 32, dtype=torch.bfloat16, device="meta").unbind(2)[1]
    assert obstacle(x.transpose(1, 2) if transposed else x) is None


@pytest.mark.parametrize(
    ("x", "inf", "reason"),
    [
        (rows_of(dtype=torch.float32), 1e9, "float32 is not bfloat16"),
        (rows_of(n=257), 1e9, "rows of 257 keys"),
        (rows_of(n=128), 1e9, "rows of 128 keys"),
        (rows_of(width=64), 1e9, "64 channels"),
        (rows_of(), 1e5, "a mask of 100000 does not swallow scores"),
        (torch.empty(1, 3, 256, 2, 36, dtype=torch.bfloat16, device="meta")[..., :32], 1e9, "16 bytes"),
        (torch.empty(1, 3, 1, 2, 32, dtype=torch.bfloat16, device="meta").expand(1, 3, 256, 2, 32), 1e9, "16 bytes"),
    ],
    ids=["float32", "long", "short", "wide", "inf", "strides", "expanded"],
)
def test_what_the_programs_cannot_take_is_named(compiled, x, inf, reason):
    assert reason in str(obstacle(x, inf))


@pytest.mark.parametrize("n", [65, 100, 128])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_rows_of_65_to_128_keys_without_a_bias_have_no_obstacle(compiled, n, width):
    assert rows_obstacle(rows_of(n=n, width=width)) is None


@pytest.mark.parametrize(
    ("x", "inf", "reason"),
    [
        (rows_of(n=64), 1e9, "rows of 64 keys, not 65 to 128"),
        (rows_of(n=129), 1e9, "rows of 129 keys"),
        (rows_of(n=128, width=64), 1e9, "64 channels"),
        (rows_of(n=128, dtype=torch.float32), 1e9, "float32 is not bfloat16"),
        (rows_of(n=128), 1e5, "a mask of 100000 does not swallow scores"),
    ],
    ids=["short", "long", "wide", "float32", "inf"],
)
def test_what_gradients_without_a_bias_cannot_take_is_named(compiled, x, inf, reason):
    assert reason in str(rows_obstacle(x, inf))


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
def test_gradients_of_the_msa_s_columns_are_preferred_in_gluon(compiled, dap_size):
    x = rows_of(256 // dap_size, n=128, heads=8)
    assert hopper.rows_obstacle(x, x, x, x, 1e9) is None


@pytest.mark.parametrize("target", [80, 100])
def test_other_compute_capabilities_keep_triton(monkeypatch, target):
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(target):
        reason = f"compute capability {target / 10} is not 9.0"
        assert (obstacle(rows_of()), forward_obstacle(rows_of(), bias_of())) == (reason, reason)


def test_the_interpreter_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(True))
    reason = "the interpreter cannot run Gluon"
    assert (obstacle(rows_of()), forward_obstacle(rows_of(), bias_of())) == (reason, reason)


def test_a_bias_of_another_type_is_named(compiled):
    assert obstacle(rows_of(), bias=bias_of(dtype=torch.float32)) == "float32 is not bfloat16"


def test_without_an_entry_in_the_tables_triton_is_preferred(compiled, monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda target: {})
    tuning._resolved.cache_clear()
    x = rows_of()
    found = hopper.keys_obstacle(x, x, x, x, bias_of(), 1e9), hopper.forward_obstacle(x, x, x, bias_of())
    tuning._resolved.cache_clear()
    assert found == ("the table prefers the Triton program",) * 2


@pytest.mark.parametrize(
    ("rows", "heads", "width", "preferred"),
    [
        (256, 4, 32, True),
        (128, 4, 32, True),
        (124, 8, 32, True),
        (64, 8, 32, True),
        (1024, 8, 8, True),
        (1024, 8, 16, False),
    ],
)
def test_key_gradients_are_preferred_where_they_were_found_faster(compiled, rows, heads, width, preferred):
    x = rows_of(rows=rows, heads=heads, width=width)
    assert (hopper.keys_obstacle(x, x, x, x, bias_of(heads), 1e9) is None) == preferred


@pytest.mark.parametrize("dap_size", [1, 2])
def test_key_gradients_of_templates_are_preferred(compiled, dap_size):
    x = torch.empty(4, 256 // dap_size, 256, 4, 16, dtype=torch.bfloat16, device="meta")
    assert hopper.keys_obstacle(x, x, x, x, bias_of(4).expand(4, -1, -1, -1), 1e9) is None


@pytest.mark.parametrize("dap_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("rows", "n", "heads", "width"),
    [(256, 256, 4, 32), (128, 256, 8, 32), (256, 128, 8, 32), (1024, 256, 8, 8)],
    ids=["triangle", "msa_row", "msa_column", "extra_msa_row"],
)
def test_a_forward_is_preferred_where_it_was_found_faster_and_fills_the_gpu_once(
    compiled, dap_size, rows, n, heads, width
):
    """Larger groups inherit from smaller ones; of 32 rows of a triangle and 32 columns Triton was found faster."""
    x, bias = rows_of(rows // dap_size, n, heads, width), bias_of(heads) if n == 256 else None
    assert (hopper.forward_obstacle(x, x, x, bias) is None) == (
        (x.shape[1], heads, n) not in ((32, 4, 256), (32, 8, 128))
    )
    config = hopper._launch_parameters("attention_hopper_forward", x, bias)
    groups, _ = hopper._groups(x.shape[1], config)
    assert 64 < groups * heads * n // 128 <= hopper.MULTIPROCESSORS


@pytest.mark.parametrize("rows", [320, 704])
def test_columns_of_longer_chains_take_gluon_too(compiled, rows):
    x = rows_of(rows, n=128, heads=8)
    assert hopper.forward_obstacle(x, x, x, None) is None


def taken_forward(monkeypatch, saves, n=256):
    """Which of both implementations a forward takes and whether it saves what a backward wants."""
    calls = []

    def named(name):
        def forward(q, k, v, mask, bias, inf, save):
            calls.append((name, save))
            return torch.empty_like(q), None, None

        return forward

    monkeypatch.setattr(hopper, "forward", named("Gluon"))
    monkeypatch.setattr(twin, "_forward", named("Triton"))
    q, k, v = (rows_of(rows=256, n=n, heads=4).requires_grad_(saves) for _ in range(3))
    twin.attention(q, k, v, torch.ones(1, 256, n, device="meta"), bias_of(4, n), 1e9)
    return calls


@pytest.mark.parametrize("saves", [False, True])
def test_a_forward_takes_gluon_with_gradients_and_without(compiled, monkeypatch, caplog, saves):
    with caplog.at_level(logging.INFO):
        assert taken_forward(monkeypatch, saves) == [("Gluon", saves)]
    assert messages(caplog) == []


def test_the_forwards_of_an_evaluation_say_once_why_they_stay_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    with caplog.at_level(logging.INFO):
        found = [taken_forward(monkeypatch, False, n) for n in (192, 320, 704)]
    assert found == [[("Triton", False)]] * 3
    line = "kernels: Triton attention forward: rows are not of 256 keys with a bias or 128 without"
    assert messages(caplog) == [line]


def taken(monkeypatch, width=32):
    """Which of both implementations a backward takes; nothing is computed."""
    calls = []

    def named(name):
        def gradients(q, k, v, *_):
            calls.append(name)
            return torch.empty_like(k), torch.empty_like(v), None

        return gradients

    monkeypatch.setattr(hopper, "key_gradients", named("Gluon"))
    monkeypatch.setattr(twin, "_key_gradients", named("Triton"))
    monkeypatch.setattr(twin, "_query_gradients", lambda q, k, bias, ds: (torch.empty_like(q), torch.empty_like(bias)))
    for module, name in ((hopper, "forward"), (twin, "_forward")):
        monkeypatch.setattr(module, name, lambda q, *_: (torch.empty_like(q), None, None))
    q, k, v = (rows_of(rows=256, heads=4, width=width).requires_grad_() for _ in range(3))
    mask = torch.ones(1, 256, 256, dtype=torch.bfloat16, device="meta")
    twin.attention(q, k, v, mask, bias_of(4).requires_grad_(), 1e9).sum().backward()
    return calls


def messages(caplog):
    return [record.message for record in caplog.records]


def test_a_backward_takes_gluon_where_nothing_stands_in_its_way(compiled, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert taken(monkeypatch) == ["Gluon"]
    assert messages(caplog) == []


def test_a_backward_without_a_bias_takes_gluon_where_nothing_stands_in_its_way(compiled, monkeypatch):
    def named(name):
        return lambda q, k, v, *_: calls.append(name) or tuple(map(torch.empty_like, (q, k, v)))

    calls = []
    monkeypatch.setattr(hopper, "row_gradients", named("Gluon"))
    monkeypatch.setattr(twin, "_gradients", named("Triton"))
    monkeypatch.setattr(hopper, "forward", lambda q, *_: (torch.empty_like(q), None, None))
    for n in (128, 48):
        q, k, v = (rows_of(rows=256, n=n, heads=8).requires_grad_() for _ in range(3))
        monkeypatch.setattr(twin, "_forward", lambda q, *_: (torch.empty_like(q), None, None))
        twin.attention(q, k, v, torch.ones(1, 256, n, device="meta"), None, 1e9).sum().backward()
    assert calls == ["Gluon", "Triton"]


def test_a_backward_says_once_why_it_stays_with_triton(compiled, monkeypatch, caplog):
    choice._explained.clear()
    with caplog.at_level(logging.INFO):
        assert taken(monkeypatch, width=16) + taken(monkeypatch, width=16) == ["Triton"] * 2
    reason = "the table prefers the Triton program"
    assert messages(caplog) == [
        f"kernels: Triton attention {part}: {reason}" for part in ("forward", "keys' gradients")
    ]


def test_where_gluon_is_another_one_a_backward_stays_with_triton_and_says_so(compiled, monkeypatch, caplog):
    choice._explained.clear()
    monkeypatch.setattr(hopper, "MISSING", "this Triton's Gluon is another one: no `tma`")
    with caplog.at_level(logging.INFO):
        assert taken(monkeypatch) == ["Triton"]
    parts = ("forward", "keys' gradients")
    assert messages(caplog) == [f"kernels: Triton attention {part}: {hopper.MISSING}" for part in parts]


def test_on_other_gpus_there_is_nothing_to_say(monkeypatch, caplog):
    choice._explained.clear()
    monkeypatch.setattr(hopper_choice, "INTERPRETED", tl.constexpr(False))
    with caplog.at_level(logging.INFO), tuning.assume_capability(80):
        assert taken(monkeypatch) == ["Triton"]
    assert messages(caplog) == []


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
        "from scalefold.kernels import triton_ops\n"
        "from scalefold.kernels.hopper import attention\n"
        "x = torch.empty(1, 2, 256, 2, 32, dtype=torch.bfloat16, device='meta')\n"
        "print(attention.keys_obstacle(x, x, x, x, x, 1e9), attention.forward_obstacle(x, x, x, x), sep='\\n')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert finished.stdout.count("this Triton's Gluon is another one") == 2, finished.stderr


PROGRAMS = [
    ("msa_row", "keys", "GROUPS=8 STAGES=2 REGISTERS=224 BLOCK_Q=64"),
    ("msa_column", "rows", "GROUPS=16 STAGES=3 REGISTERS=232"),
    ("msa_row", "forward", "GROUPS=8 STAGES=2"),
    ("msa_column", "forward", "GROUPS=16 STAGES=4"),
]


@pytest.mark.long
@pytest.mark.parametrize(("case", "pass_", "config"), PROGRAMS)
def test_the_programs_compile_without_a_gpu_and_their_products_are_not_serialized(
    repository, tmp_path, case, pass_, config
):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = compiling_environment(tmp_path)
    command = [sys.executable, "benchmarks/measure/compile_hopper.py", "--only", case, "--passes", pass_, "--first"]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.startswith(f"{case}  {pass_}  {config}  ")


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
