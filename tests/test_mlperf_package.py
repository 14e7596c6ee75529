"""The rehearsal submission passes every official checker; sabotaged ones are refused, each for the right reason.

Longer than 400 lines, because it holds one table of every contradiction and sabotage of one package.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlperf_editing import as_trained, drop, edit, index_of, line_of, rehearsal, set_value
from runs import SMALLEST
from scalefold.config import load_config
from scalefold.errors import ConfigError, LogError
from scalefold.mlperf.judge.check import Verdict, check_log
from scalefold.mlperf.log.logfile import read_log
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal
from scalefold.mlperf.pack.package import Submission, SystemEntry, choose_runs, collect_logs, pack, plan_package
from scalefold.mlperf.pack.package_lint import Package, lint_package
from scalefold.mlperf.pack.system_desc import FIELDS, describe_system
from scalefold.mlperf.pack.verify import PackageVerdict, _errors_by_folder, dump, verify_package, verify_packages

ORG = "Rehearsal Institute"
KNOWN = {field: "stated" for field in FIELDS if field.startswith(("host_", "accelerator_", "cooling"))}
KNOWN |= {"host_processors_per_node": "2", "accelerators_per_node": "8"}


def rebuild(folder: Path, submitter: str, scaling: str) -> tuple[Path, ...]:
    """One run folder per log, as training leaves them."""
    for run in published_runs(submitter=submitter, scaling=scaling)[:10]:
        script = published_script(run, org=ORG, platform="r1")
        as_trained(write_rehearsal(script, folder / f"run-{run.run:02}" / "result_0.txt"))
    return tuple(sorted(folder.iterdir()))


def described(name: str, nodes: int, **known: str) -> dict:
    system = describe_system(number_of_nodes=nodes, submitter=ORG, system_name=name, known=KNOWN | known)
    return system.fields


@pytest.fixture(scope="module", autouse=True)
def each_log_is_checked_once() -> Iterator[None]:
    """Packages of these tests share most of their logs; the verdict on a log depends on its bytes alone."""
    known: dict[bytes, Verdict] = {}

    def check(file: Path) -> Verdict:
        contents = file.read_bytes()
        if contents not in known:
            known[contents] = check_log(file)
        return replace(known[contents], file=str(file))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalefold.mlperf.pack.package_tree.check_log", check)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A source tree that holds the writer of the rehearsal logs, and names that must not be shipped."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("README.md", "LICENSE", "Makefile", ".gitignore", "runs/log.txt", "with space.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    import scalefold.mlperf

    shutil.copytree(Path(scalefold.mlperf.__file__).parent, folder / "src/scalefold/mlperf")
    return folder


def config_of(folder: Path, repository: Path, name: str, base: str) -> Path:
    """A system file of this submitter that builds on one of ours."""
    file = folder / f"{name}.yaml"
    mine = f"system: {name}\nsubmission: {{org: {ORG}, platform: r1}}\n"
    file.write_text(f"base: {repository}/configs/{base}.yaml\n{mine}")
    return file


@pytest.fixture(scope="module")
def submission(tmp_path_factory, source, repository) -> Submission:
    runs = tmp_path_factory.mktemp("runs")
    config = config_of(runs, repository, "r260_260x8", "eos_h100_260x8_dap8")
    strong = SystemEntry(
        name="r260",
        description=described("r260", 260),
        config=config,
        strong=rebuild(runs / "strong", "NVIDIA", "strong"),
    )
    weak = SystemEntry(
        name="r160",
        description=described("r160", 160),
        config=config_of(runs, repository, "r160_16x8", "eos_h100_16x8_weak"),
        weak=rebuild(runs / "weak", "NVIDIA", "weak"),
    )
    return Submission(org=ORG, systems=(strong, weak), source_dir=source)


@pytest.fixture(scope="module")
def full(submission, tmp_path_factory) -> Path:
    org = tmp_path_factory.mktemp("packages") / "Rehearsal"
    pack(submission, org)
    return org


@pytest.fixture(scope="module")
def strong_only(full, tmp_path_factory) -> Path:
    org = tmp_path_factory.mktemp("strong_only") / "Rehearsal"
    shutil.copytree(full, org)
    for path in ("results/r160", "benchmarks/openfold/r160"):
        shutil.rmtree(org / path)
    (org / "systems/r160.json").unlink()
    return org


def test_the_rehearsal_submission_passes_every_checker_without_bypass(full, tmp_path):
    before = {p: p.read_bytes() for p in full.rglob("*") if p.is_file()}
    verdict = verify_package(full)
    assert verdict.failures == [], verdict.text()
    assert verdict.exit_code == 0
    passed = {(row.check, row.where) for row in verdict.rows if row.result == "pass"}
    assert passed >= {
        ("repo checker", "."),
        ("package checker", "."),
        ("system checker", "systems/r260.json"),
        ("system checker", "systems/r160.json"),
        ("rcp checker", "results/r260/strong/openfold"),
        ("rcp checker", "results/r160/weak/openfold"),
        ("summarizer", "results/r260/strong/openfold"),
        ("summarizer", "results/r160/weak/openfold"),
        ("own rules", "."),
    }
    minutes = {score.scaling: score.minutes for score in verdict.scores}
    assert minutes["strong"] == pytest.approx(7.512, abs=0.0005)
    assert "124,160 samples, reference 133,120, floor 123,132, factor 1.0722" in verdict.text()
    assert {p: p.read_bytes() for p in full.rglob("*") if p.is_file()} == before
    dump(verdict, tmp_path / "verdict.json")
    assert json.loads((tmp_path / "verdict.json").read_text())["exit_code"] == 0


def test_the_package_has_the_form_that_the_checker_walks(full):
    assert sorted(p.name for p in full.iterdir()) == ["LICENSE", "README.md", "benchmarks", "results", "systems"]
    names = sorted(p.name for p in (full / "results/r260/strong/openfold").iterdir())
    assert names == sorted(f"result_{i}.txt" for i in range(10))
    starts = [read_log(full / f"results/r160/weak/openfold/result_{i}.txt").need("run_start") for i in range(10)]
    assert [s.time_ms for s in starts] == sorted(s.time_ms for s in starts)
    system = full / "benchmarks/openfold/r260"
    assert {p.name for p in system.iterdir()} == {
        "README.md",
        "setup.sh",
        "init_datasets.sh",
        "run_and_time.sh",
        "r260.json",
        "r260_260x8.yaml",
    }
    assert "r260_260x8.yaml" in (system / "run_and_time.sh").read_text()
    assert (system / "setup.sh").stat().st_mode & 0o111


def test_source_is_shipped_without_names_that_the_repository_checker_refuses(full, source):
    shipped = full / "benchmarks/openfold/implementations/scalefold"
    assert (shipped / "src/scalefold/mlperf/log/events.py").read_bytes() == (
        source / "src/scalefold/mlperf/log/events.py"
    ).read_bytes()
    names = {p.name for p in shipped.rglob("*")}
    assert not names & {".gitignore", "with space.txt", "runs", "log.txt"}
    assert "not from a git checkout" in (shipped / "SOURCE.txt").read_text()


# Sabotage: name -> (edit of the package, word in the failing rows, whether the official package checker accepts it)

STRONG = "results/r260/strong/openfold"
SYSTEM = "systems/r260.json"


def log_edit(change, number=0):
    return lambda org: edit(org / STRONG / f"result_{number}.txt", change)


def all_logs(change):
    return lambda org: [edit(file, change) for file in sorted((org / STRONG).iterdir())]


def json_edit(**changes):
    def change(org):
        fields = json.loads((org / SYSTEM).read_text())
        (org / SYSTEM).write_text(json.dumps(fields | changes))

    return change


def write(path, text):
    return lambda org: (org / path).write_text(text)


def without_scaling_level(org):
    (org / STRONG).rename(org / "results/r260/openfold")
    (org / "results/r260/strong").rmdir()


def converge_too_fast(lines):
    """Meet the target at the second evaluation."""
    keep = index_of(lines, "eval_stop", 2) + 1
    stop = {**line_of(lines, "run_stop"), "time_ms": lines[keep - 1]["time_ms"]}
    lines[keep:] = [stop]
    line_of(lines, "eval_accuracy", 2)["value"] = 0.81


def abort(lines):
    line_of(lines, "run_stop")["metadata"]["status"] = "aborted"
    line_of(lines, "eval_accuracy", -1)["value"] = 0.79


def same_seed_from_another_line(org):
    seed = read_log(org / STRONG / "result_0.txt").value("seed")
    edit(org / STRONG / "result_1.txt", set_value("seed", seed))
    edit(org / STRONG / "result_1.txt", lambda ls: line_of(ls, "seed")["metadata"].update(lineno=8))


def throughput_alone(org):
    (org / "results/r260/strong").rename(org / "results/r260/weak")


def cycles_as_epochs(lines):
    for line in lines:
        if "epoch_num" in line["metadata"]:
            line["metadata"]["epoch_num"] *= 1000


SABOTAGE = {
    "nine runs": (lambda o: (o / STRONG / "result_9.txt").unlink(), "9 runs", False),
    "no scaling level": (without_scaling_level, "success on nothing", True),
    "division in capitals": (json_edit(division="Closed"), "disables seed and convergence checks", True),
    "number in the system JSON": (json_edit(accelerators_per_node=8), "make the system checker crash", False),
    "field missing in the system JSON": (
        lambda o: (o / SYSTEM).write_text(json.dumps({"division": "closed", "status": "x"})),
        "missing fields: submitter",
        False,
    ),
    "system JSON missing": (lambda o: (o / SYSTEM).unlink(), "stops with a traceback", False),
    "system of another size": (json_edit(number_of_nodes="256"), "number_of_nodes 260 in logs, 256 in the JSON", True),
    "empty fields": (json_edit(cooling="", host_storage_type=""), "still empty: host_storage_type, cooling", True),
    "equal seeds": (same_seed_from_another_line, "same seed", True),
    "one run twice": (
        lambda o: (
            shutil.copy(o / STRONG / "result_3.txt", o / STRONG / "result_4.txt"),
            edit(o / STRONG / "result_4.txt", set_value("seed", 12345)),
        ),
        "same run_start stamp",
        True,
    ),
    "mixed batch sizes": (log_edit(set_value("global_batch_size", 128)), "global_batch_size differs", False),
    "too fast to be true": (all_logs(converge_too_fast), "rcp checker", False),
    "inflated sample counts": (all_logs(cycles_as_epochs), "val_every_iters x global_batch_size", True),
    "two aborted runs": (
        lambda o: (log_edit(abort)(o), log_edit(abort, 1)(o)),
        "2 runs did not converge",
        False,
    ),
    "one run of another model": (log_edit(set_value("max_templates", 2)), "1 key differs: max_templates", True),
    "placeholder organization": (
        all_logs(set_value("submission_org", "SUBMISSION_ORG_PLACEHOLDER")),
        "real name",
        True,
    ),
    "evaluation skipped": (
        log_edit(lambda ls: drop(ls, "eval_start", "eval_accuracy", "eval_stop", epoch_num=40960)),
        "evaluation cadence",
        True,
    ),
    "data touched early": (
        log_edit(lambda ls: ls.insert(3, ls.pop(index_of(ls, "train_samples")))),
        "data was touched",
        True,
    ),
    "left-over scaling": (write(f"{STRONG}/scaling.json", '{"scaling_factor": 0.5}'), "multiplies the score", True),
    "bypass": (write("results/r260/package_checker_params", "rcp-bypass"), "asks checkers to bypass", True),
    "bypass for the verify script": (write("package_checker_params", "rcp_bypass\n"), "asks checkers to bypass", True),
    "throughput alone": (throughput_alone, "throughput result without a time-to-train result", True),
    "no source": (
        lambda o: shutil.rmtree(o / "benchmarks/openfold/implementations"),
        "ship the source that ran",
        True,
    ),
    "dot file": (write("benchmarks/openfold/.env", "x"), "repo checker", True),
    "notes among results": (write(f"{STRONG}/notes.txt", "x"), "not a result_<i>.txt", True),
    "text that is no log": (write(f"{STRONG}/result_2.txt", "hello\n"), "MLLOG line", False),
}


def times(lines, change):
    """Change every stamp after the start of the run."""
    start = line_of(lines, "run_start")["time_ms"]
    for line in lines:
        line["time_ms"] = change(line["time_ms"], start)


def clone(seed, and_also=lambda lines: None):
    """Run 4 becomes run 3 of the next day, with another seed."""

    def change(org):
        shutil.copy(org / STRONG / "result_3.txt", org / STRONG / "result_4.txt")
        edit(org / STRONG / "result_4.txt", set_value("seed", seed))
        edit(org / STRONG / "result_4.txt", lambda ls: times(ls, lambda ms, start: ms + 86_400_000))
        edit(org / STRONG / "result_4.txt", and_also)

    return change


def other_accuracies(lines):
    for index, line in enumerate(ls for ls in lines if ls["key"] == "eval_accuracy"):
        line["value"] += 0.001 * (index % 3)


def other_durations(lines):
    times(lines, lambda ms, start: round(start + (ms - start) * 1.03) if ms > start else ms)


def halved(lines):
    times(lines, lambda ms, start: round(start + (ms - start) / 2) if ms > start else ms)


def halved_with_its_throughput(lines):
    halved(lines)
    for line in lines:
        if line["key"] == "tracked_stats" and "throughput" in line["value"]:
            line["value"]["throughput"] *= 2


def forty_times_as_fast(lines):
    times(lines, lambda ms, start: round(start + (ms - start) / 40) if ms > start else ms)
    for line in lines:
        if line["key"] == "tracked_stats" and "throughput" in line["value"]:
            line["value"]["throughput"] *= 40


def of_year(year):
    return lambda lines: times(lines, lambda ms, start: ms + (year - 2023) * 31_557_600_000)


def linked_out(org):
    outside = org.parent / "elsewhere.txt"
    shutil.move(org / STRONG / "result_5.txt", outside)
    (org / STRONG / "result_5.txt").symlink_to(outside)


def two_runs_in_one_file(org):
    first, second = (org / STRONG / f"result_{i}.txt" for i in (6, 7))
    first.write_text(first.read_text() + second.read_text())


def the_same_runs_for_another_system(org):
    shutil.copytree(org / "results/r260", org / "results/s260")
    shutil.copy(org / SYSTEM, org / "systems/s260.json")
    shutil.copytree(org / "benchmarks/openfold/r260", org / "benchmarks/openfold/s260")
    (org / "benchmarks/openfold/s260/r260.json").rename(org / "benchmarks/openfold/s260/s260.json")


def config_edit(old, new):
    def change(org):
        file = org / "benchmarks/openfold/r260/r260_260x8.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def remove(path):
    return lambda org: shutil.rmtree(org / path) if (org / path).is_dir() else (org / path).unlink()


RUN_SCRIPT = "benchmarks/openfold/r260/run_and_time.sh"
# What the official tools do not look at -> (edit of the package, words that our rules must say)
CONTRADICTIONS = {
    "a run cloned a day later with another seed": (clone(99), "a copy of results/r260/strong/openfold/result_3.txt"),
    "a clone with other accuracies": (clone(99, other_accuracies), "durations are equal to the millisecond"),
    "a clone with other durations": (clone(99, other_durations), "accuracies are equal"),
    "the same runs for another system": (the_same_runs_for_another_system, "a copy of results/r260"),
    "one run's times halved": (log_edit(halved), "2 times as many samples per second as it states itself"),
    "times and throughput halved": (log_edit(halved_with_its_throughput), "those of the other runs 27."),
    "all runs forty times as fast": (
        lambda o: (json_edit(accelerator_model_name="NVIDIA H100 80GB HBM3")(o), all_logs(forty_times_as_fast)(o)),
        "H100 needs 2.92 s at the least",
    ),
    "runs of the year 2036": (all_logs(of_year(2036)), "stamped 2036-"),
    "runs before the benchmark existed": (all_logs(of_year(2019)), "stamped 2019-"),
    "times in seconds": (
        all_logs(lambda ls: times(ls, lambda ms, start: ms // 1000)),
        "counts seconds, not milliseconds",
    ),
    "runs after the description's date": (json_edit(date="2023-09-01"), "run of 2023-09-28"),
    "more runs at once than nodes": (
        all_logs(lambda ls: times(ls, lambda ms, start: ms - start + 1695866176810)),
        "the system has 2080",
    ),
    "a result linked out of the package": (linked_out, "a link to"),
    "two runs in one file": (two_runs_in_one_file, "two runs in one file"),
    "run script removed": (remove(RUN_SCRIPT), "missing: run_and_time"),
    "scripts of a system removed": (remove("benchmarks/openfold/r260"), "missing: README, setup, init_datasets"),
    "LICENSE removed": (remove("LICENSE"), "no LICENSE in the organization's folder"),
    "README removed": (remove("README.md"), "no README in the organization's folder"),
    "README of the source removed": (remove("benchmarks/openfold/implementations/scalefold/README.md"), "no README"),
    "configuration without its base": (
        write("benchmarks/openfold/r260/r260_260x8.yaml", "base: base.yaml\n"),
        "run_and_time.sh cannot run",
    ),
    "configuration of other runs": (config_edit("nodes: 260", "nodes: 68"), "number_of_nodes 260 in the logs, 68"),
    "precision of the configuration": (config_edit("precision: bf16", "precision: tf32"), "precision bf16 in the logs"),
    "precision that is no format": (all_logs(set_value("precision", "fp3")), "no format that the rules admit"),
    "precision that the accelerator lacks": (
        lambda o: (json_edit(accelerator_model_name="NVIDIA A100-SXM4")(o), all_logs(set_value("precision", "fp8"))(o)),
        "which A100 does not have",
    ),
    "precision of the description": (json_edit(training_precision="FP32"), "training_precision 'FP32' in the JSON"),
    "accelerator of the description": (
        json_edit(accelerator_model_name="NVIDIA A100-SXM4-80GB"),
        "parallel.gpu is H100-SXM-80GB",
    ),
    "accelerator of the platform": (
        lambda o: (
            json_edit(accelerator_model_name="NVIDIA A100-SXM4")(o),
            all_logs(set_value("submission_platform", "dgxh100_n260"))(o),
        ),
        "platform 'dgxh100_n260' in logs",
    ),
    "status: whatever": (json_edit(status="whatever"), "status is 'whatever'"),
    "status of the logs": (json_edit(status="Available cloud"), "status onprem in logs"),
    "submitter of the description": (json_edit(submitter="Somebody Else"), "submitter 'Somebody Else' in the JSON"),
    "another learning rate in one run": (log_edit(set_value("opt_base_learning_rate", 2e-3)), "opt_base_learning_rate"),
    "log of another benchmark": (log_edit(set_value("submission_benchmark", "cosmoflow")), "a log of cosmoflow"),
    "log of a run with injected faults": (
        log_edit(lambda ls: line_of(ls, "tracked_stats")["value"].update(rehearsal="kill-rank@3")),
        "a rehearsal: faults were injected (kill-rank@3)",
    ),
    "log of the rehearsal": (
        log_edit(lambda ls: line_of(ls, "seed")["metadata"].update(file="scalefold/mlperf/log/rehearsal.py")),
        "written by the rehearsal",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_cannot_be_true_is_refused(strong_only, tmp_path, name):
    change, words = CONTRADICTIONS[name]
    org = tmp_path / "Rehearsal"
    shutil.copytree(strong_only, org)
    change(org)
    problems = [p for p in lint_package(Package(org)) if p.severity == "error"]
    assert any(words in f"{p.where}: {p.message}" for p in problems), problems
    assert all(p.fix for p in problems)


def test_a_description_that_was_completed_in_one_place_only_is_noted(strong_only, tmp_path):
    org = tmp_path / "Rehearsal"
    shutil.copytree(strong_only, org)
    json_edit(cooling="water")(org)
    (note,) = lint_package(Package(org))
    assert (note.severity, note.where) == ("note", "benchmarks/openfold/r260/r260.json")
    assert note.message == "cooling: not as in systems/r260.json"


def crlf(org):
    for file in (org / STRONG).iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


def count_from_one(org):
    for i in reversed(range(10)):
        (org / STRONG / f"result_{i}.txt").rename(org / STRONG / f"result_{i + 1}.txt")


def prefixes(org):
    for file in (org / STRONG).iterdir():
        file.write_text("starting\n" + file.read_text().replace(":::MLLOG", "0: :::MLLOG"))


def hpe_and_lbnl(org):
    """The published result that the RCP checker refuses."""
    shutil.rmtree(org / STRONG)
    (org / STRONG).mkdir()
    for i, run in enumerate(rebuild(org.parent / "runs", "HPE+LBNL", "strong")):
        shutil.copy(run / "result_0.txt", org / STRONG / f"result_{i}.txt")
    json_edit(number_of_nodes="224", accelerators_per_node="4")(org)


LEGAL = {
    "Windows line ends, other lines and prefixes": lambda o: (prefixes(o), crlf(o)),
    "results counted from one, other words for status and submitter": lambda o: (
        count_from_one(o),
        json_edit(status="onprem", submitter=ORG.upper())(o),
    ),
}
UNUSUAL = {"one aborted run": log_edit(abort, 9), "below the floor": hpe_and_lbnl} | LEGAL


@pytest.fixture(scope="module")
def verdicts(strong_only, tmp_path_factory) -> dict[str, PackageVerdict]:
    """Verdicts of all sabotaged or unusual packages, by name."""
    folder = tmp_path_factory.mktemp("sabotaged")
    packages = {}
    changes = {name: change for name, (change, _, _) in SABOTAGE.items()} | UNUSUAL
    for number, (name, change) in enumerate(changes.items()):
        packages[name] = folder / f"{number}" / "Rehearsal"
        shutil.copytree(strong_only, packages[name])
        change(packages[name])
    return dict(zip(packages, verify_packages(list(packages.values())), strict=True))


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_refused_with_the_right_reason(verdicts, name):
    _, word, official_accepts = SABOTAGE[name]
    verdict = verdicts[name]
    assert verdict.exit_code == 1
    reasons = "\n".join(f"{row.check} {row.where} {row.detail} {row.fix}" for row in verdict.failures)
    assert word in reasons, verdict.text()
    assert all(row.fix for row in verdict.failures), verdict.text()
    (official,) = [row.result for row in verdict.rows if row.check == "package checker"]
    assert (official == "pass") is official_accepts, verdict.text()


@pytest.mark.parametrize("name", LEGAL)
def test_legal_oddities_are_accepted(verdicts, name):
    assert verdicts[name].failures == [], verdicts[name].text()


@pytest.mark.parametrize("name", SABOTAGE)
def test_every_message_names_benchmark_and_system(verdicts, name):
    for row in verdicts[name].rows:
        assert row.benchmark == "openfold", row
        assert row.system == "r260", row
    assert "openfold on " in verdicts[name].text()


def test_errors_of_the_package_checker_stand_with_the_benchmark_and_system_that_it_was_at():
    lines = ["ERROR - System description file checker failed"]
    for system, benchmark, error in (
        ("a", "cosmoflow", "RCP Test Failed: x"),
        ("b", "openfold", "Seed checker failed"),
    ):
        lines += ["INFO -  Running compliance checks in dir /x", f"INFO -  System {system}"]
        lines += [f"INFO -  Benchmark {benchmark}", f"ERROR - {error}"]
    assert _errors_by_folder("\n".join(lines)) == [
        "System description file checker failed",
        "cosmoflow on a: RCP Test Failed: x",
        "openfold on b: Seed checker failed",
    ]


def test_one_honest_failure_stands_as_the_slowest_run(verdicts):
    verdict = verdicts["one aborted run"]
    assert verdict.exit_code == 0, verdict.text()
    assert "result_9.txt did not converge and stands as the slowest run" in verdict.text()


def test_a_published_result_below_the_convergence_floor_fails_the_rcp_checker(verdicts):
    (row,) = [row for row in verdicts["below the floor"].failures if row.check == "rcp checker"]
    assert "109,000 samples" in row.detail
    assert "floor 111,199" in row.detail
    assert "do not tune for fewer samples" in row.fix


def test_a_folder_that_is_no_package_is_an_error(tmp_path):
    with pytest.raises(LogError, match="no results folder"):
        verify_package(tmp_path)


# Packing --------------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_lists_every_file(submission, tmp_path):
    plan = pack(submission, tmp_path / "org", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert "results/r260/strong/openfold/result_9.txt  <- " in plan.text()


def test_packing_never_replaces_a_folder_and_leaves_nothing_behind_on_failure(submission, tmp_path):
    (tmp_path / "org").mkdir()
    with pytest.raises(LogError, match="exists"):
        pack(submission, tmp_path / "org")
    few = SystemEntry(name="few", description={}, strong=submission.systems[0].strong[:9])
    with pytest.raises(LogError, match="system few: 9 strong runs"):
        pack(Submission(org="O", systems=(few,), source_dir=submission.source_dir), tmp_path / "other")
    none = SystemEntry(name="none", description={}, strong=(tmp_path,))
    with pytest.raises(LogError, match="without result"):
        plan_package(Submission(org="O", systems=(none,), source_dir=submission.source_dir))
    assert [p.name for p in tmp_path.iterdir()] == ["org"]


def test_of_a_longer_series_the_ten_consecutive_runs_closest_to_the_median_are_chosen(submission, tmp_path):
    logs = collect_logs(submission.systems[0].strong)
    outlier = rehearsal(tmp_path / "late" / "result_0.txt", index=9)

    def late_and_slow(lines):
        for line in lines:
            line["time_ms"] += 10**9
        line_of(lines, "run_stop")["time_ms"] += 10**7

    edit(outlier, late_and_slow)
    chosen, left_out = choose_runs(collect_logs([*submission.systems[0].strong, outlier]), "r260")
    assert [log.file for log in chosen] == [log.file for log in logs]
    assert [log.file for log in left_out] == [outlier]


def test_a_packed_configuration_needs_no_other_file_and_is_the_one_that_was_given(full, submission):
    packed = full / "benchmarks/openfold/r260/r260_260x8.yaml"
    assert "base:" not in packed.read_text()
    given = submission.systems[0].config
    assert given is not None
    assert load_config(packed).config == load_config(given).config


def test_a_configuration_that_cannot_be_read_is_not_packed(submission, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("base: absent.yaml\n")
    entry = replace(submission.systems[0], config=broken)
    with pytest.raises(ConfigError, match="absent"):
        pack(replace(submission, systems=(entry,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unpacked(submission, repository, tmp_path_factory) -> Path:
    """A package of this source with the tiny system in it, carried elsewhere in an archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    tiny = replace(submission.systems[0], name="tiny", config=repository / "configs/tiny.yaml")
    pack(Submission(org=ORG, systems=(tiny,), source_dir=repository), folder / "packed" / "Rehearsal")
    archive = shutil.make_archive(str(folder / "org"), "tar", folder / "packed")
    shutil.rmtree(folder / "packed")
    shutil.unpack_archive(archive, folder / "somewhere else")
    return folder / "somewhere else/Rehearsal"


