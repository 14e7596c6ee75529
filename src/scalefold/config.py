"""One YAML file per system becomes one strict, frozen ``Config``; every value knows where it came from.

A file may name one parent with ``base:``; its keys override the parent's, ``key.sub=value`` overrides from the command
line override both. Unknown keys, wrong types and impossible combinations raise ``ConfigError`` with file and line.
Keys take the word of the MLPerf log wherever one exists, so that log and YAML read alike.
"""

import difflib
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from scalefold.errors import ConfigError
from scalefold.textfile import read_text
from scalefold.yamlfile import parse_yaml

MAX_PROFILED_STEPS = 100


class Section(BaseModel):
    """A strict, immutable part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


class TemplateConfig(Section):
    """Template pair stack and pointwise attention (Supplement Algorithms 16 and 17)."""

    num_blocks: int = Field(default=2, ge=1)
    c_hidden_tri_att: int = Field(default=16, ge=1)
    num_heads_tri: int = Field(default=4, ge=1)
    c_hidden_tri_mul: int = Field(default=64, ge=1)
    transition_n: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.25, ge=0.0, lt=1.0)
    c_hidden_pointwise: int = Field(default=16, ge=1)
    num_heads_pointwise: int = Field(default=4, ge=1)


class EvoformerConfig(Section):
    """One stack of Evoformer-like blocks (Supplement Algorithms 6 and 18)."""

    num_blocks: int = Field(default=48, ge=1)
    c_hidden_msa_att: int = Field(default=32, ge=1)
    num_heads_msa: int = Field(default=8, ge=1)
    c_hidden_opm: int = Field(default=32, ge=1)
    c_hidden_tri_att: int = Field(default=32, ge=1)
    num_heads_tri: int = Field(default=4, ge=1)
    c_hidden_tri_mul: int = Field(default=128, ge=1)
    transition_n: int = Field(default=4, ge=1)
    msa_dropout: float = Field(default=0.15, ge=0.0, lt=1.0)
    pair_dropout: float = Field(default=0.25, ge=0.0, lt=1.0)


class ExtraMsaConfig(EvoformerConfig):
    """The extra MSA stack: the same block with fewer, narrower heads."""

    num_blocks: int = Field(default=4, ge=1)
    c_hidden_msa_att: int = Field(default=8, ge=1)


class StructureConfig(Section):
    """Structure module (Supplement Algorithms 20 to 24); weights are shared by its iterations."""

    num_blocks: int = Field(default=8, ge=1)
    c_hidden_ipa: int = Field(default=16, ge=1)
    num_heads_ipa: int = Field(default=12, ge=1)
    num_qk_points: int = Field(default=4, ge=1)
    num_v_points: int = Field(default=8, ge=1)
    c_hidden_angle_resnet: int = Field(default=128, ge=1)
    num_angle_resnet_blocks: int = Field(default=2, ge=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)


class HeadsConfig(Section):
    """Auxiliary heads (Supplement 1.9.6 to 1.9.10)."""

    c_hidden_plddt: int = Field(default=128, ge=1)
    num_plddt_bins: int = Field(default=50, ge=2)
    num_distogram_bins: int = Field(default=64, ge=2)
    num_msa_classes: int = 23
    num_atoms: int = 37


class ModelConfig(Section):
    """Sizes of the model; the defaults are the benchmark's 93,229,082 parameters."""

    c_m: int = Field(default=256, ge=1)
    c_z: int = Field(default=128, ge=1)
    c_s: int = Field(default=384, ge=1)
    c_t: int = Field(default=64, ge=1)
    c_e: int = Field(default=64, ge=1)
    relpos_k: int = Field(default=32, ge=1)
    templates_enabled: bool = True
    template: TemplateConfig = TemplateConfig()
    extra_msa: ExtraMsaConfig = ExtraMsaConfig()
    evoformer: EvoformerConfig = EvoformerConfig()
    structure: StructureConfig = StructureConfig()
    heads: HeadsConfig = HeadsConfig()


class LossConfig(Section):
    """Weights of the loss terms; the benchmark fixes all of them."""

    fape_loss_weight: float = 1.0
    fape_loss_backbone_weight: float = 0.5
    fape_loss_sidechain_weight: float = 0.5
    supervised_chi_loss_weight: float = 1.0
    distogram_loss_weight: float = 0.3
    masked_msa_loss_weight: float = 2.0
    plddt_loss_weight: float = 0.01
    experimentally_resolved_loss_weight: float = 0.0
    violation_loss_weight: float = 0.0


