"""The judgement on runs of the program: from small records, and one start on CPU ranks from launch to table."""

import csv
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import scalefold


@pytest.fixture
def judge(gpu_runs):
    """What they must meet."""
    return importlib.import_module("gpu_judge")


@pytest.fixture
def watched(gpu_runs):
    """What starts and ends processes."""
    return importlib.import_module("watched")


def step(number, ms=100.0, passes=1, loss=2.5, **more):
    terms = {"fape": 0.5, "distogram": 0.25}
    return {"kind": "step", "step": number, "step_ms": ms, "passes": passes, "loss": loss, "terms": terms} | more


def wait_for(one, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not one.poll():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- figures of one run -----------------------------------------------------------------------------------------------


def test_the_first_step_ends_its_own_time_after_the_loader_was_started(readings):
    event = {"kind": "event", "name": "start", "time_s": 9.0, "data_opened_s": 0.5, "loader_started_s": 0.75}
    parts = readings.start_parts([event, step(1, ms=500.0), step(2)])
    assert parts == {"data_opened": 0.5, "loader_started": 0.75, "first_step": 1.25}


def test_a_record_without_the_parts_of_the_start_falls_short(readings, judge):
    assert readings.start_parts([step(1)]) == {}
    assert judge.at_most("start_to_first_step_s", None, 2.0, "no first step recorded").met is False


def test_a_resumed_start_is_judged_by_its_own_steps(readings):
    record = [step(1), step(2), {"kind": "event", "name": "resume", "step": 2}, step(3)]
    assert [row["step"] for row in readings.steps_of(readings.of_this_start(record))] == [3]


def test_a_stall_is_what_the_steps_after_a_checkpoint_took_beyond_the_median_of_their_passes(readings):
    steps = [step(n, ms=100.0 * (1 + n % 2), passes=1 + n % 2) for n in range(1, 25)]
    assert readings.checkpoint_stall_ms(steps, save_every=12) == 0.0
    steps[12]["step_ms"] += 40.0
    steps[14]["step_ms"] += 15.0
    assert readings.checkpoint_stall_ms(steps, save_every=12) == pytest.approx(55.0)


def test_of_several_checkpoints_the_longest_stall_counts_and_later_steps_do_not(readings):
    steps = [step(n) for n in range(1, 31)]
    for number, extra in ((11, 20.0), (21, 30.0), (18, 500.0)):
        steps[number - 1]["step_ms"] += extra
    assert readings.checkpoint_stall_ms(steps, save_every=10) == pytest.approx(30.0)


def test_a_stall_in_a_number_of_passes_that_no_other_step_has_is_not_hidden(readings):
    steps = [step(n) for n in range(1, 13)] + [step(13, ms=3000.0, passes=2)]
    assert readings.checkpoint_stall_ms(steps, save_every=12) == pytest.approx(2900.0)


def test_no_checkpoint_gives_no_stall(readings):
    assert readings.checkpoint_stall_ms([step(n) for n in range(1, 9)], save_every=12) is None
    assert readings.checkpoint_stall_ms([], save_every=12) is None


def test_steps_are_compared_with_the_ruler_over_common_numbers_of_passes(readings):
    assert readings.over_ruler_percent({1: 103.0, 2: 205.0, 3: 999.0}, {1: 100.0, 2: 200.0}) == pytest.approx(8 / 3)
    assert readings.over_ruler_percent({3: 1.0}, {1: 1.0}) is None


def test_the_ruler_of_the_right_layout_is_read(readings, tmp_path):
    lines = ["gpus,dap,passes,median_ms", "1,1,1,300", "2,2,1,200", "2,1,1,310", "2,2,2,250"]
    (tmp_path / "step_time.csv").write_text("\n".join(lines) + "\n")
    assert readings.ruler_ms(tmp_path, 2, 2) == {1: 200.0, 2: 250.0}
    assert readings.ruler_ms(tmp_path, 4, 4) == {}


# --- bits -------------------------------------------------------------------------------------------------------------


def test_equal_records_have_no_different_steps_whatever_their_times(readings):
    one, two = ([step(n, ms=ms) for n in range(1, 5)] for ms in (100.0, 101.0))
    assert readings.different_steps(one, two, whole=True) == ""


def test_one_bit_of_one_term_is_seen_and_named(readings):
    one, two = ([step(n) for n in range(1, 5)] for _ in range(2))
    one[2] = step(3) | {"terms": {"fape": 0.5, "distogram": 0.25000000000000006}}
    problem = readings.different_steps(one, two, whole=True)
    assert problem.startswith("1 of 4 steps, first 3: term distogram 0.25000000000000006")


def test_losses_are_recorded_with_every_digit(tmp_path):
    from scalefold.report.record import Record, StepRow

    loss = torch.tensor(1.0 + 2.0**-23).item()
    with Record(tmp_path, rank0=True) as record:
        record.step(StepRow(step=1, loss=loss))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == loss


def test_a_stopped_run_may_end_earlier_but_a_whole_one_may_not(readings):
    whole, part = [step(n) for n in range(1, 5)], [step(n) for n in range(1, 3)]
    assert readings.different_steps(part, whole, whole=False) == ""
    assert "2 steps where the other start has 4" in readings.different_steps(part, whole, whole=True)
    assert readings.different_steps([], whole, whole=False)


def test_the_digest_of_weights_tells_one_changed_bit(readings, tmp_path):
    digests = []
    for value in (1.0, 1.0, 1.0 + 2.0**-23):
        folder = tmp_path / "checkpoints" / "last" / "000004"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {"averaged_model.n_averaged": torch.tensor(4), "w": torch.full((2, 3), value)}
        torch.save(weights, folder / "swa_checkpoint.pt")
        digests.append(readings.weights_digest(tmp_path, 4))
    assert digests[0] == digests[1] != digests[2]
    assert readings.weights_digest(tmp_path, 5) == ""


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, statuses, met",
    [
        ("one_gpu", [4], True),
        ("one_gpu", [0], False),
        ("one_gpu", [None], False),
        ("dap2", [4, 4], True),
        ("dap2", [4, 143], True),  # torchrun ended the second rank once the first had left
        ("dap2", [143, 143], False),
        ("dap2", [4, 137], False),
        ("train_eval", [4, 0], True),
        ("phases", [6, 143], True),
        ("phases", [6, 4], False),
        ("killed", [5, 137], True),
        ("killed", [None, 137], False),
    ],
)
def test_every_rank_must_end_with_its_documented_status(judge, layouts, layout, statuses, met):
    start = next(start for start in layouts.STARTS if start.name == layout)
    assert judge.judge_statuses(start, statuses, hung=False).met is met
    assert judge.judge_statuses(start, statuses, hung=True).met is False


