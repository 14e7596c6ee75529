"""The promise of equal bits: what finds a difference, and on GPUs that there is none."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from scalefold.config import TrainingConfig
from scalefold.kernels.table import REFERENCE
from scalefold.step.graphs import TrainStep
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters
from scalefold.step.reducer import GradientReducer
from scalefold.tune.sound import bits

CLEAN = ["========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
REPORT = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _input_gradient_kernel+0x1c40 in linear.py:140
=========     and Read access at _input_gradient_kernel+0x2a10 in linear.py:140 [508 hazards]
=========     and Read access at _input_gradient_kernel+0x2a90 in linear.py:140 [4 hazards]
=========
========= Warning: Race reported between Read access at void reduce<float>(T1 *)+0x70 in reduce.cu:7
=========     and Write access at void reduce<float>(T1 *)+0x90 in reduce.cu:9
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""

INVALID = """\
========= COMPUTE-SANITIZER
========= Invalid __shared__ read of size 512 bytes
=========     at _input_gradient_kernel+0x5a30 in templates.py:169
=========     by thread (32,0,0) in block (4,0,0)
=========     Access to 0x8200 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x2a5d] in __triton_launcher.so
=========
========= Invalid __shared__ read of size 512 bytes
=========     at _input_gradient_kernel+0x5a30 in templates.py:169
=========
========= Invalid __global__ write of size 4 bytes
=========     at void copy<float>(T1 *)+0x70 in copy.cu:7
=========
========= ERROR SUMMARY: 3 errors
"""


@pytest.fixture
def script(repository, monkeypatch):
    """Benchmark scripts by name."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    return __import__


def arguments(**changed) -> argparse.Namespace:
    """A command line, as far as steps look at it."""
    return argparse.Namespace(**{"passes": [1, 2], "repeats": 3, "set": [], "digests": None} | changed)


def small_step(disturb) -> TrainStep:
    """A step of one layer; ``disturb`` changes the loss of a call with so many passes."""
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(4, 4)
    flat = FlatParameters(model, torch.device("cpu"))

    def objective(batch, passes):
        output = torch.nn.functional.dropout(model.layer(batch["x"]), 0.5).square().sum() * passes
        return output * disturb(passes), {"term": output.detach()}

    step = TrainStep(objective, Optimizer(flat, TrainingConfig(), REFERENCE), GradientReducer(flat, None))
    step.model = model
    return step


@pytest.fixture
def rows_of(script, monkeypatch):
    """Rows and digests of ``small_step`` on this process alone."""
    reproducibility = script("reproducibility")
    config = SimpleNamespace(data=SimpleNamespace(num_recycling_iters=3))

    def rows(disturb, **changed):
        torch.manual_seed(3)
        batch = SimpleNamespace(features={"x": torch.ones(1, 4)}, shape=SimpleNamespace(batch_size=1))
        built = (small_step(disturb), batch, config)
        monkeypatch.setattr(reproducibility, "build", lambda *_: built)
        host = reproducibility.Host(0, 1, torch.device("cpu"), None, None)
        return reproducibility.step_rows(host, (1, 1), arguments(**changed))

    return rows


