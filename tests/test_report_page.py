"""Reports: logs are read as they are, the minutes add up, and the page stands alone.

Longer than 400 lines, because it has one test per section of the page.
"""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from observed_runs import write_gpu_trace, write_own_run, write_slow_ranks
from report_logs import published_rows, write_result
from scalefold.errors import LogError
from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.mlperf.log.published import olympic_mean, read_published
from scalefold.report.anatomy import anatomy, evaluates_synchronously, hand_over_delays
from scalefold.report.console import format_minutes
from scalefold.report.logs import read_result, read_runs, reference_band
from scalefold.report.page import write_report
from scalefold.report.plots import PALETTE, step_parts, thin
from scalefold.report.record import Record, StepRow
from scalefold.report.systems import Verdict, by_system, lines, parse_check


def log_of(tmp_path, submitter="NVIDIA", scaling="strong", index=0):
    return write_result(tmp_path / f"result_{index}.txt", published_rows(submitter, scaling)[index])


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
    assert by_system([run])[0].minutes is None
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
        (_line(time_ms=True), "time_ms is True, must be a number"),
        (_line(metadata=[]), "key must be text and metadata a JSON object"),
        (_line(key="eval_accuracy", value=None), "eval_accuracy is None, must be a number"),
        (_line(key="eval_accuracy", value=0.5, metadata={"epoch_num": "4"}), "epoch_num is '4', must be a number"),
        (_line(key="target_avg_lddt_ca_value", value={"a": 1}), "target_avg_lddt_ca_value is {"),
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


def test_a_page_replaces_no_folder_and_no_device(tmp_path):
    log = log_of(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "folder"), ("pipe", "device or pipe")):
        with pytest.raises(LogError, match=f"{name}: is a {kind}; name a file to write"):
            write_report(log, tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert {file.name for file in tmp_path.iterdir()} == {log.name, "folder", "pipe"}


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
    path.write_text(path.read_text().replace(str(PARAMETERS_COUNT), "1234567"))
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


def organizations(tmp_path, *submitters):
    """Folders of published results, one per submitter, under the folders' usual names."""
    folders = []
    for submitter in submitters:
        folders.append(tmp_path / submitter / "strong" / "openfold")
        folders[-1].mkdir(parents=True)
        for row in published_rows(submitter):
            write_result(folders[-1] / f"result_{row['run']}.txt", row)
    return folders


def test_runs_of_several_systems_are_told_apart_with_one_colour_and_legend_entry_each(tmp_path):
    folders = organizations(tmp_path, "NVIDIA", "HPE+LBNL", "TACC", "Clemson")
    systems = by_system(read_runs(folders))
    assert [(system.label.split(" · ")[0], len(system.runs)) for system in systems] == [
        ("NVIDIA", 10),
        ("HPE+LBNL", 10),
        ("TACC", 10),
        ("Clemson", 10),
    ]
    drawn = list(lines(systems))
    assert {line.colour for line in drawn} == {0, 1, 2, 3}
    assert [line.label for line in drawn if line.label] == [system.label for system in systems]
    text = write_report(folders, tmp_path / "r.html").page.read_text()
    assert "OpenFold training: 4 systems, 40 runs" in text
    for system, minutes in zip(systems, ("7.51 min", "14.65 min", "2h37m", "4h18m"), strict=True):
        assert text.count(f"</span>{system.label}</h2>") == 1
        assert minutes in text
    svg = text[text.index("<h3>Accuracy over samples</h3>") : text.index("<h3>Accuracy over time</h3>")]
    assert all(svg.count(f">{system.label}</text>") == 1 for system in systems)


def test_weak_and_strong_results_of_one_platform_are_two_systems(tmp_path):
    for scaling in ("strong", "weak"):
        folder = tmp_path / "sys" / scaling / "openfold"
        folder.mkdir(parents=True)
        for row in published_rows("NVIDIA", scaling):
            write_result(folder / f"result_{row['run']}.txt", row | {"system": "eos"})
    strong, weak = by_system(read_runs([tmp_path / "sys" / scaling / "openfold" for scaling in ("strong", "weak")]))
    assert (len(strong.scored), len(weak.scored)) == (8, 16)
    assert strong.label == "NVIDIA · eos · 2080 ranks · batch 256 · bf16"
    assert weak.minutes == pytest.approx(28.59, abs=0.01)


def test_minutes_and_samples_are_those_of_the_same_runs(tmp_path):
    (system,) = by_system(read_runs(organizations(tmp_path, "NVIDIA")))
    rows = sorted(published_rows("NVIDIA"), key=lambda row: float(row["ttt_seconds"]))[1:-1]
    assert system.minutes == pytest.approx(np.mean([float(row["ttt_seconds"]) for row in rows]) / 60)
    assert system.samples == np.mean([int(row["samples_to_converge"]) for row in rows])
    assert system.floor_samples == pytest.approx(123_132.39, abs=0.5)


def test_one_run_that_missed_the_target_is_the_slowest_and_two_leave_no_score(tmp_path):
    (folder,) = organizations(tmp_path, "NVIDIA")
    before = by_system(read_runs(folder))[0].minutes
    slowest = max(read_runs(folder), key=lambda run: run.minutes or 0.0)
    for path, score in ((slowest.log.path, before), (folder / "result_0.txt", None)):
        path.write_text(path.read_text().replace('"success"', '"aborted"'))
        assert by_system(read_runs(folder))[0].minutes == score
    assert "no score" in write_report(folder, tmp_path / "r.html").page.read_text()


def test_the_log_of_another_benchmark_is_refused(tmp_path):
    path = log_of(tmp_path)
    path.write_text(path.read_text().replace('"openfold"', '"cosmoflow"'))
    with pytest.raises(LogError, match="a log of cosmoflow; the report is on openfold"):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("log_time_ms_string.txt", ":53: run_start: time_ms is '1695867472645', must be a number"),
        ("log_valnull.txt", ":61: eval_accuracy is None, must be a number"),
        ("log_two_runs.txt", ":134: two runs in one file"),
        ("garbage_metrics.jsonl", ": holds no record"),
    ],
)
def test_the_reported_cases_are_one_line_with_file_and_place(shared_dir, tmp_path, name, words):
    with pytest.raises(LogError, match=re.escape(f"{name}{words}")):
        write_report(shared_dir / "cases" / name, tmp_path / "r.html")


