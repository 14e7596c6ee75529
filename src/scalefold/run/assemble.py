"""Assembles a run from its configuration: ranks, model, optimizer, data, log, record, checkpoints, evaluation."""

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scalefold.config import Config
from scalefold.data.configured import batch_limits_s, evaluation_lengths, feature_settings
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading.loader import Batch, TrainLoader, to_device
from scalefold.data.loading.sampler import Delivered, TrainingSampler, initialisation_seed
from scalefold.data.loading.shared_loader import SharedLoader
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.data.store import selection
from scalefold.data.store.store import Store
from scalefold.errors import LogError, TrainingError
from scalefold.eval.elsewhere import EvaluationElsewhere
from scalefold.eval.evaluator import Evaluator
from scalefold.eval.here import EvaluationHere
from scalefold.eval.score import ChainScorer
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.mlperf.log.events import Events, merge_left_parts
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.dap.collectives import use_direct
from scalefold.parallel.dap.points import apply_dap, check_shares
from scalefold.parallel.ranks import Ranks
from scalefold.parallel.stop import PHASE_REACHED, STOP_REQUESTED, TARGET_REACHED, StopSignal
from scalefold.phases import Schedule, any_phase
from scalefold.report.console import Progress
from scalefold.report.record import Record
from scalefold.run.begin import begin, continue_counting, make_progress
from scalefold.run.ending import Ending
from scalefold.run.header import log_header, run_header, write_resolved
from scalefold.run.resume import CONFIG_FILE, RunOptions, Start, load_state
from scalefold.step.agreement import Agreement
from scalefold.step.build import (
    adds_gradients,
    build_model,
    build_optimizer,
    build_step,
    choose_operations,
    connect_replica,
    parameter_names,
)
from scalefold.step.checkpoint import RunState
from scalefold.step.checkpoint_writer import CheckpointWriter, Written
from scalefold.step.graphs import TrainStep
from scalefold.step.optimizer import Optimizer, learning_rate
from scalefold.stop_signals import STOP_SIGNALS

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the training loop uses on one training rank."""

    schedule: Schedule
    ranks: Ranks
    seed: int
    model: AlphaFold
    optimizer: Optimizer
    step: TrainStep
    loader: TrainLoader | SharedLoader
    evaluator: Evaluator
    events: Events
    record: Record
    progress: Progress
    checkpoints: CheckpointWriter
    result_file: Path
    first_step: int = 1
    settings: FeatureSettings = field(default_factory=FeatureSettings)
    stop_asked: bool = False
    left_over: Sequence[int] = ()
    _sampler: TrainingSampler | None = None
    _agreement: Agreement | None = None
    _training_set: selection.TrainingSet | None = None
    _stop: StopSignal | None = None
    _copies: "torch.cuda.Stream | None" = None

    @property
    def config(self) -> Config:
        """The configuration of the present phase."""
        return self.schedule.config

    def open_data(self) -> None:
        """Open the data set, start loader and evaluation features. Only after ``run_start``."""
        c, store = self.config, Store(self.config.data.store_dir)
        self._training_set = train = selection.training_set(
            store.table, c.data.train_max_pdb_release_date, c.data.filter_by_alignments
        )
        self.events.train_samples(len(train.rows))
        lengths = evaluation_lengths(c, store)
        self.events.eval_samples(len(lengths))
        self.events.dataloader_type(f"InitialTrainingDataloader{c.data.dataloader.upper()}")
        self.evaluator.open_data(lengths)
        store.close()
        self.record.start_part("data_opened")
        self.start_loader(self.first_step)

    def start_loader(self, first_step: int) -> None:
        """Deliver the batches of the present phase from iteration ``first_step`` on."""
        c, train = self.config, self._training_set
        assert train is not None, "open_data comes first"
        self._sampler = TrainingSampler(
            train.rows,
            train.weights,
            self.seed,
            self.ranks.dp_index,
            self.ranks.layout.dp_size,
            c.local_batch_size,
            c.data.num_recycling_iters,
            c.training.gradient_accumulation_steps,
            first_step - 1,
            self.schedule.samples(first_step - 1),
            self.left_over,
        )
        self.loader.start(self._sampler, first_step, self.schedule.last_step)

    def synthetic_batch(self) -> Batch:
        """A batch of true shapes and plausible geometry that touches no data."""
        return synthetic_batch(self.settings, self.config.local_batch_size, device=self.ranks.device)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device, by one asynchronous copy beside the step before."""
        if self.ranks.device.type == "cpu":
            return batch
        if self._copies is None:
            self._copies = torch.cuda.Stream()
        moved = to_device(batch, self.ranks.device, self._copies)
        self.record.start_part("first_copy_launched")
        return moved

    def spawn_workers(self) -> None:
        """Start the processes that will build features; they touch no data before ``open_data``."""
        self.loader.spawn()
        self.evaluator.spawn()

    def learning_rate(self, step: int) -> float:
        """Rate of iteration ``step``."""
        return learning_rate(step, self.config.training)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint follows iteration ``step``."""
        every = self.config.run.checkpoint_every_iters
        return every > 0 and step % every == 0

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of the ``step`` completed iterations on rank 0, beside training.

        Every training rank calls this: they compare what they hold, and say which samples they have passed over.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
            TrainingError: the ranks held different weights at the one before.
        """
        self.compare_ranks(step)
        left_over = self.samples_left_over(step)
        if self.ranks.is_root:
            position = vars(self.schedule.position)
            state = RunState(step, self.seed, self.optimizer.num_averaged, **position, left_over=left_over)
            names = parameter_names(self.model)
            self._note(self.checkpoints.save(self.optimizer.flat, self.optimizer, names, state))

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk, and the ranks are known to agree.

        Raises:
            CheckpointError: it could not be written.
            TrainingError: the ranks held different weights.
        """
        self._go_on_comparing(to_the_end=True)
        self._note(self.checkpoints.finish())

    def samples_left_over(self, step: int) -> list[int]:
        """Places in the stream of samples that were passed over by iteration ``step``; every training rank calls this.

        In the order of draws nothing is. Else only the loaders know.
        """
        assert self._sampler is not None, "open_data comes first"
        found: list[Delivered | None] = [Delivered(step)] * self.ranks.layout.dp_size
        if self.config.data.dataloader == "pq":
            found = [mine := self.loader.delivered()] * self.ranks.layout.num_train_ranks
            if len(found) > 1:
                dist.all_gather_object(found, mine, group=self.ranks.train_control_group)
        return self._sampler.passed_over([delivered for delivered in found if delivered is not None])

    def compare_ranks(self, step: int, wait: bool = False) -> None:
        """Begin to compare the weights of all training ranks after ``step`` iterations; the same call on all of them.

        Raises:
            TrainingError: they differed, now (with ``wait``) or at the comparison before.
        """
        self._go_on_comparing(to_the_end=True)
        if self._agreement is None:
            group = self.ranks.train_control_group if self.ranks.layout.num_train_ranks > 1 else None
            self._agreement = Agreement(self.optimizer, group)
        self._agreement.begin(step)
        if wait:
            self._go_on_comparing(to_the_end=True)

    def _go_on_comparing(self, to_the_end: bool = False) -> None:
        if (agreement := self._agreement) is None:
            return
        try:
            (agreement.settle if to_the_end else agreement.advance)()
        except TrainingError:
            if self.ranks.is_root:
                self.checkpoints.set_aside(agreement.last_step)
            raise

    def _note(self, written: Written | None) -> None:
        if written is not None:
            times = {"stall_ms": round(written.stall_ms, 3), "write_s": round(written.write_s, 3)}
            self.record.event("checkpoint", step=written.step, folder=written.folder.name, **times)

    def stop_code(self) -> int:
        """0, TARGET_REACHED, STOP_REQUESTED (a signal to rank 0) or PHASE_REACHED; the same on all training ranks."""
        if self._stop is None:
            self._stop = StopSignal(self.ranks.train_control_group, self._decide_to_stop)
        self._go_on_comparing()
        return self._stop.poll()

    def _decide_to_stop(self) -> int:
        if self.evaluator.poll():
            return TARGET_REACHED
        if self.stop_asked:
            return STOP_REQUESTED
        elsewhere = self.ranks.layout.num_eval_ranks > 0
        return PHASE_REACHED if elsewhere and self.schedule.goal_reached(self.evaluator.last) else 0

    def between_updates(self, step: int) -> bool:
        """Whether no gradient is held after iteration ``step``: only then can a run be left and continued."""
        return step % self.config.training.gradient_accumulation_steps == 0

    def phase_ends(self, step: int, code: int) -> bool:
        """Whether another phase follows iteration ``step``; the same on all training ranks."""
        if not self.between_updates(step):
            return False
        here = self.ranks.layout.num_eval_ranks == 0 and step % self.config.training.val_every_iters == 0
        due = step == self.schedule.last_step or code == PHASE_REACHED
        return self.schedule.follows(step) and (due or (here and self.schedule.goal_reached(self.evaluator.last)))

    def end_polling(self) -> None:
        """Wait for the last exchange of stop codes; an orderly end only."""
        if self._stop is not None:
            self._stop.close()
            self._stop = None

    def let_go_with(self, ending: Ending) -> None:
        """Hand over everything this run holds; what is entered last goes first."""
        ending.add("the record", self.record.close)
        ending.add("the screen", self.progress.close)
        ending.add("the checkpoint under way", self.checkpoints.close)
        ending.add("captured steps", lambda: self.step.close(), after_errors=False)
        ending.add("captured evaluations", self.evaluator.release_device, after_errors=False)
        ending.add("evaluation workers", self.evaluator.close)
        ending.add("page-locked batches", lambda: self.loader.release_memory(), after_errors=False)
        ending.add("loader workers", lambda: self.loader.close())


def assemble(schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending) -> Run:
    """Build a training rank's run, up to the moment before warm-up; ``ending`` lets go of it.

    Raises:
        ConfigError, CheckpointError: the configuration, the launcher or a checkpoint do not fit.
    """
    check_shares(schedule.config.model, schedule.config.parallel.dap_size)
    beginning = begin(schedule, options, ranks, ending)
    config, start = schedule.config, beginning.start
    events, checkpoints, run_dir = beginning.events, beginning.checkpoints, config.run.run_dir
    ops = choose_operations(config, ranks)
    model = build_model(config, initialisation_seed(start.seed), ranks)
    use_operations(model, ops)
    apply_dap(model, ranks.dap_group)
    exchange = connect_replica(config, ranks)
    if (group := ranks.dap_group) is not None:
        ending.add("memory that GPUs share", lambda: use_direct(group, None), after_errors=False)
    optimizer = build_optimizer(config, model, ranks, ops, any_phase(schedule.base, adds_gradients))
    names = parameter_names(model)
    digest = load_state(config, start, optimizer, names, ranks)
    settings = feature_settings(config)
    log_header(events, config, ranks, start.seed, model, digest)
    continue_counting(events, schedule)
    record = Record(run_dir, ranks.is_root, start.state.iteration if start.state else None)
    if ranks.is_root:
        checkpoints.set_aside(start.first_step - 1)
        join_left_parts(run_dir, start)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_resolved(run_dir / CONFIG_FILE, schedule.base)
        record.run(**run_header(config, ranks, start.seed, model, ops, exchange))
        if config.run.checkpoint_every_iters:
            checkpoints.prepare(optimizer.flat, optimizer, names)
    record.event("placement", **beginning.placement.facts())
    progress = make_progress(config, ranks)
    progress.note(beginning.placement.text)
    progress.note(f"operations: {'plain PyTorch' if ops is REFERENCE else 'Triton kernels'} on {ranks.device.type}")
    step = build_step(config, model, optimizer, ranks)
    evaluator = make_evaluator(config, ranks, settings, optimizer, events, record, progress, ops, schedule)
    loader = make_loader(config, ranks, settings)
    run = Run(
        schedule=schedule,
        ranks=ranks,
        seed=start.seed,
        model=model,
        optimizer=optimizer,
        step=step,
        loader=loader,
        evaluator=evaluator,
        events=events,
        record=record,
        progress=progress,
        checkpoints=checkpoints,
        result_file=start.result_file,
        first_step=start.first_step,
        left_over=start.left_over,
        settings=settings,
    )
    run.let_go_with(ending)
    catch_stop_signals(run)
    return run


def join_left_parts(run_dir: Path, start: Start) -> None:
    """On a resume: the logs of a run with evaluation ranks that ended before they were joined."""
    try:
        for joined in merge_left_parts(run_dir, besides=start.result_file) if start.folder else []:
            log.warning("%s: joined from the parts that the run before left", joined)
    except LogError as error:  # a damaged log of the past does not keep a run from going on
        log.warning("%s", error)


def make_loader(config: Config, ranks: Ranks, settings: FeatureSettings) -> TrainLoader | SharedLoader:
    """The training loader of one rank; in a DAP group the first rank's workers build for all."""
    d, grouped = config.data, ranks.dap_group is not None
    page_locked, own = d.pin_memory and ranks.device.type == "cuda", None
    if ranks.layout.dap_index(ranks.rank) == 0:
        own = TrainLoader(
            d.store_dir,
            settings,
            num_workers=d.num_workers,
            prefetch_factor=d.prefetch_factor,
            in_order=d.dataloader == "pt",
            pin_memory=page_locked and not grouped,
            limits_s=batch_limits_s(config),
        )
    if grouped or own is None:
        return SharedLoader(own, ranks, settings, config.local_batch_size, page_locked)
    return own


