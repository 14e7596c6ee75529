"""What a run writes of its steps and cycles: one step late, so that reading never stops the device."""

import heapq
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.data.loading.loader import Batch
from scalefold.errors import TrainingError
from scalefold.report.record import StepRow
from scalefold.run.assemble import Run
from scalefold.step.optimizer import learning_rate

log = logging.getLogger(__name__)

NUM_SLOWEST = 3  # chains of a cycle


class Cycle:
    """The interval between two evaluations: MLPerf's epoch, with its throughput."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._samples, self._waits_ms, self._start_s = 0, [0.0], 0.0
        self._built: list[tuple[str, float]] = []
        self._open = False

    def begin(self, step: int) -> None:
        """Open a cycle unless one is open."""
        if not self._open:
            every = self.run.config.training.val_every_iters
            self.run.events.epoch_start(-(-step // every) * every)
            self._samples, self._waits_ms, self._start_s, self._built = 0, [], time.monotonic(), []
            self._open = True

    def count(self, batch: Batch) -> None:
        """Add one iteration."""
        self._samples += self.run.config.training.global_batch_size
        self._waits_ms.append(batch.wait_ms)
        self._built += zip(batch.chain_ids, batch.build_s, strict=False)  # not all ranks of a DAP group build

    def end(self, step: int, times_ms: Sequence[float]) -> dict[str, Any]:
        """Close the cycle and log its speed and mean wait for a batch; ``times_ms`` are those of its steps.

        Returns what telemetry notes of it on this rank.
        """
        seconds = time.monotonic() - self._start_s
        iterations = self._samples // self.run.config.training.global_batch_size
        self.run.events.epoch_stop(step)
        self.run.events.throughput(step, self._samples / seconds, sum(self._waits_ms) / 1e3 / iterations)
        self._open = False
        slowest = heapq.nlargest(NUM_SLOWEST, self._built, key=lambda built: built[1])
        return {
            "steps": iterations,
            "step_ms": round(sum(times_ms) / len(times_ms), 3),
            "step_max_ms": round(max(times_ms), 3),
            "data_ms": round(sum(self._waits_ms) / iterations, 3),
            "data_max_ms": round(max(self._waits_ms), 3),
            "slowest": [[chain, round(built_s, 4)] for chain, built_s in slowest],
        }


@dataclass(frozen=True)
class Pending:
    """A step whose values are still on their way from the device."""

    step: int
    chain_ids: Sequence[str]
    passes: int
    data_ms: float
    values: Tensor
    stamp: "Stamp"

    def named(self, names: Sequence[str]) -> tuple[dict[str, float], list[float]]:
        """The values of all ranks by name, and this rank's own (``TrainStep.own``; none in a single process)."""
        numbers = self.values.tolist()
        return dict(zip(names, numbers[: len(names)], strict=True)), numbers[len(names) :]


class Stamp:
    """A point in time on the device's own clock (CUDA event) or the host's."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._seconds = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has passed this point."""
        if self._event is not None:
            self._event.synchronize()

    def ms_since(self, earlier: "Stamp") -> float:
        """Milliseconds between two stamps that have both passed."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event)
        return 1e3 * (self._seconds - earlier._seconds)


class StepLog:
    """Writes each step one step late, so that reading its values never stops the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._pending: Pending | None = None
        self._times_ms: list[float] = []
        self._previous = Stamp(run.ranks.device)

    def push(self, step: int, batch: Batch, values: Tensor) -> None:
        """Start the copy of this step's values to the host and write the previous step."""
        if (own := self.run.training.step.own) is not None:
            values = torch.cat([values, own])
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        stamp = Stamp(self.run.ranks.device)
        pending = Pending(step, batch.chain_ids, batch.passes, batch.wait_ms, host, stamp)
        self.flush()
        self._pending = pending

    def restart(self) -> None:
        """The next step begins now: what came before (an evaluation) is not its time."""
        self._previous = Stamp(self.run.ranks.device)

    def take_times(self) -> list[float]:
        """Milliseconds of the steps written since the last call."""
        times, self._times_ms = self._times_ms, []
        return times

    def pause(self) -> None:
        """What lies between the last step and the next is nobody's time."""
        self.flush()
        self.restart()

    def flush(self) -> None:
        """Write the pending step, if there is one.

        Raises:
            TrainingError: its gradient norm is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.stamp.wait()
        values, own = pending.named(self.run.training.step.names)
        step_ms = pending.stamp.ms_since(self._previous)
        self._previous = pending.stamp
        self._times_ms.append(step_ms)
        self._check(pending, values, own)
        if pending.step % self.run.config.run.log_every_iters == 0:
            self._write(pending, values, step_ms)

    def _write(self, pending: Pending, values: dict[str, float], step_ms: float) -> None:
        run, device = self.run, self.run.ranks.device
        loss, norm = values.pop("loss"), values.pop("grad_norm")
        row = StepRow(
            step=pending.step,
            loss=loss,
            terms=values,
            lr=learning_rate(pending.step, run.config.training),
            grad_norm=norm,
            step_ms=step_ms,
            data_ms=pending.data_ms,
            passes=pending.passes,
            peak_gib=torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
            samples=run.schedule.samples(pending.step),
        )
        run.record.step(row)
        run.progress.step(row)

    def _check(self, pending: Pending, values: dict[str, float], own: list[float]) -> None:
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if broken:
            raise TrainingError(self._who_broke(pending, broken, own))
        terms = values.get("non_finite_terms", 0.0)
        if terms:
            mine = own[self.run.training.step.names.index("non_finite_terms")] if own else terms
            if mine:
                where = f"{self.run.ranks.describe()}, step {pending.step}, chains {', '.join(pending.chain_ids)}"
                log.warning("%s: %g loss terms were not finite and left out", where, mine)
            chains = list(pending.chain_ids) if mine else []
            self.run.record.event("non_finite_terms", step=pending.step, chains=chains)

    def _who_broke(self, pending: Pending, broken: list[str], own: list[float]) -> str:
        """What is not finite, and whose it was: every rank sees the sum, so the ranks tell each other."""
        ranks, what = self.run.ranks, f"not finite: {', '.join(broken)}"
        good = f"Last good checkpoint: {self.run.saves.writer.newest() or 'none'}"
        look = "look at these chains, or try execution.precision: fp32"
        mine = f"{ranks.describe()}, step {pending.step}, chains {', '.join(pending.chain_ids)}: {what}. {good}; {look}"
        if not own:
            return mine
        faulty = not all(math.isfinite(number) for number in own)
        report = (faulty, f"rank {ranks.rank} on {ranks.host}")
        reports = [report] * ranks.layout.num_train_ranks
        dist.all_gather_object(reports, report, group=ranks.train_control_group)
        if faulty:
            return mine
        culprits = [place for guilty, place in reports if guilty]
        whose = f"it began on {', '.join(culprits[:8])}" if culprits else "every rank's own numbers are finite"
        return f"{ranks.describe()}, step {pending.step}: {what}; {whose}{', ...' if len(culprits) > 8 else ''}. {good}"
