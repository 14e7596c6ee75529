"""Everything one run needs to know, and which combinations of keys cannot run."""

from pydantic import model_validator

from scalefold.config.sections import (
    DataConfig,
    ExecutionConfig,
    LaunchConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    Section,
    SubmissionConfig,
    TrainingConfig,
)

MAX_PROFILED_STEPS = 100
_PHASE_KEYS = {
    "training": ("global_batch_size", "opt_base_learning_rate"),
    "execution": ("kernels",),
    "parallel": ("nodes", "dap_size", "num_eval_ranks"),
}


class Config(Section):
    """Everything one run needs to know."""

    system: str
    description: str = ""
    expected_minutes: str = ""
    expected_peak_gib: str = ""
    submission: SubmissionConfig = SubmissionConfig()
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    execution: ExecutionConfig = ExecutionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    run: RunConfig = RunConfig()
    launch: LaunchConfig = LaunchConfig()
    phases: tuple[PhaseConfig, ...] = ()

    @model_validator(mode="after")
    def check_combinations(self) -> "Config":
        """Refuse combinations that cannot run, before any GPU is touched."""
        problems = phase_problems(self) if self.phases else combination_problems(self)
        for problem in problems:
            raise ValueError(problem)
        return self

    def in_phase(self, index: int) -> "Config":
        """This configuration with the values of phase ``index`` in place."""
        phase, sections = self.phases[index], {}
        for section, keys in _PHASE_KEYS.items():
            given = {key: getattr(phase, key) for key in keys if getattr(phase, key) is not None}
            sections[section] = getattr(self, section).model_copy(update=given)
        return self.model_copy(update=sections)

    @property
    def local_batch_size(self) -> int:
        """Samples per data-parallel replica and iteration."""
        return self.training.global_batch_size // self.parallel.dp_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of the local batch that are computed at once; gradients of the rest are added one after another."""
        return self.execution.micro_batch_size or self.local_batch_size


def combination_problems(config: Config) -> list[str]:
    """Human sentences, one per impossible combination of keys."""
    p, t, d = config.parallel, config.training, config.data
    problems = []
    if p.num_train_ranks < p.dap_size or p.num_train_ranks % p.dap_size:
        problems.append(
            f"parallel: {p.world_size} ranks minus num_eval_ranks {p.num_eval_ranks} must be a positive "
            f"multiple of dap_size {p.dap_size}"
        )
    elif p.nodes > 1 and p.world_size // p.nodes % p.dap_size:
        problems.append(
            f"parallel.dap_size {p.dap_size} must divide the {p.world_size // p.nodes} ranks of a node: the ranks of a "
            "group share a sample through the node's memory"
        )
    elif t.global_batch_size % p.dp_size:
        problems.append(
            f"training.global_batch_size {t.global_batch_size} must be a multiple of the {p.dp_size} "
            "data-parallel replicas (ranks that train / dap_size)"
        )
    elif config.local_batch_size % config.micro_batch_size:
        problems.append(
            f"execution.micro_batch_size {config.micro_batch_size} must divide the local batch of "
            f"{config.local_batch_size} samples (training.global_batch_size / data-parallel replicas)"
        )
    k = t.gradient_accumulation_steps
    for name, value in (
        ("training.val_every_iters", t.val_every_iters),
        ("run.checkpoint_every_iters", config.run.checkpoint_every_iters),
    ):
        if value % k:
            problems.append(f"{name} {value} must be a multiple of training.gradient_accumulation_steps {k}")
    if config.run.archive_every_iters % (config.run.checkpoint_every_iters or 1) or (
        config.run.archive_every_iters and not config.run.checkpoint_every_iters
    ):
        problems.append("run.archive_every_iters must be a multiple of run.checkpoint_every_iters")
    if d.masked_msa_profile_prob + d.masked_msa_same_prob + d.masked_msa_uniform_prob > 1.0:
        problems.append("data.masked_msa_*_prob: the three probabilities add up to more than 1")
    if d.dataloader == "pq" and config.execution.deterministic:
        problems.append(
            "execution.deterministic needs data.dataloader: pt (pq delivers samples in the order of readiness)"
        )
    return problems + profile_problems(config)


def profile_problems(config: Config) -> list[str]:
    """What cannot be profiled: steps or ranks that the run does not have, or more than memory holds."""
    profile, p, last = config.run.profile, config.parallel, config.training.num_train_iters
    where, problems = f"run.profile.steps {profile.steps}", []
    if profile.steps is None:
        return []
    if not profile.window or profile.window[0] < 1:
        problems.append(f"{where}: must be FIRST-LAST or one step, counted from 1")
    elif profile.window[-1] > last:
        problems.append(f"{where}: the run ends after step {last} (training.num_train_iters)")
    elif len(profile.window) > MAX_PROFILED_STEPS:
        problems.append(f"{where}: at most {MAX_PROFILED_STEPS} steps, the profiler keeps all of them in memory")
    for rank in profile.ranks:
        if not 0 <= rank < p.world_size:
            problems.append(f"run.profile.ranks: rank {rank} is not there, the run has ranks 0 to {p.world_size - 1}")
        elif rank >= p.num_train_ranks:
            problems.append(f"run.profile.ranks: rank {rank} only evaluates; ranks 0 to {p.num_train_ranks - 1} train")
    if len(set(profile.ranks)) != len(profile.ranks) or not profile.ranks:
        problems.append("run.profile.ranks: must name one rank or more, each once")
    return problems


def phase_problems(config: Config) -> list[str]:
    """The same for every phase, and for the order of the phases."""
    problems, last_step = [], 0
    for index, phase in enumerate(config.phases):
        where = f"phases.{index} ({phase.name})"
        problems += [f"{where}: {problem}" for problem in combination_problems(config.in_phase(index))]
        if index + 1 < len(config.phases) and phase.until_step is None and phase.until_lddt_ca is None:
            problems.append(f"{where}: needs until_step or until_lddt_ca, because a phase follows")
        if phase.until_step is not None and phase.until_step <= last_step:
            problems.append(f"{where}: until_step {phase.until_step} must be above {last_step} of an earlier phase")
        if phase.until_step is not None and phase.until_step % config.training.val_every_iters:
            problems.append(f"{where}: until_step must be a multiple of training.val_every_iters: phases evaluate last")
        last_step = phase.until_step or last_step
    return problems
