"""The event writer: what it writes, who writes, and which order it refuses."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalefold.errors import LogError
from scalefold.mlperf.judge.lint import lint
from scalefold.mlperf.log.events import Events, SubmissionInfo, merge_left_parts, merge_parts
from scalefold.mlperf.log.keys import CHECKPOINT_SHA256, EXPECTED, KEYS
from scalefold.mlperf.log.logfile import read_log
from scalefold.mlperf.log.rehearsal import benchmark_hyperparameters

INFO = SubmissionInfo(org="Rehearsal Institute", platform="rehearsal-1")


class Clock:
    """A clock that advances by one millisecond per reading."""

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self.ms = start_ms

    def __call__(self) -> int:
        self.ms += 1
        return self.ms


def read(file: Path) -> list[dict]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in file.read_text().splitlines()]


def keys(file: Path) -> list[str]:
    return [event["key"] for event in read(file)]


def initialize(events: Events) -> None:
    events.init_start()
    events.cache_clear(True)
    events.submission(INFO)
    events.seed(1234)
    events.scale(number_of_ranks=2080, number_of_nodes=260, accelerators_per_node=8)
    events.hyperparameters(benchmark_hyperparameters(global_batch_size=256))
    events.checkpoint(CHECKPOINT_SHA256)
    events.staging()
    events.init_stop()


def begin(events: Events) -> None:
    initialize(events)
    events.run_start()
    events.train_samples(594595)
    events.eval_samples(180)
    events.dataloader_type("InitialTrainingDataloaderPQ")


def evaluate(events: Events, step: int, value: float) -> None:
    events.eval_start(step)
    events.eval_accuracy(step, value)
    events.eval_stop(step)


def train_cycle(events: Events, step: int) -> None:
    events.epoch_start(step)
    events.epoch_stop(step)
    events.throughput(step, 376.5, 0.027)


def test_a_run_logs_every_key_of_the_closed_division(tmp_path):
    with Events(tmp_path / "result_0.txt", now_ms=Clock()) as events:
        begin(events)
        train_cycle(events, 40)
        evaluate(events, 40, 0.81)
        events.run_stop("success")
    logged = keys(tmp_path / "result_0.txt")
    assert set(logged) == set(KEYS)
    for name, value in EXPECTED.items():
        (event,) = [e for e in read(tmp_path / "result_0.txt") if e["key"] == name]
        assert event["value"] == value
        assert type(event["value"]) is type(value)


def test_epoch_num_is_the_number_of_samples_and_the_stats_step_is_the_cycle(tmp_path):
    with Events(tmp_path / "r.txt", instance=3) as events:
        begin(events)
        for step in (40, 80):
            train_cycle(events, step)
            evaluate(events, step, 0.7)
    cycle = [e for e in read(tmp_path / "r.txt") if "epoch_num" in e["metadata"]]
    assert [e["metadata"]["epoch_num"] for e in cycle] == [40 * 256] * 5 + [80 * 256] * 5
    stats = [e for e in read(tmp_path / "r.txt") if e["key"] == "tracked_stats"]
    assert [e["metadata"]["step"] for e in stats] == [0, 1, 2]
    assert {e["metadata"]["instance"] for e in [*cycle, *stats]} == {3}


def test_each_line_names_the_line_that_called_the_public_method(tmp_path):
    with Events(tmp_path / "r.txt") as events:
        begin(events)
    source = Path(__file__).read_text().splitlines()
    for event in read(tmp_path / "r.txt"):
        assert Path(event["metadata"]["file"]).name == Path(__file__).name
        assert "events." in source[event["metadata"]["lineno"] - 1], event


def test_package_files_are_logged_by_their_path_inside_the_source_tree(tmp_path):
    from scalefold.mlperf.log import events as module

    code = compile("events.init_start()", str(Path(module.__file__).parents[2] / "run" / "loop.py"), "exec")
    with Events(tmp_path / "r.txt") as events:
        exec(code, {"events": events})
    assert read(tmp_path / "r.txt")[0]["metadata"]["file"] == "scalefold/run/loop.py"


def test_stamps_come_from_the_given_clock_or_the_call(tmp_path):
    with Events(tmp_path / "r.txt", now_ms=lambda: 5) as events:
        begin(events)
        events.eval_start(0, time_ms=99)
    stamps = [e["time_ms"] for e in read(tmp_path / "r.txt")]
    assert set(stamps[:-1]) == {5}
    assert stamps[-1] == 99


ILLEGAL = {
    "init_stop before init_start": lambda e: e.init_stop(),
    "epoch_start before run_start": lambda e: (initialize(e), e.epoch_start(40)),
    "train_samples before run_start": lambda e: (initialize(e), e.train_samples(1)),
    "run_start before init_stop": lambda e: (e.init_start(), e.run_start()),
    "seed after init_stop": lambda e: (initialize(e), e.seed(2)),
    "seed a second time": lambda e: (e.init_start(), e.seed(2), e.seed(2)),
    "run_start a second time": lambda e: (begin(e), e.run_start()),
    "epoch_start before hyperparameters": lambda e: (e.init_start(), e.init_stop(), e.run_start(), e.epoch_start(40)),
    "has not stopped": lambda e: (begin(e), e.epoch_start(40), e.epoch_start(80)),
    "the cycle in progress is that of step 40": lambda e: (begin(e), e.epoch_start(40), e.epoch_stop(80)),
    "the evaluation in progress is that of step None": lambda e: (begin(e), e.eval_accuracy(40, 0.8)),
    "the evaluation of step 40 has not stopped": lambda e: (begin(e), e.eval_start(40), e.eval_start(80)),
    "run_stop after run_stop": lambda e: (begin(e), e.run_stop("aborted"), e.run_stop("aborted")),
    "eval_start after run_stop": lambda e: (begin(e), e.run_stop("aborted"), e.eval_start(40)),
    "last lDDT-Cα is 0.79": lambda e: (begin(e), evaluate(e, 40, 0.79), e.run_stop("success")),
    "last lDDT-Cα is None": lambda e: (begin(e), e.run_stop("success")),
    "last lDDT-Cα is nan": lambda e: (begin(e), evaluate(e, 40, float("nan")), e.run_stop("success")),
}


@pytest.mark.parametrize("reason", ILLEGAL)
def test_an_illegal_order_is_refused(tmp_path, reason):
    with Events(tmp_path / "r.txt") as events, pytest.raises(LogError, match=reason):
        ILLEGAL[reason](events)


def test_stamps_go_on_when_the_system_clock_is_set_back(tmp_path, monkeypatch):
    """A duration is a duration, whatever somebody does to the node's clock."""
    real = time.time_ns
    with Events(tmp_path / "result_0.txt") as events:
        initialize(events)
        monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
        events.run_start()
    stamps = [event.time_ms for event in read_log(tmp_path / "result_0.txt").events]
    assert stamps == sorted(stamps)
    assert abs(stamps[-1] - real() // 10**6) < 60_000


def test_a_rehearsal_says_so_before_anything_is_trained(tmp_path):
    with Events(tmp_path / "result_0.txt") as events:
        events.init_start()
        events.rehearsal("kill-rank@3")
    log = read_log(tmp_path / "result_0.txt")
    assert log.value("tracked_stats") == {"rehearsal": "kill-rank@3"}
    assert [finding.severity for finding in lint(log) if finding.rule == "rehearsal"] == ["submission"]


def test_a_log_is_never_appended_to_another_runs_log(tmp_path):
    (tmp_path / "result_0.txt").write_text("kept\n")
    with pytest.raises(LogError, match="exists"):
        Events(tmp_path / "result_0.txt")
    assert (tmp_path / "result_0.txt").read_text() == "kept\n"


def test_text_that_the_rcp_checker_would_misread_is_refused(tmp_path):
    with Events(tmp_path / "r.txt") as events:
        events.init_start()
        with pytest.raises(LogError, match="global_batch_size"):
            events.submission(SubmissionInfo(org="global_batch_size Inc", platform="p"))


def test_a_closed_log_and_a_failing_disk_are_errors(tmp_path):
    events = Events(tmp_path / "r.txt")
    events.init_start()
    os.close(events.descriptor)
    with pytest.raises(LogError, match="Bad file descriptor"):
        events.cache_clear(True)
    events.descriptor = None
    with pytest.raises(LogError, match="closed"):
        events.seed(1)


def test_silent_ranks_write_and_check_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = Events.silent()
    events.run_stop("success")
    begin(events)
    events.epoch_stop(40)
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_two_roots_of_an_asynchronous_run_give_one_log_in_time_order(tmp_path):
    clock = Clock()
    result = tmp_path / "result_0.txt"
    with Events(result, role="training", now_ms=clock) as train, Events(result, role="evaluation", now_ms=clock) as ev:
        begin(train)
        begin(ev)
        train_cycle(train, 40)
        ev.eval_start(40)
        train.epoch_start(80)
        ev.eval_accuracy(40, 0.8)
        ev.eval_stop(40)
        ev.run_stop("success")
        train.epoch_stop(80)
        train.run_stop("success")
    assert keys(ev.file) == ["eval_start", "eval_accuracy", "eval_stop", "run_stop"]
    merged = keys(merge_parts(result))
    assert merged.count("run_start") == 1
    assert merged[-9:] == [
        "epoch_start",
        "epoch_stop",
        "tracked_stats",
        "eval_start",
        "epoch_start",
        "eval_accuracy",
        "eval_stop",
        "run_stop",
        "epoch_stop",
    ]
    first = result.read_bytes()
    assert merge_parts(result).read_bytes() == first


def test_an_aborted_asynchronous_run_is_stopped_by_the_training_root_alone(tmp_path):
    with Events(tmp_path / "r.txt", role="training") as train, Events(tmp_path / "r.txt", role="evaluation") as ev:
        for events in (train, ev):
            begin(events)
            events.run_stop("aborted")
    stops = [e for e in read(merge_parts(tmp_path / "r.txt")) if e["key"] == "run_stop"]
    assert [e["metadata"]["status"] for e in stops] == ["aborted"]


def test_a_success_ends_the_run_even_if_training_then_fails_while_shutting_down(tmp_path):
    clock = Clock()
    with (
        Events(tmp_path / "r.txt", role="training", now_ms=clock) as train,
        Events(tmp_path / "r.txt", role="evaluation", now_ms=clock) as ev,
    ):
        begin(train)
        begin(ev)
        train.epoch_start(40)
        evaluate(ev, 40, 0.9)
        ev.run_stop("success")
        train.abort()
    stops = [e for e in read(merge_parts(tmp_path / "r.txt")) if e["key"] == "run_stop"]
    assert [e["metadata"]["status"] for e in stops] == ["success"]


def test_parts_that_disagree_or_have_broken_lines_are_refused(tmp_path):
    clock = Clock()
    with (
        Events(tmp_path / "r.txt", role="training", now_ms=clock) as train,
        Events(tmp_path / "r.txt", role="evaluation", now_ms=clock) as ev,
    ):
        begin(train)
        begin(ev)
        train.run_stop("aborted")
        evaluate(ev, 40, 0.9)
        ev.run_stop("success")
    with pytest.raises(LogError, match="2 run_stop lines, the first is aborted"):
        merge_parts(tmp_path / "r.txt")
    ev.file.write_text("half a line\n" + ev.file.read_text())
    with pytest.raises(LogError, match="not an MLPerf log line"):
        merge_parts(tmp_path / "r.txt")
    with pytest.raises(LogError, match=r"no other\.txt\.training\.part"):
        merge_parts(tmp_path / "other.txt")


@pytest.mark.parametrize("tail", [':::MLLOG {"namespace": "", "time_ms": 17', "\0" * 500, "\0" * 20 + "\n"])
def test_parts_of_a_crashed_run_are_joined_without_what_the_crash_left_behind(tmp_path, tail):
    result, clock = tmp_path / "result_0.txt", Clock()
    with Events(result, role="training", now_ms=clock) as train, Events(result, role="evaluation", now_ms=clock) as ev:
        begin(train)
        begin(ev)
        evaluate(ev, 40, 0.5)
        train.epoch_start(80)
    for part in (train.file, ev.file):
        part.write_text(part.read_text() + tail)
    assert merge_left_parts(tmp_path, besides=tmp_path / "result_0.resumed_000040.txt") == [result]
    assert [key for key in keys(result) if key in ("run_start", "eval_stop", "epoch_start")] == [
        "run_start",
        "eval_stop",
        "epoch_start",
    ]
    assert merge_left_parts(tmp_path, besides=result) == []


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with Events(tmp_path / "r.txt") as events:
        begin(events)
        whole, write = events.file.read_text(), os.write

        def short(descriptor, data):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[:-5])

        with monkeypatch.context() as patch:
            patch.setattr("os.write", short)
            with pytest.raises(LogError, match="No space left on device"):
                events.epoch_start(40)
        assert events.file.read_text() == whole
        events.abort()
    assert read(events.file)[-1]["key"] == "run_stop"


