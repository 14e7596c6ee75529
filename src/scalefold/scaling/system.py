"""The facts of a system that decide what it needs and how long it takes."""

from dataclasses import dataclass

from scalefold.config import RankLayout
from scalefold.errors import ConfigError


@dataclass(frozen=True)
class SystemSpec:
    """The facts of a system file that a plan depends on. ``global_batch_size`` excludes gradient accumulation.

    ``is_benchmark`` False (another model or other data) leaves step time, memory and time to train open; ``in_phases``
    (training from scratch with changing batches) leaves time to train open.
    """

    name: str
    nodes: int
    gpus_per_node: int
    gpu: str
    dap_size: int = 1
    num_eval_ranks: int = 0
    global_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    num_workers: int = 4
    cores_per_node: int | None = None
    precision: str = "bf16"
    activation_checkpointing: bool = False
    val_every_iters: int = 40
    ranks_per_node: int | None = None
    gpu_memory_gib: float | None = None
    is_benchmark: bool = True
    in_phases: bool = False

    @property
    def layout(self) -> RankLayout:
        """Which ranks train, in which groups, and which evaluate."""
        return RankLayout.of_nodes(
            self.nodes, self.gpus_per_node, self.ranks_per_node, self.dap_size, self.num_eval_ranks
        )

    @property
    def world_size(self) -> int:
        """Ranks of one run."""
        return self.layout.world_size

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.layout.dp_size

    @property
    def local_batch_size(self) -> int:
        """Samples per replica and iteration, processed one after another."""
        return self.global_batch_size // self.dp_size

    def __post_init__(self) -> None:
        train_ranks = self.layout.num_train_ranks
        if self.nodes < 1 or train_ranks < 1 or train_ranks % self.dap_size:
            raise ConfigError(
                f"{self.name}: {self.world_size} ranks minus {self.num_eval_ranks} for evaluation must be a positive "
                f"multiple of dap_size {self.dap_size}"
            )
        if self.global_batch_size < 1 or self.global_batch_size % self.dp_size:
            raise ConfigError(
                f"{self.name}: global_batch_size {self.global_batch_size} must be a multiple of {self.dp_size} replicas"
            )
