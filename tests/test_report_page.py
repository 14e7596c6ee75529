"""Reports: logs are read as they are, the minutes add up, and the page stands alone."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from report_logs import published_rows, write_result
from scalefold.errors import LogError
from scalefold.report.anatomy import anatomy, evaluates_synchronously, hand_over_delays
from scalefold.report.logs import read_result, read_runs, reference_band
from scalefold.report.page import Verdict, format_minutes, parse_check, score_minutes, write_report
from scalefold.report.plots import PALETTE, step_parts, thin
from scalefold.report.published import olympic_mean, read_published
from scalefold.report.record import EvalRow, Record, StepRow


def log_of(tmp_path, submitter="NVIDIA", scaling="strong", index=0):
    return write_result(tmp_path / f"result_{index}.txt", published_rows(submitter, scaling)[index])


def write_own_run(folder):
    with Record(folder, rank0=True) as record:
        record.run(config="tiny", target=0.6, environment={"torch": "2.11"}, global_batch_size=2)
        for step in range(1, 9):
            phases = {"fwd": 40.0 * step, "bwd": 30.0}
            record.step(
                StepRow(
                    step=step,
                    loss=9.0 / step,
                    terms={"fape": 1.0 / step},
                    step_ms=100.0 + 40 * step,
                    data_ms=10.0,
                    passes=1 + step % 4,
                    samples=2 * step,
                    time_s=float(step),
                    phases_ms=phases,
                )
            )
            if step % 4 == 0:
                record.evaluation(EvalRow(step=step, samples=2 * step, lddt_ca=0.07 * step, time_s=step + 0.5))
        record.event("loader", workers=2, prefetch=4, slowest=[{"chain": "1abc_A", "seconds": 0.25}])
    (folder / "config.yaml").write_text("system: tiny <laptop>\n")


@pytest.mark.parametrize("submitter", ["NVIDIA", "HPE+LBNL", "TACC", "Clemson"])
def test_the_anatomy_of_a_run_adds_up_to_its_time_to_train(tmp_path, submitter):
    row = published_rows(submitter)[0]
    log = read_result(log_of(tmp_path, submitter))
    parts = anatomy(log)
    assert parts is not None
    assert parts.total_s == pytest.approx(float(row["ttt_seconds"]), abs=0.01)
    assert parts.start_s == pytest.approx(float(row["time_to_first_epoch_start_s"]), abs=0.01)
    assert parts.first_cycle_s == pytest.approx(float(row["first_cycle_s"]), abs=0.01)
    assert parts.num_cycles == int(row["train_cycles"])
    assert parts.steady_cycle_s == pytest.approx(float(row["later_cycles_median_s"]), abs=0.01)
    assert parts.synchronous == (row["eval_mode"] == "sync")


def test_cycles_that_run_beside_the_passing_evaluation_belong_to_the_tail(tmp_path):
    path = log_of(tmp_path)
    before = anatomy(read_result(path))
    log = read_result(path)
    extra = {"epoch_num": log.cycles[-1].samples + 10240}
    stop = int(published_rows("NVIDIA")[0]["run_stop_ms"])
    lines = [
        {"time_ms": stop - 20000, "key": "epoch_start", "value": None, "metadata": extra},
        {"time_ms": stop - 100, "key": "epoch_stop", "value": None, "metadata": extra},
    ]
    with path.open("a") as stream:
        stream.writelines(f":::MLLOG {json.dumps(line)}\n" for line in lines)
    assert anatomy(read_result(path)) == before


def test_asynchronous_and_synchronous_evaluation_are_told_apart_and_delays_measured(tmp_path):
    asynchronous = read_result(log_of(tmp_path, "NVIDIA", "strong", 1))
    synchronous = read_result(log_of(tmp_path, "NVIDIA", "weak", 0))
    assert not evaluates_synchronously(asynchronous)
    assert evaluates_synchronously(synchronous)
    samples, delay, seconds = hand_over_delays(asynchronous)[3]
    assert samples == 4 * 10240
    assert delay == pytest.approx(25.409, abs=0.01)
    assert seconds == pytest.approx(25.409, abs=0.01)


def test_a_run_that_is_still_going_has_no_minutes_but_a_curve(tmp_path):
    path = log_of(tmp_path)
    lines = [line for line in path.read_text().splitlines() if '"run_stop"' not in line]
    path.write_text("\n".join(lines) + '\n:::MLLOG {"time_ms": 1, "key": "eval_acc')
    (run,) = read_runs(path)
    assert run.minutes is None
    assert score_minutes([run]) is None
    assert run.log is not None
    assert anatomy(run.log) is None
    assert len(run.lddt_curve()[0]) == 14


def _line(**changes):
    return (
        ":::MLLOG " + json.dumps({"time_ms": 1, "key": "run_start", "value": None, "metadata": {}} | changes) + "\nx\n"
    )


def test_other_lines_and_prefixes_in_a_log_do_not_matter(tmp_path):
    path = log_of(tmp_path)
    clean = read_result(path)
    noisy = "starting\n" + "".join(f"0: {line}\nsome text\n" for line in path.read_text().splitlines())
    path.write_text(noisy)
    assert read_result(path) == clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":::MLLOG {broken\nx\n", "result_0.txt:1: an MLPerf line"),
        (':::MLLOG {"time_ms": 1, "key": "run_start", "value": null}\nx\n', "result_0.txt:1: an MLPerf line"),
        ("no log at all\n", "no run_start line"),
        (_line(time_ms="1"), "result_0.txt:1: run_start: time_ms is '1', must be a number"),
        (_line(time_ms=True), "time_ms is 'True', must be a number"),
        (_line(metadata=[]), "key must be text and metadata a JSON object"),
        (_line(key="eval_accuracy", value=None), "eval_accuracy: value is 'None', must be a number"),
        (_line(key="eval_accuracy", value=0.5, metadata={"epoch_num": "4"}), "epoch_num is '4', must be a number"),
        (_line(key="target_avg_lddt_ca_value", value={"a": 1}), "target_avg_lddt_ca_value: value is"),
        (_line(key="tracked_stats", value={"throughput": "fast"}), "tracked_stats: throughput is 'fast'"),
        (_line(key=None), "key must be text"),
        (":::MLLOG " + "[" * 100_000 + "\nx\n", "result_0.txt:1: an MLPerf line"),
    ],
)
def test_a_broken_log_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "result_0.txt"
    path.write_text(text)
    with pytest.raises(LogError, match=message):
        read_runs(path)


def test_an_empty_or_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(LogError, match="holds neither"):
        read_runs(tmp_path)
    with pytest.raises(LogError, match="no such file"):
        read_runs(tmp_path / "absent")


def test_result_files_are_taken_in_the_order_of_their_numbers(tmp_path):
    for index in (10, 2, 1):
        write_result(tmp_path / f"result_{index}.txt", published_rows("HPE+LBNL")[0])
    assert [run.name for run in read_runs(tmp_path)] == ["result_1", "result_2", "result_10"]


def test_a_resumed_run_is_one_run_with_its_latest_log_and_the_whole_curve(tmp_path):
    write_own_run(tmp_path)
    first = log_of(tmp_path)
    resumed = tmp_path / "result_0.resumed_step_4.txt"
    lines = [line for line in first.read_text().splitlines() if '"eval_' not in line or "153600" in line]
    resumed.write_text("\n".join(lines) + "\n")
    os.utime(first, (1, 1))
    (run,) = read_runs(tmp_path)
    assert run.log is not None
    assert run.log.path == resumed
    assert run.lddt_curve()[0].tolist() == [8.0, 16.0]


def test_the_reference_band_is_there_for_the_benchmark_only(tmp_path):
    path = log_of(tmp_path)
    (run,) = read_runs(path)
    assert reference_band(run) == (133120.0, 13738.0)
    assert reference_band(read_runs(log_of(tmp_path, "NVIDIA", "weak", 1))[0]) == (88832.0, 8760.0)
    mean, _ = reference_band(read_runs(log_of(tmp_path, "Clemson", index=2))[0]) or (0, 0)
    assert mean == pytest.approx(88832 + (133120 - 88832) / 8)
    path.write_text(path.read_text().replace("93229082", "1234567"))
    assert reference_band(read_runs(path)[0]) is None
    assert not read_runs(path)[0].is_benchmark


def test_published_results_give_the_published_scores():
    minutes = {(p.submitter, p.scaling): p.minutes for p in read_published()}
    assert minutes["NVIDIA", "strong"] == pytest.approx(7.512, abs=0.001)
    assert minutes["HPE+LBNL", "strong"] == pytest.approx(14.646, abs=0.001)
    assert minutes["TACC", "strong"] == pytest.approx(157.27, abs=0.01)
    assert minutes["Clemson", "strong"] == pytest.approx(257.56, abs=0.01)


def test_the_olympic_mean_drops_both_extremes():
    assert olympic_mean([1.0, 2.0, 3.0, 100.0]) == 2.5
    assert olympic_mean([1.0, 2.0]) == 1.5


def test_thinning_keeps_the_mean_and_skips_what_is_unknown():
    x = np.arange(10007.0)
    y = np.sin(x / 500)
    y[::7] = np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == 400
    assert np.isfinite(thin_y).all()
    assert np.abs(np.interp(x, thin_x, thin_y) - np.sin(x / 500))[50:-50].max() < 0.02


def test_phases_of_a_step_add_up_to_the_step(tmp_path):
    write_own_run(tmp_path)
    (run,) = read_runs(tmp_path)
    parts = step_parts(run)
    assert list(parts) == ["data", "fwd", "bwd", "other"]
    assert run.metrics is not None
    assert np.allclose(sum(parts.values()), run.metrics.step_ms)
    assert np.allclose(parts["other"], 60.0)


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        ("INFO:root: Running\nINFO:root:SUCCESS\n", True),
        ("SUCCESS of a part\nERROR:root:FAILED\n", False),
        ("no word", False),
        ({"ok": True, "headline": "fine", "details": ["a", "b"]}, True),
        (Verdict(False, "x"), False),
    ],
)
def test_the_verdict_is_read_from_what_the_caller_has(check, verdict):
    parsed = parse_check(check)
    assert parsed is not None
    assert parsed.ok is verdict


@pytest.mark.parametrize(("minutes", "text"), [(0.5, "30.0 s"), (7.512, "7.51 min"), (258.0, "4h18m")])
def test_minutes_are_written_for_people(minutes, text):
    assert format_minutes(minutes) == text


class Page(HTMLParser):
    """Collects what a page would load, its ids and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.ids, self.figures = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.figures += tag == "figure"
        self.ids += [values["id"]] if "id" in values else []
        self.loaded += [values[k] for k in ("src", "href", "xlink:href") if not (values.get(k) or "#").startswith("#")]
        if tag not in ("meta", "br", "hr", "link", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_of_a_submitters_folder_stands_alone(tmp_path):
    for index in range(3):
        log_of(tmp_path, index=index)
    (tmp_path / "scaling.csv").write_text("# model\nkind,accelerators,minutes\nmodelled,64,16.2\nmodelled,2080,2.2\n")
    files = write_report(tmp_path, tmp_path / "report.html", check="SUCCESS", scaling_csv=tmp_path / "scaling.csv")
    text = files.page.read_text()
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert len(page.ids) == len(set(page.ids)), "ids of the drawings must not collide"
    assert "prefers-color-scheme: dark" in text
    for colour in PALETTE.values():
        assert text.count(colour) == 1, f"{colour} appears outside its CSS variable, so dark mode would not change it"
    for words in ("7.45 min", "133,120 ± 13,738", "reference ± sd", "✓ The compliance checker accepts", "HPE+LBNL"):
        assert words in text
    assert {"anatomy.svg", "scaling.png", "run_spread.svg"} <= {file.name for file in files.figures}
    assert page.figures * 2 == len(files.figures)
    assert all(file.stat().st_size > 2000 for file in files.figures)


def test_the_page_of_a_run_that_is_not_the_benchmark_shows_losses_and_no_reference(tmp_path):
    write_own_run(tmp_path)
    verdict = {"ok": False, "headline": "3 keys differ <from> the benchmark"}
    text = write_report(tmp_path, tmp_path / "out" / "r.html", check=verdict).page.read_text()
    assert Page(text).figures == 5
    assert "not the benchmark configuration" in text
    assert "reference ± sd" not in text
    assert "Published results" not in text
    assert "✗ 3 keys differ &lt;from&gt; the benchmark" in text
    assert "system: tiny &lt;laptop&gt;" in text
    assert re.search(r"Environment</h2>.*torch.*2\.11", text, re.DOTALL)
    assert re.search(r"Slowest samples</h2>.*1abc_A.*0\.250 s.*2 loader workers, 4 batches", text, re.DOTALL)
