"""Rank arithmetic for any system size, and what the launchers state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalefold.config import Config, ParallelConfig, RankLayout, TrainingConfig
from scalefold.errors import ConfigError
from scalefold.parallel.ranks import choose_device, read_environment, start


def test_the_published_2080_gpu_layout() -> None:
    layout = RankLayout(2080, dap_size=8, num_eval_ranks=32)
    assert (layout.num_train_ranks, layout.dp_size) == (2048, 256)
    assert layout.eval_ranks == list(range(2048, 2080))
    assert layout.dap_group(2047) == list(range(2040, 2048))
    assert (layout.dp_index(13), layout.dap_index(13)) == (1, 5)


@given(dp=st.integers(1, 40), dap=st.sampled_from([1, 2, 4, 8]), evaluators=st.integers(0, 9))
def test_every_training_rank_is_in_exactly_one_replica_and_no_evaluator_is(dp: int, dap: int, evaluators: int) -> None:
    layout = RankLayout(dp * dap + evaluators, dap, evaluators)
    members = [(layout.dp_index(rank), layout.dap_index(rank)) for rank in layout.train_ranks]
    assert sorted(members) == [(i, j) for i in range(dp) for j in range(dap)]
    for rank in layout.train_ranks:
        group = layout.dap_group(rank)
        assert rank in group
        assert {layout.dp_index(other) for other in group} == {layout.dp_index(rank)}
    assert not any(layout.trains(rank) for rank in layout.eval_ranks)
    assert len(layout.eval_ranks) == evaluators


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 0, 1, "single")),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4, "torchrun")),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (5, 1, 8, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1, "single")),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"},
            (2, 0, 3, "mpirun"),
        ),
    ],
    ids=["none", "torchrun", "srun", "batch script outside srun", "mpirun"],
)
def test_ranks_are_read_from_every_launcher(variables: dict[str, str], expected: tuple) -> None:
    environment = read_environment(variables)
    assert (environment.rank, environment.local_rank, environment.world_size, environment.launcher) == expected


def test_a_process_count_that_differs_from_the_configuration_is_an_error() -> None:
    config = Config(system="x", parallel=ParallelConfig(gpus_per_node=2), training=TrainingConfig(global_batch_size=2))
    with pytest.raises(ConfigError, match="started 1 processes, but parallel: nodes 1 x 2 per node = 2"):
        start(config)


def test_a_missing_gpu_is_named_with_the_keys_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = Config.model_validate({"system": "x", "execution": {"device": "cuda"}})
    with pytest.raises(ConfigError, match="local rank 0 finds 0 CUDA devices"):
        choose_device(config, 0)
