"""The sections of a configuration: every key with its type, range and default.

Keys take the word of the MLPerf log wherever one exists, so that log and YAML read alike.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from scalefold.config.layout import RankLayout


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
    """Sizes of the model; the defaults are the benchmark's."""

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
    def layout(self) -> RankLayout:
        """Which ranks train, in which groups, and which evaluate."""
        return RankLayout.of_nodes(
            self.nodes, self.gpus_per_node, self.ranks_per_node, self.dap_size, self.num_eval_ranks
        )

    @property
    def world_size(self) -> int:
        """Number of processes of one run."""
        return self.layout.world_size

    @property
    def num_train_ranks(self) -> int:
        """Processes that train."""
        return self.layout.num_train_ranks

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.layout.dp_size


class SourceConfig(Section):
    """Where samples come from: the store, the processes that read it, the chains that are taken."""

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
    filter_by_alignments: bool = False


class FeatureConfig(Section):
    """How a record becomes features: sizes and rates of the feature pipeline."""

    eval_length_multiple: int = Field(default=64, ge=1)
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


class DataConfig(FeatureConfig, SourceConfig):
    """Where samples come from and how a record becomes features."""


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
