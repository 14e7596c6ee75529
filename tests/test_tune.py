"""The search for launch parameters: on a recorded device, without a GPU."""

import numpy as np
import pytest

pytest.importorskip("triton")

from recorded_device import FIELDS, KERNEL, PLANTED, PRESENT, Compiled, Record, columns, planted_us
from scalefold.errors import DeviceError
from scalefold.kernels import tuning
from scalefold.tune import trials
from scalefold.tune.candidates import CANDIDATES, neighbours, space
from scalefold.tune.model import TREES, Forest, augmented, fit, lessons
from scalefold.tune.programs import Problem, Program
from scalefold.tune.search import Prior, Search, places_of
from scalefold.tune.sound.bits import Difference
from scalefold.tune.sweep import REPEATS, SEARCH_REPEATS, Sweep, seek_problem
from scalefold.tune.trials import Trial, config_text, parse_config


@pytest.fixture
def tables(tmp_path, monkeypatch, tables_read_anew):
    """Choices and trials are written elsewhere."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tuned")
    (tmp_path / "tuned").mkdir()
    return tmp_path / "tuned"


def sought(forest=None, seed=0):
    configs = [PRESENT, *space(KERNEL, FIELDS)]
    return seek_problem(Problem(KERNEL, FIELDS, 0, False), columns(), configs, forest, seed)


def sweep_of(found, device, compiler, file, clock=lambda: 0.0):
    return Sweep([found], device, compiler, file, lambda text: None, clock)


def history(best=None, us=planted_us, kernel=KERNEL):
    """All trials of a problem whose best is ``best``."""
    rows = []
    for config in space(kernel, FIELDS):
        text = config_text(config)
        problem = "c=128 dtype=bfloat16 n=512 rows=16384"
        rows.append(Trial(**columns(kernel, problem), config=text, us=us(config, best), registers=128, programs=256))
    return rows


@pytest.fixture(scope="module")
def forest():
    pytest.importorskip("sklearn")
    return fit(augmented(lessons(history())))


def trials_to(found, us, seed=0, within=1.02):
    """How many proposals until one is within two hundredths of the least."""
    configs = [parse_config(blank.config) for blank in found.blanks]
    least = min(map(us, configs))
    while found.search.best_us > within * least:
        candidate = found.search.propose()
        found.search.tell(candidate, us(configs[candidate]))
    return len(found.search.tried)


def test_the_search_finds_the_planted_best_without_history(tables, tmp_path):
    found, device = sought(), Record()
    sweep_of(found, device, Compiled(), tmp_path / "trials.csv").run(deadline=1.0)
    assert found.search.best_us == planted_us(PLANTED)
    assert device.asked[0] == (config_text(PRESENT), SEARCH_REPEATS)
    assert len(device.asked) < len(found.blanks) / 2


def test_history_finds_it_in_fewer_trials(forest):
    alone = [trials_to(sought(seed=seed), planted_us) for seed in range(20)]
    advised = [trials_to(sought(forest, seed=seed), planted_us) for seed in range(20)]
    assert np.median(advised) <= np.median(alone) / 2


def test_what_history_likes_best_is_tried_first_and_the_present_choice_when_one_is_made(forest, tables, tmp_path):
    found, device = sought(forest), Record()
    sweep = sweep_of(found, device, Compiled(), tmp_path / "trials.csv")
    sweep.run(deadline=1.0)
    assert parse_config(device.asked[0][0]) != PRESENT
    assert planted_us(parse_config(device.asked[0][0])) < planted_us(PRESENT)
    (row,) = sweep.choose(deadline=1.0)
    assert row["config"] == PLANTED
    assert (config_text(PRESENT), REPEATS) in device.asked


def test_of_what_history_cannot_tell_apart_a_listed_candidate_comes_first():
    class Knows:
        """A model to which all are the same."""

        @staticmethod
        def predict(blanks):
            return np.zeros(len(blanks)), np.full(len(blanks), 0.05)

    found = sought(Knows())
    unlisted = {n for n, blank in enumerate(found.blanks) if blank.config not in found.listed}
    assert 0 not in unlisted
    assert len(found.listed) + len(unlisted) == len(found.blanks)
    found.search.drop(0)
    assert found.search.propose() not in unlisted
    assert len(set(found.search.prior.mean[sorted(unlisted)])) == 1


def test_history_that_is_wrong_fades(forest):
    """The truth has its best at the other end of every ladder; the advised search still gets there."""
    other = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4}
    needed = [trials_to(sought(forest, seed=seed), lambda config: planted_us(config, other)) for seed in range(10)]
    assert np.median(needed) < len(sought().blanks) / 2
    found = sought(forest)
    before = found.search.weight
    found.search.tell(0, 100.0)
    assert found.search.weight < before == 1.0


def test_what_does_not_compile_does_not_fit_spills_or_races_never_reaches_the_device(tables, tmp_path):
    def unfit(config):
        if config["BLOCK_N"] == 32:
            return Program(error="shared memory: 300000 bytes")
        return Program(registers=255, programs=512, spill_bytes=600 if config["BLOCK_M"] == 128 else 8)

    found, device, file = sought(), Record(), tmp_path / "trials.csv"
    sweep_of(found, device, Compiled(unfit), file).run(deadline=1.0)
    asked = [parse_config(text) for text, _ in device.asked]
    assert len(asked) > 5
    assert not [config for config in asked if config["BLOCK_N"] == 32 or config["BLOCK_M"] == 128]
    errors = {row.error for row in trials.read(file)}
    assert errors == {"", "shared memory: 300000 bytes", "spills 600 bytes per thread"}


def test_a_search_that_was_killed_goes_on_where_it_was(tables, tmp_path):
    file = tmp_path / "trials.csv"
    with pytest.raises(KeyboardInterrupt):
        sweep_of(sought(), Record(dies_after=6), Compiled(), file).run(deadline=1.0)
    with file.open("a") as stream:
        stream.write("2026-01-01,half a li")
    rows = trials.read(file)
    assert sum(row.us is not None for row in rows) == 6
    found, device = sought(), Record()
    assert found.resume(rows) == len(rows)
    sweep_of(found, device, Compiled(), file).run(deadline=1.0)
    assert found.search.best_us == planted_us(PLANTED)
    timed = [row.config for row in trials.read(file) if row.us is not None]
    assert len(timed) == len(set(timed)) == 6 + len(device.asked)


def test_a_gpu_that_fails_ends_the_search_and_its_next_call_goes_on_after_the_candidate(tables, tmp_path):
    """An access to memory that is not there ends a process's use of the GPU: all later trials would fail with it."""
    file, device = tmp_path / "trials.csv", Record(fatal=[config_text(PLANTED)])
    with pytest.raises(DeviceError, match="the same command goes on after it"):
        sweep_of(sought(), device, Compiled(), file).run(deadline=1.0)
    assert device.asked[-1][0] == config_text(PLANTED)
    rows = trials.read(file)
    assert [row.config for row in rows if row.error] == [config_text(PLANTED)]
    found, again = sought(), Record()
    found.resume(rows)
    sweep_of(found, again, Compiled(), file).run(deadline=1.0)
    assert config_text(PLANTED) not in {text for text, _ in again.asked}


