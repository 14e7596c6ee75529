"""metrics.jsonl: what is written comes back, whatever interrupts the run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.errors import LogError
from scalefold.report.record import EvalRow, Record, StepRow, read_metrics


def write_run(run_dir, steps, **record_kwargs):
    with Record(run_dir, rank0=True, **record_kwargs) as record:
        record.run(config="tiny", world_size=1)
        record.start_clock()
        for step in steps:
            record.step(StepRow(step=step, loss=10.0 - step, terms={"fape": 0.5 / step}, samples=4 * step, step_ms=5.0))
            if step % 2 == 0:
                record.evaluation(EvalRow(step=step, samples=4 * step, lddt_ca=0.1 * step, seconds=1.5))
    return run_dir / "metrics.jsonl"


def test_written_values_come_back_as_columns(tmp_path):
    with Record(tmp_path, rank0=True) as record:
        record.run(config="eos", world_size=2080, environment={"torch": "2.11"})
        row = {"lr": 1e-3, "grad_norm": 0.2, "step_ms": 412.0, "data_ms": 3.0, "passes": 2, "peak_gib": 71.4}
        row |= {"samples": 256, "time_s": 9.0}
        record.step(StepRow(step=1, loss=1.873, terms={"fape": 0.412}, phases_ms={"fwd": 148.0}, **row))
        record.step(StepRow(step=2, loss=np.float32(1.5), terms={"fape": 0.4, "chi": 0.1}))
        record.evaluation(
            EvalRow(step=2, samples=512, lddt_ca=0.781, seconds=25.4, time_s=60.0, chains={"7abc_A": 0.9})
        )
        record.event("hand_over", step=2, stall_ms=12.0)
    metrics = read_metrics(tmp_path)
    assert metrics.run == {"config": "eos", "world_size": 2080, "environment": {"torch": "2.11"}}
    assert metrics.step.tolist() == [1, 2]
    assert metrics.loss.tolist() == [1.873, 1.5]
    for name, value in row.items():
        assert getattr(metrics, name)[0] == value
        assert math.isnan(getattr(metrics, name)[1])
    assert metrics.terms["fape"].tolist() == [0.412, 0.4]
    assert math.isnan(metrics.terms["chi"][0])
    assert metrics.phases_ms["fwd"][0] == 148.0
    assert metrics.eval_lddt_ca.tolist() == [0.781]
    assert metrics.eval_time_s.tolist() == [60.0]
    assert metrics.eval_chains == [{"7abc_A": 0.9}]
    assert metrics.events[0]["name"] == "hand_over"
    assert metrics.events[0]["stall_ms"] == 12.0


def test_the_first_step_writes_the_parts_of_the_start_once(tmp_path):
    with Record(tmp_path, rank0=True) as record:
        record.start_part("before_the_clock")
        record.start_clock()
        for step in (1, 2):
            record.start_part("data_opened")
            record.start_part("first_batch")
            record.step(StepRow(step=step, loss=1.0))
    (start,) = read_metrics(tmp_path).events
    assert (start["name"], start["step"]) == ("start", 1)
    assert 0 <= start["data_opened_s"] <= start["first_batch_s"] <= start["time_s"]
    assert "before_the_clock_s" not in start


def test_a_resumed_record_times_the_parts_of_its_own_start(tmp_path):
    write_run(tmp_path, [1, 2])
    with Record(tmp_path, rank0=True, resume_step=2) as record:
        record._clock_offset_s = 1000.0
        record.start_clock()
        record.start_part("data_opened")
        record.step(StepRow(step=3, loss=1.0))
    assert read_metrics(tmp_path).events[-1]["data_opened_s"] < 1000.0


def test_each_line_is_on_disk_before_the_call_returns(tmp_path):
    record = Record(tmp_path, rank0=True)
    record.step(StepRow(step=1, loss=2.0))
    assert read_metrics(tmp_path).loss.tolist() == [2.0]
    record.close()


def test_a_resumed_run_drops_exactly_the_steps_that_will_be_repeated(tmp_path):
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 10), resume_step=4)
    metrics = read_metrics(tmp_path)
    assert metrics.step.tolist() == list(range(1, 10))
    assert metrics.eval_step.tolist() == [2, 4, 6, 8]
    assert [e["name"] for e in metrics.events] == ["resume"]
    assert np.all(np.diff(metrics.time_s) >= 0), "the clock continues where the kept part ended"


def test_a_fresh_run_sets_an_older_record_aside(tmp_path):
    write_run(tmp_path, [1, 2, 3])
    write_run(tmp_path, [1])
    assert read_metrics(tmp_path).step.tolist() == [1]
    assert read_metrics(tmp_path / "metrics.1.jsonl").step.tolist() == [1, 2, 3]


def test_an_incomplete_last_line_of_a_killed_run_is_ignored_and_removed_by_the_resume(tmp_path):
    path = write_run(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-9])
    assert read_metrics(path).step.tolist() == [1, 2]
    write_run(tmp_path, [3], resume_step=2)
    assert read_metrics(path).step.tolist() == [1, 2, 3]


@pytest.mark.parametrize("tail", ["\0" * 300, "\0" * 300 + "\n", '{"kind": "st', '\0\0{"kind": "st'])
def test_what_a_crash_leaves_at_the_end_does_not_block_a_resume(tmp_path, tail):
    path = write_run(tmp_path, [1, 2, 3])
    path.write_text(path.read_text() + tail)
    assert read_metrics(path).step.tolist() == [1, 2, 3]
    write_run(tmp_path, [3], resume_step=2)
    assert read_metrics(path).step.tolist() == [1, 2, 3]
    assert "\0" not in path.read_text()


def test_half_a_line_inside_is_left_out_by_a_resume_which_says_so_and_keeps_the_file(tmp_path, caplog):
    path = write_run(tmp_path, [1, 2, 3])
    lines = path.read_text().splitlines(keepends=True)
    broken = "".join([*lines[:2], lines[2][:-30], *lines[2:]])
    path.write_text(broken)
    write_run(tmp_path, [3], resume_step=2)
    assert read_metrics(path).step.tolist() == [1, 3]  # the half line has swallowed the one of step 2
    assert "metrics.jsonl:3: not a JSON object" in caplog.text
    assert "1 such lines are left out" in caplog.text
    assert (tmp_path / "metrics.1.jsonl").read_text() == broken


@settings(deadline=None)
@given(cut=st.integers(min_value=0, max_value=2000))
def test_a_file_cut_at_any_byte_is_readable(cut, tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("cut"), range(1, 9))
    whole = read_metrics(path).step.tolist()
    path.write_bytes(path.read_bytes()[:cut])
    assert read_metrics(path).step.tolist() == whole[: len(read_metrics(path).step)]


def test_other_ranks_write_nothing(tmp_path):
    with Record(tmp_path / "run", rank0=False) as record:
        record.start_clock()
        record.run(config="x")
        record.step(StepRow(step=1, loss=1.0))
        record.evaluation(EvalRow(step=1, samples=1, lddt_ca=0.5))
        record.event("x")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_keeps_the_file_strict_json_and_reads_back_as_nan(tmp_path):
    with Record(tmp_path, rank0=True) as record:
        record.step(StepRow(step=1, loss=math.nan, terms={"fape": math.inf}, grad_norm=-math.inf))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    metrics = read_metrics(tmp_path)
    assert np.isnan([metrics.loss[0], metrics.terms["fape"][0], metrics.grad_norm[0]]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "metrics.jsonl:2: not a JSON object"),
        ('{"kind": "stop"}', "metrics.jsonl:2: no record"),
        ("[1, 2]", "metrics.jsonl:2: no record"),
        ('{"kind": "step", "loss": 1.0}', "metrics.jsonl:2: step record without 'step'"),
        ('{"kind": "eval", "step": 1, "samples": 4}', "metrics.jsonl:2: eval record without 'lddt_ca'"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n' + line + '\n{"kind": "run"}\n')
    with pytest.raises(LogError, match=message):
        read_metrics(tmp_path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(LogError, match="cannot read metrics"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"kind": "step", "step": "3", "loss": 1}', "step: step is '3', must be a whole number"),
        ('{"kind": "step", "step": 1e3, "loss": 1}', "must be a whole number"),
        ('{"kind": "step", "step": 1' + "0" * 5000 + ', "loss": 1}', "must be a whole number"),
        ('{"kind": "step", "step": 1, "loss": "low"}', "step: loss is 'low', must be a number"),
        ('{"kind": "step", "step": 1, "loss": 1, "terms": [1]}', "terms is '[1]', must be a JSON object of numbers"),
        ('{"kind": "step", "step": 1, "loss": 1, "terms": {"fape": {}}}', "terms.fape is '{}', must be a number"),
        ('{"kind": "step", "step": 1, "loss": 1, "time_s": true}', "time_s is 'True', must be a number"),
        ('{"kind": "eval", "step": 1, "samples": 4, "lddt_ca": [0.5]}', "lddt_ca is '[0.5]', must be a number"),
        ('{"kind": "event", "step": 1}', "event record without 'name'"),
        ('{"kind": "event", "name": "loader", "slowest": [1], "workers": 1, "prefetch": 1}', "must list chains"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_line(tmp_path, line, message):
    """One line with file, line and key, where the report would have ended with a traceback."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "run"}\n' + line + "\n")
    with pytest.raises(LogError, match=r"metrics\.jsonl:2: ") as caught:
        read_metrics(file)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_no_metrics_file_is_refused(tmp_path):
    """A binary file without a line end was an empty page."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\0\1")
    with pytest.raises(LogError, match=r"metrics\.jsonl: holds no record"):
        read_metrics(file)
