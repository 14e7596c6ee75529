"""Studies of planned systems: spread, parts and printed assumptions."""

from dataclasses import replace

import numpy as np
import pytest

from scalefold.errors import ConfigError
from scalefold.scaling.plan import Assumptions, plan
from scalefold.scaling.simulate import Noise
from scalefold.scaling.study import study, usual_noise
from scalefold.scaling.system import SystemSpec

EOS = SystemSpec("eos", nodes=264, gpus_per_node=8, gpu="H100", dap_size=8, num_eval_ranks=64, global_batch_size=256)


def test_a_quiet_study_scatters_around_the_plan():
    planned = plan(EOS)
    found = study(planned, runs=200, seed=1)
    assert planned.minutes is not None
    assert found.minutes.mean() == pytest.approx(planned.minutes, rel=0.03)
    assert found.minutes.std() > 0
    ordered = np.sort(found.minutes)
    assert found.score_minutes == pytest.approx(ordered[1:-1].mean())
    assert sum(found.mean_parts().values()) == pytest.approx(60 * found.minutes.mean())


def test_usual_disturbances_cost_time_and_are_printed():
    assumptions = Assumptions(core_s_per_sample=0.5)
    quiet = study(plan(EOS), runs=3)
    noisy = study(plan(EOS), usual_noise(EOS, assumptions), runs=3)
    assert np.all(noisy.minutes > quiet.minutes)
    assert noisy.mean_parts()["stragglers"] > 0
    for words in (
        "straggler_sigma 0.01",
        "loader sample_s 0.5",
        "reference convergence points",
        "failures per run: 0.00",
    ):
        assert words in noisy.text()
    assert "no disturbances" in quiet.text()


def test_too_few_loader_workers_show_up_as_waiting():
    fed = study(plan(EOS), usual_noise(replace(EOS, num_workers=8), Assumptions(core_s_per_sample=0.5)), runs=2)
    starved = study(plan(EOS), usual_noise(replace(EOS, num_workers=1), Assumptions(core_s_per_sample=0.5)), runs=2)
    assert starved.mean_parts()["waiting for the loader"] > 100 * 0.3
    assert fed.mean_parts()["waiting for the loader"] < 10


def test_an_open_plan_cannot_be_simulated_and_says_why():
    with pytest.raises(ConfigError, match="eos: cannot be simulated, its plan is open: needs step time"):
        study(plan(replace(EOS, gpu="MI300X")))
    with pytest.raises(ConfigError, match="runs 0"):
        study(plan(EOS), Noise(), runs=0)