def test_the_end_counts_from_run_stop_or_from_the_loss_of_a_rank(judge, layouts, starts, watched, tmp_path):
    one = watched.Watched([], tmp_path, {}, 1.0, ended_at=130.0)
    plain, killed = (next(s for s in layouts.STARTS if s.name == name) for name in ("one_gpu", "killed"))
    line = judge.judge_end(starts.Ended(plain, one, None, set(), []), {"run_stop": 119.0})
    assert (line.value, line.met) == (11.0, False)
    assert judge.judge_end(starts.Ended(plain, one, None, set(), []), {}).met is False
    line = judge.judge_end(starts.Ended(killed, one, 105.0, set(), []), {"run_stop": 129.0})
    assert (line.value, line.met) == (25.0, True)


def test_a_phase_ends_before_its_checkpoint_is_outlived_and_the_next_one_goes_on_in_another_layout(layouts, tmp_path):
    first, then = (start for start in layouts.STARTS if start.layout == "phases")
    assert (first.dap, then.dap, then.phase_dap, then.run_name) == (1, 1, 2, first.name), "resumed with its settings"
    assert (first.statuses, then.statuses) == ((6, 6), (4, 4))
    plan = layouts.Plan(tmp_path, tmp_path, steps=24)
    assert (
        "phases=[{name: apart, until_step: 8}, {name: shared, dap_size: 2, global_batch_size: 1}]"
        in layouts.settings(plan, first)
    )


