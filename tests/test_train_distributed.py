"""Tiny runs on several processes of this machine: data parallel, axial parallel, asynchronous evaluation."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from processes import run_ranks
from runs import tiny_config
from scalefold.config import Config
from scalefold.mlperf.judge.check import check_log
from scalefold.parallel.stop import StopSignal
from scalefold.report.record import read_metrics
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank
from scalefold.run.stops import Stops
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatParameters
from scalefold.telemetry.profile import Window
from scalefold.telemetry.stragglers import read_loads
from scalefold.telemetry.trace import read_anatomies

pytestmark = pytest.mark.distributed
NO_DROPOUT = [
    "model.template.dropout=0.0",
    "model.structure.dropout=0.0",
    *(f"model.{stack}.{kind}_dropout=0.0" for stack in ("extra_msa", "evoformer") for kind in ("msa", "pair")),
]


def ranked(rank: int, config: Config) -> str | None:
    outcome = run_rank(config, RunOptions())
    return outcome.status if outcome else None


def parallel(world_size: int, dap_size: int = 1, num_eval_ranks: int = 0) -> list[str]:
    return [
        f"parallel.ranks_per_node={world_size}",
        f"parallel.dap_size={dap_size}",
        f"parallel.num_eval_ranks={num_eval_ranks}",
    ]


@pytest.fixture(scope="module")
def alone(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with global batch 2 and no dropout (its draws depend on the replica)."""
    run_dir = tmp_path_factory.mktemp("alone")
    run_ranks(ranked, 1, tiny_config(tiny_store, run_dir, *NO_DROPOUT), join=False)
    return run_dir


@pytest.mark.parametrize("world_size, dap_size", [(2, 1), (2, 2), (4, 2)], ids=["dp2", "dap2", "dp2 x dap2"])
def test_parallel_runs_have_the_losses_of_one_process(
    alone: Path, tiny_store: Path, tmp_path: Path, world_size: int, dap_size: int
) -> None:
    config = tiny_config(tiny_store, tmp_path, *NO_DROPOUT, *parallel(world_size, dap_size))
    assert run_ranks(ranked, world_size, config, join=False) == ["aborted"] * world_size
    one, many = read_metrics(alone), read_metrics(tmp_path)
    np.testing.assert_allclose(many.loss, one.loss, rtol=2e-5)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(many.eval_lddt_ca, one.eval_lddt_ca, atol=2e-3)


