"""Faults on purpose: who notices, how soon, what is said, and what is left. ``docs/faults.md`` carries the answers.

``SCALEFOLD_WRITE_FAULTS=1`` writes each row; without, a row that says anything else than this run fails its test.
"""

import os
import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
from faults_table import Row, read_rows, replace_row
from rehearse import Ended, rehearse
from scenarios import CORE, KILLED, SCENARIOS, Scenario, copy_store, pattern

from scalefold.autopsy import examine_run, newest_log
from scalefold.errors import ConfigError
from scalefold.mlperf.judge.lint import lint
from scalefold.mlperf.log.events import merge_parts
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.rehearse.faults import KINDS, parse_faults
from scalefold.report.record import read_metrics
from scalefold.step.checkpoint import AVERAGED_FILE, RESUMABLE_FILE, Checkpoints, load_weights, verified_state

HOST = socket.gethostname()
WRITES = os.environ.get("SCALEFOLD_WRITE_FAULTS") == "1"
BOUND_S = 120.0


def marks(scenario: Scenario) -> list[pytest.MarkDecorator]:
    """All but a short core run with ``make faults`` only."""
    core = [] if scenario.name in CORE else [pytest.mark.faults]
    return [*core, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    "scenario", [pytest.param(scenario, marks=marks(scenario), id=scenario.name) for scenario in SCENARIOS]
)
def test_a_fault_is_noticed_named_and_survived(
    scenario: Scenario, tiny_store: Path, tmp_path: Path, repository: Path
) -> None:
    damages = scenario.before or scenario.during
    store = copy_store(tiny_store, tmp_path / "store") if damages else tiny_store
    ended, run_dir = rehearse(scenario, store, tmp_path), tmp_path / "run"
    said = check_words(scenario, ended)
    assert ended.statuses == scenario.statuses, ended.outputs
    assert ended.seconds < BOUND_S
    assert ended.left == []
    saved = check_checkpoint(scenario, run_dir)
    logged = check_log(scenario, run_dir)
    check_autopsy(scenario, run_dir)
    row = Row(scenario.name, scenario.inject, f"{ended.seconds:.1f}", said, scenario.statuses, saved, logged)
    table = repository / "docs" / "faults.md"
    if WRITES:
        replace_row(table, row, [one.name for one in SCENARIOS])
    assert read_rows(table)[scenario.name].without_seconds() == row.without_seconds()


def check_words(scenario: Scenario, ended: Ended) -> str:
    """The line that names the fault, without what differs between two runs; nobody prints more than one error."""
    for rank, output in enumerate(ended.outputs):
        assert "Traceback" not in output, output
        errors = ended.errors(rank)
        fails = scenario.statuses[rank] not in (KILLED, 0, 4)
        assert len(errors) == int(fails), output
    if scenario.speaker is None:
        return ""
    found = pattern(scenario.says, HOST).search(ended.outputs[scenario.speaker])
    assert found, ended.outputs
    return f"rank {scenario.speaker}: {general(found[0])}"


def general(text: str) -> str:
    """A message without names, numbers and times of this run and this machine."""
    text = re.sub(r"\(pid \d+\)", "(pid N)", text.replace(HOST, "HOST"))
    text = re.sub(r"worker (\(pid\(s\) )?\d+", r"worker \1N", text)
    text = re.sub(r"\b\d+ s\b", "N s", text)
    text = re.sub(r"\bchains? \w+(, \w+)*", "chain C", text)
    text = re.sub(r"row \d+, seed \d+", "row N, seed N", text)
    return re.sub(r"iteration \d+", "iteration N", text)


def check_checkpoint(scenario: Scenario, run_dir: Path) -> str:
    """The newest checkpoint is whole and loads."""
    newest = Checkpoints(run_dir / "checkpoints").newest()
    if scenario.checkpoint is None:
        assert newest is None
        return "none"
    assert newest is not None
    state = verified_state(newest)
    assert all(load_weights(newest / name) for name in (RESUMABLE_FILE, AVERAGED_FILE))
    if not scenario.during and "eval" not in scenario.inject:
        assert state.iteration == scenario.checkpoint
    return "loads"


def check_log(scenario: Scenario, run_dir: Path) -> str:
    """Log and record are well-formed, stamps never go back, and a rehearsal is marked."""
    log = newest_log(run_dir)
    assert log is not None
    parts = list(run_dir.glob("result_0.txt.*.part"))
    if parts:
        log = read_log(merge_parts(run_dir / "result_0.txt"))
    assert log.broken_lines == []
    assert all(a.time_ms <= b.time_ms for a, b in pairwise(log.events))
    findings = [finding.rule for finding in lint(log)]
    assert ("rehearsal" in findings) == bool(scenario.inject)
    read_metrics(run_dir)
    return ending_of(scenario, log)


def ending_of(scenario: Scenario, log: Log) -> str:
    """How the log ends; a killed rank 0 writes no last line."""
    stop = log.first("run_stop")
    expected = None if scenario.statuses[0] == KILLED or scenario.log is None else scenario.log
    assert (stop.metadata["status"] if stop else None) == expected
    return expected or "no last line"


def check_autopsy(scenario: Scenario, run_dir: Path) -> None:
    """``scalefold doctor --run`` finds the checkpoint, and the words of whoever had any."""
    findings = examine_run(run_dir)
    text = "\n".join(f"{finding.topic}: {finding.text}" for finding in findings)
    assert any(finding.topic == "checkpoint" and finding.level == "ok" for finding in findings), text
    if any(status in (2, 5) for status in scenario.statuses):
        assert "rank " in text
        assert "start the same command with --resume" in text
    if scenario.inject:
        assert "no result" in text


@pytest.mark.faults
def test_slow_storage_shows_as_waiting_and_ends_nothing(tiny_store: Path, tmp_path: Path) -> None:
    (scenario,) = (scenario for scenario in SCENARIOS if scenario.name == "slow storage")
    ended = rehearse(scenario, tiny_store, tmp_path)
    assert ended.statuses == scenario.statuses
    assert max(read_metrics(tmp_path / "run").data_ms) > 2000


def test_every_fault_is_rehearsed_and_has_its_row(repository: Path) -> None:
    rehearsed = {scenario.inject.partition("@")[0] for scenario in SCENARIOS} - {""}
    assert rehearsed == set(KINDS)
    text = (repository / "docs" / "faults.md").read_text(encoding="utf-8")
    assert list(read_rows(repository / "docs" / "faults.md")) == [scenario.name for scenario in SCENARIOS]
    assert all(f"`{kind}`" in text for kind in KINDS)
    for row in read_rows(repository / "docs" / "faults.md").values():
        assert float(row.seconds) < BOUND_S


@pytest.mark.parametrize("text", ["kill-rank", "kill-rank@0", "kill-rank@x", "explode@3", "@3", ""])
def test_a_fault_that_nobody_knows_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be FAULT@STEP with a step from 1 on and one of kill-root"):
        parse_faults([text])
