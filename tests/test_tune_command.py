"""The whole of ``scalefold tune`` on a recorded device: what it leaves behind, whenever it ends."""

import builtins
import csv
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from processes import compiling_environment
from recorded_device import Compiled, Record
from scalefold.errors import DeviceError
from scalefold.kernels import tuning
from scalefold.tune import command, trials
from scalefold.tune.command import Request, tune
from scalefold.tune.programs import Problem, Program
from scalefold.tune.sweep import REPEATS
from scalefold.tune.trials import config_text

KERNEL = "layer_norm_forward"
BEST = {"BLOCK_M": 16, "num_warps": 8}


def us_of(config):
    """Least at BEST."""
    return 100.0 + 60 * sum(config[name] != value for name, value in BEST.items())


def problems_of(cases, n):
    """The kernel at the rows of a layer norm; what kernels look up cannot be seen in the interpreter."""
    case = cases[n]
    fields: dict[str, int | str] = {"rows": 1024 * (n + 1), "c": 128, "dtype": "bfloat16"}
    return [Problem(KERNEL, fields, n, False)] if case.operation == "layer_norm" else []


@pytest.fixture
def machine(tmp_path, monkeypatch, tables_read_anew):
    """A machine with a recorded GPU and tables of its own; what it is called with is the device that it has."""
    device = Record(us_of)
    shutil.copytree(tuning.TABLES, tmp_path / "tuned", ignore=shutil.ignore_patterns("nvidia*"))
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(tuning, "device_kind", lambda: "a_gpu")
    monkeypatch.setattr(tuning, "_device_capability", lambda: 90)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    facts = {"date": "d", "device": "A GPU", "torch": "t", "code": "c"}
    monkeypatch.setattr(trials, "facts", lambda: facts)
    monkeypatch.setattr(command, "find_problems", problems_of)
    monkeypatch.setattr(command, "Device", lambda cases: device)
    monkeypatch.setattr(command, "Processes", lambda *state: Compiled())
    monkeypatch.setattr(command, "graph_microseconds", lambda call, replays, warm_up: 50.0)
    monkeypatch.chdir(tmp_path)
    return device


def request_for(out, **changed):
    return Request(**{"kernels": (KERNEL,), "daps": (4, 8), "minutes": 0.5, "alone": True, "out": out, **changed})


def table_of(folder):
    with (folder / "tuning.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_one_command_leaves_choices_table_picture_and_trials(machine, tmp_path):
    said = []
    rows = tune(request_for(tmp_path / "out"), said.append)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_gpu.json",
        "a_gpu_trials.csv",
        "tuning.csv",
        "tuning.svg",
    }
    chosen = tuning.read_table(tmp_path / "out" / "a_gpu.json")[KERNEL]
    assert len(chosen) == len(rows) == len(table_of(tmp_path / "out")) > 2
    assert all(config == BEST for config in chosen.values())
    assert any("DAP 8: operations with other choices take" in text for text in said)


def test_what_was_settled_before_a_kill_is_in_the_folder(machine, tmp_path):
    """The tables of the package stay on the machine, but a job may keep no more than its output folder."""
    tries, finals = machine.try_out, []

    def killed(problem, config, repeats):
        finals.extend([config] if repeats == REPEATS else [])
        if len(finals) > 3:  # a present choice and its finalist, then a second problem is under way
            raise KeyboardInterrupt
        return tries(problem, config, repeats)

    machine.try_out = killed
    with pytest.raises(KeyboardInterrupt):
        tune(request_for(tmp_path / "out"), lambda text: None)
    assert len(table_of(tmp_path / "out")) == 1
    assert len(tuning.read_table(tmp_path / "out" / "a_gpu.json")[KERNEL]) == 1
    assert trials.read(tmp_path / "out" / "a_gpu_trials.csv")


def test_trials_of_a_search_that_was_killed_are_in_the_folder(machine, tmp_path):
    machine.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        tune(request_for(tmp_path / "out"), lambda text: None)
    assert len(trials.read(tmp_path / "out" / "a_gpu_trials.csv")) == 5


def test_what_made_the_gpu_fail_at_one_problem_is_tried_at_no_other(machine, tmp_path):
    machine.fatal = {config_text(BEST)}
    with pytest.raises(DeviceError, match="the same command goes on after it"):
        tune(request_for(tmp_path / "out"), lambda text: None)
    machine.works, before = True, len(machine.asked)
    assert tune(request_for(tmp_path / "out"), lambda text: None)
    later = {text for text, _ in machine.asked[before:]}
    assert later
    assert config_text(BEST) not in later


FAILS = """
import sys
from scalefold.cli import main
from scalefold.errors import DeviceError
from scalefold.tune import command

def fails(request):
    raise DeviceError("the GPU fails, the same command goes on after it")

command.tune = fails
sys.argv = ["scalefold", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the new process would search")
@pytest.mark.parametrize(("minutes", "asked"), [("3", "no CUDA device"), ("0.4", "the GPU fails")])
def test_a_new_process_goes_on_after_a_failure_of_the_gpu_if_there_is_time(minutes, asked):
    """Here it has no GPU at all."""
    environment = compiling_environment()
    command_line = [sys.executable, "-c", FAILS, "tune", "--dap", "4", "--minutes", minutes]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert asked in done.stderr.splitlines()[-1]
    assert ("a new process does, for 3.0 minutes" in done.stdout) == (minutes == "3")


def test_a_second_call_tries_nothing_again_that_was_tried(machine, tmp_path):
    tune(request_for(tmp_path / "out"), lambda text: None)
    before = {(row.key, row.config) for row in trials.read(trials.own_file())}
    first = len(machine.asked)
    tune(request_for(tmp_path / "out"), lambda text: None)
    after = [(row.key, row.config) for row in trials.read(trials.own_file())]
    assert len(after) == len(set(after))
    assert before <= set(after)
    assert len(machine.asked) - first < first


def test_a_machine_without_matplotlib_gets_no_picture_and_all_the_rest(machine, tmp_path, monkeypatch):
    original, said = builtins.__import__, []

    def without(name, *arguments, **named):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    assert tune(request_for(tmp_path / "out"), said.append)
    assert said[-1] == "no picture: No module named 'matplotlib'"
    assert table_of(tmp_path / "out")


def test_where_the_time_is_over_the_sums_say_what_they_lack(machine, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(command, "CHOICES_SHARE", 1e4)
    monkeypatch.setattr(command, "SEARCH_SHARE", 1e4)
    rows = tune(request_for(tmp_path / "out", minutes=0.001), said.append)
    assert rows
    assert any("the time is over: " in text and "changed operations were not timed" in text for text in said)


def test_nothing_that_does_not_compile_is_in_the_trials_with_a_time(machine, tmp_path, monkeypatch):
    bad = {"BLOCK_M": 16, "num_warps": 8}
    unfit = Compiled(lambda config: Program(error="does not compile" if config == bad else "", programs=64))
    monkeypatch.setattr(command, "Processes", lambda *state: unfit)
    tune(request_for(tmp_path / "out"), lambda text: None)
    assert config_text(bad) not in {text for text, _ in machine.asked}
    rows = [row for row in trials.read(trials.own_file()) if row.config == config_text(bad)]
    assert rows
    assert not [row for row in rows if row.us is not None]
