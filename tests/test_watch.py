"""Killed, sleeping, failing and missing ranks: everybody ends in time, and the message names the culprit."""

import multiprocessing as mp
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from processes import free_port
from runs import tiny_config
from scalefold.config import Config
from scalefold.errors import DataError, RankLostError, ScaleFoldError
from scalefold.eval import score as evaluation
from scalefold.parallel import ranks as meeting
from scalefold.parallel import watch
from scalefold.parallel.ranks import start
from scalefold.parallel.watch import Sign, Watch, blame
from scalefold.report.record import read_metrics
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank

STEP_TIMEOUT_S = 8  # several times what a step takes on a busy machine


@dataclass(frozen=True)
class End:
    """How one rank ended: exit status (negative: signal), its error stream, and when, in seconds after the start."""

    status: int | None
    text: str
    seconds: float


def run_apart(
    function: Callable[[int], None], world_size: int, folder: Path, timeout_s: float = 300, never: int = 0
) -> list[End]:
    """Run ``function(rank)`` as the command line would: errors are printed and become the exit status.

    ``never``: so many ranks do not end by themselves; they are killed when all others have ended.
    """
    context, port, begin = mp.get_context("fork"), free_port(), time.monotonic()
    processes = [
        context.Process(target=_child, args=(function, r, world_size, port, folder)) for r in range(world_size)
    ]
    for process in processes:
        process.start()
    seconds: dict[int, float] = {}
    while len(seconds) < world_size - never and time.monotonic() - begin < timeout_s:
        seconds |= {
            r: time.monotonic() - begin for r, p in enumerate(processes) if r not in seconds and not p.is_alive()
        }
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    texts = [(folder / f"stderr_{rank}.txt").read_text() for rank in range(world_size)]
    return [
        End(p.exitcode, t, seconds.get(r, timeout_s)) for r, (p, t) in enumerate(zip(processes, texts, strict=True))
    ]


def _child(function: Callable[[int], None], rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.stderr = (folder / f"stderr_{rank}.txt").open("w", buffering=1)
    torch.set_num_threads(1)
    try:
        function(rank)
    except ScaleFoldError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_status)
    os._exit(0)


def two_ranks(store: Path, run_dir: Path, *overrides: str) -> Config:
    timeouts = [f"parallel.step_timeout_s={STEP_TIMEOUT_S}", "parallel.startup_timeout_s=60"]
    return tiny_config(store, run_dir, "parallel.ranks_per_node=2", *timeouts, *overrides)


def disturbed(config: Config, victim: int, step: int, disturb: Callable[[], None]) -> Callable[[int], None]:
    """A run in which rank ``victim`` does something bad when it should fetch the batch of ``step``."""

    def function(rank: int) -> None:
        from scalefold.data.loading.loader import TrainLoader

        original = TrainLoader.next

        def fetch(self: TrainLoader, iteration: int, *wanted: Any):
            if rank == victim and iteration == step:
                disturb()
            return original(self, iteration, *wanted)

        TrainLoader.next = fetch  # type: ignore[method-assign]
        run_rank(config, RunOptions())

    return function


def killed_after_a_sign() -> None:
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_with_its_step_and_the_others_end(tiny_store: Path, tmp_path: Path, victim: int) -> None:
    config = two_ranks(tiny_store, tmp_path / "run")
    ends = run_apart(disturbed(config, victim, 3, killed_after_a_sign), 2, tmp_path)
    other = ends[1 - victim]
    assert ends[victim].status == -signal.SIGKILL
    assert other.status == RankLostError.exit_status
    assert other.seconds - ends[victim].seconds < 2 * STEP_TIMEOUT_S
    if victim == 1:
        assert "rank 0 on " in other.text
        assert "Gave no more sign of life, last seen: rank 1 on " in other.text
        assert "at step 3, waiting for a batch" in other.text
        assert '"aborted"' in (tmp_path / "run" / "result_0.txt").read_text()
    else:
        assert "rank 0 has ended" in other.text
    assert "--resume" in other.text
    assert len(other.text.splitlines()) == 1, other.text


@pytest.mark.distributed
def test_a_rank_that_stands_still_is_named_and_everybody_ends_within_the_timeout(
    tiny_store: Path, tmp_path: Path
) -> None:
    config = two_ranks(tiny_store, tmp_path / "run")
    ends = run_apart(disturbed(config, 1, 3, lambda: time.sleep(80)), 2, tmp_path)
    assert [end.status for end in ends] == [RankLostError.exit_status] * 2
    assert abs(ends[0].seconds - ends[1].seconds) < STEP_TIMEOUT_S
    for end in ends:
        assert f"no progress within {STEP_TIMEOUT_S} s" in end.text
        assert "the others wait for: rank 1 on " in end.text
        assert "at step 3, waiting for a batch" in end.text
        assert "parallel.step_timeout_s" in end.text


