"""The training loop: from an assembled run to an outcome, readable in one sitting.

``run.py`` assembles the parts; this file says in which order they act and who logs what.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scalefold.config import Config
from scalefold.data.loader import Batch
from scalefold.data.sampler import forward_seed
from scalefold.ending import Ending
from scalefold.errors import TrainingError
from scalefold.mlperf.events import merge_parts
from scalefold.parallel.ranks import start
from scalefold.parallel.snapshots import STOP_REQUESTED, TARGET_REACHED
from scalefold.phases import EXIT_NEXT_PHASE, open_schedule
from scalefold.report.record import StepRow
from scalefold.run import (
    Run,
    RunOptions,
    assemble,
    check_places,
    enter_next_phase,
    evaluate_elsewhere,
    prepare_process,
)

log = logging.getLogger(__name__)


EXIT_STATUS = {"success": 0, "aborted": 4, "next_phase": EXIT_NEXT_PHASE}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the target, another end, or a phase that needs other ranks; last iteration, last evaluation."""

    status: Literal["success", "aborted", "next_phase"]
    step: int
    lddt_ca: float | None

    @property
    def exit_status(self) -> int:
        """Of a process of this run."""
        return EXIT_STATUS[self.status]


def run_rank(config: Config, options: RunOptions) -> Outcome | None:
    """What one process of a run does from start to end; the outcome on training ranks, None on evaluation ranks.

    Raises:
        RankLostError: another rank was killed, failed or stands still.
        ScaleFoldError: see ``train``; configuration, checkpoint and data errors.
    """
    schedule = open_schedule(config, options.resume)
    check_places(schedule.config)
    prepare_process(schedule.config)
    with Ending() as ending:
        ranks, outcome = start(schedule.config), None
        ending.owner = ranks.describe()
        ending.add("process groups", ranks.stop, after_errors=False)
        with ranks.watch:
            try:
                if ranks.trains:
                    run = assemble(schedule, options, ranks, ending)
                    outcome = train(run)
                    ending.status = outcome.exit_status
                else:
                    evaluate_elsewhere(schedule, options, ranks, ending)
                ranks.watch.at("end")
                ranks.barrier()
            except BaseException:
                ranks.watch.before_exit()  # the log says so, or is removed if its clock never ran
                raise
        if ranks.is_root and ranks.layout.num_eval_ranks:
            merge_parts(run.result_file)
    return outcome


def train(run: Run) -> Outcome:
    """Train until the average lDDT-Cα reaches the target, the step budget ends, or the scheduler asks to stop.

    Raises:
        TrainingError: gradients are not finite; the last good checkpoint stays.
        DataError: a sample cannot be built.
    """
    warm_up(run)
    start_clock(run)
    outcome = loop(run, StepLog(run))
    run.events.run_stop("success" if outcome.status == "success" else "aborted")
    run.ranks.watch.at("checkpoint", outcome.step)
    run.finish_saving()
    report_loading(run)
    run.end_polling()
    run.events.close()  # whoever joins the parts of the log must find all of this one
    return outcome


def warm_up(run: Run) -> None:
    """Everything slow that needs no data set: compile, capture, first collectives, on a synthetic batch."""
    run.spawn_workers()
    with counted_kernels(run):
        warm_up_step(run)
        run.evaluator.warm_up()
    run.checkpoints.settle()
    run.compare_ranks(run.first_step - 1, wait=True)
    run.ranks.barrier()
    run.events.init_stop()


@contextmanager
def counted_kernels(run: Run) -> Iterator[None]:
    """Say how many Triton kernels were looked up inside, and how many of them had to be compiled."""
    if run.optimizer.ops.name != "triton":
        yield
        return
    from scalefold.kernels.ahead import counting

    with counting() as count:
        yield
    run.record.event("kernels", hits=count.hits, misses=count.misses, seconds=round(count.seconds, 1))
    run.progress.note(count.text())