def test_a_log_whose_clock_never_ran_is_removed_when_its_run_fails(tmp_path):
    with Events(tmp_path / "r.txt", role="training") as events:
        events.init_start()
        assert events.file.exists()
        events.abort()
        events.abort()
    assert list(tmp_path.iterdir()) == []


def test_abort_stops_a_running_clock_once(tmp_path):
    with Events(tmp_path / "r.txt") as events:
        begin(events)
        events.abort()
        events.abort()
    stops = [e for e in read(tmp_path / "r.txt") if e["key"] == "run_stop"]
    assert [e["metadata"]["status"] for e in stops] == ["aborted"]
    assert Path(stops[0]["metadata"]["file"]).name == Path(__file__).name
    Events.silent().abort()


@given(steps=st.lists(st.integers(1, 10**6), unique=True, max_size=5), instance=st.integers(0, 10**4))
def test_every_line_is_one_json_object_after_the_token(tmp_path_factory, steps, instance):
    file = tmp_path_factory.mktemp("log") / "r.txt"
    with Events(file, instance=instance) as events:
        begin(events)
        for step in steps:
            evaluate(events, step, 0.5)
    assert all(line.startswith(":::MLLOG {") and line.endswith("}") for line in file.read_text().splitlines())
    assert all(set(e) >= {"key", "value", "metadata", "time_ms", "namespace", "event_type"} for e in read(file))