@pytest.mark.distributed
def test_a_rank_that_fails_tells_the_others_why(tiny_store: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise DataError("chain 1abc_A is broken")

    config = two_ranks(tiny_store, tmp_path / "run")
    ends = run_apart(disturbed(config, 1, 2, fail), 2, tmp_path)
    assert (ends[0].status, ends[1].status) == (RankLostError.exit_status, 2)
    assert "error: chain 1abc_A is broken" in ends[1].text
    assert "rank 1 on " in ends[0].text
    assert "at step 2, waiting for a batch" in ends[0].text
    assert "failed: DataError: chain 1abc_A is broken" in ends[0].text


@pytest.mark.distributed
def test_a_silent_evaluation_rank_ends_the_run(tiny_store: Path, tmp_path: Path) -> None:
    config = two_ranks(tiny_store, tmp_path / "run", "parallel.num_eval_ranks=1", "training.num_train_iters=4000")

    def function(rank: int) -> None:
        from scalefold.eval.score import ChainScorer

        def score(self: ChainScorer, flat: object, weights: object):
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGSTOP)

        ChainScorer.score = score  # type: ignore[method-assign,assignment]
        run_rank(config, RunOptions())

    ends = run_apart(function, 2, tmp_path, never=1)
    assert ends[0].status == RankLostError.exit_status
    assert "Gave no more sign of life, last seen: rank 1 on " in ends[0].text
    assert "at step 2, evaluation" in ends[0].text


@pytest.mark.distributed
def test_a_collective_that_hangs_is_named(tiny_store: Path, tmp_path: Path) -> None:
    config = two_ranks(tiny_store, tmp_path / "run")

    def function(rank: int) -> None:
        os.environ["TORCH_FR_BUFFER_SIZE"] = "50"
        ranks = start(config)
        with ranks.watch:
            for step in range(1, 4):
                ranks.watch.at("training step", step)
                if (rank, step) == (1, 3):
                    time.sleep(60)
                dist.all_reduce(torch.ones(3), group=ranks.train_group)

    ends = run_apart(function, 2, tmp_path)
    assert [end.status for end in ends] == [RankLostError.exit_status] * 2
    verdict = ends[0].text
    assert ends[1].text == verdict
    assert "rank 1 on " in verdict
    if verdict.startswith("error: rank 0"):
        assert "in all_reduce" in verdict


@pytest.mark.distributed
def test_the_groups_of_the_loop_get_the_short_timeout_after_the_first_step(tiny_store: Path, tmp_path: Path) -> None:
    config = two_ranks(tiny_store, tmp_path / "run")

    def function(rank: int) -> None:
        ranks = start(config)
        assert ranks.watch.limit_s == 60
        ranks.watch.at("training step", 1)
        assert ranks.watch.limit_s == 60
        ranks.watch.at("waiting for a batch", 2)
        assert ranks.watch.limit_s == STEP_TIMEOUT_S
        assert ranks.train_group is not None
        backend = ranks.train_group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() < 60
        ranks.watch.at("evaluation", 2)
        assert ranks.watch.limit_s == 60
        assert backend.options._timeout.total_seconds() > 60
        ranks.watch.at("training step", 3)
        assert backend.options._timeout.total_seconds() < 60
        ranks.stop()

    ends = run_apart(function, 2, tmp_path)
    assert [(end.status, end.text) for end in ends] == [(0, "")] * 2


@pytest.mark.distributed
@pytest.mark.parametrize("apart", [True, False], ids=["on ranks of its own", "on the training ranks"])
def test_ranks_wait_for_an_evaluation_that_takes_longer_than_a_step_may(
    apart: bool, tiny_store: Path, tmp_path: Path
) -> None:
    layout = ("parallel.ranks_per_node=3", "parallel.num_eval_ranks=1") if apart else ()
    config = two_ranks(tiny_store, tmp_path / "run", *layout, "training.num_train_iters=3")
    slow = 2 if apart else 1

    def function(rank: int) -> None:
        score = evaluation.score_chains

        def score_slowly(*args: Any) -> dict[str, float]:
            if rank == slow:
                time.sleep(STEP_TIMEOUT_S + 2)
            return score(*args)

        watch.GRACE_S, evaluation.score_chains = 0.5, score_slowly  # type: ignore[assignment]
        run_rank(config, RunOptions())

    ends = run_apart(function, 3 if apart else 2, tmp_path)
    assert [(end.status, end.text) for end in ends] == [(0, "")] * len(ends)
    assert read_metrics(tmp_path / "run").step[-1] == 3, "training went on"
    assert len(read_metrics(tmp_path / "run").eval_lddt_ca) == 1