class ExecutionConfig(Section):
    """How the mathematics is executed; nothing here changes what is computed beyond rounding.

    ``micro_batch_size``: samples computed at once; None means the whole local batch. ``compile``: fuse embedders,
    structure module, heads and losses of the training step with Inductor, on CUDA devices. ``dap_exchange``: the GPUs
    of a DAP group read each other's memory where they can (auto), or exchange by NCCL (library).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    cuda_graphs: bool = True
    compile: bool = False
    dap_exchange: Literal["auto", "library"] = "auto"
    activation_checkpointing: bool = False
    deterministic: bool = False
    micro_batch_size: int | None = Field(default=None, ge=1)
    cpu_threads: int | None = Field(default=None, ge=1)
    eval_precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    warm_up: bool = True


class ParallelConfig(Section):
    """Who does what: nodes x gpus_per_node ranks, the last ``num_eval_ranks`` of which evaluate.

    ``gpu`` (for example H100-SXM-80GB) and ``cores_per_node`` tell ``scalefold plan`` what a node is made of.
    """

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=1, ge=0)
    ranks_per_node: int | None = Field(default=None, ge=1)
    gpu: str = ""
    cores_per_node: int | None = Field(default=None, ge=1)
    dap_size: Literal[1, 2, 4, 8] = 1
    num_eval_ranks: int = Field(default=0, ge=0)
    eval_queue_depth: int = Field(default=1, ge=1)
    when_evaluation_is_behind: Literal["wait", "skip"] = "wait"
    startup_timeout_s: int = Field(default=1800, ge=1)
    step_timeout_s: int = Field(default=600, ge=1)

    @property
    def world_size(self) -> int:
        """Number of processes of one run: one per GPU, or ``ranks_per_node`` per node on CPU systems."""
        return self.nodes * (self.ranks_per_node or max(self.gpus_per_node, 1))

    @property
    def num_train_ranks(self) -> int:
        """Processes that train."""
        return self.world_size - self.num_eval_ranks

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas: training ranks over ranks per replica."""
        return self.num_train_ranks // self.dap_size


class DataConfig(Section):
    """Where samples come from and how a record becomes features."""

    store_dir: Path = Path("data/store")
    dataloader: Literal["pt", "pq"] = "pt"
    num_workers: int = Field(default=4, ge=0)
    prefetch_factor: int = Field(default=4, ge=1)
    num_eval_workers: int = Field(default=2, ge=0)
    pin_memory: bool = True
    train_max_pdb_release_date: str = Field(default="2021-09-16", pattern=r"^\d{4}-\d{2}-\d{2}$")
    val_min_cameo_submission_date: str = Field(default="2021-09-17", pattern=r"^\d{4}-\d{2}-\d{2}$")
    val_max_cameo_submission_date: str = Field(default="2021-12-11", pattern=r"^\d{4}-\d{2}-\d{2}$")
    val_max_sequence_length: int = Field(default=700, ge=1)
    eval_length_multiple: int = Field(default=64, ge=1)
    filter_by_alignments: bool = False
    train_sequence_crop_size: int = Field(default=256, ge=1)
    max_msa_clusters: int = Field(default=124, ge=1)
    max_extra_msa: int = Field(default=1024, ge=1)
    max_templates: int = Field(default=4, ge=0)
    num_recycling_iters: int = Field(default=3, ge=0)
    shuffle_top_k_prefiltered: int = Field(default=20, ge=0)
    masked_msa_replace_fraction: float = Field(default=0.15, ge=0.0, le=1.0)
    masked_msa_profile_prob: float = Field(default=0.1, ge=0.0, le=1.0)
    masked_msa_same_prob: float = Field(default=0.1, ge=0.0, le=1.0)
    masked_msa_uniform_prob: float = Field(default=0.1, ge=0.0, le=1.0)
    use_clamped_fape_probability: float = Field(default=0.9, ge=0.0, le=1.0)


