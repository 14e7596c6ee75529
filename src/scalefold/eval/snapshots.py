"""Handing averaged weights from training to evaluation ranks without stopping training, and the way back of "stop".

At a due step the training root copies the flat averaged weights on the device (one copy kernel, in stream order) and
goes on. As soon as the evaluation root says in the key-value store that it is waiting, the copy is sent with one
asynchronous send; so no send ever spins on a busy receiver. The evaluation root spreads it over its group.

If evaluation is slower than a cycle, at most ``depth`` snapshots wait. What happens then is a policy, and logged:
``wait`` (training waits; every evaluation takes place, as the closed division demands) or ``skip`` (the oldest
waiting snapshot is dropped).
"""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from scalefold.errors import TrainingError

POLL_S = 0.002


def run_store() -> dist.Store:
    """The run's key-value store, under a prefix of ours."""
    return dist.PrefixStore("scalefold", dist.distributed_c10d._get_default_store())


@dataclass
class Waiting:
    """A snapshot on its way: the step it belongs to and the device copy."""

    step: int
    weights: Tensor


class SnapshotSender:
    """Training root's end of the hand-over to rank ``target``."""

    def __init__(
        self,
        store: dist.Store,
        group: dist.ProcessGroup,
        target: int,
        depth: int = 1,
        when_behind: Literal["wait", "skip"] = "wait",
        note: Callable[..., None] = lambda name, **facts: None,
    ) -> None:
        self.store, self.group, self.target = store, group, target
        self.depth, self.when_behind, self.note = depth, when_behind, note
        self._queue: deque[Waiting] = deque()
        self._sent = 0
        self._reported = 0
        self._flight: tuple[dist.Work, Tensor] | None = None

    def submit(self, step: int, averaged: Tensor) -> None:
        """Take a consistent copy of ``averaged`` as of now in stream order, and send it when the receiver is ready."""
        self.poll()
        if len(self._queue) >= self.depth:
            self._make_room(step)
        self._queue.append(Waiting(step, averaged.detach().clone()))
        self.poll()

    def poll(self) -> None:
        """Send the oldest waiting snapshot if the receiver waits for one; returns at once otherwise."""
        if self._flight is not None and self._delivered(*self._flight):
            self._flight = None
        if not self._queue or self._flight is not None or not self.store.check([f"ready_{self._sent}"]):
            return
        waiting = self._queue.popleft()
        self.store.set(f"snapshot_{self._sent}", str(waiting.step))
        work = dist.isend(waiting.weights, self.target, group=self.group)
        assert work is not None
        self._flight = (work, waiting.weights)
        self._sent += 1

    def target_reached(self) -> bool:
        """Whether the evaluation root has seen the target."""
        return self.store.check(["target_reached"])

    def results(self) -> list[dict[str, Any]]:
        """What the evaluation root has reported since the last call."""
        found = []
        while self._reported < self._sent and self.store.check([f"evaluated_{self._reported}"]):
            found.append(json.loads(self.store.get(f"evaluated_{self._reported}")))
            self._reported += 1
        return found

    def drain(self, timeout_s: float) -> None:
        """Deliver everything and wait until it is evaluated; then tell the evaluation ranks that nothing follows."""
        deadline = time.monotonic() + timeout_s
        while not self.target_reached() and (self._queue or self._flight is not None or not self._evaluated()):
            self.poll()
            if time.monotonic() > deadline:
                raise TrainingError(f"rank {self.target} (evaluation) did not finish within {timeout_s:.0f} s")
            time.sleep(POLL_S)
        self.store.set("finished", "1")

    def _delivered(self, work: dist.Work, weights: Tensor) -> bool:
        """Whether the send is over. NCCL says so itself; Gloo's sends are only known to be over by the receiver."""
        return work.is_completed() if weights.is_cuda else self.store.check([f"received_{self._sent - 1}"])

    def _evaluated(self) -> bool:
        return self._sent == 0 or self.store.check([f"evaluated_{self._sent - 1}"])

    def _make_room(self, step: int) -> None:
        if self.when_behind == "skip":
            dropped = self._queue.popleft()
            self.note("evaluation_skipped", step=dropped.step, because_of_step=step)
            return
        start = time.monotonic()
        while len(self._queue) >= self.depth and not self.target_reached():
            self.poll()
            time.sleep(POLL_S)
        self.note("training_waited_for_evaluation", step=step, seconds=round(time.monotonic() - start, 3))


class SnapshotReceiver:
    """Evaluation ranks' end: the root receives, the group shares."""

    def __init__(
        self, store: dist.Store, group: dist.ProcessGroup | None, eval_group: dist.ProcessGroup, source: int, root: int
    ) -> None:
        self.store, self.group, self.eval_group = store, group, eval_group
        self.source, self.root = source, root
        self._count = 0

    def next(self, buffer: Tensor) -> int | None:
        """Receive the next snapshot into ``buffer`` on every evaluation rank.

        Returns its step, or None when training is over.
        """
        step = self._await_header()
        if step is None:
            return None
        if dist.get_rank() == self.root:
            dist.recv(buffer, self.source, group=self.group)
            self.store.set(f"received_{self._count - 1}", "1")
        dist.broadcast(buffer, src=self.root, group=self.eval_group)
        return step

    def done(self, report: dict[str, Any], reached_target: bool) -> None:
        """The evaluation root's verdict on the snapshot received last; ``report`` must be JSON."""
        if dist.get_rank() == self.root:
            self.store.set(f"evaluated_{self._count - 1}", json.dumps(report))
            if reached_target:
                self.store.set("target_reached", "1")

    def _await_header(self) -> int | None:
        """Every rank looks for itself: a cycle may last longer than a collective may."""
        is_root = dist.get_rank() == self.root
        if is_root:
            self.store.set(f"ready_{self._count}", "1")
        while not self.store.check([f"snapshot_{self._count}"]):
            if self.store.check(["finished"]):
                return None
            time.sleep(POLL_S if is_root else 10 * POLL_S)
        step = int(self.store.get(f"snapshot_{self._count}"))
        self._count += 1
        return step
