"""The training loop: from an assembled run to an outcome, readable in one sitting.

``assemble.py`` builds the parts; this file says in which order they act and who logs what.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from scalefold.config import Config
from scalefold.data.configured import evaluation_lengths
from scalefold.data.loading.sampler import forward_seed
from scalefold.data.loading.waiting import NotWanted
from scalefold.data.store import selection
from scalefold.data.store.store import Store
from scalefold.errors import TrainingError
from scalefold.mlperf.log.events import merge_parts
from scalefold.parallel.ending import Ending
from scalefold.parallel.ranks import prepare_process, start
from scalefold.parallel.stop import STOP_REQUESTED, TARGET_REACHED
from scalefold.phases import EXIT_NEXT_PHASE
from scalefold.rehearse.rehearsal import Rehearsal
from scalefold.run.assemble import Run, assemble, enter_next_phase, save
from scalefold.run.begin import RunOptions, begin_counting, check_means, check_places, open_node_log, open_schedule
from scalefold.run.evaluation_rank import evaluate_elsewhere
from scalefold.run.step_log import Cycle, StepLog
from scalefold.telemetry.profile import Span, Window

LESS = "use more GPUs per sample (parallel.dap_size) or execution.activation_checkpointing, and continue with --resume"
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
    check_means(schedule.config)
    prepare_process(schedule.config)
    with Ending() as ending:
        ranks, outcome = start(schedule.config), None
        ending.owner = ranks.describe()
        ending.add("process groups", ranks.stop, after_errors=False)
        with ranks.watch:
            try:
                rehearsal = Rehearsal(options.inject, ranks, schedule.config)
                if ranks.trains:
                    run = assemble(schedule, options, ranks, ending)
                    outcome = train(run, rehearsal)
                    ending.status = outcome.exit_status
                else:
                    evaluate_elsewhere(schedule, options, ranks, ending, rehearsal)
                ranks.watch.at("end")
                ranks.barrier()
            except torch.OutOfMemoryError as error:
                ranks.watch.before_exit()
                sign = ranks.watch.sign()
                where = f"{ranks.describe()}, step {sign.step}, {sign.activity}"
                raise TrainingError(f"{where}: {str(error).splitlines()[0]}; {LESS}") from error
            except BaseException:
                ranks.watch.before_exit()  # the log says so, or is removed if its clock never ran
                raise
        if ranks.is_root and ranks.layout.num_eval_ranks:
            merge_parts(run.start.result_file)
    return outcome


def train(run: Run, rehearsal: Rehearsal) -> Outcome:
    """Train until the average lDDT-Cα reaches the target, the step budget ends, or the scheduler asks to stop.

    Raises:
        TrainingError: gradients are not finite; the last good checkpoint stays.
        DataError: a sample cannot be built.
    """
    numbers = range(run.start.first_step, run.config.training.num_train_iters + 1)
    with open_node_log(run.config, run.ranks, run.start.result_file, run.progress.note) as node_log:
        warm_up(run)
        start_clock(run)
        steps = StepLog(run)
        with window(run, steps).around(numbers) as walk:
            outcome = loop(run, steps, walk, begin_counting(node_log), rehearsal)
            run.events.run_stop("success" if outcome.status == "success" else "aborted")
        run.ranks.watch.at("checkpoint", outcome.step)
        run.saves.finish()
        report_loading(run)
        run.stops.close()
        run.events.close()  # whoever joins the parts of the log must find all of this one
    return outcome


def warm_up(run: Run) -> None:
    """Everything slow that needs no data set: compile, capture, first collectives, on a synthetic batch."""
    run.batches.loader.spawn()  # workers touch no data before ``open_data``
    run.evaluator.spawn()
    with counted_kernels(run):
        warm_up_step(run)
        run.evaluator.warm_up()
    run.saves.writer.settle()
    run.saves.compare(run.start.first_step - 1, wait=True)
    run.ranks.barrier()
    run.events.init_stop()


@contextmanager
def counted_kernels(run: Run) -> Iterator[None]:
    """Say how many Triton kernels were looked up inside, and how many of them had to be compiled."""
    if run.training.optimizer.ops.name != "triton":
        yield
        return
    from scalefold.kernels.compiled.ahead import counting

    with counting() as count:
        yield
    run.record.event("kernels", hits=count.hits, misses=count.misses, seconds=round(count.seconds, 1))
    run.progress.note(count.text())


def warm_up_step(run: Run) -> None:
    """The training step's part of it, also at the beginning of a later phase that has a step of its own."""
    if run.training.step.warm:
        return
    run.ranks.watch.at("warm-up")
    if run.config.execution.warm_up or run.config.execution.cuda_graphs:
        passes = run.config.data.num_recycling_iters + 1
        run.training.step.warm_up(run.batches.synthetic(), passes, run.progress.note)


def start_clock(run: Run) -> None:
    """Start the MLPerf clock between two barriers; the data set is opened only after it."""
    run.ranks.barrier()
    run.events.run_start()
    run.record.start_clock()
    run.ranks.barrier()
    open_data(run)
    run.record.start_part("loader_started")


