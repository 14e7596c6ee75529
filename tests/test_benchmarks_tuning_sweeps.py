"""The script that times every candidate of some problems: on a recorded device, whole, cut off and continued."""

import argparse
import importlib
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from recorded_device import Compiled, Record
from scalefold.kernels import tuning
from scalefold.tune import trials
from scalefold.tune.candidates import space
from scalefold.tune.programs import Problem, Program
from scalefold.tune.trials import config_text

KERNEL, ROWS = "layer_norm_forward", 4096
FIELDS: dict[str, int | str] = {"rows": ROWS, "c": 128, "dtype": "bfloat16"}


def us_of(config):
    return 100.0 + config["BLOCK_M"] + config["num_warps"]


@pytest.fixture
def script(repository, monkeypatch):
    """The script, for one problem, on a machine whose device knows all times and whose compiler is done at once."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    found = importlib.import_module("tuning_sweeps")
    monkeypatch.setattr(found, "SETS", {"held-out": found.Swept((8,), ((KERNEL, "layer_norm "),))})
    monkeypatch.setattr(found, "find_problems", lambda cases, n: [Problem(KERNEL, FIELDS, n, False)])
    monkeypatch.setattr(found, "Processes", lambda *state: Compiled())
    monkeypatch.setattr(found, "Device", lambda cases: Record(us_of))
    monkeypatch.setattr(trials, "history", list)
    monkeypatch.setattr(trials, "facts", lambda: {"date": "d", "device": "A GPU", "torch": "t", "code": "c"})
    return found


def arguments(file, limit=None, minutes=1.0):
    return argparse.Namespace(set="held-out", part=(0, 1), minutes=minutes, csv=file, limit=limit, workers=1)


def wanted():
    configs = [tuning.lookup(KERNEL, **FIELDS), *space(KERNEL, FIELDS)]
    return set(map(config_text, configs))


def test_every_candidate_is_timed_and_the_close_ones_again(script, tmp_path):
    rows = script.sweep(arguments(tmp_path / "t.csv"))
    first = [row.config for row in rows][: len(wanted())]
    assert set(first) == wanted()
    assert len(set(first)) == len(first)
    again = rows[len(first) :]
    least = min(row.us for row in rows)
    assert {row.config for row in again} == {row.config for row in rows if row.us <= script.CLOSE * least}
    assert trials.read(tmp_path / "t.csv") == rows


def test_what_made_a_gpu_fail_at_another_problem_is_a_row_and_no_trial(script, tmp_path, monkeypatch):
    fatal = script.sweep(arguments(tmp_path / "t.csv"))[3]
    failed = replace(fatal, problem="c=64", error="AcceleratorError: an illegal memory access was encountered")
    monkeypatch.setattr(trials, "history", lambda: [failed])
    rows = [row for row in script.sweep(arguments(tmp_path / "again.csv")) if row.config == fatal.config]
    assert [(row.us, row.error) for row in rows] == [(None, "made a GPU fail at another problem")]


def test_a_problem_is_found_by_its_key_where_one_operation_has_several(script, monkeypatch):
    fields: list[dict[str, int | str]] = [{**FIELDS, "c": width} for width in (64, 128)]
    monkeypatch.setattr(script, "find_problems", lambda cases, n: [Problem(KERNEL, f, n, False) for f in fields])
    cases = script.all_cases([8], [])
    keys = [tuning.problem_key(f) for f in fields]
    found = script.swept_problems(cases, [(KERNEL, "layer_norm ", key) for key in keys])
    assert [p.key[1] for p in found] == keys
    assert [p.key[1] for p in script.swept_problems(cases, [(KERNEL, "layer_norm ")])] == keys[:1]


def test_problems_of_each_kernel_are_drawn_of_other_widths_as_long_as_there_are(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    draw = importlib.import_module("tuning_draw")
    shapes = {"a": [(64, n) for n in range(draw.OF_EACH)] + [(128, 1), (256, 1)], "b": [(64, 1), (64, 2)]}
    problems = [Problem(k, {"c": c, "rows": 1024 * n}, 0, False) for k, own in shapes.items() for c, n in own]
    for seed in range(20):
        found = draw.drawn(problems, seed)
        assert found == draw.drawn(problems[::-1], seed)
        assert sorted(p.kernel for p in found) == ["a"] * draw.OF_EACH + ["b"] * 2
        assert {p.kernel for p in found[:2]} == {"a", "b"}
        assert {p.fields["c"] for p in [p for p in found if p.kernel == "a"][:3]} == {64, 128, 256}


def test_what_is_timed_again_is_said_to_be_of_the_code_that_is_timed(script, tmp_path, monkeypatch):
    script.sweep(arguments(tmp_path / "t.csv"))
    count = len(trials.read(tmp_path / "t.csv"))
    facts = {**trials.facts(), "code": "later"}
    monkeypatch.setattr(trials, "facts", lambda: facts)
    again = script.sweep(arguments(tmp_path / "t.csv"))[count:]
    assert again
    assert {row.code for row in again} == {"later"}


def test_a_sweep_that_was_cut_off_is_continued(script, tmp_path):
    file = tmp_path / "t.csv"
    cut_off = {row.config for row in script.sweep(arguments(file, limit=3))}
    assert len(cut_off) == 3
    rows = script.sweep(arguments(file))
    assert {row.config for row in rows} == wanted()
    assert rows[: len(cut_off)] == trials.read(file)[: len(cut_off)]


def test_a_gpu_that_fails_ends_a_sweep_and_its_next_call_goes_on_after_the_candidate(
    script, tmp_path, monkeypatch, capsys
):
    """An access to memory that is not there ends a process's use of the GPU: all later trials would fail with it."""
    fatal = config_text(space(KERNEL, FIELDS)[1])
    monkeypatch.setattr(script, "Device", lambda cases: Record(us_of, fatal=[fatal]))
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: True)
    command = ["tuning_sweeps.py", "--set", "held-out", "--csv", str(tmp_path / "t.csv")]
    monkeypatch.setattr("sys.argv", command)
    assert script.main() == 2
    assert f"the GPU fails with {KERNEL} {fatal}" in capsys.readouterr().out
    rows = trials.read(tmp_path / "t.csv")
    assert [row.config for row in rows if row.error] == [fatal]
    assert rows[-1].config == fatal
    monkeypatch.setattr(script, "Device", lambda cases: Record(us_of))
    assert script.main() == 0
    times = [row.us for row in trials.read(tmp_path / "t.csv") if row.config == fatal]
    assert times == [None]