def enter_next_phase(run: Run, step: int) -> bool:
    """Continue with the next phase after ``step``; False, and a checkpoint, if that needs other ranks."""
    stays = run.schedule.continues_here()
    run.schedule.advance(step)
    run.progress.note(f"phase {run.schedule.name} after step {step}, {run.schedule.samples(step)} samples")
    run.record.event("phase", step=step, phase=run.schedule.name, samples=run.schedule.samples(step))
    if not stays:
        run.save(step)
        return False
    config = run.config
    ops = choose_operations(config, run.ranks)
    use_operations(run.model, ops)
    run.evaluator.use(ops)
    run.optimizer.config, run.optimizer.ops = config.training, ops
    run.step.close()
    run.step = build_step(config, run.model, run.optimizer, run.ranks, run.step.reducer)
    continue_counting(run.events, run.schedule)
    run.left_over = run.samples_left_over(step)
    run.loader.close()
    run.loader.release_memory()
    run.loader = make_loader(config, run.ranks, run.settings)
    run.start_loader(step + 1)
    return True


def catch_stop_signals(run: Run) -> None:
    """SIGTERM and SIGUSR1 ask for an orderly stop after the current step, with a checkpoint."""

    def ask(signum: int, _: Any) -> None:
        run.stop_asked = True
        log.warning("%s: signal %s: stopping after this step", run.ranks.describe(), signal.Signals(signum).name)

    for wanted in STOP_SIGNALS:
        signal.signal(wanted, ask)


def make_evaluator(
    config: Config,
    ranks: Ranks,
    settings: FeatureSettings,
    optimizer: Optimizer,
    events: Events,
    record: Record,
    progress: Progress,
    ops: Operations,
    schedule: Schedule,
) -> Evaluator:
    """The evaluator of a training rank."""
    if ranks.layout.num_eval_ranks:
        return EvaluationElsewhere(config, ranks, optimizer, record, progress, schedule)
    scorer = ChainScorer(config, ranks, settings, ops, ranks.train_group if ranks.layout.world_size > 1 else None)
    return EvaluationHere(config, scorer, optimizer, events, record, progress, schedule)
