"""Runs in phases: another batch, learning rate or number of ranks from some step on, and nothing is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scalefold.step.build
from processes import run_ranks
from runs import SMALLEST, TINY
from scalefold.config import Config, describe_config, dump_config, load_config
from scalefold.data.loading.sampler import TrainingSampler
from scalefold.errors import CheckpointError, ConfigError
from scalefold.phases import EXIT_NEXT_PHASE, Position, Schedule
from scalefold.report.record import read_metrics
from scalefold.run.begin import RunOptions, open_schedule
from scalefold.run.loop import run_rank
from scalefold.step.checkpoint import RESUMABLE_FILE, read_state
from scalefold.step.graphs import TrainStep

BATCH_2_THEN_4 = [
    {"name": "small", "until_step": 2, "global_batch_size": 2},
    {"name": "large", "global_batch_size": 4, "opt_base_learning_rate": 5e-4},
]


def phased(store: Path, run_dir: Path, phases: list[dict], *overrides: str) -> Config:
    """The smallest run with ``phases``; one of them may be left out to change ranks by hand."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir.parent / f"{run_dir.name}.yaml"
    file.write_text(yaml.safe_dump({"base": str(TINY), "phases": phases}))
    places = [f"data.store_dir={store}", f"run.run_dir={run_dir}", "run.checkpoint_every_iters=2"]
    return load_config(file, [*SMALLEST, *places, *overrides]).config