def test_bits_tell_apart_what_numbers_do_not():
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.zeros(2)
    assert bits.differences([nan, zero], [nan.clone(), zero.clone()]) == []
    (found,) = bits.differences([nan, zero], [nan.clone(), -zero])
    assert (found.result, found.elements, found.largest) == (1, 2, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_one_changed_bit_of_any_type_is_found(dtype):
    first = torch.ones(3, 5, dtype=dtype).t()
    again = first.clone()
    bits.bits(again)[2, 1] ^= 1
    (found,) = bits.differences([first], [again])
    assert found.elements == 1
    assert found.shape == (5, 3)


def test_repeats_that_differ_from_the_first_are_counted():
    turns, values = [], iter([1.0, 1.0, 2.0, 1.0, 3.0])
    found = bits.repeat(lambda: [torch.tensor([next(values)])], 4, between=turns.append)
    assert turns == [0, 1, 2, 3]
    assert [different[0].largest for different in found] == [1.0, 2.0]


def test_a_result_in_a_buffer_that_is_used_again_is_compared_with_the_first():
    buffer = torch.zeros(1)
    assert len(bits.repeat(lambda: [buffer.add_(1)], 3, between=lambda turn: None)) == 3


def test_steps_from_one_seed_are_equal_although_dropout_is_on(rows_of):
    rows, digests = rows_of(lambda passes: 1.0)
    assert [(row["what"], row["passes"], row["repeats"], row["differing"]) for row in rows] == [
        ("step", 1, 3, 0),
        ("step", 2, 3, 0),
    ]
    assert len(set(digests.values())) == 2
    assert rows_of(lambda passes: 1.0)[1] == digests


def test_a_step_whose_gradient_differs_once_is_counted_for_its_number_of_passes(rows_of, capsys):
    calls = iter([1.0, 1.0, 1.0, 1.0 + 1e-6])  # warm-up; first; two repeats; then as before
    rows, _ = rows_of(lambda passes: next(calls, 1.0) if passes == 2 else 1.0)
    assert [row["differing"] for row in rows] == [0, 1]
    assert "R=2 repeat 1 DIFFERS; gradients of: layer" in capsys.readouterr().out


def test_an_earlier_process_with_other_bits_is_named(script, tmp_path):
    unequal, file = script("reproducibility").unequal_digests, tmp_path / "digests.json"
    assert unequal(file, {"step R=1": "a"}) == []
    assert unequal(file, {"step R=1": "a", "step R=2": "b"}) == []
    assert unequal(file, {"step R=1": "c", "step R=2": "b"}) == ["step R=1"]
    assert json.loads(file.read_text()) == {"step R=1": "a", "step R=2": "b"}


def test_a_call_that_is_cut_off_keeps_the_layouts_before(script, monkeypatch, tmp_path):
    reproducibility = script("reproducibility")

    def step_rows(host, layout, asked):
        if layout[1] == 1:
            raise SystemExit(143)
        return [reproducibility.result_row("step", layout[1], 1, 3, 0)], {}

    monkeypatch.setattr(reproducibility, "step_rows", step_rows)
    monkeypatch.setattr(reproducibility, "facts", lambda: {"commit": "abc"})
    host = reproducibility.Host(0, 2, torch.device("cpu"), None, None)
    with pytest.raises(SystemExit):
        reproducibility.all_step_rows(host, [2, 1], arguments(csv=tmp_path / "rows.csv", small=False))
    assert (tmp_path / "rows.csv").read_text() == "commit,what,dap,passes,repeats,differing\nabc,step,2,1,3,0\n"


def test_an_operation_that_does_not_run_is_no_success(script):
    reproducibility = script("reproducibility")
    case = reproducibility.operation_cases.Case("broken", "2x2", 1, lambda: 1 / 0)
    assert reproducibility.differing_repeats(case, 2) == "error"


def test_operations_of_every_share_are_asked_about(script, monkeypatch):
    reproducibility = script("reproducibility")
    monkeypatch.setattr(reproducibility, "differing_repeats", lambda case, repeats: int("transition" in case.name))
    rows = reproducibility.operation_rows([1, 8], [], 5)
    assert {row["dap"] for row in rows} == {1, 8}
    assert any(row["what"].startswith("layer_norm_linear 1x32x256x128to") for row in rows)
    assert all(row["differing"] == int("transition" in row["what"]) for row in rows)


@pytest.mark.long
def test_the_script_runs_on_the_cpu(repository):
    command = [sys.executable, "benchmarks/measure/reproducibility.py", "--small", "--repeats", "1", "--passes", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 questions, 0 with differing bits" in done.stdout


@pytest.mark.long
@pytest.mark.distributed
def test_the_script_runs_on_two_ranks_of_the_cpu(repository):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--small", "--repeats", "1", "--passes", "1", "--dap", "2", "1"]
    command = [*torchrun, "benchmarks/measure/reproducibility.py", *options]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 questions, 0 with differing bits" in done.stdout
    assert "step of 2 replicas" in done.stdout


def test_hazards_of_a_report_are_summed_by_kernel(script):
    found = script("sanitize").hazards(REPORT.splitlines())
    assert found == {("_input_gradient_kernel", "error"): 512, ("reduce", "warning"): 1}


@pytest.mark.parametrize(
    ("reached", "reports", "status"),
    [
        (["a", "b"], [CLEAN, CLEAN], 0),
        (["a"], [CLEAN, CLEAN], 1),
        (["a", "b"], [CLEAN, REPORT.splitlines()], 1),
        (["a", "b"], [CLEAN, []], 1),
    ],
    ids=["clean", "not reached", "hazards", "no report"],
)
def test_only_whole_reports_without_hazards_are_a_success(script, reached, reports, status):
    assert script("sanitize").summarise("racecheck", ["a", "b"], reached, reports) == status


def test_accesses_to_memory_that_is_nobody_s_are_counted_by_kernel(script):
    sanitize, report = script("sanitize"), INVALID.splitlines()
    expected = {("_input_gradient_kernel", "Invalid __shared__ read"): 2, ("copy", "Invalid __global__ write"): 1}
    assert sanitize.invalid_accesses(report) == expected
    clean = ["========= ERROR SUMMARY: 0 errors"]
    assert sanitize.summarise("memcheck", ["a"], ["a"], [clean]) == 0
    assert sanitize.summarise("memcheck", ["a"], ["a"], [report]) == 1
    assert sanitize.summarise("memcheck", ["a"], ["a"], [clean[:0]]) == 1


def test_processes_under_the_sanitizer_share_all_cases(script):
    race = script("sanitize")
    parts = [list(race.chosen_cases([8], [], number, 3)) for number in range(3)]
    assert all(parts)
    assert sorted(name for part in parts for name in part) == sorted(race.chosen_cases([8], []))


@pytest.mark.gpu
def test_every_operation_gives_the_same_bits_again(script):
    assert torch.cuda.is_available()
    rows = script("reproducibility").operation_rows([1], [], repeats=4)
    assert rows
    assert [row["what"] for row in rows if row["differing"] != 0] == []


@pytest.mark.own_work(3600)  # many processes compile
@pytest.mark.gpu
def test_whole_steps_give_the_same_bits_again_and_in_another_process(repository, tmp_path):
    command = [
        sys.executable,
        "benchmarks/measure/reproducibility.py",
        "--steps",
        "--digests",
        str(tmp_path / "digests.json"),
    ]
    for _ in range(2):
        check(command, repository, tmp_path)


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
def test_steps_of_two_gpus_give_the_same_bits_again(repository, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    check([*torchrun, "benchmarks/measure/reproducibility.py", "--steps", "--dap", "2", "1"], repository, tmp_path)


def check(command: list[str], repository: Path, folder: Path) -> None:
    """Three repeats; rows go to a table of the test's own."""
    options = ["--repeats", "3", "--csv", str(folder / "rows.csv")]
    done = subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
