"""The simulator: limits that can be computed by hand, conservation of time, published runs replayed."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefold.errors import ConfigError
from scalefold.scaling.replay import PUBLISHED_RUNS, replay, run_times
from scalefold.scaling.simulate import Loader, Noise, RunTimes, draw_cycles, simulate, simulate_many

QUIET = RunTimes(step_s=0.5, num_cycles=10, eval_s=8.0, start_s=12.0)


def test_published_runs_are_predicted_within_ten_percent():
    result = replay()
    assert len(result.rows) == 56
    assert result.ok(0.10), result.text()
    assert {key[0] for key in result.groups()} == {"NVIDIA", "HPE+LBNL", "TACC", "Clemson"}
    assert not result.ok(abs(result.worst.error) * 0.99)
    assert "worst run" in result.text()


def test_a_replay_uses_neither_the_total_nor_the_gaps():
    with PUBLISHED_RUNS.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    unused = ("ttt_seconds", "later_gap_median_s", "first_handoff_or_eval_gap_s", "tail_after_last_train_step_s")
    for row in rows[::7]:
        assert run_times(row | dict.fromkeys(unused, "1e9")) == run_times(row)


def test_a_replay_of_a_broken_table_names_file_and_reason(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("submitter,system\nA,B\n")
    with pytest.raises(ConfigError, match=r"runs\.csv: column 'scaling' is missing"):
        replay(table)
    with pytest.raises(ConfigError, match="cannot read"):
        replay(tmp_path / "absent.csv")
    text = PUBLISHED_RUNS.read_text().splitlines()
    table.write_text("\n".join([text[0], text[1].replace(",0.68,", ",x,")]))
    with pytest.raises(ConfigError, match="'x'"):
        replay(table)


def test_synchronous_evaluation_adds_every_evaluation():
    assert simulate(QUIET).total_s == pytest.approx(12 + 10 * (20 + 8))
    first = simulate(replace(QUIET, first_eval_s=30.0, first_cycle_extra_s=5.0))
    assert first.total_s == pytest.approx(12 + 10 * 28 + 22 + 5)


def test_asynchronous_evaluation_costs_only_the_last_one_and_the_hand_overs():
    run = simulate(replace(QUIET, asynchronous=True, hand_over_s=0.5))
    assert run.total_s == pytest.approx(12 + 10 * 20.5 + 8)
    assert run.parts["tail: last evaluation"] == pytest.approx(8.0)
    assert run.parts["waiting for the evaluators"] == 0.0


@pytest.mark.parametrize(("depth", "waits"), [(0, 270.0), (1, 220.0), (3, 120.0), (9, 0.0)])
def test_slow_evaluators_make_training_wait_once_the_queue_is_full(depth, waits):
    run = simulate(replace(QUIET, asynchronous=True, eval_s=50.0, queue_depth=depth))
    assert waits == max(0.0, 50.0 * (9 - depth) - 20.0 * 9)
    assert run.parts["waiting for the evaluators"] == pytest.approx(waits)
    assert run.total_s == pytest.approx(12 + 20 + 10 * 50), "the evaluators are the bottleneck either way"


def test_training_waits_for_evaluators_that_are_still_busy_with_the_first_weights():
    times = replace(QUIET, asynchronous=True, eval_ready_s=12.0, initial_eval_s=60.0, queue_depth=0)
    assert simulate(times).parts["waiting for the evaluators"] == pytest.approx(60 - 20)
    assert simulate(replace(times, queue_depth=1)).parts["waiting for the evaluators"] == pytest.approx(20.0)


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    noise = Noise(straggler_sigma=0.02, hiccup_rate=1e-4, hiccup_s=0.5, loader=Loader(4, 1.5), mtbf_rank_h=5.0)
    times = replace(QUIET, num_replicas=8, ranks_per_replica=4)
    assert simulate(times, noise, seed=1) == simulate(times, noise, seed=1)
    assert simulate(times, noise, seed=1).total_s != simulate(times, noise, seed=2).total_s


@settings(max_examples=40, deadline=None)
@given(
    cycles=st.integers(1, 6),
    replicas=st.integers(1, 6),
    asynchronous=st.booleans(),
    depth=st.integers(0, 2),
    sigma=st.floats(0, 0.1),
    mtbf_h=st.floats(0.05, 10.0),
    checkpoint=st.integers(0, 30),
    in_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_second_is_lost(cycles, replicas, asynchronous, depth, sigma, mtbf_h, checkpoint, in_order, seed):
    times = RunTimes(
        step_s=0.2, num_cycles=cycles, eval_s=5.0, start_s=3.0, asynchronous=asynchronous, queue_depth=depth,
        num_replicas=replicas, hand_over_s=0.1, first_cycle_extra_s=2.0,
    )  # fmt: skip
    noise = Noise(
        straggler_sigma=sigma, loader=Loader(2, 0.3, in_order=in_order), mtbf_rank_h=mtbf_h * replicas,
        checkpoint_every_steps=checkpoint, checkpoint_s=0.5, restart_s=20.0,
    )  # fmt: skip
    run = simulate(times, noise, seed)
    assert sum(run.parts.values()) == pytest.approx(run.total_s)
    assert run.total_s == pytest.approx(run.evaluation_finish_s[-1])
    assert run.steps == cycles * 40
    assert len(run.evaluation_finish_s) == cycles
    assert np.all(np.diff(run.evaluation_finish_s) > 0)
    kept = {name: seconds for name, seconds in run.parts.items() if name != "stragglers"}
    assert min(kept.values()) >= 0


def test_more_ranks_mean_slower_slowest_ranks():
    noise = Noise(straggler_sigma=0.02)
    slow = [simulate(replace(QUIET, num_replicas=n), noise).parts["stragglers"] for n in (2, 32, 512, 2048)]
    assert slow == sorted(slow)
    expected = 400 * 0.5 * 0.02 * 3.43
    assert slow[-1] == pytest.approx(expected, rel=0.1), "the mean of the largest of 2048 normal deviates is 3.43"


def test_hiccups_are_as_frequent_as_said():
    run = simulate(replace(QUIET, num_cycles=100, num_replicas=100), Noise(hiccup_rate=1e-3, hiccup_s=1.0))
    expected = 4000 * (1 - (1 - 1e-3) ** 100)
    assert run.parts["stragglers"] == pytest.approx(expected, rel=0.15)


def test_a_loader_that_is_fast_enough_costs_only_its_first_sample_and_a_slow_one_sets_the_pace():
    fast = simulate(QUIET, Noise(loader=Loader(num_workers=8, sample_s=2.0, sample_sigma=0.0)))
    assert fast.parts["waiting for the loader"] == pytest.approx(2.0)
    slow = simulate(QUIET, Noise(loader=Loader(num_workers=2, sample_s=2.0, sample_sigma=0.0)))
    assert slow.parts["waiting for the loader"] == pytest.approx(400 * (1.0 - 0.5) - 10 * 8 * 1.0, abs=90)
    per_step = (slow.parts["waiting for the loader"] + slow.parts["evaluation (training waits)"]) / 400 + 0.5
    assert per_step == pytest.approx(1.0, rel=0.05)


def test_slow_samples_stall_an_ordered_loader_but_not_one_that_hands_out_what_is_ready():
    times = replace(QUIET, asynchronous=True, num_replicas=16)
    loader = Loader(num_workers=6, sample_s=1.0, slow_fraction=0.01, slow_factor=40.0, prefetch_factor=2)
    ready_first = simulate(times, Noise(loader=loader)).parts["waiting for the loader"]
    in_order = simulate(times, Noise(loader=replace(loader, in_order=True))).parts["waiting for the loader"]
    assert ready_first < 0.25 * in_order


def test_a_local_batch_takes_that_many_samples():
    loader = Loader(num_workers=4, sample_s=1.0, sample_sigma=0.0)
    one = simulate(replace(QUIET, asynchronous=True), Noise(loader=loader)).parts["waiting for the loader"]
    four = simulate(replace(QUIET, asynchronous=True, local_batch_size=4), Noise(loader=loader))
    assert one == pytest.approx(1.0)
    assert four.parts["waiting for the loader"] == pytest.approx(400 * 0.5, rel=0.05)


def test_checkpoints_limit_what_a_failure_costs():
    times = replace(QUIET, num_cycles=200, num_replicas=64, asynchronous=True, eval_s=1.0)
    noise = Noise(mtbf_rank_h=64 * 0.2, restart_s=30.0, checkpoint_s=0.2)
    often, rarely = (simulate(times, replace(noise, checkpoint_every_steps=n), seed=3) for n in (100, 2000))
    assert often.num_failures > 3
    assert often.parts["failures and repeated steps"] < rarely.parts["failures and repeated steps"]
    mean_loss = often.parts["failures and repeated steps"] / often.num_failures
    assert 30.0 < mean_loss < 30.0 + 100 * 0.6


def test_a_run_that_can_never_finish_is_refused():
    with pytest.raises(ConfigError, match="never ends"):
        simulate(replace(QUIET, num_cycles=50), Noise(mtbf_rank_h=0.001))


@pytest.mark.parametrize("change", [{"num_cycles": 0}, {"step_s": 0.0}, {"queue_depth": -1}, {"num_replicas": 0}])
def test_impossible_arguments_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(QUIET, **change)


def test_cycles_are_drawn_around_the_observed_convergence():
    cycles = draw_cycles(133120, 13738, 40 * 256, runs=4000, seed=1)
    assert cycles.mean() == pytest.approx(13.0, abs=0.1)
    assert cycles.std() == pytest.approx(13738 / 10240, rel=0.1)
    totals = [run.total_s for run in simulate_many(QUIET, Noise(), cycles[:20])]
    assert len(totals) == 20
    assert totals[0] == pytest.approx(12 + 28 * cycles[0])


def test_2080_ranks_with_all_disturbances_are_simulated_in_seconds():
    times = replace(QUIET, num_cycles=13, num_replicas=256, ranks_per_replica=8, asynchronous=True)
    noise = Noise(straggler_sigma=0.02, hiccup_rate=1e-6, hiccup_s=1.0, loader=Loader(14, 3.0), mtbf_rank_h=50000.0)
    run = simulate(times, noise)
    assert run.steps == 520
    assert 12 + 520 * 0.5 < run.total_s < 1.5 * (12 + 520 * 0.5)
    assert "total" in run.text()