@pytest.fixture(scope="module")
def alone_on_real_chains(real_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``alone``, on real chains with real alignments and templates."""
    run_dir = tmp_path_factory.mktemp("real")
    run_ranks(ranked, 1, tiny_config(real_store, run_dir, *NO_DROPOUT), join=False)
    return run_dir


@pytest.mark.parametrize(
    "world_size, dap_size, num_eval_ranks",
    [(4, 4, 0), (8, 8, 0), (5, 2, 1)],
    ids=["dap4", "dap8", "dp2 x dap2 + evaluation"],
)
def test_real_chains_give_every_layout_the_losses_of_one_process(
    alone_on_real_chains: Path, real_store: Path, tmp_path: Path, world_size: int, dap_size: int, num_eval_ranks: int
) -> None:
    layout = parallel(world_size, dap_size, num_eval_ranks)
    config = tiny_config(real_store, tmp_path, *NO_DROPOUT, *layout)
    expected = ["aborted"] * (world_size - num_eval_ranks) + [None] * num_eval_ranks
    assert run_ranks(ranked, world_size, config, join=False) == expected
    one, many = read_metrics(alone_on_real_chains), read_metrics(tmp_path)
    np.testing.assert_allclose(many.loss, one.loss, rtol=2e-5)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(many.eval_lddt_ca, one.eval_lddt_ca, atol=2e-3)


def test_asynchronous_evaluation_reports_the_same_values_and_everybody_ends(
    alone: Path, tiny_store: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_store, tmp_path, *NO_DROPOUT, *parallel(3, num_eval_ranks=2))
    assert run_ranks(ranked, 3, config, join=False) == ["aborted", None, None]
    np.testing.assert_allclose(read_metrics(tmp_path).eval_lddt_ca, read_metrics(alone).eval_lddt_ca, atol=2e-3)
    assert read_metrics(tmp_path).eval_step.tolist() == [2, 4]


def test_every_rank_notes_its_cycles_and_those_of_a_group_can_be_profiled(tiny_store: Path, tmp_path: Path) -> None:
    layout = parallel(3, dap_size=2, num_eval_ranks=1)
    config = tiny_config(tiny_store, tmp_path, *layout, "run.profile={steps: 2-3, ranks: [0, 1]}")
    assert run_ranks(ranked, 3, config, join=False) == ["aborted", "aborted", None]
    assert [file.suffix for file in (tmp_path / "telemetry").iterdir()] == [".jsonl"], "one node, one file"
    loads = {load.rank: load for load in read_loads(tmp_path).ranks}
    assert {rank: (load.role, load.steps) for rank, load in loads.items()} == {
        0: ("train", 4),
        1: ("train", 4),
        2: ("evaluate", 0),
    }
    first, second = read_anatomies(tmp_path)
    assert (first.file.name, second.file.name) == ("steps_2-3_rank_0.json", "steps_2-3_rank_1.json")
    for found in (first, second):
        assert found.steps == 2
        assert {"data wait", "forward and backward", "update", "log", "snapshot hand-over"} <= found.host.keys()
        assert found.work["exchange"] > 0


def over_when_collected(rank: int, config: Config) -> list[bool]:
    """Whether the exchange of codes was over when this rank collected what it had recorded; rank 0 is late for it."""
    code, write, signals, found = Stops.code, Window._write, list[StopSignal](), list[bool]()

    def late(self: Stops) -> int:
        time.sleep(0.0 if rank else 0.5)
        signals[:] = [self._signal]
        return code(self)

    def collect(self: Window, profiler: torch.profiler.profile) -> None:
        (signal,) = signals
        assert signal._flight is not None
        found.append(signal._flight[0].is_completed())
        write(self, profiler)

    Stops.code, Window._write = late, collect  # type: ignore[method-assign]
    run_rank(config, RunOptions())
    return found


def test_exchanges_beside_the_loop_are_over_before_a_trace_is_collected(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_store, tmp_path, *parallel(2), "run.profile={steps: 2-3, ranks: [1]}")
    assert run_ranks(over_when_collected, 2, config, join=False) == [[], [True]]


def made(rank: int, config: Config) -> tuple[int, int]:
    """Optimizers and flat parameters that a rank of a run makes."""
    counts = {Optimizer: 0, FlatParameters: 0}
    for kind in counts:

        def counted(self: object, *args, original=kind.__init__, kind=kind, **kwargs) -> None:
            counts[kind] += 1
            original(self, *args, **kwargs)

        kind.__init__ = counted  # type: ignore[method-assign]
    run_rank(config, RunOptions())
    return counts[Optimizer], counts[FlatParameters]


def test_only_training_ranks_hold_an_optimizer(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_store, tmp_path, *parallel(2, num_eval_ranks=1))
    assert run_ranks(made, 2, config, join=False) == [(1, 1), (0, 0)]


def test_the_stop_decision_of_the_evaluation_root_ends_the_run_with_one_run_stop(
    tiny_store: Path, tmp_path: Path
) -> None:
    overrides = [
        *parallel(2, num_eval_ranks=1),
        "training.target_avg_lddt_ca_value=0.001",
        "training.num_train_iters=400",
        "training.global_batch_size=1",
    ]
    config = tiny_config(tiny_store, tmp_path, *overrides)
    assert run_ranks(ranked, 2, config, join=False) == ["success", None]
    lines = (tmp_path / "result_0.txt").read_text().splitlines()
    events = [json.loads(line.split("MLLOG ")[1]) for line in lines if "MLLOG" in line]
    stops = [event for event in events if event["key"] == "run_stop"]
    assert [stop["metadata"]["status"] for stop in stops] == ["success"]
    assert [event["time_ms"] for event in events] == sorted(event["time_ms"] for event in events)
    assert check_log(tmp_path / "result_0.txt").exit_code == 3, check_log(tmp_path / "result_0.txt").text()
    assert max(read_metrics(tmp_path).step) < 400


def watched(rank: int, config: Config, store: str) -> list[str]:
    """Run, and list what was opened below ``store`` before the rank's clock started."""
    early: list[str] = []
    started = {"clock": False}

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and not started["clock"] and str(arguments[0]).startswith(store):
            early.append(str(arguments[0]))

    sys.addaudithook(hook)
    from scalefold.mlperf.log.events import Events

    original = Events.run_start

    def run_start(self: Events) -> None:
        original(self)
        started["clock"] = True

    Events.run_start = run_start  # type: ignore[method-assign]
    run_rank(config, RunOptions())
    assert started["clock"]
    os.stat(store)
    return early


def test_no_rank_opens_the_data_set_before_the_clock_starts(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_store, tmp_path, *parallel(3, num_eval_ranks=1))
    assert run_ranks(watched, 3, config, str(tiny_store), join=False) == [[], [], []]