def weights(run_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    file = run_dir / "checkpoints" / "last" / f"{iteration:06d}" / RESUMABLE_FILE
    content = torch.load(file, weights_only=True)
    moments = {f"{i}.{k}": v for i, s in content["optimizer_state_dict"]["state"].items() for k, v in s.items()}
    return content["alphafold_state_dict"] | moments


def test_a_phase_change_inside_the_process_equals_one_between_two_processes(tiny_store: Path, tmp_path: Path) -> None:
    outcome = run_rank(phased(tiny_store, tmp_path / "whole", BATCH_2_THEN_4), RunOptions())
    assert outcome is not None
    assert (outcome.status, outcome.step) == ("aborted", 4)
    parts = tmp_path / "parts"
    run_rank(phased(tiny_store, parts, BATCH_2_THEN_4, "training.num_train_iters=2"), RunOptions())
    run_rank(phased(tiny_store, parts, BATCH_2_THEN_4), RunOptions(resume=True))
    one, two = weights(tmp_path / "whole", 4), weights(parts, 4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    metrics = [read_metrics(folder) for folder in (tmp_path / "whole", parts)]
    assert metrics[0].loss.tolist() == metrics[1].loss.tolist()


def test_only_a_phase_that_computes_otherwise_makes_a_new_step_and_warms_it_up(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, warmed = [], []
    build, warm_up = scalefold.step.build.build_step, TrainStep.warm_up
    monkeypatch.setattr(scalefold.step.build, "build_step", lambda *a: made.append(1) or build(*a))
    monkeypatch.setattr(TrainStep, "warm_up", lambda self, *a: warmed.append(1) or warm_up(self, *a))
    phases = [
        {"name": "first", "until_step": 1, "global_batch_size": 2},
        {"name": "another rate", "until_step": 2, "global_batch_size": 2, "opt_base_learning_rate": 5e-4},
        {"name": "another batch", "global_batch_size": 4},
    ]
    evaluates = "training.val_every_iters=1"
    run_rank(phased(tiny_store, tmp_path / "run", phases, evaluates, "execution.warm_up=true"), RunOptions())
    assert (len(made), len(warmed)) == (2, 2)
    assert len(read_metrics(tmp_path / "run").step) == 4


def test_every_step_and_sample_is_counted_once(tiny_store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_rank(phased(tiny_store, run_dir, BATCH_2_THEN_4, "training.opt_base_learning_rate=2e-3"), RunOptions())
    metrics = read_metrics(run_dir)
    assert metrics.step.tolist() == [1, 2, 3, 4]
    assert metrics.samples.tolist() == [2, 4, 8, 12]
    assert metrics.lr.tolist() == [2e-3, 2e-3, 5e-4, 5e-4]
    assert metrics.eval_samples.tolist() == [4, 12]
    assert [(e["step"], e["phase"], e["samples"]) for e in metrics.events if e["name"] == "phase"] == [(2, "large", 4)]
    lines = [json.loads(line.split("MLLOG ")[1]) for line in (run_dir / "result_0.txt").read_text().splitlines()]
    seen = [line["metadata"]["epoch_num"] for line in lines if line["key"] in ("eval_accuracy", "epoch_stop")]
    assert seen == [4, 4, 12, 12]
    assert "phases" in (run_dir / "config.yaml").read_text()


def test_the_stream_of_samples_continues_where_the_last_phase_stopped() -> None:
    rows, chain_weights = np.arange(50), np.ones(50)
    whole = TrainingSampler(rows, chain_weights, 7, local_batch_size=1)
    first = [TrainingSampler(rows, chain_weights, 7, replica=r, num_replicas=2) for r in range(2)]
    second = TrainingSampler(rows, chain_weights, 7, local_batch_size=4, iterations_before=3, samples_before=6)
    in_phases = [pair for i in (1, 2, 3) for sampler in first for pair in sampler.pairs(i)]
    in_phases += [pair for i in (4, 5) for pair in second.pairs(i)]
    assert in_phases == [whole.pairs(i)[0] for i in range(1, 15)]


def test_a_phase_ends_at_its_lddt(tiny_store: Path, tmp_path: Path) -> None:
    phases = [{"name": "until good", "until_lddt_ca": 0.001, "until_step": 4}, {"name": "rest", "global_batch_size": 1}]
    run_rank(phased(tiny_store, tmp_path / "run", phases), RunOptions())
    assert read_metrics(tmp_path / "run").samples.tolist() == [2, 4, 5, 6]


@pytest.mark.distributed
def test_a_phase_with_other_ranks_ends_the_process_and_the_next_one_continues(tiny_store: Path, tmp_path: Path) -> None:
    phases = [
        {"name": "one node", "until_step": 2, "global_batch_size": 2, "nodes": 1},
        {"name": "two nodes", "global_batch_size": 4, "nodes": 2},
    ]
    config = phased(tiny_store, tmp_path / "run", phases)
    assert run_ranks(status, 1, config, False, join=False) == ["next_phase"]
    state = read_state(tmp_path / "run" / "checkpoints" / "last" / "000002")
    assert state.position == Position(1, 2, 4)
    assert run_ranks(status, 2, config, True, join=False) == ["aborted", "aborted"]
    metrics = read_metrics(tmp_path / "run")
    assert metrics.step.tolist() == [1, 2, 3, 4]
    assert metrics.samples.tolist() == [2, 4, 8, 12]


@pytest.mark.distributed
def test_evaluation_ranks_end_their_phase_too(tiny_store: Path, tmp_path: Path) -> None:
    phases = [{"name": "first", "until_lddt_ca": 0.001}, {"name": "second", "global_batch_size": 4}]
    several = ["parallel.ranks_per_node=2", "parallel.num_eval_ranks=1", "training.num_train_iters=400"]
    config = phased(tiny_store, tmp_path / "run", phases, *several)
    assert run_ranks(status, 2, config, False, join=False) == ["next_phase", None]
    last = int(read_metrics(tmp_path / "run").step[-1])
    assert last < 400
    state = read_state(tmp_path / "run" / "checkpoints" / "last" / f"{last:06d}")
    assert state.position == Position(1, last, 2 * last)


def status(rank: int, config: Config, resume: bool) -> str | None:
    outcome = run_rank(config, RunOptions(resume=resume))
    return outcome.status if outcome else None


def test_archived_checkpoints_stay(tiny_store: Path, tmp_path: Path) -> None:
    overrides = ["run.checkpoint_every_iters=1", "run.archive_every_iters=2", "run.keep_checkpoints=1"]
    places = [f"data.store_dir={tiny_store}", f"run.run_dir={tmp_path / 'run'}"]
    run_rank(load_config(TINY, [*SMALLEST, *places, *overrides, "training.num_train_iters=5"]).config, RunOptions())
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "last").iterdir())
    assert folders == ["000002", "000004", "000005"]


def test_the_schedule_of_the_shipped_long_run(repository: Path) -> None:
    config = load_config(repository / "configs" / "from_scratch_1056_to_2080_h100.yaml").config
    schedule = Schedule(config)
    assert (schedule.config.parallel.world_size, schedule.config.local_batch_size) == (1056, 1)
    assert not schedule.goal_reached(0.79)
    assert schedule.goal_reached(0.8)
    assert not schedule.continues_here()
    schedule.advance(5000)
    assert (schedule.config.parallel.world_size, schedule.config.local_batch_size) == (2080, 1)
    assert schedule.samples(5001) == 5000 * 128 + 256
    assert (schedule.is_last, schedule.last_step) == (True, 60000)
    assert not schedule.goal_reached(1.0)
    eight = Schedule(load_config(repository / "configs" / "from_scratch_8_h100.yaml").config)
    assert eight.continues_here()


def test_a_run_without_phases_is_one_phase() -> None:
    schedule = Schedule(load_config(TINY, ["training.num_train_iters=600", "training.global_batch_size=4"]).config)
    assert (schedule.is_last, schedule.last_step, schedule.samples(10)) == (True, 600, 40)
    assert not schedule.goal_reached(1.0)
    assert not schedule.follows(10)


def test_show_prints_every_phase(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"base": str(TINY), "phases": BATCH_2_THEN_4}))
    loaded = load_config(file, ["training.val_every_iters=2"])
    rows = {key: (value, origin) for key, value, origin in describe_config(loaded)}
    assert rows["phases.1.global_batch_size"] == ("4", f"{file}:2")
    assert rows["phases.0.opt_base_learning_rate"] == ("null", "default")
    (tmp_path / "again.yaml").write_text(dump_config(loaded.config))
    assert load_config(tmp_path / "again.yaml").config == loaded.config


