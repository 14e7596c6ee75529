"""Scores of rebuilt published results equal the published ones; broken series get no score."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlperf_editing import drop, edit, line_of, rehearsal, set_value
from scalefold.errors import LogError
from scalefold.mlperf.judge.rcp import judge_convergence, recorded_references, reference_convergence
from scalefold.mlperf.judge.score import score, score_folder
from scalefold.mlperf.log.published import published_runs
from scalefold.mlperf.log.rehearsal import published_script, write_rehearsal
from scalefold.mlperf.pack.package import collect_logs


def rebuild(folder, submitter, scaling):
    for run in published_runs(submitter=submitter, scaling=scaling):
        write_rehearsal(published_script(run), folder / f"result_{run.run}.txt")
    return folder


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    return rebuild(tmp_path_factory.mktemp("nvidia") / "strong" / "openfold", "NVIDIA", "strong")


@pytest.fixture
def series(nvidia, tmp_path):
    return shutil.copytree(nvidia, tmp_path / "openfold")


# submitter: score, scaled score (minutes), mean samples, RCP status
PUBLISHED = {
    "NVIDIA": (7.512, 8.054, 124_160, "pass"),
    "HPE+LBNL": (14.646, None, 109_000, "fail"),
    "TACC": (157.27, 157.27, 106_080, "pass"),
    "Clemson": (257.56, 263.52, 92_160, "pass"),
}


@pytest.mark.parametrize("submitter", PUBLISHED)
def test_published_times_to_train_are_reproduced(tmp_path, submitter):
    minutes, scaled, samples, status = PUBLISHED[submitter]
    (result,) = score(rebuild(tmp_path / "results" / "sys" / "strong" / "openfold", submitter, "strong"))
    assert result.minutes == pytest.approx(minutes, abs=0.005 if minutes > 100 else 0.0005)
    assert result.convergence.mean_samples == samples
    assert result.convergence.status == status
    if scaled:
        assert result.scaled_minutes == pytest.approx(scaled, abs=0.005)
    assert result.problems == ()
    assert result.is_legal is (status == "pass")


def test_published_throughput_is_reproduced(tmp_path):
    rebuild(tmp_path / "results" / "eos" / "weak" / "openfold", "NVIDIA", "weak")
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "eos.json").write_text('{"number_of_nodes": "256", "accelerators_per_node": "8"}')
    (result,) = score(tmp_path)
    assert result.minutes == pytest.approx(34.415, abs=0.0005)
    assert (result.total_scale, result.instance_scale, result.num_models) == (2048, 128, 16)
    assert result.models_per_minute == pytest.approx(0.465, abs=0.0005)
    assert result.convergence.factor == pytest.approx(1.0153, abs=0.00005)


def as_job(folder, submitter, scaling):
    """Runs as a job of ``scalefold launch`` leaves them."""
    for run in published_runs(submitter=submitter, scaling=scaling):
        write_rehearsal(published_script(run), folder / f"run_{run.run}" / f"result_{run.run}.txt")
    shutil.copytree(folder / "run_0", folder / "run_0_interrupted_1")
    return folder


def test_the_runs_of_a_job_are_one_result(tmp_path):
    job = as_job(tmp_path / "runs" / "eos" / "job_1", "NVIDIA", "strong")
    (result,) = score(tmp_path / "runs")
    assert (result.folder, result.scaling, result.problems) == (str(job), "strong", ())
    assert result.minutes == pytest.approx(PUBLISHED["NVIDIA"][0], abs=0.0005)
    assert [found.folder for found in score(job / "run_3")] == [str(job / "run_3")]
    assert len(collect_logs([job])) == 10


def test_the_instances_of_a_job_are_a_throughput_result(tmp_path):
    (result,) = score(as_job(tmp_path / "job_2", "NVIDIA", "weak"))
    assert (result.scaling, result.num_models) == ("weak", 16)
    assert result.minutes == pytest.approx(34.415, abs=0.0005)


def test_instance_scale_is_the_instances_even_when_its_log_names_the_whole_jobs_nodes(tmp_path):
    folder = rebuild(tmp_path / "weak" / "openfold", "NVIDIA", "weak")
    for file in folder.iterdir():
        edit(file, set_value("number_of_nodes", 256))
    assert score_folder(folder).instance_scale == 128


def test_one_failed_run_stands_as_the_slowest(series):
    slowest = max(score_folder(series).runs, key=lambda run: run.minutes).file
    before = score_folder(series).minutes
    edit(series / slowest, lambda lines: line_of(lines, "run_stop")["metadata"].update(status="aborted"))
    after = score_folder(series)
    assert after.minutes == before
    assert after.problems == ()
    assert (
        json.loads(json.dumps(after.as_dict()))["runs"][[r.file for r in after.runs].index(slowest)]["minutes"] is None
    )


def test_two_failed_runs_leave_no_score(series):
    edit(series / "result_0.txt", lambda lines: drop(lines, "run_stop"))
    edit(series / "result_1.txt", lambda lines: line_of(lines, "eval_accuracy", -1).update(value=0.7))
    result = score_folder(series)
    assert result.minutes is None
    assert "2 runs did not converge (result_0.txt, result_1.txt)" in result.problems[0]
    assert "no score" in result.text()


def test_nine_runs_and_mixed_batches_are_reported(series):
    (series / "result_9.txt").unlink()
    edit(series / "result_0.txt", set_value("global_batch_size", 128))
    problems = " ".join(score_folder(series).problems)
    assert "9 runs" in problems
    assert "batch sizes differ: 128, 256" in problems


def test_pruned_instances_power_logs_and_other_benchmarks_do_not_count(series, tmp_path):
    for other in ("pruned_results", "power/result_0"):
        shutil.copytree(series, tmp_path / "copy" / other)
    shutil.copytree(tmp_path / "copy", series, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "copy" / "pruned_results", tmp_path / "cosmoflow")
    for file in (tmp_path / "cosmoflow").iterdir():
        edit(file, set_value("submission_benchmark", "cosmoflow"))
    shutil.rmtree(tmp_path / "copy")
    assert [result.folder for result in score(tmp_path)] == [str(series)]


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(LogError, match="no OpenFold result"):
        score(tmp_path)


@pytest.mark.parametrize(
    "batch, mean, floor",
    [(128, 88746.67, 82378.07), (144, 94293.33, 87598.78), (192, 110933, 102907), (256, 133120.0, 123132.39)],
)
def test_reference_convergence_is_the_official_one(batch, mean, floor):
    reference = reference_convergence(batch)
    assert reference.mean_samples == pytest.approx(mean, abs=0.5)
    assert reference.floor_samples == pytest.approx(floor, abs=0.5)
    assert reference.interpolated is (batch in (144, 192))


def test_small_batches_use_the_128_record_and_large_ones_have_none():
    assert reference_convergence(16).mean_samples == reference_convergence(128).mean_samples
    assert reference_convergence(257) is None
    assert judge_convergence(512, [1.0] * 10).status == "missing"
    assert {batch: len(runs) for batch, runs in recorded_references().items()} == {128: 20, 256: 20}


@given(st.integers(1, 256), st.floats(60_000, 200_000))
def test_the_factor_never_rewards_and_the_floor_lies_below_the_mean(batch, samples):
    result = judge_convergence(batch, [samples] * 10)
    assert result.reference.floor_samples < result.reference.mean_samples
    assert result.factor >= 1
    assert (result.status == "pass") is (samples >= result.reference.floor_samples)
    assert samples * result.factor >= result.reference.mean_samples * (1 - 1e-12)


def test_two_runs_in_one_file_and_values_that_are_no_numbers_are_problems_with_their_place(series):
    first, second = series / "result_0.txt", series / "result_1.txt"
    first.write_text(first.read_text() + second.read_text())
    edit(series / "result_2.txt", lambda lines: line_of(lines, "eval_accuracy").update(value=None))
    line = 1 + next(i for i, text in enumerate(_lines(series / "result_2.txt")) if '"eval_accuracy"' in text)
    problems = score_folder(series).problems
    assert "result_0.txt: two runs in one file" in problems
    assert f"result_2.txt:{line}: eval_accuracy is None, must be a number" in problems


@pytest.mark.parametrize("value", [None, "8", [8], {"a": 8}, 8.5])
def test_a_scale_that_is_no_number_is_one_error_with_file_line_and_key(series, value):
    edit(series / "result_0.txt", set_value("number_of_nodes", value))
    line = 1 + next(i for i, text in enumerate(_lines(series / "result_0.txt")) if '"number_of_nodes"' in text)
    with pytest.raises(LogError, match=rf"result_0\.txt:{line}: number_of_nodes is "):
        score_folder(series)


@pytest.mark.parametrize("value", [None, "256", [256], {"a": 256}])
def test_a_batch_size_that_is_no_number_leaves_convergence_open(series, value):
    for file in series.iterdir():
        edit(file, set_value("global_batch_size", value))
    result = score_folder(series)
    assert result.convergence is None
    assert not result.is_legal


def _lines(file):
    return file.read_text().splitlines()


def test_the_benchmark_that_was_found_instead_is_named(tmp_path, nvidia):
    shutil.copytree(nvidia, tmp_path / "deepcam")
    for file in (tmp_path / "deepcam").iterdir():
        edit(file, set_value("submission_benchmark", "deepcam"))
    with pytest.raises(LogError, match="only logs of deepcam"):
        score(tmp_path)


@pytest.mark.parametrize("value", [None, "4", {"a": 1}, [4], True])
def test_a_count_that_is_no_number_is_named_with_its_line(tmp_path, value):
    """And a batch of another type is never hashed."""
    log = edit(rehearsal(tmp_path / "result_0.txt"), set_value("number_of_nodes", value))
    with pytest.raises(LogError, match=r"result_0\.txt:\d+: number_of_nodes is .*, must be a whole number"):
        score_folder(tmp_path)
    edit(log, set_value("number_of_nodes", 4))
    edit(log, set_value("global_batch_size", value))
    assert score_folder(tmp_path).convergence is None
