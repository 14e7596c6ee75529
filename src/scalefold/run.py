"""Assembles a run from its configuration: ranks, model, optimizer, data, log, record, checkpoints, evaluation."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalefold.checkpoint import RunState
from scalefold.checkpoint_writer import CheckpointWriter, Written
from scalefold.compile import GraphedTrainStep, TrainStep
from scalefold.config import Config
from scalefold.data import selection
from scalefold.data.features import FeatureSettings
from scalefold.data.loader import Batch, TrainLoader, to_device
from scalefold.data.sampler import Delivered, TrainingSampler, initialisation_seed
from scalefold.data.shared_loader import SharedLoader
from scalefold.data.store import Store
from scalefold.data.synthetic import synthetic_batch
from scalefold.ending import Ending
from scalefold.errors import ConfigError, LogError, TrainingError
from scalefold.evaluators import (
    ChainScorer,
    Evaluator,
    accept_connection,
    make_evaluator,
    serve_evaluations,
)
from scalefold.fuse import can_fuse, fuse_model, fuse_terms
from scalefold.header import log_header, run_header, write_resolved
from scalefold.kernels import REFERENCE, Operations, operations, use_operations
from scalefold.launch.placement import Placement, check_placement
from scalefold.loss import loss_terms, total_of_terms
from scalefold.mlperf.events import Events, merge_left_parts
from scalefold.model.alphafold import AlphaFold, is_fp32_parameter, select_slice
from scalefold.optim import FlatParameters, Optimizer, learning_rate
from scalefold.parallel.agreement import Agreement
from scalefold.parallel.collectives import use_direct
from scalefold.parallel.dap import apply_dap, check_shares, gradient_scale
from scalefold.parallel.ddp import GradientReducer
from scalefold.parallel.ranks import Ranks
from scalefold.parallel.snapshots import PHASE_REACHED, STOP_REQUESTED, TARGET_REACHED, StopSignal
from scalefold.phases import Position, Schedule, any_phase
from scalefold.report.console import Progress
from scalefold.report.record import Record
from scalefold.resume import CONFIG_FILE, RunOptions, Start, agree_on_start, load_state
from scalefold.stop_signals import STOP_SIGNALS, leave_stopping_to_others

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


def check_places(config: Config) -> None:
    """See that store and initial checkpoint are there, before ranks meet, devices are touched and a log begins.

    Nothing is opened: the data set stays closed until ``run_start``.

    Raises:
        ConfigError: naming the key.
    """
    store, checkpoint = config.data.store_dir, config.training.init_checkpoint
    if not store.is_dir():
        raise ConfigError(f"data.store_dir: {store}: no such folder; `scalefold prepare` writes it")
    if checkpoint is not None and not checkpoint.is_file():
        raise ConfigError(f"training.init_checkpoint: {checkpoint}: no such file; `scalefold download` fetches it")


def prepare_process(config: Config) -> None:
    """Settings that must precede the first use of a device: threads, matrix precision, determinism."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # the watch names the collective that does not end
    if config.execution.cpu_threads:
        torch.set_num_threads(config.execution.cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = config.execution.precision != "fp32"
    torch.backends.cudnn.allow_tf32 = config.execution.precision != "fp32"
    if config.execution.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@dataclass(frozen=True)
class Beginning:
    """What every rank of a run does first: where it starts, and the log of this rank."""

    start: Start
    events: Events
    checkpoints: CheckpointWriter
    placement: Placement


def begin(schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending) -> Beginning:
    """Look where ranks are, agree on the start and move the schedule there; logs ``init_start`` after a barrier.

    Raises:
        CheckpointError, ConfigError, LogError: see ``check_placement`` and ``agree_on_start``.
    """
    r, p = schedule.base.run, schedule.config.parallel
    placement = check_placement(ranks, p.world_size // p.nodes)
    checkpoints = CheckpointWriter(r.run_dir / "checkpoints", r.keep_checkpoints, r.archive_every_iters)
    start = agree_on_start(schedule, options, ranks, checkpoints)
    ranks.barrier()
    events = open_events(start.result_file, ranks, options)
    ending.add("the log", events.close)
    ranks.watch.before_exit = events.abort
    events.init_start()
    return Beginning(start, events, checkpoints, placement)


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


def continue_counting(events: Events, schedule: Schedule) -> None:
    """Let the log count samples across phases and changes of the batch."""
    position = schedule.position
    if position != Position():
        events.change_batch(position.steps_before, position.samples_before, schedule.config.training.global_batch_size)


def evaluate_elsewhere(schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending) -> None:
    """An evaluation rank's whole life, in step with the barriers of the training ranks; ``ending`` lets go of it."""
    leave_stopping_to_others()
    beginning = begin(schedule, options, ranks, ending)
    config, events = schedule.config, beginning.events
    settings = feature_settings(config)
    ops = choose_operations(config, ranks)
    flat = build_optimizer(config, build_model(config, 0, ranks), ranks, ops).flat
    scorer = ChainScorer(config, ranks, settings, ops, ranks.eval_group)
    ending.add("captured evaluations", scorer.model.close, after_errors=False)
    ending.add("evaluation workers", scorer.close)
    log_header(events, config, ranks, beginning.start.seed, scorer.model.model, None)
    continue_counting(events, schedule)
    accept_connection(ranks)
    ranks.watch.at("warm-up")
    scorer.spawn()
    scorer.warm_up(lambda text: ranks.watch.at(f"warm-up, {text}"))
    ranks.barrier()
    events.init_stop()
    ranks.barrier()
    events.run_start()
    ranks.barrier()
    store = Store(config.data.store_dir)
    scorer.open_data(evaluation_lengths(config, store))
    store.close()
    serve_evaluations(config, ranks, scorer, flat, events)
    events.close()  # whoever joins the parts of the log must find all of this one


def make_progress(config: Config, ranks: Ranks) -> Progress:
    """The screen of rank 0; every other rank prints to nowhere."""
    stream = None if ranks.is_root else open(os.devnull, "w")  # noqa: SIM115
    return Progress(config.training.target_avg_lddt_ca_value, config.training.num_train_iters, stream)


def open_events(result_file: Path, ranks: Ranks, options: RunOptions) -> Events:
    """The log of this rank: rank 0 and, with separate evaluation ranks, the first of those write."""
    separate = ranks.layout.num_eval_ranks > 0
    if ranks.is_root:
        return Events(result_file, role="training" if separate else "single", instance=options.instance)
    if ranks.is_eval_root:
        return Events(result_file, role="evaluation", instance=options.instance)
    return Events.silent()


def choose_operations(config: Config, ranks: Ranks) -> Operations:
    """The operations table that configuration, device and precision allow."""
    wanted = config.execution.kernels
    if wanted == "triton" and ranks.device.type == "cpu":
        raise ConfigError("execution.kernels: triton needs a CUDA device; use auto or reference")
    on_device = wanted != "reference" and ranks.device.type == "cuda"
    return operations(wanted if on_device else "reference")


def connect_replica(config: Config, ranks: Ranks) -> str:
    """How the ranks of a DAP group exchange: ``none``, ``library``, or ``direct`` where they may and can."""
    if ranks.dap_group is None:
        return "none"
    if ranks.device.type != "cuda" or config.execution.dap_exchange == "library":
        return "library"
    try:
        from scalefold.parallel.direct import connect
    except ImportError:  # no Triton: the operations have said so
        return "library"
    assert ranks.dap_control_group is not None
    return "direct" if connect(ranks.dap_group, ranks.dap_control_group, ranks.device) else "library"


def build_model(config: Config, seed: int, ranks: Ranks) -> AlphaFold:
    """The model on this rank's device, in training mode, fp32."""
    model = AlphaFold(config.model, seed=seed % 2**63).to(ranks.device).train()
    model.checkpoint_blocks = config.execution.activation_checkpointing
    return model


def compute_dtype(config: Config, name: str) -> torch.dtype:
    """Type in which a parameter computes: bf16 for the trunk in bf16 runs, else fp32."""
    low = config.execution.precision == "bf16" and not is_fp32_parameter(name)
    return torch.bfloat16 if low else torch.float32


def adds_gradients(config: Config) -> bool:
    """Whether an update adds up the gradients of several backward passes."""
    return config.local_batch_size > config.micro_batch_size or config.training.gradient_accumulation_steps > 1


def build_optimizer(
    config: Config, model: AlphaFold, ranks: Ranks, ops: Operations, in_parts: bool | None = None
) -> Optimizer:
    """Flat buffers over the model's parameters, and the optimizer on them.

    Gradients are collected in fp32 if ``in_parts`` (by default: if this configuration adds some up), else in their
    own type.
    """
    layout = ranks.layout
    in_parts = adds_gradients(config) if in_parts is None else in_parts
    flat = FlatParameters(
        model,
        ranks.device,
        compute_dtype=lambda name: compute_dtype(config, name),
        gradient_scale=lambda name: gradient_scale(name, layout.dp_size, layout.dap_size),
        gradient_dtype=torch.float32 if in_parts else None,
    )
    return Optimizer(flat, config.training, ops)


def build_step(
    config: Config, model: AlphaFold, optimizer: Optimizer, ranks: Ranks, reducer: GradientReducer | None = None
) -> TrainStep:
    """The training step, fused and captured in CUDA graphs where device and configuration allow.

    A model has one ``reducer`` for life, because that hangs on its parameters; None makes it.
    """
    if config.execution.compile and ranks.device.type == "cuda" and can_fuse(ranks.device):
        fuse_model(model)
        terms = fuse_terms(loss_terms(config.loss))  # the compiler sees through plain operations only
    else:
        terms = loss_terms(config.loss, optimizer.ops)

    def objective(batch: Mapping[str, Tensor], passes: int) -> tuple[Tensor, dict[str, Tensor]]:
        return total_of_terms(model(batch, passes), select_slice(batch, passes - 1), terms)

    graphed = config.execution.cuda_graphs and ranks.device.type == "cuda"
    group = ranks.train_group if ranks.layout.num_train_ranks > 1 else None
    return (GraphedTrainStep if graphed else TrainStep)(
        objective,
        optimizer,
        reducer or GradientReducer(optimizer.flat, group),
        config.micro_batch_size,
        config.training.gradient_accumulation_steps,
        group,
    )


def parameter_names(model: nn.Module) -> list[str]:
    """Names in registration order: the order of the checkpoint."""
    return [name for name, _ in model.named_parameters()]


def feature_settings(config: Config) -> FeatureSettings:
    """The feature pipeline's view of the configuration."""
    d = config.data
    return FeatureSettings(
        train_sequence_crop_size=d.train_sequence_crop_size,
        max_msa_clusters=d.max_msa_clusters,
        max_extra_msa=d.max_extra_msa,
        max_templates=d.max_templates,
        templates_enabled=config.model.templates_enabled,
        num_recycling_iters=d.num_recycling_iters,
        shuffle_top_k_prefiltered=d.shuffle_top_k_prefiltered,
        masked_msa_replace_fraction=d.masked_msa_replace_fraction,
        masked_msa_profile_prob=d.masked_msa_profile_prob,
        masked_msa_same_prob=d.masked_msa_same_prob,
        masked_msa_uniform_prob=d.masked_msa_uniform_prob,
        use_clamped_fape_probability=d.use_clamped_fape_probability,
        eval_length_multiple=d.eval_length_multiple,
    )


def evaluation_lengths(config: Config, store: Store) -> dict[str, int]:
    """Evaluation chains with their lengths: the store's own list if it has one, else the benchmark's CAMEO list."""
    d = config.data
    own = sorted(d.store_dir.glob("evaluation_targets*"))
    rows = selection.evaluation_set(
        store.table,
        selection.read_evaluation_file(own[0] if own else None),
        d.val_min_cameo_submission_date,
        d.val_max_cameo_submission_date,
        d.val_max_sequence_length,
    )
    return {store.name(int(row)): int(store.table.length[row]) for row in rows}


def catch_stop_signals(run: Run) -> None:
    """SIGTERM and SIGUSR1 ask for an orderly stop after the current step, with a checkpoint."""

    def ask(signum: int, _: Any) -> None:
        run.stop_asked = True
        log.warning("%s: signal %s: stopping after this step", run.ranks.describe(), signal.Signals(signum).name)

    for wanted in STOP_SIGNALS:
        signal.signal(wanted, ask)
