"""One rank's share of a step without its peers: it launches, moves and repeats what a rank of a real group does."""

import argparse
import csv
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from processes import run_ranks
from scalefold.config import load_config
from scalefold.kernels import triton_ops
from scalefold.parallel.dap import collectives, direct

EXCHANGES = ("all_to_all", "all_gather", "reduce_scatter", "begin_all_to_all", "end_all_to_all")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_ops.INTERPRETED), reason="needs a GPU or Triton's interpreter"
)


@pytest.fixture
def script(repository, monkeypatch):
    """Imports a script of ``benchmarks/measure`` by name."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    return __import__


class Recorder:
    """What collectives are called with and what they return, in order; sums over ranks as well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple] = []
        for name in EXCHANGES:
            monkeypatch.setattr(collectives, name, self.recorded(name, getattr(collectives, name)))
        monkeypatch.setattr(dist, "all_reduce", self.recorded("all_reduce", dist.all_reduce))

    def recorded(self, name: str, call: Any) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            self.calls.append((name, *map(described, args), described(result)))
            return result

        return record


def described(value: Any) -> Any:
    """Shapes and types in place of tensors; process groups and work under way are left out."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, tuple | list):
        return tuple(map(described, value))
    if isinstance(value, collectives.Flight):
        return described([value.received, value.sent])
    return value if isinstance(value, int) else None


def real_calls(rank: int, size: int) -> list[tuple]:
    """Exchanges of a step with two passes of a rank of a gloo group."""
    import multi_gpu

    with pytest.MonkeyPatch.context() as monkeypatch:
        step, batch, _ = multi_gpu.build(multi_gpu.Host(rank, size, torch.device("cpu"), None, None), size, size, [])
        recorder = Recorder(monkeypatch)
        step(batch, 2, 1)
    return recorder.calls


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_share_exchanges_what_a_rank_of_a_real_group_does_forward_and_backward(script, monkeypatch, size):
    with script("dap_share").share_of(size, True, []) as share:
        recorder = Recorder(monkeypatch)
        share.call(2)()
    monkeypatch.undo()
    kinds = Counter(call[0] for call in recorder.calls)
    assert all(kinds[name] for name in EXCHANGES)
    for calls in run_ranks(real_calls, size, size):
        assert calls == recorder.calls


@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=needs_kernels)])
def test_absent_peers_hold_what_this_rank_holds_and_are_gone_afterwards(script, monkeypatch, by_kernel):
    module = script("absent_peers")
    monkeypatch.setattr(module, "by_kernel", lambda out, count: by_kernel and count % 8 == 0)
    with module.ranks_alone(4, DEVICE) as ranks:
        group = collectives.Group(ranks.dap_group)
        assert (group.size, group.rank) == (4, 0)
        x = torch.randn(1, 8, 12, 16, device=DEVICE)
        (moved,) = collectives.all_to_all([x], 1, 2, group)
        assert torch.equal(moved, torch.cat([x[:, :2]] * 4, 2))
        assert torch.equal(collectives.all_gather(x, 2, group), torch.cat([x] * 4, 2))
        assert torch.equal(collectives.reduce_scatter(x, 2, group), 4 * x[:, :, :3])
        flight = collectives.begin_all_to_all(x, 1, 2, group)
        assert torch.equal(collectives.end_all_to_all(flight, 2), moved)
        odd = torch.arange(3.0, device=DEVICE)
        dist.all_reduce(odd, group=ranks.train_group)
        assert odd.tolist() == [0.0, 4.0, 8.0]
    assert not dist.is_initialized()


@needs_kernels
@pytest.mark.parametrize("size", [2, 8])
def test_exchanges_over_mapped_memory_alone_are_the_packages_own(script, size):
    own = script("absent_peers").direct_alone(size, DEVICE)
    x = torch.randn(2 * size, 8, device=DEVICE).bfloat16()
    for call, expected in script("dap_share").exchange_calls(own, x).values():
        assert torch.equal(call(), expected)


@needs_kernels
def test_an_exchange_begun_before_another_is_measured_with_one_barrier_for_both(script):
    own = script("absent_peers").direct_alone(2, DEVICE)
    x, before = torch.randn(16, 8, device=DEVICE).bfloat16(), own._met
    assert torch.equal(script("symmetric_exchange").early_all_to_all(own, x), x)
    assert own._met - before == 1


@needs_kernels
@pytest.mark.parametrize("size", [2, 8])
def test_exchanges_too_large_to_arrive_go_by_stages_alone_as_well(script, monkeypatch, size):
    monkeypatch.setattr(script("absent_peers"), "PASSING_BYTES", size * 2**16)  # as at full size: P times less per rank
    own = script("absent_peers").direct_alone(size, DEVICE)
    for rows, stages in ((size, 0), (64, 1)):
        x, turn = torch.randn(8 * rows, 8, device=DEVICE).bfloat16(), own._turn
        call, expected = script("dap_share").exchange_calls(own, x)["all_to_all"]
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)
        assert (own._turn - turn) % 2 == stages, "the smaller one arrives, the larger one is staged"


@pytest.mark.long
def test_what_the_benchmarks_model_keeps_for_its_backward_has_room_at_dap_8(script, repository, monkeypatch):
    """Gathered operands are as large at every size, so a share keeps more than an eighth of what one GPU would."""
    kept: dict[int, int] = {}

    def recorded(exchange, blocks):
        def call(x, *args):
            result = exchange(x, *args)
            parts = getattr(result, "received", result)
            if collectives.Lasts.STEP in args:
                kept[blocks] += sum(part.nbytes for part in ([parts] if isinstance(parts, Tensor) else parts))
            return result

        return call

    for blocks in (1, 2):
        config = load_config(repository / "configs" / "base.yaml", [f"model.evoformer.num_blocks={blocks}"]).config
        kept[blocks] = 0
        with monkeypatch.context() as patch:
            for name in ("all_to_all", "all_gather", "begin_all_to_all"):
                patch.setattr(collectives, name, recorded(getattr(collectives, name), blocks))
            script("exchange_counts").count(config, 8)
    whole = load_config(repository / "configs" / "base.yaml", []).config.model.evoformer.num_blocks
    assert whole == 48
    assert 0 < kept[1] + (whole - 1) * (kept[2] - kept[1]) <= direct.KEPT_BYTES // 8


def test_parts_are_marked_in_the_order_of_the_step(script):
    with script("dap_share").share_of(2, True, []) as share:
        share.call(2)()
        assert share.marks.seen == []
        share.marks.on = True
        share.call(2)()
    seen = [part for n, part in enumerate(share.marks.seen) if not n or part != share.marks.seen[n - 1]]
    embed = ["embedders", "stacks"] * 3 + ["embedders", "structure"]
    forward = [*embed, *embed, "embedders", "heads", "losses"]
    assert seen[: len(forward)] == forward
    order = seen[len(forward) :]
    assert order[:4] == ["heads", "structure", "embedders", "stacks"]
    assert order[-3:] == ["embedders", "optimizer", "embedders"]
    assert order.count("stacks") == 3
    assert "collecting" not in seen  # of a group's gradients: aside, where a mark would come late


@pytest.mark.parametrize("passes", [1, 2])
def test_marks_change_no_value_and_no_gradient(script, passes):
    found = []
    for marked in (False, True):
        with script("dap_share").share_of(2, True, []) as share:
            share.marks.on = marked
            torch.manual_seed(3)
            values = share.call(passes)()
            found.append([values, *(g.clone() for g in share.step.optimizer.flat.gradients.values())])
    assert all(map(torch.equal, *found))


def test_kernels_belong_to_the_part_whose_mark_came_last(script):
    regions, spans = script("regions"), script("spans")
    names = [
        "early",
        mark(regions, "embedders"),
        "a",
        mark(regions, "stacks"),
        "b",
        "_copy_parts",
        mark(regions, "heads"),
    ]
    timeline = [spans.Span(name, 10.0 * n, 10.0 * n + 5) for n, name in enumerate([*names, "a"])]
    found = regions.by_part(timeline[::-1])
    assert {part: [span.name for span in own] for part, own in found.items()} == {
        "embedders": ["a"],
        "stacks": ["b"],
        "heads": ["a"],
    }
    row = script("dap_share").profile_row(timeline, wall_ms=1.0)
    assert (row["kernels"], row["exchanges"], row["repeated_kernels"]) == (4, 1, 2)
    assert (row["stacks_ms"], row["repeated_ms"], row["computing_ms"]) == (0.01, 0.01, 0.02)


def mark(regions: Any, part: str) -> str:
    """Name of the kernel that begins a part."""
    return f"_mark_of_part_{regions.PARTS.index(part)}"


def test_a_share_is_compared_with_two_gpus_at_the_same_number_of_passes(script):
    real = {"gpus": "2", "dap": "2", "gaps_ms": "6", "kernels": "10624", "commit": "a"}
    older = real | {"passes": "1", "computing_ms": "500"}
    breakdowns = [older, *(real | {"passes": f"{r}", "computing_ms": f"{94 * r}"} for r in (1, 2))]
    share = {"dap": 2, "gaps_ms": 5, "kernels": 10624, "commit": "b"}
    shares = [share | {"passes": 1, "computing_ms": 98}, share | {"passes": 2, "computing_ms": 150}]
    rows = script("spans").against_two_gpus([*shares, shares[0] | {"dap": 4}], breakdowns)
    assert [(row["passes"], row["alone_ms"], row["two_gpus_ms"], row["within"]) for row in rows] == [
        (1, 103, 100.0, "yes"),
        (2, 155, 194.0, "NO"),
    ]


def test_what_would_end_late_is_left_out_and_named(script, monkeypatch, capsys):
    module, now = script("dap_share"), [0.0]

    def measure(size: int, *_: Any) -> list[dict[str, Any]] | None:
        now[0] += 100.0
        return [] if size != 4 else None

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    options = argparse.Namespace(small=True, csv=None, set=[], minutes=5.5, dap_share=[2, 4, 8, 16])
    assert module.run(options) == 1, "DAP 4 is not what it must be"
    out = capsys.readouterr().out
    assert "DAP 8: 100 s, 300 s in all" in out
    assert "DAP 16: LEFT OUT" in out


@pytest.mark.long
def test_the_script_runs_on_the_cpu(repository, tmp_path):
    command = [sys.executable, "benchmarks/measure/step_time.py", "--dap-share", "2", "--small", "--repeats", "1"]
    options = ["--passes", "1", "--csv", str(tmp_path / "share.csv")]
    done = subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "share.csv").open())
    assert (row["dap"], row["passes"]) == ("2", "1")
    assert float(row["median_ms"]) > 0