class TrainingConfig(Section):
    """The optimisation problem; names and defaults are those of the MLPerf log.

    ``global_batch_size`` counts samples per (micro-)iteration over all data-parallel replicas and does not include
    gradient accumulation; ``val_every_iters`` and ``num_train_iters`` count the same iterations, as the reference does.
    """

    seed: int | None = None
    global_batch_size: int = Field(default=128, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    num_train_iters: int = Field(default=2000, ge=1)
    val_every_iters: int = Field(default=40, ge=1)
    target_avg_lddt_ca_value: float = Field(default=0.8, gt=0.0, le=1.0)
    init_checkpoint: Path | None = None
    init_checkpoint_sha256sum: str | None = None
    opt_base_learning_rate: float = Field(default=1e-3, ge=0.0)
    opt_learning_rate_warmup_init: float = Field(default=1e-5, ge=0.0)
    opt_learning_rate_warmup_steps: int = Field(default=0, ge=0)
    opt_adam_beta_1: float = Field(default=0.9, ge=0.0, lt=1.0)
    opt_adam_beta_2: float = Field(default=0.999, ge=0.0, lt=1.0)
    opt_adam_epsilon: float = Field(default=1e-6, gt=0.0)
    opt_gradient_clip_norm: float = Field(default=0.1, gt=0.0)
    swa_decay_rate: float = Field(default=0.9, ge=0.0, lt=1.0)


class ProfileConfig(Section):
    """A window in which training ranks write what they and their GPUs do; without ``steps`` there is none."""

    steps: str | None = Field(default=None, pattern=r"^\d{1,9}(-\d{1,9})?$")
    ranks: tuple[int, ...] = (0,)

    @field_validator("steps", mode="before")
    @classmethod
    def take_one_step_as_text(cls, value: Any) -> Any:
        """``20`` is a number in YAML, ``20-24`` is text."""
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def window(self) -> range:
        """The iterations, in order; empty without ``steps``."""
        if self.steps is None:
            return range(0)
        first, _, last = self.steps.partition("-")
        return range(int(first), int(last or first) + 1)


class RunConfig(Section):
    """What a run leaves behind: the newest ``keep_checkpoints``, and for good one every ``archive_every_iters``.

    ``telemetry``: every cycle, the ranks' times and what their GPUs say of themselves, into one file per node.
    """

    run_dir: Path = Path("runs/run")
    log_every_iters: int = Field(default=1, ge=1)
    checkpoint_every_iters: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    archive_every_iters: int = Field(default=0, ge=0)
    telemetry: bool = True
    profile: ProfileConfig = ProfileConfig()


class SubmissionConfig(Section):
    """Facts about the submitter that the log must state; placeholders are refused by ``scalefold check``."""

    org: str = ""
    platform: str = ""
    division: Literal["closed", "open"] = "closed"
    status: Literal["cloud", "onprem", "preview", "research"] = "onprem"


class LaunchConfig(Section):
    """How the job starts under Slurm; see ``scalefold launch``.

    ``nics``: one network card per local rank; empty leaves the choice to NCCL. ``cache_dir``: node-local folder for
    compile caches, expanded by the shell; ``compiled_dir``: kernels of ``scalefold compile`` that a node's cache begins
    with. ``network_check_gb_per_s``: bus bandwidth that an all-reduce over all ranks must reach before the first run; 0
    checks the sums only, None checks nothing. ``gpu_request``: how the job asks for GPUs; none where Slurm knows of
    none. ``requeue``: continue from the checkpoint after the time limit and after the loss of a rank or node, this
    ``restarts`` times from one checkpoint; on ``spare_nodes`` of the allocation, else in the queue for other nodes.
    """

    partition: str | None = None
    account: str | None = None
    sbatch_options: tuple[str, ...] = ()
    time_limit_min: int = Field(default=60, ge=1)
    mpi: Literal["none", "pmix", "pmi2"] = "none"
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    venv: str | None = None
    modules: tuple[str, ...] = ()
    repeats: int = Field(default=1, ge=1)
    instances: int = Field(default=1, ge=1)
    exclusive: bool = True
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    spare_nodes: int = Field(default=0, ge=0)
    cpus_per_task: int | None = Field(default=None, ge=1)
    numa_binding: Literal["none", "socket", "reversed"] = "socket"
    nics: tuple[str, ...] = ()
    drop_caches_command: str | None = None
    network_check_gb_per_s: float | None = Field(default=None, ge=0.0)
    cache_dir: str = "/tmp/scalefold-${USER:-cache}"
    compiled_dir: str | None = None
    environment: dict[str, str] = {}
    requeue: bool = True
    restarts: int = Field(default=3, ge=0)
    signal_grace_s: int = Field(default=120, ge=0)


class PhaseConfig(Section):
    """A part of a long run: what differs from the rest of the file, and when it ends (at whatever comes first)."""

    name: str
    until_step: int | None = Field(default=None, ge=1)
    until_lddt_ca: float | None = Field(default=None, gt=0.0, lt=1.0)
    global_batch_size: int | None = Field(default=None, ge=1)
    opt_base_learning_rate: float | None = Field(default=None, ge=0.0)
    kernels: Literal["auto", "triton", "reference"] | None = None
    nodes: int | None = Field(default=None, ge=1)
    dap_size: Literal[1, 2, 4, 8] | None = None
    num_eval_ranks: int | None = Field(default=None, ge=0)


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


@dataclass(frozen=True)
class Origin:
    """Where a value was written: file and line, or the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration with the origin of every value that is not a default."""

    config: Config
    origins: dict[str, Origin]


def load_config(file: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> LoadedConfig:
    """Read ``file`` with its parents, apply ``key.sub=value`` overrides, validate.

    Raises:
        ConfigError: naming file, line and key of the first problem, and the nearest known key.
    """
    values, origins = _read_with_parents(Path(file), seen=())
    for override in overrides:
        _apply_override(values, origins, override)
    _refuse_unknown_keys(values, origins)
    try:
        return LoadedConfig(Config.model_validate(values), origins)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, origins, file)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, without ``base``: loading it gives the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_config(loaded: LoadedConfig) -> list[tuple[str, str, str]]:
    """Every value as (key, value, origin) rows, ``default`` where no file says anything."""
    rows = _flatten(loaded.config.model_dump(mode="json"))
    return [(key, _plain(value), str(_origin(key, value, loaded.origins))) for key, value in rows]


def _origin(key: str, value: Any, origins: dict[str, Origin]) -> Origin | str:
    in_list = key.startswith("phases.") and value is not None  # lines are kept for mappings, not inside lists
    return origins.get(key) or (_parent_origin(key, origins) if in_list else "default")


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _parent_origin(key: str, origins: dict[str, Origin]) -> Origin | str:
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    return next((origins[parent] for parent in parents if parent in origins), "default")


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                rows += _flatten(item, f"{prefix}{key}.{index}.")
        else:
            rows.append((prefix + key, value))
    return rows


def _read_with_parents(file: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Origin]]:
    if file.resolve() in seen:
        raise ConfigError(f"{file}: base: names a file that is already its own child")
    values, origins = _read_yaml(file)
    base = values.pop("base", None)
    origins.pop("base", None)
    if base is None:
        return values, origins
    parent, parent_origins = _read_with_parents(file.parent / str(base), (*seen, file.resolve()))
    return _merge(parent, values), parent_origins | origins


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, Origin]]:
    values, node = parse_yaml(read_text(file, ConfigError, "configuration"), str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold `key: value` lines, found {type(values).__name__}")
    origins: dict[str, Origin] = {}
    _collect_lines(node, "", str(file), origins)
    return values, origins


def _collect_lines(node: Any, prefix: str, file: str, origins: dict[str, Origin]) -> None:
    for key_node, value_node in node.value:
        path = f"{prefix}{key_node.value}"
        if path in origins:
            raise ConfigError(f"{file}:{key_node.start_mark.line + 1}: key `{path}` is given twice")
        origins[path] = Origin(file, key_node.start_mark.line + 1)
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(value_node, f"{path}.", file, origins)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], origins: dict[str, Origin], override: str) -> None:
    key, equals, text = override.partition("=")
    shown = f"override `{override[:80]}{'...' * (len(override) > 80)}`"
    if not equals:
        raise ConfigError(f"{shown} must look like key.sub=value")
    *parents, last = key.strip().split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{shown}: `{parent}` is a value, not a section")
    target[last], _ = parse_yaml(text, shown)
    origins[key.strip()] = Origin("command line", 0)