@pytest.mark.parametrize(
    "line",
    [
        {"time_ms": "1", "key": "epoch_start", "value": None, "metadata": {}},
        {"time_ms": float("nan"), "key": "epoch_start", "value": None, "metadata": {}},
        {"time_ms": 1, "key": ["x"], "value": None, "metadata": {}},
        {"time_ms": 1, "key": "eval_stop", "value": None, "metadata": []},
        {"time_ms": 1, "key": "eval_accuracy", "value": {"a": 1}, "metadata": {"epoch_num": 1}},
        {"time_ms": 1, "key": "tracked_stats", "value": {"throughput": "9"}, "metadata": {"step": 1}},
        {"time_ms": 1, "key": "tracked_stats", "value": {"throughput": 9}, "metadata": {"step": [1]}},
    ],
)
def test_an_entry_of_a_wrong_type_is_named_with_file_and_line(tmp_path, line):
    path = log_of(tmp_path)
    number = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + f":::MLLOG {json.dumps(line)}\n")
    with pytest.raises(LogError, match=rf"result_0\.txt:{number}: "):
        read_runs(path)


def test_only_a_valid_closed_division_log_has_a_green_tick(tmp_path, monkeypatch):
    monkeypatch.setattr("scalefold.report.page._figures", lambda *parts: [])
    path = log_of(tmp_path)
    valid = {"ok": True, "headline": "valid closed-division log"}

    def mark(check):
        text = write_report(path, tmp_path / "r.html", check=check).page.read_text()
        return re.search(r'<p class="verdict (\w+)">(.)', text).groups()

    assert mark(valid) == ("ok", "✓")
    assert mark({"ok": False, "well_formed": True, "headline": "other keys"}) == ("other", "○")
    assert mark({"ok": False, "headline": "invalid"}) == ("bad", "✗")
    path.write_text(path.read_text().replace(str(PARAMETERS_COUNT), "1234567"))
    assert mark(valid) == ("other", "○"), "a run that is not the benchmark"
    assert mark("SUCCESS") == ("other", "○")


def test_gradient_norm_learning_rate_memory_and_date_are_shown(tmp_path):
    with Record(tmp_path, rank0=True) as record:
        record.run(config_name="tiny", commit="abc1234")
        for step in range(1, 9):
            record.step(StepRow(step=step, loss=1.0 / step, lr=1e-3, grad_norm=2.0 / step, peak_gib=3.0))
    log_of(tmp_path)
    text = write_report(tmp_path, tmp_path / "r.html").page.read_text()
    for words in ("Gradient norm and learning rate", "Peak memory", "2023-09-28 01:56 UTC", "abc1234"):
        assert words in text


def test_stragglers_energy_and_the_anatomy_of_a_step_are_shown_where_they_were_measured(tmp_path):
    write_own_run(tmp_path)
    plain = write_report(tmp_path, tmp_path / "r.html").page.read_text()
    assert "Stragglers" not in plain
    assert "Anatomy of a step" not in plain
    write_slow_ranks(tmp_path)
    write_gpu_trace(tmp_path)
    text = write_report(tmp_path, tmp_path / "r.html").page.read_text()
    assert Page(text).open == []
    for words in ("Stragglers: 5 ranks", "1abc_A 0.50 s", "GPUs used 1.000 kWh", "steps 1-11 rank 0", "GPU: idle"):
        assert words in text
    assert text.index(">node0<") < text.index(">node1<") < text.index(">node2<")


def test_a_broken_trace_is_named(tmp_path):
    write_own_run(tmp_path)
    write_gpu_trace(tmp_path).write_text("{")
    with pytest.raises(LogError, match=r"steps_1-11_rank_0\.json: no Chrome trace"):
        write_report(tmp_path, tmp_path / "r.html")
