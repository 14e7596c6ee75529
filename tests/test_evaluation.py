"""The benchmark's own score: every chain once in the mean, every rank's share, and hands that pass weights on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from processes import run_ranks
from runs import tiny_config
from scalefold.errors import TrainingError
from scalefold.eval import snapshots
from scalefold.eval.score import Evaluation, gather_scores, score_chains
from scalefold.eval.snapshots import SnapshotReceiver, SnapshotSender
from scalefold.parallel.ending import Ending
from scalefold.parallel.ranks import start
from scalefold.phases import Schedule
from scalefold.run import assemble as assembly
from scalefold.run.resume import RunOptions

SCORES = {"1abc_A": 0.5, "2xyz_B": 0.75, "3def_C": 0.25, "4ghi_D": 0.9}


def test_the_score_is_the_plain_mean_over_all_chains() -> None:
    assert Evaluation(SCORES, 1.0).lddt_ca == pytest.approx(0.6, abs=1e-12)
    assert Evaluation({"only": 0.3}, 1.0).lddt_ca == 0.3


def test_every_chain_is_scored_under_its_own_name_in_order() -> None:
    chains = [(name, {"score": torch.tensor([score])}) for name, score in SCORES.items()]
    found = score_chains(lambda batch: batch["score"], chains)
    assert list(found) == list(SCORES)
    assert found == pytest.approx(SCORES, abs=1e-7)
    assert score_chains(lambda batch: batch["score"], []) == {}


def test_memory_that_runs_out_names_the_chain() -> None:
    def predict(batch: dict[str, Tensor]) -> Tensor:
        if batch["number"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    with pytest.raises(torch.OutOfMemoryError, match="chain c2: CUDA out of memory"):
        score_chains(predict, [(f"c{n}", {"number": torch.tensor(n)}) for n in range(4)])


def test_scores_of_all_ranks_are_gathered_on_each_in_the_expected_order() -> None:
    names = list(SCORES)

    def gather(rank: int) -> dict[str, float]:
        local = {name: SCORES[name] for name in names[rank::2]}
        return gather_scores(local, names, dist.group.WORLD)

    for found in run_ranks(gather, 2):
        assert list(found) == names
        assert found == SCORES


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({"a": 0.5}, r"1 scores for 2 chains \(first problem: b\)"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, r"3 scores for 2 chains \(first problem: c\)"),
        ({"a": 0.5, "b": float("nan")}, "chain b has lDDT-Cα nan"),
        ({"a": 1.5, "b": 0.5}, r"chain a has lDDT-Cα 1\.5"),
        ({"a": -0.1, "b": 0.5}, r"chain a has lDDT-Cα -0\.1"),
    ],
    ids=["missing", "foreign", "nan", "above one", "below zero"],
)
def test_a_score_that_is_missing_foreign_or_impossible_is_refused(local: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        gather_scores(local, ["a", "b"], None)


def test_a_chain_that_two_ranks_scored_is_refused() -> None:
    def gather(rank: int) -> str:
        try:
            gather_scores({"a": 0.5}, ["a"], dist.group.WORLD)
        except TrainingError as error:
            return str(error)
        return ""

    assert all("2 scores for 1 chains" in text for text in run_ranks(gather, 2))


class Store(dict):
    """A key-value store of one process."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> str:  # type: ignore[override]
        return self[key]


