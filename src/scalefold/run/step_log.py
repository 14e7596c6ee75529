"""What a run writes of its steps and cycles: one step late, so that reading never stops the device."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.data.loading.loader import Batch
from scalefold.errors import TrainingError
from scalefold.report.record import StepRow
from scalefold.run.assemble import Run

log = logging.getLogger(__name__)


class Cycle:
    """The interval between two evaluations: MLPerf's epoch, with its throughput."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._samples, self._wait_ms, self._start_s = 0, 0.0, 0.0
        self._open = False

    def begin(self, step: int) -> None:
        """Open a cycle unless one is open."""
        if not self._open:
            every = self.run.config.training.val_every_iters
            self.run.events.epoch_start(-(-step // every) * every)
            self._samples, self._wait_ms, self._start_s = 0, 0.0, time.monotonic()
            self._open = True

    def count(self, batch: Batch) -> None:
        """Add one iteration."""
        self._samples += self.run.config.training.global_batch_size
        self._wait_ms += batch.wait_ms

    def end(self, step: int) -> None:
        """Close the cycle and log its speed and mean wait for a batch."""
        seconds = time.monotonic() - self._start_s
        iterations = self._samples // self.run.config.training.global_batch_size
        self.run.events.epoch_stop(step)
        self.run.events.throughput(step, self._samples / seconds, self._wait_ms / 1e3 / iterations)
        self._open = False


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
        self._previous = Stamp(run.ranks.device)

    def push(self, step: int, batch: Batch, values: Tensor) -> None:
        """Start the copy of this step's values to the host and write the previous step."""
        if (own := self.run.step.own) is not None:
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

    def flush(self) -> None:
        """Write the pending step, if there is one.

        Raises:
            TrainingError: its gradient norm is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.stamp.wait()
        values, own = pending.named(self.run.step.names)
        step_ms = pending.stamp.ms_since(self._previous)
        self._previous = pending.stamp
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
            lr=run.learning_rate(pending.step),
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
            mine = own[self.run.step.names.index("non_finite_terms")] if own else terms
            if mine:
                where = f"{self.run.ranks.describe()}, step {pending.step}, chains {', '.join(pending.chain_ids)}"
                log.warning("%s: %g loss terms were not finite and left out", where, mine)
            chains = list(pending.chain_ids) if mine else []
            self.run.record.event("non_finite_terms", step=pending.step, chains=chains)

    def _who_broke(self, pending: Pending, broken: list[str], own: list[float]) -> str:
        """What is not finite, and whose it was: every rank sees the sum, so the ranks tell each other."""
        ranks, what = self.run.ranks, f"not finite: {', '.join(broken)}"
        good = f"Last good checkpoint: {self.run.checkpoints.newest() or 'none'}"
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
