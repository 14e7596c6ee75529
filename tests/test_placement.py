"""Where ranks sit, against where the configuration puts them; and who may talk to a run's store."""

import os
import socket
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from processes import free_port, run_ranks
from scalefold.config import Config, ParallelConfig, RankLayout, TrainingConfig
from scalefold.eval.snapshots import run_store
from scalefold.launch.placement import Seat, describe, problems, ranks_by_node
from scalefold.parallel.ranks import start

LAYOUT = RankLayout(8, dap_size=2, num_eval_ranks=2)


def seats(nodes: str) -> list[Seat]:
    """One seat per letter, the letter its node."""
    return [Seat(rank, node) for rank, node in enumerate(nodes)]


def test_blocks_of_ranks_are_in_order_and_the_line_says_who_is_where() -> None:
    placed = seats("aabbccdd")
    assert problems(placed, LAYOUT, 2) == []
    assert describe(placed, LAYOUT) == (
        "placement: 8 ranks on 4 nodes: a: 0-1, b: 2-3, c: 4-5, d: 6-7; DAP-2 groups inside nodes; 6-7 evaluate on d"
    )


def test_many_nodes_are_one_line() -> None:
    layout = RankLayout(2080, dap_size=8, num_eval_ranks=32)
    placed = [Seat(rank, f"node{rank // 8:03d}", nic=f"mlx5_{rank % 8}") for rank in range(2080)]
    assert problems(placed, layout, 8) == []
    text = describe(placed, layout)
    assert len(text) < 250
    assert text.startswith("placement: 2080 ranks on 260 nodes: node000: 0-7, node001: 8-15, ..., node259: 2072-2079;")
    assert "2048-2079 evaluate on node256 to node259; network cards mlx5_0, " in text


def test_a_cyclic_order_tears_dap_groups_apart_and_is_refused() -> None:
    found = problems(seats("abcdabcd"), LAYOUT, 2)
    assert found[0].startswith("the DAP group of ranks 0 (a), 1 (b) spans nodes")
    assert "--distribution=block" in found[0]


def test_evaluation_ranks_must_be_where_the_plan_puts_them() -> None:
    found = problems(seats("abab"), RankLayout(4, dap_size=1, num_eval_ranks=2), 2)
    assert "ranks 2 (a), 3 (b), evaluation among them, belong on one node" in found[-1]


def test_two_nodes_played_by_one_host_are_no_mistake() -> None:
    assert problems(seats("aaaaaaaa"), LAYOUT, 4) == []


def test_two_ranks_with_one_gpu_are_refused() -> None:
    placed = [replace(seat, gpu=gpu) for seat, gpu in zip(seats("aabb"), ("g0", "g1", "g2", "g2"), strict=True)]
    (found,) = problems(placed, RankLayout(4), 2)
    assert found.startswith("ranks 2 (b), 3 (b) have the same GPU g2")


def test_ranks_of_a_node_are_named_in_spans() -> None:
    assert ranks_by_node(seats("aababa")) == {"a": "0-1,3,5", "b": "2,4"}


def join_and_talk(token: str, foreign_key: str) -> list[tuple[bool, bool]]:
    """Two ranks meet and a stranger writes a key: did the run hear it, was its port open on another interface?"""
    port = free_port()

    def join(rank: int) -> tuple[bool, bool]:
        os.environ |= {"SCALEFOLD_TOKEN": token, "MASTER_PORT": str(port)}
        parallel = ParallelConfig(gpus_per_node=0, ranks_per_node=2)
        ranks = start(Config(system="x", parallel=parallel, training=TrainingConfig(global_batch_size=2)))
        if rank == 1:
            TCPStore("127.0.0.1", port, None, False, wait_for_workers=False).set(foreign_key, "1")
        ranks.barrier()
        heard = run_store().check(["target_reached"])
        with socket.socket() as probe:
            is_open = probe.connect_ex(("127.0.0.2", port)) == 0
        ranks.barrier()
        ranks.stop()
        return heard, is_open

    return run_ranks(join, 2, join=False)


@pytest.mark.distributed
def test_a_stray_key_does_not_reach_a_run_that_has_a_token_and_its_port_is_closed_on_other_interfaces() -> None:
    key = "attempt_0/groups/0//scalefold/target_reached"
    assert join_and_talk("", key) == [(True, False)] * 2, (
        "the key that a run without a token hears has another name now"
    )
    assert join_and_talk("5ec2e7", key) == [(False, False)] * 2