def _refuse_unknown_keys(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    known = _known_keys(Config)
    for numbered, _ in _flatten(values):
        key = re.sub(r"\.\d+\.", ".", numbered)
        if key in known or any(key.startswith(f"{free}.") for free in known if known[free]):
            continue
        prefix, _, name = key.rpartition(".")
        while prefix and prefix not in known and not any(k.startswith(f"{prefix}.") for k in known):
            prefix, _, name = prefix.rpartition(".")
        bad = f"{prefix}.{name}" if prefix else name
        sections = {".".join(k.split(".")[: n + 1]) for k in known for n in range(k.count("."))}
        near = difflib.get_close_matches(bad, [*known, *sections], n=1, cutoff=0.0)
        origin = origins.get(key) or origins.get(bad) or _parent_origin(bad, origins)
        raise ConfigError(f"{origin}: unknown key `{bad}`; the nearest known key is `{near[0]}`")


def _known_keys(section: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Every legal leaf key -> whether it is a free-form mapping."""
    keys: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if name == "phases":
            kind = PhaseConfig
            keys["phases"] = False
        if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
            keys |= _known_keys(kind, f"{prefix}{name}.")
        else:
            keys[prefix + name] = get_origin(kind) is dict or any(get_origin(a) is dict for a in get_args(kind))
    return keys


def _first_problem(error: ValidationError, origins: dict[str, Origin], file: Path | str) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = " ".join(str(problem["msg"]).removeprefix("Value error, ").split())
    if not key:
        return f"{file}: {message}"
    origin = origins.get(key) or _parent_origin(key, origins)
    return f"{origin if origin != 'default' else file}: {key}: {message} (found {_shown(problem.get('input'))})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
