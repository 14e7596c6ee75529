"""The sweep of launch parameters: what it may choose."""

import json
from concurrent.futures import Future

import pytest

pytest.importorskip("triton")

CONFIGS = [{"BLOCK": n} for n in (16, 32, 64)]
TEXTS = [json.dumps(config) for config in CONFIGS]


@pytest.fixture
def tune(repository, monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import tune

    return tune


@pytest.fixture
def problem(tune):
    return tune.Problem("example", {"n": 256}, case=0, backward=True, candidates=CONFIGS, present=CONFIGS[0])


def runner(tune, racing):
    """Differing repeats of candidates; ``asked`` lists those that were run."""
    asked = []

    def differing(config):
        asked.append(config["BLOCK"])
        difference = tune.Difference(result=2, shape=(64, 64), elements=120, largest=0.87)
        return [[difference]] * 6 if config["BLOCK"] in racing else []

    return differing, asked


def test_the_fastest_is_dropped_if_its_bits_differ_and_the_next_one_is_asked(tune, problem, capsys):
    differing, asked = runner(tune, racing={64})
    left = tune.without_differing(problem, dict(zip(TEXTS, (9.0, 7.0, 5.0), strict=True)), differing)
    assert list(left) == TEXTS[:2]
    assert asked == [64, 32]
    assert tune.fastest(left) == TEXTS[1]
    assert (
        'example n=256: {"BLOCK": 64} is dropped: 6 of 20 repeats differ, result 2 (64x64)' in capsys.readouterr().out
    )


def test_the_present_choice_is_dropped_too(tune, problem):
    differing, _ = runner(tune, racing={16})
    left = tune.without_differing(problem, dict(zip(TEXTS, (5.0, 7.0, 9.0), strict=True)), differing)
    assert tune.fastest(left) == TEXTS[1]


def test_nothing_is_chosen_where_every_candidate_differs(tune, problem):
    differing, _ = runner(tune, racing={16, 32, 64})
    assert tune.without_differing(problem, dict.fromkeys(TEXTS, 5.0), differing) == {}


def test_a_gain_that_noise_explains_does_not_replace_the_present_choice(tune):
    assert tune.fastest(dict(zip(TEXTS, (10.0, 9.95, 12.0), strict=True))) == TEXTS[0]


def test_a_candidate_that_races_or_does_not_run_is_not_timed(tune, problem, monkeypatch):
    """The present choice is no exception; one that was not judged in time is kept only if it is the present one."""

    class Pool:
        def submit(self, task, problem, config):
            future = Future()
            if config["BLOCK"] == 16:
                future.set_result(False)
            elif config["BLOCK"] == 32:
                future.set_result(True)
            return future

    monkeypatch.setattr(tune, "choices", lambda problem, refine: CONFIGS)
    tune.compile_all(Pool(), [problem], refine=False, deadline=0.0)
    assert problem.candidates == [CONFIGS[1]]
    assert problem.present == CONFIGS[0]


def test_a_kernel_with_a_short_ring_races(tune):
    from test_rings import LOOP, program

    assert tune.races(program(LOOP, slots=2), "", 4)
    assert not tune.races(program(LOOP, slots=3), "", 4)


def test_every_kernel_with_launch_parameters_has_candidates_and_no_other_has(tune):
    from scalefold.kernels import triton_ops, tuning
    from scalefold.tune.candidates import CANDIDATES

    assert triton_ops.TRITON.name == "triton"  # all kernels are registered by now
    assert sorted(CANDIDATES) == tuning.registered()


def test_candidates_start_with_the_present_choice_and_do_not_repeat_it(tune, monkeypatch):
    from scalefold.kernels import tuning

    fields = {"rows": 512, "c": 128, "dtype": "bfloat16"}
    with tuning.override("layer_norm_forward", {"BLOCK_M": 64, "num_warps": 8}, **fields):
        found = tune.candidates("layer_norm_forward", **fields)
    assert found[0] == {"BLOCK_M": 64, "num_warps": 8}
    assert len(found) == 8
    assert found.count(found[0]) == 1


def test_candidates_have_the_names_of_the_defaults(tune):
    """A launch parameter that a kernel does not know would be timed in vain."""
    from scalefold.kernels import tuning
    from scalefold.tune.candidates import CANDIDATES

    sizes = {"rows": 4096, "n": 256, "c": 128, "batch": 1, "heads": 4, "d": 32, "bias": 1, "sequences": 1024}
    fields = {**sizes, "frames": 256, "points": 256, "products": 1, "dtype": "bfloat16"}
    optional = {"maxnreg", "LIBRARY", "COPY_ENGINE"}
    for name, listed in CANDIDATES.items():
        default = tuning._defaults[name](fields, 90)
        for config in listed(fields):
            assert config.keys() - optional <= default.keys() | {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}, name


def test_a_sweep_tries_both_forms_of_the_backward_of_transitions(tune):
    tried = tune.candidates("transition_backward", rows=32768, c=256, n=1024, dtype="bfloat16")
    assert {bool(config.get("LIBRARY")) for config in tried[: tune.MAX_CANDIDATES]} == {True, False}
