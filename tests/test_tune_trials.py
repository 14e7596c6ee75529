"""Trials on the disk, the shipped history, and the command around the search."""

import builtins
import gzip
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from processes import compiling_environment
from scalefold.errors import ConfigError
from scalefold.kernels import tuning
from scalefold.tune import trials
from scalefold.tune.command import Request, fit_model, table_text, tune
from scalefold.tune.model import fit, lessons, resident_programs
from scalefold.tune.picture import draw, progress
from scalefold.tune.trials import Trial, config_text, parse_config

ROW = Trial(
    *("2026-01-01", "NVIDIA H100 80GB HBM3", "2.11", "c0de", "layer_norm_forward", "c=128 dtype=bfloat16 rows=65536"),
    *("layer_norm", 1, 2, "BLOCK_M=8 num_warps=4"),
    us=12.5,
    registers=40,
    bits="equal",
    search="history",
)


def test_trials_come_back_as_they_were_written(tmp_path):
    failed = replace(ROW, us=None, registers=None, bits="", error='CompilationError: "a", b')
    trials.append(tmp_path / "t.csv", [ROW])
    trials.append(tmp_path / "t.csv", [failed])
    trials.write_compressed(tmp_path / "t.csv.gz", [ROW, failed])
    assert trials.read(tmp_path / "t.csv") == trials.read(tmp_path / "t.csv.gz") == [ROW, failed]
    assert parse_config(config_text({"num_warps": 4, "BLOCK_M": 8})) == {"BLOCK_M": 8, "num_warps": 4}


def test_half_a_line_is_no_trial_and_is_replaced_by_the_next(tmp_path):
    file = tmp_path / "t.csv"
    trials.append(file, [ROW])
    whole = file.read_bytes()
    file.write_bytes(whole + whole.splitlines()[1][:30])
    assert trials.read(file) == [ROW]
    trials.append(file, [ROW])
    assert trials.read(file) == [ROW, ROW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("12.5", "fast"), "line 2 is no trial"),
        (lambda text: text.replace("BLOCK_M=8", "BLOCK_M"), "line 2 is no trial"),
        (lambda text: text.replace("kernel,", "colonel,"), "line 1 must name the columns"),
    ],
)
def test_a_file_that_holds_no_trials_is_named_with_its_line(tmp_path, change, message):
    file = tmp_path / "t.csv"
    trials.append(file, [ROW])
    file.write_text(change(file.read_text()))
    with pytest.raises(ConfigError, match=rf"t\.csv: {message}"):
        trials.read(file)


def test_a_broken_compressed_history_is_named(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"x")[:-4])
    with pytest.raises(ConfigError, match=r"t\.csv\.gz: no table of trials"):
        trials.read(tmp_path / "t.csv.gz")


def test_the_shipped_history_is_what_the_tables_of_results_make(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "estimate"))
    import tuning_history

    shipped = trials.read(trials.SHIPPED)
    assert shipped == tuning_history.all_trials()
    assert trials.SHIPPED.stat().st_size < 20 * len(shipped)
    assert {trial.device for trial in shipped} >= {"NVIDIA H200", "NVIDIA H100 80GB HBM3"}
    assert sum(trial.search == "sweep" for trial in shipped) > 500


def test_what_won_unseen_counts_less_than_what_was_timed_beside_others():
    won = replace(ROW, code="other", best_of=12)
    found = lessons([ROW, replace(ROW, config="BLOCK_M=16 num_warps=4", us=25.0), won, replace(ROW, code="alone")])
    assert [round(lesson.distance, 3) for lesson in found] == [0.0, 0.693, 0.0]
    assert [lesson.weight for lesson in found] == [1.0, 1.0, 0.5]


def test_resident_programs_are_limited_by_registers_shared_memory_and_warps():
    assert resident_programs(128, 0, 4, 228 * 1024) == 4
    assert resident_programs(32, 100 * 1024, 4, 228 * 1024) == 2
    assert resident_programs(32, 0, 16, 228 * 1024) == 4
    assert resident_programs(255, 227 * 1024, 16, 228 * 1024) == 1


def test_without_scikit_learn_one_line_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"No module named 'sklearn'; install it with pip install 'scalefold\[tune\]'"
    ):
        fit(lessons([ROW, replace(ROW, us=20.0)]))


def test_without_a_gpu_one_line_says_so():
    with pytest.raises(ConfigError, match="no CUDA device"):
        tune(Request())


