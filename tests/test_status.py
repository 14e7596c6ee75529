"""``scalefold status``: what files and Slurm say of jobs and runs."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlperf_editing import edit, rehearsal, set_value
from observed_runs import write_slow_ranks
from scalefold.cli import app
from scalefold.config import dump_config, load_config
from scalefold.errors import ConfigError
from scalefold.launch.status import queue_state, run_status, status, watch
from scalefold.report.record import EvalRow, Record, StepRow

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def write_run(folder: Path, steps: int = 5, system: str = "tiny", finished: bool = False) -> Path:
    """A run folder after ``steps`` steps of half a minute each, evaluated every second one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(CONFIGS / f"{system}.yaml").config))
    with Record(folder, rank0=True) as record:
        record.run(target=0.8)
        for step in range(1, steps + 1):
            record.step(StepRow(step=step, loss=1.0, step_ms=30_000.0, time_s=30.0 * step))
            if step % 2 == 0:
                record.evaluation(EvalRow(step=step, samples=step, lddt_ca=0.1 * step, time_s=30.0 * step))
    if finished:
        edit(rehearsal(folder / "result_0.txt"), set_value("submission_org", "A Laboratory"))
        (folder / "finished").touch()
    return folder


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing but what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)


def test_a_running_run_says_step_evaluation_and_minutes_left_by_the_plan(programs: Path, tmp_path: Path) -> None:
    found = run_status(write_run(tmp_path / "run_0", system="dgx_h100_1x8"))
    assert (found.state, found.step, found.lddt_step, found.minutes) == ("running", 5, 4, 2.5)
    assert found.lddt_ca == pytest.approx(0.4)
    assert found.planned is not None
    assert found.minutes_left == pytest.approx(found.planned - 2.5)
    assert f"lddt 0.400@4→0.800  2.5 min  about {found.minutes_left:.1f} min left" in found.text()


def test_where_no_plan_is_known_the_step_budget_bounds_the_time(programs: Path, tmp_path: Path) -> None:
    found = run_status(write_run(tmp_path / "run_0"))
    assert (found.planned, found.at_most, found.minutes_left) == (None, True, (1200 - 5) / 2)
    assert "at most 597.5 min left by its step budget" in found.text()


def test_a_run_whose_record_stands_still_is_called_silent(programs: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_0")
    old = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (old, old))
    found = run_status(folder)
    assert found.state == "silent"
    assert "no sign for 1h00m" in found.text()
    assert run_status(folder, alive=True).state == "running", "its job runs: a long evaluation"
    assert run_status(folder, alive=False).state == "stopped"


def test_a_finished_run_comes_with_the_verdict_on_its_log(programs: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_0", finished=True)
    assert run_status(folder).verdict == "valid closed-division log"
    assert not (folder / "verdict.json").exists(), "looking leaves nothing behind"
    run_status(folder, check=True)
    assert json.loads((folder / "verdict.json").read_text())["headline"] == "valid closed-division log"
    time.sleep(0.02)
    edit(folder / "result_0.txt", set_value("seed", "x"))
    assert str(run_status(folder).verdict).startswith("invalid"), "a log that changed is judged anew"


def test_a_job_counts_its_runs_and_names_suspect_nodes(programs: Path, tmp_path: Path) -> None:
    job = tmp_path / "runs" / "job_17"
    write_run(job / "run_0", finished=True)
    write_run(job / "run_1")
    write_run(job / "run_1_interrupted_0")
    (job / "job.sbatch").write_text("repeats=5 # runs\ninstances=2 # at once\n")
    (job / "suspect_nodes").write_text("node7\nnode3\nnode7\n")
    program(programs, "squeue", "echo 'RUNNING|node[1-2]|0:12 of 1:00:00|None'")
    (found,) = status(str(job))
    assert [run.state for run in found.runs] == ["reached", "running"]
    assert found.text().startswith(
        "job 17: RUNNING  node[1-2]  0:12 of 1:00:00: 1 of 10 runs done, 1 running, suspect nodes node3, node7\n"
    )
    assert not found.is_over


def test_slurm_is_asked_for_jobs_in_the_queue_and_then_for_those_that_are_over(programs: Path) -> None:
    assert queue_state("17") == {}
    program(programs, "squeue", "exit 1")
    program(programs, "sacct", "echo 'FAILED|node1|00:10:00|5:0'")
    assert queue_state("17") == {"state": "FAILED", "nodes": "node1", "time": "00:10:00", "exit": "5:0"}
    program(programs, "squeue", "echo 'PENDING||0:00 of 30:00|Priority'")
    assert queue_state("17") == {"state": "PENDING", "time": "0:00 of 30:00", "reason": "Priority"}


def test_a_number_or_folder_finds_its_jobs_and_a_wrong_one_is_named(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "tiny" / "job_17" / "run_0")
    write_run(tmp_path / "runs" / "alone")
    assert [job.job_id for job in status("17")] == ["17"]
    assert sorted(job.job_id or job.folder.name for job in status()) == ["17", "alone"]
    with pytest.raises(ConfigError, match="job 18: neither Slurm nor a folder"):
        status("18")
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        status("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: holds no run"):
        status("empty")
    program(programs, "squeue", "echo 'PENDING||0:00 of 30:00|Priority'")
    (waiting,) = status("18")
    assert waiting.text() == "job 18: PENDING  0:00 of 30:00  Priority: 0 runs done"


def test_watching_ends_when_everything_is_over(programs: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_0")
    looks = watch(str(folder), 0.01)
    assert [job.runs[0].state for job in next(looks)] == ["running"]
    edit(rehearsal(folder / "result_0.txt"), set_value("submission_org", "A Laboratory"))
    assert [job.runs[0].state for job in next(looks)] == ["reached"]
    with pytest.raises(StopIteration):
        next(looks)


def test_the_verb_prints_text_or_json(programs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "job_17" / "run_0", finished=True)
    shown = CliRunner().invoke(app, ["status", str(tmp_path / "job_17"), "--json"])
    (job,) = json.loads(shown.output)
    assert (job["job_id"], job["runs"][0]["state"], job["runs"][0]["step"]) == ("17", "reached", 5)
    line = CliRunner().invoke(app, ["status", str(tmp_path / "job_17" / "run_0"), "--check"]).output
    assert line.count("\n") == 1
    assert line.startswith("run_0    reached   step    5  lddt 0.400@4")
    assert line.endswith("valid closed-division log\n")


def test_the_slowest_rank_and_the_energy_are_said_where_they_were_measured(programs: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_0")
    assert "rank" not in run_status(folder).text()
    write_slow_ranks(folder)
    found = run_status(folder)
    assert found.gpu_kwh == pytest.approx(1.0)
    assert found.text().endswith(
        "GPUs 1.000 kWh  slowest rank 1 on node0: waits 30 ms for data, SM clock 1600 MHz, may cost 28 ms per step"
    )
