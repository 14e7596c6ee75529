"""Comparison of training curves: the same passes, a small bias does not."""

import numpy as np
import pytest

from scalefold.errors import LogError
from scalefold.report.compare import compare_runs
from scalefold.report.record import Record, StepRow


def write_run(folder, seed=0, bias=1.0, first=1, last=300, noise=0.05, terms=("fape", "chi"), nan_at=None):
    rng = np.random.default_rng(seed)
    with Record(folder, rank0=True) as record:
        for step in range(1, last + 1):
            trend = 5.0 * step**-0.2 * (1 + noise * rng.standard_normal(1 + len(terms)))
            trend[0] *= bias
            if step == nan_at:
                trend[0] = np.nan
            if step >= first:
                record.step(StepRow(step=step, loss=trend[0], terms=dict(zip(terms, trend[1:], strict=True))))
    return folder


def test_a_run_is_the_same_as_itself_even_with_tolerance_zero(tmp_path):
    write_run(tmp_path / "a")
    comparison = compare_runs(tmp_path / "a", tmp_path / "a" / "metrics.jsonl", tolerance=0.0, step_tolerance=0.0)
    assert comparison.ok
    assert [row.quantity for row in comparison.rows] == ["loss", "fape", "chi"]
    assert all(row.max_step == row.max_window == 0.0 for row in comparison.rows)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_that_no_run_can_keep_is_refused(tmp_path, tolerance):
    write_run(tmp_path / "a")
    with pytest.raises(LogError, match=f"tolerance {tolerance:g}: must be at least 0"):
        compare_runs(tmp_path / "a", tmp_path / "a", tolerance=tolerance)


@pytest.mark.parametrize("seed", range(1, 21))
def test_two_seeds_of_one_curve_lie_within_the_noise_band(tmp_path, seed):
    write_run(tmp_path / "a", seed=100 + seed)
    write_run(tmp_path / "b", seed=200 + seed)
    assert compare_runs(tmp_path / "a", tmp_path / "b").ok


def test_a_bias_above_the_noise_band_is_found_and_the_quantity_named(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, bias=1.10)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert not comparison.ok
    assert [row.quantity for row in comparison.rows if not row.ok] == ["loss"]
    assert "DIFFERS" in comparison.text()
    assert comparison.text().endswith("NOT the same")


def test_a_given_tolerance_decides_on_window_means(tmp_path):
    write_run(tmp_path / "a", seed=3)
    write_run(tmp_path / "b", seed=3, bias=1.001)
    assert compare_runs(tmp_path / "a", tmp_path / "b", tolerance=2e-3).ok
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", tolerance=5e-4)
    assert not comparison.ok
    assert comparison.rows[0].max_window == pytest.approx(1e-3, rel=1e-6)


def test_a_single_step_above_the_step_tolerance_fails(tmp_path):
    write_run(tmp_path / "a", seed=3)
    write_run(tmp_path / "b", seed=3, bias=1.001)
    assert compare_runs(tmp_path / "a", tmp_path / "b", tolerance=1.0, step_tolerance=2e-3).ok
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", tolerance=1.0, step_tolerance=5e-4)
    assert not comparison.ok
    assert "single step above" in comparison.text()


def test_only_shared_steps_count_and_too_few_are_an_error(tmp_path):
    write_run(tmp_path / "a", last=100)
    write_run(tmp_path / "b", first=61, last=300)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", tolerance=0.0)
    assert comparison.ok
    assert comparison.rows[0].num_steps == 40
    with pytest.raises(LogError, match="shares 40 steps"):
        compare_runs(tmp_path / "a", tmp_path / "b", window=41)


def test_a_loss_term_missing_in_one_run_is_a_difference(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", terms=("fape",))
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", tolerance=10.0)
    assert not comparison.ok
    assert "'chi' is in only one" in comparison.text()


def test_a_loss_that_is_finite_in_one_run_only_is_a_difference(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", nan_at=17)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b", tolerance=10.0)
    assert not comparison.ok
    assert "at step 17" in comparison.text()


def test_several_runs_are_each_compared_with_the_first(tmp_path):
    for name, bias in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
        write_run(tmp_path / name, bias=bias)
    comparison = compare_runs(*(tmp_path / n for n in "abc"), tolerance=1e-3)
    assert {(row.run, row.quantity) for row in comparison.rows if not row.ok} == {("c", "loss")}


def test_the_overlay_is_written_as_a_picture(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=5)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert comparison.plot(tmp_path / "overlay.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in comparison.plot(tmp_path / "overlay.svg").read_text()


def test_logs_and_garbage_are_refused_in_one_line(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\1")
    with pytest.raises(LogError, match="holds no record"):
        compare_runs(tmp_path / "a", tmp_path / "metrics.jsonl")
    with pytest.raises(LogError, match=r"result_0\.txt: an MLPerf log has no losses; give the run folder"):
        compare_runs(tmp_path / "result_0.txt", tmp_path / "a")
