"""Input gradients of projections in Gluon: which calls the program takes and that it compiles, without a GPU; what it
computes, on one of 9.0.

Triton's interpreter cannot run Gluon.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch
import triton.language as tl

from scalefold.kernels import choice, tuning
from scalefold.kernels.hopper import attention
from scalefold.kernels.hopper import input_gradient as hopper
from scalefold.kernels.ops import linear

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
PREFERRED = {"HOPPER": 1, "DEPTH": 4, "REGISTERS": 240}
C = hopper.CHANNELS


@pytest.fixture
def scripts(repository, monkeypatch):
    """The folder of the scripts can be imported from."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))


@pytest.fixture
def compiled(monkeypatch):
    """As outside the interpreter, for 9.0."""
    for module in (hopper, attention):
        monkeypatch.setattr(module, "INTERPRETED", tl.constexpr(False))
    with tuning.assume_capability(90):
        yield


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def by_channels(rows=(1, 8, 64)):
    return empty(rows[0], C, *rows[1:]).permute(0, 2, 3, 1)


def call(rows=(1, 8, 64), count=4, heads=4, **changed):
    """Arguments of an obstacle by name."""
    narrow = [heads] * bool(heads)
    given = {
        "x": empty(*rows, C),
        "row_mask": None,
        "weights": [empty(C, C)] * count + [empty(h, C) for h in narrow],
        "ds": [empty(*rows, C)] * count + [empty(rows[0], h, *rows[1:]).movedim(1, -1) for h in narrow],
        "has_bias": [False] * (count - 1) + [True] + [False] * len(narrow),
        "through": empty(*rows, C),
    }
    return given | changed


def obstacle(**given):
    with tuning.override(hopper.KERNEL, PREFERRED):
        return hopper.obstacle(**call(**given))


@pytest.mark.parametrize(("count", "heads"), [(4, 4), (1, 0), (2, 8)])
def test_square_projections_and_a_narrow_one_have_no_obstacle(compiled, count, heads):
    assert obstacle(count=count, heads=heads) is None
    assert obstacle(count=count, heads=heads, through=None) is None


def test_transposed_rows_slices_and_channels_that_lie_first_have_no_obstacle(compiled):
    x = empty(1, 64, 8, C).transpose(1, 2)
    assert obstacle(x=x, ds=[x], through=x, count=1, heads=0) is None
    assert obstacle(ds=[empty(1, 8, 64, 2 * C).chunk(2, -1)[1]], count=1, heads=0) is None
    assert obstacle(x=by_channels(), through=None, count=1, heads=0) is None


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("float32 is not bfloat16", {"x": empty(1, 8, 64, C, dtype=torch.float32)}),
        ("not one to 4 weights 128 x 128", {"count": 5}),
        ("a row mask, or biases of other projections than the last wide one", {"row_mask": empty(1, 8, 64)}),
        ("a row mask, or biases of other projections than the last wide one", {"has_bias": [True] * 5}),
        ("more than one narrow weight, or more than 8 rows of it", {"heads": 12}),
        ("rows do not come in tiles of 64", {"rows": (1, 8, 60)}),
        ("channels that lie first, and a residual connection", {"x": by_channels(), "count": 1, "heads": 0}),
        ("rows do not lie densely", {"through": empty(1, 8, 64, C).expand(1, 8, 64, C)[:, :1].expand(1, 8, 64, C)}),
    ],
)
def test_other_calls_stay_with_triton(compiled, reason, changed):
    assert obstacle(**changed) == reason


def test_without_an_entry_in_the_tables_triton_is_preferred(compiled, monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda target: {})
    tuning._resolved.cache_clear()
    found = hopper.obstacle(**call())
    tuning._resolved.cache_clear()
    assert found == "the table prefers the Triton program"


def test_other_gpus_have_an_obstacle(compiled):
    with tuning.assume_capability(80):
        assert obstacle() == "compute capability 8.0 is not 9.0"


@pytest.mark.parametrize("preferred", [True, False])
def test_a_backward_takes_the_program_that_the_table_prefers_and_says_so(compiled, monkeypatch, caplog, preferred):
    choice._explained.clear()
    calls = []
    monkeypatch.setattr(hopper, "input_gradient", lambda *_: calls.append("Gluon"))
    monkeypatch.setattr(linear, "launch_with_sums", lambda *_, **__: calls.append("Triton"))
    given = call()
    mask = given.pop("row_mask")
    x = given.pop("x")
    with caplog.at_level(logging.INFO), tuning.override(hopper.KERNEL, PREFERRED | {"HOPPER": int(preferred)}):
        linear.input_gradient(x, empty(C), empty(C), mask, **given)
    line = "kernels: Triton input gradients of projections: the table prefers the Triton program"
    assert calls == ["Gluon" if preferred else "Triton"]
    assert [record.message for record in caplog.records] == ([] if preferred else [line])


def test_as_many_sets_of_tiles_are_used_as_fit_beside_the_weights():
    assert [hopper.deepest(count, True) for count in (1, 2, 4)] == [4, 2, 1]
    assert hopper.deepest(1, False) == 6


def test_the_programs_compile_without_a_gpu_and_their_products_are_not_serialized(repository, tmp_path):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "benchmarks/measure/hopper_gradient.py", "--compile", "--only", "ending", "product_few"]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(finished.stdout.splitlines()) == 3


@on_hopper
@pytest.mark.parametrize("name", ["starting_few", "ending_few", "gate_few", "product_few"])
def test_results_are_as_exact_as_the_twins_and_repeat_bit_for_bit(scripts, name):
    import hopper_gradient as script

    case = next(case for case in script.CASES if case.name == name)
    with torch.no_grad():
        prepared = script.Prepared(case)
        for job in script.jobs_of([case]):
            assert script.measure(job, prepared)["status"] == "ok"