@pytest.mark.parametrize("timed", [0, 2])
def test_the_time_limit_ends_a_sweep_that_has_compiled_more_than_it_has_timed(script, tmp_path, monkeypatch, timed):
    """A trial takes ten seconds; all programs are there from the start."""
    device = Record(us_of)
    monkeypatch.setattr(script, "Device", lambda cases: device)
    monkeypatch.setattr(script.time, "monotonic", lambda: 10.0 * len(device.asked))
    assert len(script.sweep(arguments(tmp_path / "t.csv", minutes=(10.0 * timed - 0.5) / 60))) == timed


def test_what_does_not_compile_is_a_row_and_a_problem_without_a_time_has_its_line(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "Processes", lambda *state: Compiled(lambda config: Program(error="CompilationError")))
    file = tmp_path / "t.csv"
    rows = script.sweep(arguments(file))
    assert {row.error for row in trials.read(file)} == {"CompilationError"}
    capsys.readouterr()
    other = [replace(row, kernel="layer_norm_backward", us=10.0, error="") for row in rows]
    script.print_table(script.summary([*rows, *other]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["layer_norm_forward", "layer_norm_backward"]
    assert lines[0].split()[-1] == "best"


def test_two_parts_are_the_whole_set(script):
    numbers = [script.part_of(text) for text in ("0/2", "1/2")]
    assert sorted(n for number, count in numbers for n in range(10)[number::count]) == list(range(10))
    with pytest.raises(ValueError, match="2/2"):
        script.part_of("2/2")