def run_and_time(org: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The packed script, with the environment that setup.sh makes replaced by one that imports the packed source."""
    source = org / "benchmarks/openfold/implementations/scalefold"
    programs = source / ".venv/bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "scalefold").write_text(f'#!/bin/sh\nexec {sys.executable} -m scalefold "$@"\n')
    (programs / "scalefold").chmod(0o755)
    places = [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "PATH": ":".join([str(path or programs), *places])}
    command = ["bash", str(org / "benchmarks/openfold/tiny/run_and_time.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.distributed
def test_the_tiny_system_runs_from_an_unpacked_package(unpacked, tiny_store, tmp_path):
    places = [f"data.store_dir={tiny_store}", f"run.run_dir={tmp_path}/run", "training.target_avg_lddt_ca_value=0.01"]
    done = run_and_time(unpacked, "--here", *SMALLEST, *places)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run/result_0.txt")
    assert log.status == "success"
    site = log.need("seed").metadata
    source = (unpacked / "benchmarks/openfold/implementations/scalefold/src" / site["file"]).read_text().splitlines()
    assert "events.seed(" in source[site["lineno"] - 1], "the packed source ran, and wrote its own lines into the log"


def test_under_slurm_the_packed_script_submits_a_job_from_the_package(unpacked, tmp_path):
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\ncp "$2" {tmp_path}/job\necho 17\n')
    sbatch.chmod(0o755)
    done = run_and_time(unpacked, f"run.run_dir={tmp_path}/run", path=sbatch.parent)
    assert done.returncode == 0, done.stderr
    assert "job 17 submitted" in done.stdout
    assert f"{unpacked}/benchmarks/openfold/tiny/tiny.yaml" in (tmp_path / "job").read_text()


def test_pruned_instances_are_kept_apart(submission, tmp_path):
    weak = submission.systems[1]
    extra = rehearsal(tmp_path / "pruned" / "result_0.txt", scaling="weak", index=12)
    entry = SystemEntry(name="r160", description=weak.description, weak=weak.weak, pruned=(extra,))
    plan = plan_package(Submission(org=ORG, systems=(entry,), source_dir=submission.source_dir))
    assert plan.copies["results/r160/weak/openfold/pruned_results/result_0.txt"] == extra


def test_logs_that_name_lines_which_are_not_shipped_are_noted(strong_only, tmp_path):
    org = tmp_path / "Rehearsal"
    shutil.copytree(strong_only, org)
    log_edit(lambda ls: line_of(ls, "seed")["metadata"].update(lineno=10**6))(org)
    notes = [p for p in lint_package(Package(org)) if "logs name" in p.message]
    assert [(p.severity, p.where) for p in notes] == [("note", STRONG)]
    assert "events.py:1000000, and the shipped source has" in notes[0].message


def test_a_file_that_is_shipped_under_another_folder_or_behind_a_link_is_found(strong_only, tmp_path):
    org = tmp_path / "Rehearsal"
    shutil.copytree(strong_only, org)
    all_logs(lambda ls: [line["metadata"].update(file="/workspace/openfold/train.py", lineno=467) for line in ls])(org)

    def notes():
        return [p.message for p in lint_package(Package(org)) if "logs name" in p.message]

    assert "no file of that name" in notes()[0]
    source = org / "benchmarks/openfold/shared_source/pytorch"
    source.mkdir(parents=True)
    (source / "train.py").write_text("\n" * 466)
    assert "466 lines of it at most" in notes()[0]
    (source / "train.py").write_text("\n" * 467)
    assert notes() == []
    shutil.move(source, org / "benchmarks/pytorch")
    source.symlink_to("../../pytorch")
    assert notes() == []