def test_files_under_temporary_names_are_found(starts, tmp_path):
    kept = tmp_path / "checkpoints" / "last" / "000012"
    kept.mkdir(parents=True)
    (kept / "swa_checkpoint.pt").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert starts.partial_files(tmp_path) == []
    (kept.parent / ".000024.partial").mkdir()
    (tmp_path / "metrics.jsonl.tmp").touch()
    assert sorted(starts.partial_files(tmp_path)) == ["checkpoints/last/.000024.partial", "metrics.jsonl.tmp"]


def python(*code):
    """A process that passes for a rank."""
    return [sys.executable, "-c", "; ".join(code), "scalefold", "train"]


def test_what_hangs_is_ended_and_leaves_the_stack_of_every_thread(watched, tmp_path):
    thread = "threading.Thread(target=time.sleep, args=(100,)).start()"
    command = python("import threading, time", thread, "time.sleep(100)")
    one = watched.Watched(command, tmp_path / "start", {}, limit_s=2.0)
    one.start()
    wait_for(one)
    assert one.hung
    assert one.statuses() == [None]
    assert sum("most recent call first" in line for line in one.output()) == 2
    assert watched.processes(one.mark) == []


def test_a_process_that_outlives_its_launcher_is_named_and_ended(watched, tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "LEFT_AFTER_S", 0.5)
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True)"
    one = watched.Watched(python("import subprocess, sys", child), tmp_path / "start", {}, limit_s=30.0)
    one.start()
    wait_for(one)
    assert one.statuses() == [0]
    assert len(one.left) == 1
    assert "time.sleep(99)" in one.left[0]


def test_a_start_that_would_end_too_late_does_not_begin(layouts, starts):
    start, nothing = layouts.STARTS[0], starts.Results()
    assert starts.cannot_run(start, nothing, 2, 50.0, {"run on 1": 40.0, "run on 2": 90.0}) == ""
    assert "50 s are left" in starts.cannot_run(start, nothing, 2, 50.0, {"run on 1": 60.0, "run on 2": 40.0})
    pair = next(start for start in layouts.STARTS if start.ranks == 2)
    assert starts.cannot_run(pair, nothing, 1, 50.0, {}) == "needs 2 GPUs"
    again = next(start for start in layouts.STARTS if start.after)
    nothing.not_run[again.after] = "no time"
    assert "did not run" in starts.cannot_run(again, nothing, 2, 50.0, {})


def test_a_ruler_that_took_long_keeps_no_run_from_its_turn(layouts, starts):
    ruler = next(start for start in layouts.STARTS if start.layout == "ruler_two")
    pair = next(start for start in layouts.STARTS if start.layout == "dap2")
    assert starts.cannot_run(pair, starts.Results(), 2, 60.0, {ruler.kind: 109.0, pair.kind: 55.0}) == ""


@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("", "1"), ("2,3", "3"), ("GPU-a,GPU-b", "GPU-b")])
def test_gpus_are_taken_from_those_that_the_script_may_use(starts, monkeypatch, visible, name):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert starts.device_name(1) == name


def test_chosen_layouts_bring_what_they_are_compared_with(gpu_runs):
    names = [start.name for start in gpu_runs.chosen(["stop_dap2"], tiny=False)]
    assert names == ["dap2", "dap2 again", "stop_dap2", "stop_dap2 resumed"]