def open_data(run: Run) -> None:
    """Open the data set, start loader and evaluation features. Only after ``run_start``."""
    c, store = run.config, Store(run.config.data.store_dir)
    train = selection.training_set(store.table, c.data.train_max_pdb_release_date, c.data.filter_by_alignments)
    run.events.train_samples(len(train.rows))
    lengths = evaluation_lengths(c, store)
    run.events.eval_samples(len(lengths))
    run.events.dataloader_type(f"InitialTrainingDataloader{c.data.dataloader.upper()}")
    run.evaluator.open_data(lengths)
    store.close()
    run.record.start_part("data_opened")
    run.batches.open(train, run.start.first_step)


def report_loading(run: Run) -> None:
    """Workers, prefetch depth and the slowest samples of this rank, to record and screen."""
    d, slowest = run.config.data, run.batches.loader.slowest()
    chains = [{"chain": chain, "seconds": round(seconds, 3)} for seconds, chain in slowest]
    run.record.event("loader", workers=d.num_workers, prefetch=d.prefetch_factor, slowest=chains)
    shown = ", ".join(f"{chain} {seconds:.2f} s" for seconds, chain in slowest[:3]) or "none built"
    run.progress.note(f"loader: num_workers {d.num_workers}, prefetch_factor {d.prefetch_factor}; slowest: {shown}")


def window(run: Run, steps: StepLog) -> Window:
    """The steps that this rank profiles, usually none."""
    r, ranks = run.config.run, run.ranks

    def settle() -> None:
        run.stops.wait()
        run.saves.wait()

    return Window(r.profile, r.run_dir, ranks.rank, ranks.device, lambda: spans(run, steps), settle, steps.pause)


def spans(run: Run, steps: StepLog) -> list[Span]:
    """What is named in the trace of a step."""
    evaluates = "snapshot hand-over" if run.ranks.layout.num_eval_ranks else "evaluation"
    return [
        (run.batches.loader, "next", "data wait"),
        (run.batches, "to_device", "copy"),
        *((run.training.step, method, name) for method, name in run.training.step.SPANS.items()),
        (steps, "push", "log"),
        (run.evaluator, "submit", evaluates),
        (run.saves, "go_on_comparing", "comparison of ranks"),
        (run.stops, "code", "stop code"),
        (run.batches, "left_over_after", "places left over"),
        (run.saves, "save", "checkpoint"),
    ]


def loop(
    run: Run, steps: StepLog, numbers: Iterable[int], note_cycle: Callable[..., None], rehearsal: Rehearsal
) -> Outcome:
    """Iterate over the numbers of the steps; evaluate, save and stop where they are due."""
    t, at, alone = run.config.training, run.ranks.watch.at, run.ranks.layout.world_size == 1
    cycle = Cycle(run)
    for step in numbers:
        cycle.begin(step)
        at("waiting for a batch", step)
        rehearsal.before_step(run, step)
        try:
            batch = run.batches.loader.next(step, lambda: not (run.stops.asked and alone))
        except NotWanted:
            return leave_waiting(run, steps, step - 1)
        run.record.start_part("first_batch")
        at("training step", step)
        torch.manual_seed(forward_seed(run.start.seed, run.ranks.dp_index, step))
        values = run.training.step(run.batches.to_device(batch), batch.passes, step)
        run.record.start_part("first_step_launched")
        steps.push(step, batch, values)
        cycle.count(batch)
        reached = False
        if step % t.val_every_iters == 0:
            steps.flush()
            note_cycle(step, **cycle.end(step, steps.take_times()))
            at("evaluation", step)
            reached = run.evaluator.submit(step)
            steps.restart()
            at("training step", step)
        run.saves.go_on_comparing()
        code = run.stops.code()
        if reached or code == TARGET_REACHED:
            return finish(run, steps, step, "success")
        if run.stops.phase_ends(step, code):
            steps.flush()
            if not enter_next_phase(run, step):
                return finish(run, steps, step, "next_phase")
            warm_up_step(run)
            steps.restart()
        stops = code == STOP_REQUESTED and run.stops.between_updates(step)
        if saves_due(run.config, step) or stops:
            steps.flush()
            at("checkpoint", step)
            save(run, step)
        if stops:
            return finish(run, steps, step, "aborted")
    return finish(run, steps, t.num_train_iters, "aborted")


def leave_waiting(run: Run, steps: StepLog, step: int) -> Outcome:
    """Stop after ``step`` because the next batch does not come; a single process only, others wait for each other."""
    steps.flush()
    if step >= run.start.first_step and run.stops.between_updates(step):
        run.ranks.watch.at("checkpoint", step)
        save(run, step)
    return finish(run, steps, step, "aborted")


def saves_due(config: Config, step: int) -> bool:
    """Whether a checkpoint follows iteration ``step``."""
    every = config.run.checkpoint_every_iters
    return every > 0 and step % every == 0


def finish(run: Run, steps: "StepLog", step: int, status: Literal["success", "aborted", "next_phase"]) -> Outcome:
    """Write the last step, wait for evaluations under way, and say how it ended."""
    steps.flush()
    run.ranks.watch.at("evaluation", step)
    reached = run.evaluator.finish()
    return Outcome("success" if reached else status, step, run.evaluator.last)