class Hands:
    """Both ends of a hand-over in one process: a receiver that takes a snapshot when ``take`` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.store, self.sent, self.notes = Store(), [], []
        monkeypatch.setattr(snapshots.dist, "isend", self._send)
        note = lambda name, **facts: self.notes.append((name, facts))  # noqa: E731
        self.sender = SnapshotSender(self.store, None, 1, note=note, **options)  # type: ignore[arg-type]
        self.taken = 0

    def _send(self, weights: Tensor, target: int, group: object) -> SimpleNamespace:
        self.sent.append(float(weights))
        return SimpleNamespace(is_completed=lambda: False)

    def take(self) -> None:
        """The evaluation root asks for a snapshot, and has it as soon as it is sent."""
        self.store.set(f"ready_{self.taken}", "1")
        self.sender.poll()
        if len(self.sent) > self.taken:
            self.store.set(f"received_{self.taken}", "1")
            report = {"step": int(self.store[f"snapshot_{self.taken}"]), "chains": {}, "seconds": 1.0}
            self.store.set(f"evaluated_{self.taken}", json.dumps(report))
            self.taken += 1

    def steps(self) -> list[int]:
        return [report["step"] for report in self.sender.results()]


def test_a_snapshot_holds_the_weights_as_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    hands, weights = Hands(monkeypatch), torch.tensor(1.0)
    hands.sender.submit(40, weights)
    weights.fill_(2.0)
    hands.take()
    assert hands.sent == [1.0]
    assert hands.steps() == [40]
    assert hands.steps() == []


def test_skip_drops_the_oldest_waiting_snapshot_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch, depth=2, when_behind="skip")
    for step in (1, 2, 3, 4):
        hands.sender.submit(step, torch.tensor(float(step)))
    hands.take()
    hands.take()
    assert hands.sent == [3.0, 4.0]
    assert hands.steps() == [3, 4]
    skipped = [("evaluation_skipped", {"step": s, "because_of_step": s + 2}) for s in (1, 2)]
    assert hands.notes == skipped


def test_wait_keeps_every_snapshot_and_says_how_long_training_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch, depth=1)
    monkeypatch.setattr(snapshots.time, "sleep", lambda seconds: hands.take())
    for step in (1, 2, 3):
        hands.sender.submit(step, torch.tensor(float(step)))
    hands.take()
    assert hands.sent == [1.0, 2.0, 3.0]
    assert [(name, facts["step"]) for name, facts in hands.notes] == [
        ("training_waited_for_evaluation", 2),
        ("training_waited_for_evaluation", 3),
    ]


def test_nothing_is_sent_while_another_snapshot_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch, depth=2)
    for step in (1, 2):
        hands.sender.submit(step, torch.tensor(float(step)))
    hands.store.set("ready_0", "1")
    hands.store.set("ready_1", "1")
    hands.sender.poll()
    hands.sender.poll()
    assert hands.sent == [1.0]
    hands.store.set("received_0", "1")
    hands.sender.poll()
    assert hands.sent == [1.0, 2.0]


def test_the_end_waits_for_every_evaluation_and_then_tells_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch, depth=3)
    for step in (1, 2):
        hands.sender.submit(step, torch.tensor(float(step)))
    monkeypatch.setattr(snapshots.time, "sleep", lambda seconds: hands.take())
    hands.sender.drain(60.0)
    assert hands.sent == [1.0, 2.0]
    assert hands.store["finished"] == "1"


def test_an_evaluation_that_never_ends_is_an_error_that_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    hands.sender.submit(1, torch.tensor(1.0))
    with pytest.raises(TrainingError, match=r"rank 1 \(evaluation\) did not finish within 0 s"):
        hands.sender.drain(0.0)
    assert "finished" not in hands.store


def test_the_receiver_shares_what_it_got_and_reports_once() -> None:
    def play(rank: int) -> list[Any]:
        store, world = snapshots.run_store(), dist.group.WORLD
        if rank == 0:
            sender = SnapshotSender(store, world, 1)  # type: ignore[arg-type]
            for step in (1, 2):
                sender.submit(step, torch.full((3,), float(step)))
            sender.drain(60.0)
            return [report["step"] for report in sender.results()] + [sender.target_reached()]
        receiver = SnapshotReceiver(store, world, eval_group, 0, 1)
        seen, buffer = [], torch.zeros(3)
        while (step := receiver.next(buffer)) is not None:
            seen.append((step, buffer.tolist()))
            receiver.done({"step": step, "chains": {}, "seconds": 0.0}, reached_target=False)
        return seen

    eval_group: Any = None

    def with_group(rank: int) -> list[Any]:
        nonlocal eval_group
        eval_group = dist.new_group([1])
        return play(rank)

    trained, evaluated = run_ranks(with_group, 2)
    assert trained == [1, 2, False]
    assert evaluated == [(1, [1.0] * 3), (2, [2.0] * 3)]


def test_a_run_lets_go_of_its_evaluator(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    evaluator = SimpleNamespace(
        close=lambda: closed.append("workers"), release_device=lambda: closed.append("captured evaluations")
    )
    monkeypatch.setattr(assembly, "make_evaluator", lambda *parts: evaluator)
    schedule = Schedule(tiny_config(tiny_store, tmp_path / "run"))
    with Ending() as ending:
        run = assembly.assemble(schedule, RunOptions(), start(schedule.config), ending)
        assert run.evaluator is evaluator
        assert closed == []
    assert closed == ["workers", "captured evaluations"]
