"""Ranks that share each sample hand out the same draws in the same order, whatever is ready first on each of them."""

import queue
import threading
from dataclasses import dataclass

from scalefold.data.loader import TrainLoader, _ReadyFirst


@dataclass(frozen=True)
class Draw:
    """All that the queue looks at."""

    iteration: int


class Finished:
    """Workers that finish draws in a given order."""

    def __init__(self, order: list[int]) -> None:
        self._order = iter(order)

    def next(self) -> Draw:
        return Draw(next(self._order))


def test_a_wanted_draw_is_waited_for_even_when_the_queue_is_full() -> None:
    ready = _ReadyFirst(Finished([1, 2, 3, 4, 5, 6]), capacity=2)  # type: ignore[arg-type]
    assert ready.next(6).iteration == 6
    assert [ready.next().iteration for _ in range(5)] == [1, 2, 3, 4, 5]
    ready.close()


def test_the_others_follow_the_rank_that_chooses(tmp_path) -> None:
    decided: queue.Queue[int] = queue.Queue()
    orders = {"chooses": [3, 1, 2, 5, 4, 6], "follows": [6, 5, 4, 3, 2, 1]}
    taken: dict[str, list[int]] = {}

    def agree(choice: int | None) -> int:
        if choice is None:
            return decided.get(timeout=10)
        decided.put(choice)
        return choice

    def run(role: str) -> None:
        from scalefold.data.features import FeatureSettings

        chooses = role == "chooses"
        loader = TrainLoader(tmp_path, FeatureSettings(), num_workers=0, in_order=False, agree=agree, chooses=chooses)
        loader._ready = _ReadyFirst(Finished(orders[role]), capacity=2)  # type: ignore[arg-type]
        taken[role] = [loader._next_batch().iteration for _ in range(6)]
        loader._ready.close()

    threads = [threading.Thread(target=run, args=(role,)) for role in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(taken["chooses"]) == [1, 2, 3, 4, 5, 6]
    assert taken["follows"] == taken["chooses"]