@pytest.mark.parametrize(
    "phases, message",
    [
        ([{"name": "a", "gobal_batch_size": 2}], "unknown key `phases.gobal_batch_size`.*`phases.global_batch_size`"),
        ([{"name": "a"}, {"name": "b"}], r"phases.0 \(a\): needs until_step or until_lddt_ca"),
        ([{"name": "a", "until_step": 80}, {"name": "b", "until_step": 40}], "until_step 40 must be above 80"),
        ([{"name": "a", "until_step": 30}, {"name": "b"}], "must be a multiple of training.val_every_iters"),
        ([{"name": "a", "until_step": 40}, {"name": "b", "dap_size": 2}], r"phases.1 \(b\): parallel: 1 ranks"),
    ],
)
def test_a_bad_phase_is_refused_by_name(tmp_path: Path, phases: list[dict], message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"base": str(TINY), "phases": phases}))
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_checkpoint_of_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "last" / "000002"
    folder.mkdir(parents=True)
    state = {"iteration": 2, "seed": 1, "num_averaged": 2, "phase": 1, "steps_before": 2, "samples_before": 4}
    (folder / "run_state.json").write_text(json.dumps(state))
    config = load_config(TINY, [f"run.run_dir={tmp_path}"]).config
    with pytest.raises(CheckpointError, match=r"000002: was written in phase 1"):
        open_schedule(config, resume=True)
    assert open_schedule(config, resume=False).position == Position()


def test_the_exit_status_of_a_finished_phase_is_its_own() -> None:
    assert EXIT_NEXT_PHASE not in (0, 1, 2, 4, 5)
