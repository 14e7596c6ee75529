"""What ``scalefold doctor --run`` makes of the files that a run left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import tiny_config
from scalefold.autopsy import examine_run
from scalefold.doctor import Finding
from scalefold.errors import LogError
from scalefold.report.record import METRICS_FILE
from scalefold.run.loop import run_rank
from scalefold.run.resume import RunOptions
from scalefold.step.checkpoint import RESUMABLE_FILE


@pytest.fixture(scope="module")
def ended(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that spent its budget, with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    run_rank(tiny_config(tiny_store, run_dir, "run.checkpoint_every_iters=2"), RunOptions())
    return run_dir


@pytest.fixture
def run_dir(ended: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; its record is as old as a dead run's."""
    copy = shutil.copytree(ended, tmp_path / "run")
    os.utime(copy / METRICS_FILE, (0, 0))
    return copy


def told(run_dir: Path) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examine_run(run_dir)}


def test_an_orderly_end_is_called_one(run_dir: Path) -> None:
    found = told(run_dir)
    assert "1 ranks, last step 4, loss" in found["record"].text
    assert "2 evaluations, the last 0." in found["record"].text
    assert found["log"].text == "result_0.txt ends with aborted"
    assert found["cause"].text.startswith("an orderly end")
    assert "goes on from 000004" in found["next"].text


def test_a_run_that_was_killed_left_no_word(run_dir: Path) -> None:
    log = run_dir / "result_0.txt"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "run_stop" not in line))
    found = told(run_dir)
    assert found["log"].text == "result_0.txt has no run_stop"
    assert "no rank left a word: all were killed" in found["cause"].text
    os.utime(run_dir / METRICS_FILE)
    assert "the run may still be going" in told(run_dir)["cause"].text


def test_a_run_that_may_still_be_going_is_no_problem_and_is_to_be_waited_for(run_dir: Path) -> None:
    log = run_dir / "result_0.txt"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "run_stop" not in line))
    shutil.rmtree(run_dir / "checkpoints")
    assert told(run_dir)["next"].level == "problem"
    os.utime(run_dir / METRICS_FILE)
    assert told(run_dir)["next"].level == "note"
    assert "wait, " in told(run_dir / METRICS_FILE)["next"].text
    assert "if it has ended: start again" in told(run_dir)["next"].text


def test_a_damaged_checkpoint_is_named_and_the_one_before_recommended(run_dir: Path) -> None:
    newest = run_dir / "checkpoints" / "last" / "000004" / RESUMABLE_FILE
    newest.write_bytes(newest.read_bytes()[:-1])
    findings = examine_run(run_dir)
    assert any(f.level == "warning" and str(newest) in f.text for f in findings)
    assert "goes on from 000002" in findings[-1].text


def test_a_run_without_checkpoint_cannot_be_resumed_and_the_command_says_so(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    done = subprocess.run(
        [sys.executable, "-m", "scalefold", "doctor", "--run", str(run_dir)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "none was written" in done.stdout
    assert "there is nothing to resume from" in done.stdout


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"metrics\.jsonl: cannot read metrics"):
        examine_run(tmp_path)