def warm_up_step(run: Run) -> None:
    """The training step's part of it, also at the beginning of a later phase."""
    run.ranks.watch.at("warm-up")
    if run.config.execution.warm_up or run.config.execution.cuda_graphs:
        run.step.warm_up(run.synthetic_batch(), run.config.data.num_recycling_iters + 1, run.progress.note)


def start_clock(run: Run) -> None:
    """Start the MLPerf clock between two barriers; the data set is opened only after it."""
    run.ranks.barrier()
    run.events.run_start()
    run.record.start_clock()
    run.ranks.barrier()
    run.open_data()
    run.record.start_part("loader_started")


def report_loading(run: Run) -> None:
    """Workers, prefetch depth and the slowest samples of this rank, to record and screen."""
    d, slowest = run.config.data, run.loader.slowest()
    chains = [{"chain": chain, "seconds": round(seconds, 3)} for seconds, chain in slowest]
    run.record.event("loader", workers=d.num_workers, prefetch=d.prefetch_factor, slowest=chains)
    shown = ", ".join(f"{chain} {seconds:.2f} s" for seconds, chain in slowest[:3]) or "none built"
    run.progress.note(f"loader: num_workers {d.num_workers}, prefetch_factor {d.prefetch_factor}; slowest: {shown}")


def loop(run: Run, steps: "StepLog") -> Outcome:
    """Iterate; evaluate, save and stop where they are due."""
    t, at = run.config.training, run.ranks.watch.at
    cycle = Cycle(run)
    for step in range(run.first_step, t.num_train_iters + 1):
        cycle.begin(step)
        at("waiting for a batch", step)
        batch = run.loader.next(step)
        run.record.start_part("first_batch")
        at("training step", step)
        torch.manual_seed(forward_seed(run.seed, run.ranks.dp_index, step))
        values = run.step(run.to_device(batch), batch.passes, step)
        run.record.start_part("first_step_launched")
        steps.push(step, batch, values)
        cycle.count(batch)
        reached = False
        if step % t.val_every_iters == 0:
            steps.flush()
            cycle.end(step)
            at("evaluation", step)
            reached = run.evaluator.submit(step)
            steps.restart()
            at("training step", step)
        code = run.stop_code()
        if reached or code == TARGET_REACHED:
            return finish(run, steps, step, "success")
        if run.phase_ends(step, code):
            steps.flush()
            if not enter_next_phase(run, step):
                return finish(run, steps, step, "next_phase")
            warm_up_step(run)
            steps.restart()
        stops = code == STOP_REQUESTED and run.between_updates(step)
        if run.checkpoint_due(step) or stops:
            steps.flush()
            at("checkpoint", step)
            run.save(step)
        if stops:
            return finish(run, steps, step, "aborted")
    return finish(run, steps, t.num_train_iters, "aborted")


def finish(run: Run, steps: "StepLog", step: int, status: Literal["success", "aborted", "next_phase"]) -> Outcome:
    """Write the last step, wait for evaluations under way, and say how it ended."""
    steps.flush()
    run.ranks.watch.at("evaluation", step)
    reached = run.evaluator.finish()
    return Outcome("success" if reached else status, step, run.evaluator.last)


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
        values = dict(zip(self.run.step.names, pending.values.tolist(), strict=True))
        step_ms = pending.stamp.ms_since(self._previous)
        self._previous = pending.stamp
        self._check(pending, values)
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

    def _check(self, pending: Pending, values: dict[str, float]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        where = f"{self.run.ranks.describe()}, step {pending.step}, chains {', '.join(pending.chain_ids)}"
        if "grad_norm" in broken or "loss" in broken:
            raise TrainingError(
                f"{where}: not finite: {', '.join(broken)}. Last good checkpoint: "
                f"{self.run.checkpoints.newest() or 'none'}; look at these chains, or try execution.precision: fp32"
            )
        if values.get("non_finite_terms"):
            log.warning("%s: %g loss terms were not finite and left out", where, values["non_finite_terms"])
            self.run.record.event("non_finite_terms", step=pending.step, chains=list(pending.chain_ids))