def test_the_search_ends_when_no_trial_promises_enough(tables, tmp_path):
    """All candidates are equally fast: nothing is expected any more before all are tried, though no history says so."""
    device = Record(us=lambda config: 100.0)
    ticks = iter(range(10**6))
    why = sweep_of(sought(), device, Compiled(), tmp_path / "trials.csv", lambda: next(ticks) * 0.1).run(10**6)
    assert why == "nothing promises more"
    assert len(device.asked) < 45


def test_the_time_limit_ends_a_search(tables, tmp_path):
    ticks = iter(range(10**6))
    device = Record()
    assert sweep_of(sought(), device, Compiled(), tmp_path / "t.csv", lambda: float(next(ticks))).run(9.0)
    assert 1 <= len(device.asked) <= 9


def test_the_choice_is_run_again_with_all_repeats_and_saved(tables, tmp_path):
    found, device = sought(), Record()
    sweep = sweep_of(found, device, Compiled(), tmp_path / "trials.csv")
    sweep.run(deadline=1.0)
    (row,) = sweep.choose(deadline=1.0)
    assert row["config"] == PLANTED
    assert row["default_us"] == pytest.approx(planted_us(PRESENT), abs=0.1)
    assert device.asked[-2:] == [(config_text(PRESENT), REPEATS), (config_text(PLANTED), REPEATS)]
    (file,) = tables.glob("*.json")
    assert tuning.read_table(file) == {KERNEL: {tuning.problem_key(FIELDS): PLANTED}}


def test_the_fastest_is_dropped_if_its_bits_differ(tables, tmp_path):
    found, device = sought(), Record(bad=[config_text(PLANTED)])
    sweep = sweep_of(found, device, Compiled(), tmp_path / "trials.csv")
    sweep.run(deadline=1.0)
    (row,) = sweep.choose(deadline=1.0)
    assert row["config"] not in (PLANTED, PRESENT)
    assert "differ" in {trial.bits for trial in trials.read(tmp_path / "trials.csv")}


