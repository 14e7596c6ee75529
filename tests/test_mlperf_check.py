"""The verdict on one log: the rehearsal passes, each trap is caught, other configurations are told apart."""

import json
import logging
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlperf_editing import drop, edit, index_of, line_of, move, rehearsal, scale_epoch_num, set_value
from scalefold.errors import LogError
from scalefold.mlperf.judge.check import check_log, judge_log, official_messages, worst
from scalefold.mlperf.judge.official_tools import quick_sub
from scalefold.mlperf.log.keys import EXPECTED, KEYS, TOKEN
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal


@pytest.fixture
def log(tmp_path):
    return rehearsal(tmp_path / "result_0.txt")


def run_official(file, tmp_path):
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "hpc", "--ruleset", "3.0.0"]
    command += ["--werror", "--log_output", str(tmp_path / "checker.log"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_rehearsal_passes_the_official_checker_with_warnings_as_errors(log, tmp_path):
    done = run_official(log, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SUCCESS" in done.stderr
    verdict = check_log(log)
    assert (verdict.kind, verdict.exit_code, verdict.reasons) == ("valid", 0, [])


@pytest.mark.parametrize("run", published_runs(), ids=lambda r: f"{r.submitter}-{r.scaling}-{r.run}")
def test_every_published_run_can_be_rebuilt_as_a_valid_log_with_its_own_time_and_convergence(tmp_path, run):
    verdict = check_log(write_rehearsal(published_script(run), tmp_path / "result_0.txt"))
    assert verdict.kind == "valid", verdict.text()
    assert verdict.minutes == pytest.approx(run.ttt_s / 60, abs=1e-4)
    assert verdict.samples_to_converge == run.samples_to_converge


def percent(lines):
    for line in lines:
        if line["key"] == "eval_accuracy":
            line["value"] *= 100


def evaluate_every_20(lines):
    drop(lines, "eval_start", "eval_accuracy", "eval_stop", epoch_num=20480)
    for key in ("eval_start", "eval_accuracy", "eval_stop"):
        line_of(lines, key, 1)["metadata"]["epoch_num"] = 5120


def repeat(key, occurrence=0, **changes):
    def change(lines):
        position = index_of(lines, key, occurrence)
        lines.insert(position + 1, {**lines[position], **changes})

    return change


def evaluate_on_after_the_target(lines):
    line_of(lines, "eval_accuracy", -3)["value"] = 0.81


def stop_before_the_passing_evaluation(lines):
    stop = lines.pop(index_of(lines, "run_stop"))
    stop["time_ms"] = line_of(lines, "eval_start", -1)["time_ms"]
    lines.insert(index_of(lines, "eval_start", -1) + 1, stop)


def stamp_run_stop_early(lines):
    line_of(lines, "run_stop")["time_ms"] -= 900


def slow_init(lines):
    for line in lines[: index_of(lines, "init_stop")]:
        line["time_ms"] -= 31 * 60_000


def meta(key, **changes):
    return lambda lines: line_of(lines, key)["metadata"].update(changes)


def unmeta(key, name):
    return lambda lines: line_of(lines, key)["metadata"].pop(name)


def append_text(file):
    file.write_text(file.read_text().replace("}\n", "} done\n", 1))


# trap of the rules' checklist -> (edit, word that the reasons must hold, whether the official checker lets it through)
TRAPS = {
    "1 lDDT in percent": (percent, "eval_accuracy", False),
    "1 one lDDT in percent": (lambda ls: line_of(ls, "eval_accuracy", 2).update(value=77.4), "between 0 and 1", True),
    "1 numbers as text": (set_value("max_templates", "4"), "max_templates", False),
    "1 ranks as text": (set_value("number_of_ranks", "2080"), "number_of_ranks", True),
    "1 one for true": (set_value("swa_enabled", 1), "swa_enabled", True),
    "1 closed in capitals": (set_value("submission_division", "Closed"), "submission_division", False),
    "1 status available": (set_value("submission_status", "available"), "submission_status", False),
    "2 evaluation skipped": (
        lambda ls: drop(ls, "eval_start", "eval_accuracy", "eval_stop", epoch_num=40960),
        "evaluation cadence",
        True,
    ),
    "2 evaluation between cycles": (evaluate_every_20, "evaluation cadence", True),
    "2 cycle evaluated twice": (repeat("eval_start", 2), "evaluation cadence", True),
    "3 epoch_num counts cycles": (lambda ls: scale_epoch_num(ls, 1 / 10240), "epoch_num", True),
    "3 epoch_num as text": (lambda ls: scale_epoch_num(ls, str), "epoch_num", True),
    "3 epoch_num missing": (unmeta("eval_accuracy", "epoch_num"), "epoch_num", False),
    "4 no seed": (lambda ls: drop(ls, "seed"), "seed is missing", True),
    "4 two seeds": (repeat("seed", value=7), "seed must appear once", True),
    "4 seed is no integer": (set_value("seed", "abc"), "must be an integer", True),
    "4 seed without call site": (unmeta("seed", "lineno"), "lineno", True),
    "5 data set opened early": (lambda ls: move(ls, "train_samples", "init_stop"), "data was touched", True),
    "5 evaluation opened early": (lambda ls: move(ls, "eval_start", "run_start"), "data was touched", True),
    "5 training opened early": (lambda ls: move(ls, "epoch_start", "run_start"), "data was touched", True),
    "6 warm-up changed weights": (lambda ls: line_of(ls, "eval_accuracy").update(value=0.71), "initial weights", True),
    "7 no checkpoint": (set_value("init_checkpoint_sha256sum", "none"), "init_checkpoint_sha256sum", False),
    "8 caches not dropped": (set_value("cache_clear", False), "cache_clear", True),
    "9 aborted": (meta("run_stop", status="aborted"), "status", True),
    "9 evaluation after the target": (evaluate_on_after_the_target, "stop at the first one", True),
    "9 stop before the target": (stop_before_the_passing_evaluation, "after run_stop", True),
    "9 stop stamped early": (stamp_run_stop_early, "stamped before", True),
    "9 two stops": (repeat("run_stop"), "run_stop must appear once", False),
    "9 target never met": (lambda ls: line_of(ls, "eval_accuracy", -1).update(value=0.799), "eval_accuracy", False),
    "10 batch above 256": (set_value("global_batch_size", 512), "no reference convergence point", True),
    "11 nodes of the whole job": (set_value("number_of_nodes", 4160), "this instance's own nodes", True),
    "11 two instances in one file": (meta("eval_start", instance=3), "instances", True),
    "13 placeholder organization": (set_value("submission_org", "SUBMISSION_ORG_PLACEHOLDER"), "real name", True),
    "13 empty platform": (set_value("submission_platform", " "), "submission_platform", True),
    "14 searched words": (set_value("submission_platform", "eval_accuracy box"), "holds the text", True),
    "14 searched words in a path": (meta("seed", file="global_batch_size.py"), "holds the text", True),
    "15 open division": (set_value("submission_division", "open"), "submission_division", True),
    "initialization too long": (slow_init, "init_stop", False),
    "NaN": (lambda ls: line_of(ls, "eval_accuracy", 3).update(value=float("nan")), "nan", True),
    "null": (set_value("global_batch_size", None), "global_batch_size", False),
    "clock jumps back": (lambda ls: line_of(ls, "eval_stop", 4).update(time_ms=0), "before the line above", True),
    "wrong interval": (lambda ls: line_of(ls, "run_start").update(event_type="POINT_IN_TIME"), "event_type", True),
    "cycle never stops": (lambda ls: drop(ls, "epoch_stop", epoch_num=30720), "epochs", True),
    "init after start": (lambda ls: ls.append(ls.pop(index_of(ls, "seed"))), "belongs before run_start", True),
    "setting missing": (lambda ls: drop(ls, "max_extra_msa"), "max_extra_msa", False),
    "field missing": (lambda ls: line_of(ls, "seed").pop("metadata"), "field metadata missing", False),
    "init_start not first": (lambda ls: move(ls, "cache_clear", "init_start"), "must be init_start", True),
    "throughput twice": (repeat("tracked_stats", 3), "tracked_stats", True),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_caught(log, trap):
    change, word, official_accepts = TRAPS[trap]
    edit(log, change)
    verdict = check_log(log)
    assert verdict.exit_code != 0
    assert word in verdict.text(), verdict.text()
    assert (verdict.official == ()) is official_accepts, verdict.official


def test_text_after_the_json_is_caught_and_text_before_the_token_is_not(log):
    plain = log.read_text()
    log.write_text("noise\n" + plain.replace(":::MLLOG", "rank 0: :::MLLOG"))
    assert check_log(log).kind == "valid"
    log.write_text(plain)
    append_text(log)
    assert "line format" in check_log(log).text()


@given(key=st.sampled_from(sorted(EXPECTED)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
def test_any_other_legal_value_is_a_well_formed_log_that_is_not_the_benchmark(log, key):
    original = log.read_text()
    other = {bool: False, int: 3, float: 0.25, str: "other"}[type(EXPECTED[key])]
    other = (not EXPECTED[key]) if isinstance(EXPECTED[key], bool) else other
    if other == EXPECTED[key]:
        other += 1
    if key in ("val_every_iters", "target_avg_lddt_ca_value"):
        return
    edit(log, set_value(key, other))
    verdict = check_log(log)
    log.write_text(original)
    assert (verdict.kind, verdict.exit_code) == ("non_benchmark", 3), verdict.text()
    assert [(d.key, d.logged, d.expected) for d in verdict.differences] == [(key, other, EXPECTED[key])]
    assert f"1 key differs: {key}" in verdict.headline


def tiny(lines):
    """The log of a small model: other sizes, target, cadence, data and no checkpoint, consistently logged."""
    drop(lines, "eval_start", "eval_accuracy", "eval_stop", epoch_num=0)
    for key, value in {
        "global_batch_size": 4,
        "val_every_iters": 10,
        "target_avg_lddt_ca_value": 0.6,
        "model_parameters_count": 31337,
        "init_checkpoint_sha256sum": "none",
        "train_samples": 64,
        "eval_samples": 8,
        "submission_org": "unset",
        "cache_clear": False,
    }.items():
        line_of(lines, key)["value"] = value
    scale_epoch_num(lines, lambda samples: samples // 256)
    for line in lines:
        if line["key"] == "eval_accuracy":
            line["value"] -= 0.2


def test_a_tiny_run_is_told_apart_and_lists_exactly_what_differs(log):
    verdict = check_log(edit(log, tiny))
    assert verdict.exit_code == 3, verdict.text()
    assert {d.key for d in verdict.differences} == {
        "val_every_iters",
        "target_avg_lddt_ca_value",
        "model_parameters_count",
        "init_checkpoint_sha256sum",
        "train_samples",
        "eval_samples",
        "cache_clear",
    }
    assert "7 keys differ" in verdict.headline
    assert verdict.official
    assert verdict.official_otherwise == ()


def test_a_tiny_run_with_a_real_mistake_is_invalid(log):
    edit(log, tiny)
    verdict = check_log(edit(log, lambda lines: drop(lines, "eval_start", "eval_accuracy", "eval_stop", epoch_num=160)))
    assert verdict.exit_code == 1
    assert "evaluation cadence" in verdict.headline


def test_a_tiny_run_that_missed_its_own_target_is_invalid(log):
    edit(log, tiny)
    verdict = check_log(edit(log, lambda lines: line_of(lines, "eval_accuracy", -1).update(value=0.59)))
    assert verdict.exit_code == 1


def test_the_verdict_is_json(log):
    data = json.loads(json.dumps(check_log(edit(log, set_value("max_templates", 2))).as_dict()))
    assert data["kind"] == "non_benchmark"
    assert data["exit_code"] == 3
    assert data["differences"] == [{"key": "max_templates", "logged": 2, "expected": 4}]


def test_files_that_are_no_logs_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(LogError, match="MLLOG line"):
        check_log(tmp_path / "notes.txt")
    with pytest.raises(LogError, match=r"absent\.txt: cannot read"):
        check_log(tmp_path / "absent.txt")
    (tmp_path / "result_0.txt.training.part").touch()
    with pytest.raises(LogError, match=r"its parts hold no line yet: result_0\.txt\.training\.part"):
        check_log(tmp_path / "result_0.txt")


def test_the_official_checker_leaves_no_trace_in_this_process(log):
    before = list(logging.getLogger().handlers)
    edit(log, set_value("submission_division", "Closed"))
    assert "FileNotFoundError" in official_messages(log)[0]
    assert logging.getLogger().handlers == before
    assert logging.getLogger().isEnabledFor(logging.WARNING)
    assert official_messages(rehearsal(log.with_name("other.txt"))) == []


@given(st.lists(st.sampled_from([TOKEN, ":::MLLOG", " ", "{", "a:", "\n", "\r"]), max_size=12).map("".join))
def test_the_quick_search_for_a_tokens_last_place_is_the_tools_own(text):
    quick = quick_sub(re.sub)
    assert quick(f".*{TOKEN}", TOKEN, text) == re.sub(f".*{TOKEN}", TOKEN, text)
    assert quick("a", "b", text) == re.sub("a", "b", text)


def test_our_key_table_demands_what_the_official_rules_demand():
    from importlib import resources

    import yaml

    required = set()
    for name in ("common", "closed_common", "closed_openfold"):
        folder = resources.files("mlperf_logging.compliance_checker").joinpath("hpc_3.0.0")
        for entry in yaml.safe_load(folder.joinpath(f"{name}.yaml").read_text()):
            rule = entry.get("KEY", {})
            if rule.get("REQ") in ("EXACTLY_ONE", "AT_LEAST_ONE"):
                required.add((rule["NAME"], rule["REQ"].lower()))
    ours = {(key.name, key.count) for key in KEYS.values()}
    assert required <= ours


def test_parts_that_a_crashed_run_left_are_joined_and_judged(tmp_path):
    log = rehearsal(tmp_path / "result_0.txt")
    expected, lines = check_log(log), log.read_text().splitlines(keepends=True)
    log.unlink()
    for role, wanted in (("training", False), ("evaluation", True)):
        own = [line for line in lines if any(key in line for key in ('"eval_a', '"eval_st', '"run_stop"')) is wanted]
        (tmp_path / f"result_0.txt.{role}.part").write_text("".join(own))
    assert check_log(log) == expected
    assert log.exists()


def test_two_runs_in_one_file_are_said_in_these_words(log, tmp_path):
    other = rehearsal(tmp_path / "other.txt", index=2)
    log.write_text(log.read_text() + other.read_text())
    verdict = check_log(log)
    second = len(other.read_text().splitlines())
    assert verdict.exit_code == 1
    assert len(verdict.reasons) == 1
    assert "two runs in one file" in verdict.headline
    assert f"they begin at lines 1, {len(log.read_text().splitlines()) - second + 1}" in verdict.headline
    assert verdict.official, "the official checker complains too"
    assert verdict.minutes is None


def test_a_run_that_was_begun_again_in_the_same_file_counts_as_two_and_doubled_lines_do_not(log):
    lines = log.read_text().splitlines(keepends=True)
    begun = next(i for i, line in enumerate(lines) if '"init_stop"' in line)
    log.write_text("".join([*lines[:begun], *lines]))
    assert "two runs in one file" in check_log(log).headline
    log.write_text("".join([*lines[:begun], *lines, *lines]))
    assert "three runs in one file" in check_log(log).headline
    log.write_text("".join([*lines[:5], *lines[2:]]))
    assert "in one file" not in check_log(log).text()


@pytest.mark.parametrize("benchmark", ["cosmoflow", "deepcam", "oc20"])
def test_the_log_of_another_benchmark_is_named_as_such(log, benchmark):
    verdict = check_log(edit(log, set_value("submission_benchmark", benchmark)))
    assert (verdict.kind, verdict.exit_code) == ("other_benchmark", 1)
    assert verdict.headline == f"another benchmark: a log of {benchmark}; only logs of openfold are judged here"
    assert verdict.text() == f"{log}: {verdict.headline}"


def test_a_file_that_cannot_be_read_has_a_verdict_too(tmp_path, log):
    verdict = judge_log(tmp_path / "absent.txt")
    assert (verdict.kind, verdict.exit_code) == ("unreadable", 2)
    assert verdict.headline == "unreadable: cannot read the log: No such file or directory"
    assert judge_log(tmp_path).kind == "unreadable"
    assert worst([judge_log(log), verdict]) is verdict


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1], {"a": 1}, None])
def test_a_verdict_on_any_value_is_strict_json(log, value):
    verdict = check_log(edit(log, lambda lines: [line.update(value=value) for line in lines]))
    assert verdict.exit_code == 1
    json.dumps(verdict.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("log_time_ms_string.txt", "invalid", "line 53: not a legal MLLOG line: time_ms is '1695867472645'"),
        ("log_valnull.txt", "invalid", "line 61: eval_accuracy is None"),
        ("log_two_runs.txt", "invalid", "two runs in one file"),
        ("garbage_metrics.jsonl", "unreadable", "holds no :::MLLOG line"),
    ],
)
def test_the_reported_cases_are_judged_in_one_headline(shared_dir, name, kind, words):
    verdict = judge_log(shared_dir / "cases" / name)
    assert verdict.kind == kind
    assert words in verdict.headline