@pytest.mark.distributed
def test_ranks_that_never_come_are_named(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_store, tmp_path, "parallel.ranks_per_node=2", "parallel.startup_timeout_s=3", "parallel.step_timeout_s=3"
    )

    def function(rank: int) -> None:
        if rank == 0:
            start(config)

    ends = run_apart(function, 2, tmp_path)
    assert ends[0].status == RankLostError.exit_status
    assert ends[0].seconds < 60
    assert "1 of 2 ranks did not come to 127.0.0.1:" in ends[0].text
    assert "ranks 1; look at their first lines" in ends[0].text


def sign(rank: int, step: int, call: str | None = None, activity: str = "training step") -> Sign:
    return Sign(rank, f"node{rank}", 100 + rank, 7, step, activity, 12.0, call)


def test_the_rank_outside_the_collective_is_to_blame() -> None:
    text = blame([sign(0, 5, "all_reduce at ddp.py:1"), sign(1, 5), sign(2, 5, "all_reduce at ddp.py:1")], [])
    assert "wait for: rank 1 on node1 (pid 101) at step 5, training step for 12 s." in text
    assert "rank 0" not in text


def test_the_rank_that_is_steps_behind_is_to_blame_when_all_are_in_collectives() -> None:
    text = blame([sign(0, 5, "all_reduce"), sign(1, 4, "all_to_all"), sign(2, 5, "all_reduce")], [])
    assert "wait for: rank 1 on node1 (pid 101) at step 4, training step for 12 s, in all_to_all." in text


def test_silent_ranks_come_before_all_others_and_long_lists_are_cut() -> None:
    silent = [sign(rank, 5) for rank in range(1, 13)]
    text = blame([sign(0, 5, "all_reduce"), *silent], silent)
    assert text.count("node") - text.count("nodes") == 8
    assert "and 4 more" in text


def test_the_network_is_suspected_when_nobody_stands_out() -> None:
    assert "suspect the network" in blame([sign(0, 5, "all_reduce"), sign(1, 5, "all_reduce")], [])


def test_waiting_for_weights_has_no_limit_and_is_nobodys_fault() -> None:
    watch = Watch(startup_timeout_s=10, step_timeout_s=2)
    watch.at("waiting for weights")
    assert watch.limit_s is None
    idle = sign(3, 2, activity="waiting for weights")
    assert "rank 3" not in blame([sign(0, 5, "all_reduce"), sign(1, 5), idle], [])


def test_a_single_process_keeps_its_errors() -> None:
    error = DataError("as it was")
    assert Watch().explain(error) is error


def test_only_the_first_thread_of_a_process_tells_why_it_ends() -> None:
    watch = Watch()
    assert watch._speaks()
    other = threading.Thread(target=watch._exit, args=("told already",))  # would end this process
    other.start()
    other.join()
    assert watch._speaks()


def frozen() -> None:
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.distributed
def test_a_frozen_rank_0_with_its_store_is_named_and_the_others_end(tiny_store: Path, tmp_path: Path) -> None:
    config = two_ranks(tiny_store, tmp_path / "run")
    ends = run_apart(disturbed(config, 0, 3, frozen), 2, tmp_path, never=1)
    assert ends[1].status == RankLostError.exit_status
    assert "key-value store has not answered for" in ends[1].text
    assert "rank 0 on " in ends[1].text
    assert "which holds it, stands still or its node is gone" in ends[1].text
    assert len(ends[1].text.splitlines()) == 1, ends[1].text


@pytest.mark.distributed
def test_a_rank_0_that_freezes_before_the_ranks_have_met_is_not_waited_for(tiny_store: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_store, tmp_path, "parallel.ranks_per_node=2", "parallel.startup_timeout_s=3", "parallel.step_timeout_s=3"
    )

    def function(rank: int) -> None:
        meeting.GRACE_S = 2.0  # type: ignore[assignment]
        if rank == 0:  # a listener that never answers
            with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
                time.sleep(60)
        start(config)

    ends = run_apart(function, 2, tmp_path, never=1)
    assert ends[1].status == RankLostError.exit_status
    assert "rank 1 of 2" in ends[1].text
    assert "rank 0 at 127.0.0.1:" in ends[1].text