@pytest.mark.parametrize(
    ("only", "tiny", "sizes"), [(["phases"], False, [1, 2]), (["dap4"], False, [4]), (["dap2"], True, [])]
)
def test_every_share_is_compiled_into_the_cache_of_the_starts(
    gpu_runs, starts, layouts, monkeypatch, repository, tmp_path, only, tiny, sizes
):
    from scalefold.config import load_config

    asked = []
    monkeypatch.setattr(starts, "compile_ahead", lambda *arguments: asked.append(arguments))
    starts.compile_shares(layouts.Plan(tmp_path, tmp_path, tiny=tiny), gpu_runs.chosen(only, tiny))
    assert [load_config(file, overrides).config.parallel.dap_size for file, overrides, _ in asked] == sizes
    assert {file.name for file, *_ in asked} <= {"base.yaml"}
    assert {cache for *_, cache in asked} <= {tmp_path / "triton"}


def test_kernels_are_compiled_ahead_for_this_gpu_into_the_cache_that_is_named(starts, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton.knobs")
    common, commands = sys.modules["common"], []

    def run(command, env):
        commands.append((command, env["PYTHONPATH"].split(":")[0]))
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(common.subprocess, "run", run)
    monkeypatch.setattr("scalefold.kernels.tuning.capability", lambda: 90)
    starts.compile_ahead(tmp_path / "base.yaml", ["training.seed=1"], tmp_path / "triton")
    ((command, first_path),) = commands
    assert command[1:6] == ["-m", "scalefold", "compile", "--gpu", "H100"]
    assert command[6:] == [
        "--config",
        str(tmp_path / "base.yaml"),
        "training.seed=1",
        "--out",
        str(tmp_path / "triton"),
    ]
    assert (Path(first_path) / "scalefold" / "__init__.py").samefile(scalefold.__file__)
    assert "exit status 2" in capsys.readouterr().out


def test_starts_on_four_gpus_run_only_by_name(gpu_runs):
    assert {"dap4", "ruler_four"}.isdisjoint(start.layout for start in gpu_runs.chosen([], tiny=False))
    named = gpu_runs.chosen(["dap4", "ruler_four"], tiny=False)
    assert [start.ranks for start in named] == [4, 4, 4]
    assert gpu_runs.count_gpus(named, tiny=True) == 4


def test_all_settings_form_configurations_that_can_run(layouts, repository, tmp_path):
    from scalefold.config import load_config

    plan = layouts.Plan(tmp_path, tmp_path)
    for start in layouts.STARTS:
        config = load_config(repository / "configs" / "base.yaml", layouts.settings(plan, start)).config
        assert config.parallel.world_size == start.ranks


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.faults  # looks for what is left in the host's shared memory: nothing else may run beside it
def test_two_ranks_are_launched_judged_and_tabulated(gpu_runs, monkeypatch, tmp_path, tiny_store):
    monkeypatch.setattr(gpu_runs, "make_store", lambda work, workers: tiny_store)
    wanted = ["--tiny", "--workers", "0", "--steps", "12", "--only", "train_eval"]
    monkeypatch.setattr(sys, "argv", ["gpu_runs.py", *wanted, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    gpu_runs.main()  # its status depends on how busy this machine is
    details = json.loads((tmp_path / "gpu_runs.json").read_text())["starts"]["train_eval"]
    lines = {line["name"]: line for line in details["lines"]}
    for name in ("exit_status", "log_verdict", "left_behind", "steps"):
        assert lines[name]["met"], lines[name]
    assert lines["step_over_ruler_percent"]["met"] is None
    assert {"data_opened", "loader_started", "first_batch", "first_step"} <= set(details["start_parts_s"])
    assert details["seconds"]["run_stop to end"] > 0
    (row,) = csv.DictReader((tmp_path / "gpu_runs.csv").open())
    shown = [row[column] for column in ("layout", "steps", "exit_status", "log_verdict")]
    assert shown == ["train_eval", "12", "4 0", "aborted"]
    assert float(row["checkpoint_stall_ms"]) >= 0
    assert "===== train_eval" in (tmp_path / "gpu_runs.log").read_text()