def test_a_model_is_fitted_without_a_gpu(tmp_path, monkeypatch, tables_read_anew):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    said = []
    request = Request(model=tmp_path / "models" / "model.npz")
    assert fit_model(request, said.append) is not None
    assert request.model.stat().st_size < 3_000 * len(trials.read(trials.SHIPPED))
    assert said[-1].endswith("model.npz: written")


def test_progress_counts_calls_and_starts_when_every_problem_was_tried_once(tmp_path):
    other = replace(ROW, problem="c=64 dtype=bfloat16 rows=65536", calls=6, us=10.0)
    rows = [ROW, other, replace(ROW, us=6.5), replace(other, us=20.0), replace(other, us=5.0, bits="differ")]
    first = 2 * 12.5 + 6 * 10.0
    assert progress(rows) == pytest.approx([1.0, (2 * 6.5 + 60) / first, (2 * 6.5 + 60) / first])
    draw([*rows, replace(ROW, search="alone")], tmp_path / "picture.svg")
    assert "with history" in (tmp_path / "picture.svg").read_text()


def test_the_table_starts_with_the_largest_gain():
    row = {"kernel": "a", "problem": "n=1", "default_us": 10.0, "best_us": 9.0, "candidates": 4, "config": {"BLOCK": 8}}
    lines = table_text([row, {**row, "kernel": "b", "best_us": 5.0}]).splitlines()
    assert lines[1].split()[:5] == ["b", "n=1", "10.0", "5.0", "50.0%"]
    assert lines[2].split()[-1] == "BLOCK=8"


COMPILED = """
import sys
from pathlib import Path
from scalefold.tune import programs
programs.tuning.TABLES = Path(sys.argv[1])
programs.start_worker([1], [], int(sys.argv[2]), "a_gpu")
print(programs.tuning.lookup("layer_norm_forward", rows=65536, c=128, dtype="bfloat16"))
cases = programs.all_cases([1], [])
n = next(n for n, case in enumerate(cases) if case.name.startswith("layer_norm 1x256x256"))
problem = programs.find_problems(cases, n)[0]
print(programs.compile_task(problem, {"BLOCK_M": 8, "num_warps": 4}))
print(programs.compile_task(problem, {"BLOCK_M": 7, "num_warps": 4}))
"""


@pytest.mark.long
@pytest.mark.parametrize("target", [80, 90, 100])
def test_a_program_is_read_without_a_gpu_and_one_that_does_not_compile_says_why(target, tmp_path, monkeypatch):
    """In a process of its own: the interpreter, in which kernel tests run, cannot be switched off later.

    A process that compiles sees no GPU, and yet chooses what is not searched as the GPU's own table says.
    """
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    environment = compiling_environment(tmp_path)
    tuning.save("a_gpu", {"layer_norm_forward": {"c=128 dtype=bfloat16 rows=65536": {"BLOCK_M": 32, "num_warps": 2}}})
    command = [sys.executable, "-c", COMPILED, str(tmp_path), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen, good, bad = done.stdout.splitlines()
    assert chosen == "{'BLOCK_M': 32, 'num_warps': 2}"
    assert "error=''" in good
    assert "programs=8192" in good
    assert "registers=0" not in good
    assert "CompilationError" in bad


CASES = """
from scalefold.tune import programs
programs.start_worker([1], [], 90, "sm_90")
programs._worker_cases[:] = [case for case in programs._worker_cases if case.name.startswith("layer_norm 1x256x256")]
programs.compile_all_cases(2)
"""


@pytest.mark.long
def test_operations_are_compiled_by_several_processes_of_one_that_sees_no_gpu(tmp_path):
    environment = compiling_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", CASES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = len(list(tmp_path.glob("*/*.cubin")))
    assert kernels > 1
    assert done.stdout.splitlines()[-1] == f"{kernels} of {kernels} kernels"


DECIDED = """
from scalefold.kernels import tuning
from scalefold.tune import programs
programs.start_worker([1, 2, 4, 8], [], 90, "sm_90")
table = tuning.table(90)
for n in range(len(programs._worker_cases)):
    for problem in programs.find_problems(programs._worker_cases, n):
        entries, key = table.get(problem.kernel, {}), tuning.problem_key(problem.fields)
        if tuning.nearest(entries, problem.fields):
            print("own" if key in entries else f"{problem.kernel} {key}")
"""


def test_every_problem_of_training_that_the_shipped_table_decides_has_an_entry_of_its_own():
    """Else what a search finds for one share would change the programs of another."""
    environment = compiling_environment()
    done = subprocess.run([sys.executable, "-c", DECIDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) > 100
    assert set(found) == {"own"}
