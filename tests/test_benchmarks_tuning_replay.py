"""Replayed searches: what they leave out of history, and how trials are counted."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

from scalefold.kernels import triton_ops, tuning
from scalefold.tune import trials
from scalefold.tune.search import Prior
from scalefold.tune.trials import config_text


@pytest.fixture
def script(repository, monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import tuning_replay

    assert triton_ops.TRITON
    return tuning_replay


@pytest.fixture
def methods(script):
    """What the script compares."""
    return sys.modules["tuning_methods"]


@pytest.fixture(scope="module")
def rows(repository):
    """The first recorded sweep."""
    found = trials.read(repository / "benchmarks" / "results" / "tuning_sweeps.csv")
    return [row for row in found if row.key == found[0].key]


def test_the_record_holds_eight_sweeps_of_four_kernels(repository):
    found = trials.read(repository / "benchmarks" / "results" / "tuning_sweeps.csv")
    assert len({row.key for row in found}) == 8
    assert len({row.kernel for row in found}) == 4
    assert all(row.bits == "equal" for row in found if row.us is not None)


def test_only_sound_trials_are_replayed_and_today_begins_with_the_default(script, rows):
    broken = replace(rows[1], bits="differ")
    sweep = script.recorded([rows[0], broken, *rows[2:]])
    texts = [row.config for row in sweep.rows]
    assert broken.config not in texts
    assert not any(row.error for row in sweep.rows)
    default = tuning._defaults[rows[0].kernel](script.fields_of(rows[0]), 90)
    assert texts[0] == config_text(default)
    assert len(set(texts)) == len(texts)


def test_history_leaves_out_the_width_or_the_kernel(script, rows):
    out = rows[0]
    smaller = replace(out, problem=out.problem.replace("rows=65536", "rows=16384"))
    wider = replace(out, problem=out.problem.replace("c=128", "c=256"))
    other = replace(out, kernel="gated_output_forward")
    known = [out, smaller, wider, other]
    assert script.left(known, out, new_kernel=False) == [wider, other]
    assert script.left(known, out, new_kernel=True) == [other]


def test_a_curve_ends_when_a_trial_is_close_enough_to_the_best(script, rows):
    sweep = script.recorded(rows)
    best = int(sweep.us.argmin())
    others = [n for n in range(len(sweep.us)) if sweep.us[n] > 1.02 * sweep.us[best]]
    found = script.curve(sweep, iter([*others[:4], best, *others[4:]]))
    assert len(found) == 5
    assert found[-1] == 1.0
    assert list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize("method", ["random_order", "today_order", "tpe_order"])
def test_every_method_proposes_every_candidate_once(script, methods, rows, method):
    if method == "tpe_order":
        pytest.importorskip("optuna")
    sweep = script.recorded(rows)
    order = list(getattr(methods, method)(sweep, 3))
    assert sorted(order) == list(range(len(sweep.rows)))


def test_ours_begins_with_what_history_likes_best_and_ends_with_what_spills(script, methods, rows):
    sweep = script.recorded(rows)
    flat = Prior.flat(len(sweep.rows))
    order = list(methods.search_order(sweep, 3, flat))
    liked = Prior(np.where(np.arange(len(sweep.rows)) == 5, 0.0, 0.1), flat.spread)
    first = [next(methods.search_order(sweep, 3, liked, present_first=present)) for present in (False, True)]
    assert [order[0], *first] == [0, 5, 0]
    assert sorted(order) == list(range(len(sweep.rows)))
    spilling = {n for n, row in enumerate(sweep.rows) if (row.spill_bytes or 0) > 512}
    assert spilling
    assert set(order[-len(spilling) :]) == spilling


def test_ratios_are_of_medians_and_of_their_sums(script):
    ours, other = [[2, 2, 2], [3, 3, 3], [10, 10, 10]], [[4, 4, 4], [12, 12, 12], [10, 10, 10]]
    found = script.ratios(ours, other)
    assert found["median_ratio"] == "0.50"
    assert found["ratio_of_sums"] == f"{15 / 26:.2f}"
    low, high = map(float, found["median_ratio_95"].split(" to "))
    assert low <= 0.5 <= high <= 1.0
    assert np.isfinite(low)


def test_a_replay_that_was_stopped_goes_on_from_what_it_kept(script, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(script.Task, "methods", {"random": script.random_order, "today": script.today_order})
    task = script.Task(script.recorded(rows), "", (), 4, tmp_path)
    first = script.replay(task)
    assert [len(first["random"]), len(first["today"])] == [4, 1]
    monkeypatch.setattr(script.Task, "methods", None)
    again = script.replay(task)
    assert again.keys() == first.keys()
    assert all(np.array_equal(a, b) for name in first for a, b in zip(first[name], again[name], strict=True))
    other = script.Task(script.recorded(rows[:-3]), "", (), 4, tmp_path)
    assert other.file != task.file


def test_the_folder_to_keep_reaches_every_task(script, rows, tmp_path, monkeypatch):
    class InThisProcess:
        map = staticmethod(map)

        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(script, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(script.Task, "methods", {"random": script.random_order})
    script.replay_all({"development": [script.recorded(rows)]}, (), 2, 1, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 1 + len(script.SCENARIOS)


def test_a_sweep_that_was_cut_off_is_not_replayed(script, rows, tmp_path):
    """Its best is not known."""
    trials.append(tmp_path / "tuning_sweeps.csv", rows)
    assert len(script.read_sets(tmp_path)["development"]) == 1
    shorter = tmp_path / "shorter"
    missing = rows[10].config
    trials.append(shorter / "tuning_sweeps.csv", [row for row in rows if row.config != missing])
    assert script.read_sets(shorter) == {}


def test_new_sweeps_whose_candidates_are_mostly_equal_are_a_set_of_their_own(script, rows, tmp_path):
    trials.append(tmp_path / "tuning_new.csv", rows)
    assert list(script.read_sets(tmp_path)) == ["new"]
    equal = tmp_path / "equal"
    trials.append(equal / "tuning_new.csv", [row if row.us is None else replace(row, us=100.0) for row in rows])
    assert list(script.read_sets(equal)) == ["new, flat"]


@pytest.mark.parametrize(("factor", "whole"), [(1.01, True), (1.05, False)])
def test_sessions_are_one_sweep_only_if_they_agree_on_what_both_timed(script, rows, tmp_path, factor, whole):
    """One session was cut off, another one, of later code, has timed the rest and some of the same."""
    timed = [row for row in rows if row.is_sound]
    common, rest = timed[:5], timed[40:]
    later = [replace(row, code="later", us=row.us * factor) for row in (*common, *rest)]
    earlier = [row for row in rows if row not in rest]
    trials.append(tmp_path / "tuning_sweeps.csv", [*earlier, *later])
    assert len(script.read_sets(tmp_path)) == whole
    assert script.joined([*earlier, *later[len(common) :]]) == earlier


def test_what_spilling_is_worth_is_said_of_each_sweep(script, rows):
    sound = sorted((row for row in script.merged(rows)), key=lambda row: row.us)
    spilling = replace(sound[0], us=sound[0].us / 2, spill_bytes=100, config="BLOCK_M=1")
    dry = min(row.us for row in sound if not row.spill_bytes)
    found = script.spill_row("held-out", [*rows, spilling])
    assert found["best_spills_bytes"] == 100
    assert float(found["without_spills_over_best"]) == pytest.approx(dry / spilling.us, abs=1e-3)
    assert found["allowed_spills_over_best"] == "1.000"


def test_no_problem_is_in_two_sets_and_most_that_were_held_out_are_of_other_kernels(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    tuning_sweeps = importlib.import_module("tuning_sweeps")

    known = {kernel for kernel, _ in tuning_sweeps.SETS["development"].problems}
    held_out, new = tuning_sweeps.SETS["held-out"], tuning_sweeps.SETS["drawn"]
    assert not set(held_out.problems) & set(tuning_sweeps.SETS["development"].problems)
    assert 2 * sum(kernel not in known for kernel, _ in held_out.problems) >= len(held_out.problems)
    names = [case.name for case in tuning_sweeps.all_cases(list(held_out.daps), [])]
    assert all(any(name.startswith(begin) for name in names) for _, begin in held_out.problems)
    results = repository / "benchmarks" / "results"
    swept = {t.key for name in ("sweeps", "held_out") for t in trials.read(results / f"tuning_{name}.csv")}
    fresh = {(kernel, problem) for kernel, _, problem in new.problems}
    assert len(fresh) == len(new.problems) >= 24
    assert not fresh & swept
    names = [case.name for case in tuning_sweeps.all_cases(list(new.daps), list(new.lengths))]
    assert {operation for _, operation, _ in new.problems} <= set(names)