def test_nothing_is_chosen_where_every_candidate_differs(tables, tmp_path):
    texts = [config_text(config) for config in [PRESENT, *space(KERNEL, FIELDS)]]
    sweep = sweep_of(sought(), Record(bad=texts), Compiled(), tmp_path / "trials.csv")
    sweep.run(deadline=1.0)
    assert list(sweep.choose(deadline=1.0)) == []


def test_a_gain_that_noise_explains_does_not_replace_the_present_choice(tables, tmp_path):
    device = Record(us=lambda config: 100.0 if config == PRESENT else 99.5)
    sweep = sweep_of(sought(), device, Compiled(), tmp_path / "trials.csv")
    sweep.run(deadline=1.0)
    (row,) = sweep.choose(deadline=1.0)
    assert row["config"] == PRESENT


def test_every_kernel_with_launch_parameters_has_candidates_and_no_other_has():
    from scalefold.kernels import triton_ops

    assert triton_ops.TRITON.name == "triton"  # all kernels are registered by now
    assert sorted(CANDIDATES) == tuning.registered()


def test_candidates_and_their_grids_have_the_names_of_the_defaults():
    """A launch parameter that a kernel does not know would be timed in vain."""
    sizes = {"rows": 4096, "n": 256, "c": 128, "batch": 1, "heads": 4, "d": 32, "bias": 1, "sequences": 1024}
    fields = {**sizes, "frames": 256, "points": 256, "products": 1, "dtype": "bfloat16"}
    optional = {"maxnreg", "LIBRARY", "COPY_ENGINE"}
    for name, listed in CANDIDATES.items():
        default = tuning._defaults[name](fields, 90)
        grid = space(name, fields)
        assert grid[: len(listed(fields))] == listed(fields)
        assert len({config_text(config) for config in grid}) == len(grid)
        for config in [*grid, *neighbours(default)]:
            assert config.keys() - optional <= default.keys() | {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}, name


def test_no_candidate_makes_a_gpu_stand_still():
    """A Gluon attention with a ring of one slot waits for its next row before it gives the slot back."""
    fields = {"batch": 1, "rows": 32, "n": 128, "heads": 8, "d": 32, "bias": 0, "dtype": "bfloat16"}
    for name in ("attention_hopper_forward", "attention_hopper_keys"):
        tried = space(name, fields)
        rings = [config for config in tried if config["HOPPER"]]
        assert rings
        for config in [*tried, *(near for ring in rings for near in neighbours(ring))]:
            assert config["STAGES"] > 1 or not config["HOPPER"]


def test_the_switch_to_the_triton_program_has_no_neighbours():
    """They would all be the same program."""
    assert neighbours({"HOPPER": 0, "GROUPS": 16, "STAGES": 4}) == []
    assert neighbours({"HOPPER": 1, "GROUPS": 16, "STAGES": 4})


def test_a_sweep_tries_both_forms_of_the_backward_of_transitions():
    tried = space("transition_backward", {"rows": 32768, "c": 256, "n": 1024, "dtype": "bfloat16"})
    assert {bool(config.get("LIBRARY")) for config in tried} == {True, False}


def test_differences_are_described():
    assert str(Difference(2, (64, 64), 120, 0.87)) == "result 2 (64x64): 120 elements, by up to 0.87"


def test_the_model_is_the_same_from_its_file(forest, tmp_path):
    forest.save(tmp_path / "model.npz")
    again = Forest.load(tmp_path / "model.npz")
    assert np.array_equal(forest.predict(history()), again.predict(history()))


def test_the_model_says_what_scikit_learn_says():
    """Trees evaluated by NumPy alone."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    rows = history()
    known = lessons(rows)
    ours = fit(known, seed=3)
    assert ours is not None
    matrix = ours.matrix(rows)
    theirs = ensemble.ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=3, bootstrap=True)
    theirs.fit(matrix, [lesson.distance for lesson in known], sample_weight=[lesson.weight for lesson in known])
    assert np.allclose(ours.predict(rows)[0], theirs.predict(matrix), atol=1e-6)


def test_a_search_without_trials_expects_the_most_of_what_history_likes_best():
    places = places_of([{"BLOCK": n} for n in (16, 32, 64)])
    search = Search(places, Prior(np.array([0.3, 0.0, 0.2]), np.full(3, 0.02)), np.random.default_rng(0))
    assert int(search.gains().argmax()) == 1
    search.drop(1)
    assert search.gains()[1] == 0.0
    assert int(search.gains().argmax()) == 2
