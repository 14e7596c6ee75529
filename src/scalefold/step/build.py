"""A training step from its configuration: operations, model, optimizer, loss, reducer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from scalefold.config import Config, RankLayout
from scalefold.errors import ConfigError
from scalefold.kernels.around.aside import Side
from scalefold.kernels.choice import operations
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.model.alphafold import AlphaFold, is_fp32_parameter, select_slice
from scalefold.model.loss import loss_terms, total_of_terms
from scalefold.parallel.dap.collectives import Group
from scalefold.parallel.dap.points import apply_dap, gradient_scale
from scalefold.parallel.ranks import Ranks
from scalefold.step.fuse import can_fuse, fuse_model, fuse_terms
from scalefold.step.graphs import GraphedTrainStep, TrainStep
from scalefold.step.optimizer import Optimizer
from scalefold.step.parameters import FlatLayout, FlatParameters
from scalefold.step.reducer import GradientReducer

FINE_SHARES = 4  # DAP size


def launches_early(config: Config) -> bool:
    """Whether a rank's kernels are so short that their beginnings count."""
    return config.parallel.dap_size > 1


def shares_finely(config: Config) -> bool:
    """Whether they are so short that they leave room for what goes on aside."""
    return config.parallel.dap_size >= FINE_SHARES


def choose_operations(config: Config, ranks: Ranks) -> Operations:
    """The operations table that configuration, device and precision allow."""
    wanted = config.execution.kernels
    if wanted == "triton" and ranks.device.type == "cpu":
        raise ConfigError("execution.kernels: triton needs a CUDA device; use auto or reference")
    on_device = wanted != "reference" and ranks.device.type == "cuda"
    return operations(wanted if on_device else "reference", launches_early(config))


def connect_replica(config: Config, ranks: Ranks) -> Group | None:
    """The DAP group of this rank, whose GPUs read each other's memory where they may and can; None without one."""
    if ranks.dap_group is None:
        return None
    group = Group(ranks.dap_group)
    if ranks.device.type != "cuda" or config.execution.dap_exchange == "library":
        return group
    try:
        from scalefold.parallel.dap.connect import connect
    except ImportError:  # no Triton: the operations have said so
        return group
    assert ranks.dap_control_group is not None
    connect(group, ranks.dap_control_group, ranks.device)
    return group


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


def batch_sizes(config: Config) -> tuple[int, int]:
    """Samples of an iteration on a replica, and how many of them are computed at once: a step is made for both."""
    return config.local_batch_size, config.micro_batch_size


def flat_layout(config: Config, model: nn.Module, layout: RankLayout) -> FlatLayout:
    """Where each parameter of ``model`` lies in a flat buffer; the same on all ranks of a run."""
    return FlatLayout(model, partial(compute_dtype, config), scale_of(layout))


def scale_of(layout: RankLayout) -> Callable[[str], float]:
    """Factor on a parameter's summed gradient, by name."""
    return lambda name: gradient_scale(name, layout.dp_size, layout.dap_size)


def build_optimizer(
    config: Config, model: AlphaFold, ranks: Ranks, ops: Operations, in_parts: bool | None = None
) -> Optimizer:
    """Flat buffers over the model's parameters, and the optimizer on them.

    Gradients are collected in fp32 if ``in_parts`` (by default: if this configuration adds some up), else in their
    own type.
    """
    in_parts = adds_gradients(config) if in_parts is None else in_parts
    flat = FlatParameters(
        model,
        ranks.device,
        compute_dtype=partial(compute_dtype, config),
        gradient_scale=scale_of(ranks.layout),
        gradient_dtype=torch.float32 if in_parts else None,
    )
    return Optimizer(flat, config.training, ops)


def build_step(
    config: Config, model: AlphaFold, optimizer: Optimizer, ranks: Ranks, reducer: GradientReducer | None = None
) -> TrainStep:
    """The training step, fused and captured in CUDA graphs where device and configuration allow.

    A model has one ``reducer`` for life, because that hangs on its parameters; None makes it.
    """
    fused = config.execution.compile and ranks.device.type == "cuda" and can_fuse(ranks.device)
    ops = REFERENCE if fused else optimizer.ops  # the compiler sees through plain operations only
    terms = loss_terms(config.loss, ops)
    if fused:
        fuse_model(model)
        terms = fuse_terms(terms)

    def objective(batch: Mapping[str, Tensor], passes: int) -> tuple[Tensor, dict[str, Tensor]]:
        return total_of_terms(model(batch, passes), select_slice(batch, passes - 1), terms, ops)

    graphed = config.execution.cuda_graphs and ranks.device.type == "cuda"
    group = ranks.train_group if ranks.layout.num_train_ranks > 1 else None
    options = {"compiles_each": fused, "chain_first": shares_finely(config)}
    return (partial(GraphedTrainStep, **options) if graphed else TrainStep)(
        objective,
        optimizer,
        reducer or GradientReducer(optimizer.flat, group),
        config.micro_batch_size,
        config.training.gradient_accumulation_steps,
        group,
        Side(ranks.device) if ranks.device.type == "cuda" else None,
    )


@dataclass
class Training:
    """What learns on a training rank: the model, the optimizer on its parameters, and the step that moves both."""

    model: AlphaFold
    optimizer: Optimizer
    step: TrainStep
    dap_group: Group | None

    @property
    def exchange(self) -> str:
        """How the ranks of a DAP group exchange: ``none``, ``library`` or ``direct``."""
        if self.dap_group is None:
            return "none"
        return "library" if self.dap_group.direct is None else "direct"

    def change(self, before: Config, config: Config, ranks: Ranks, ops: Operations) -> None:
        """Go on with the operations, rate and batch of another phase; the rate alone leaves the step as it is."""
        self.optimizer.config = config.training
        if ops is self.optimizer.ops and batch_sizes(config) == batch_sizes(before):
            return
        use_operations(self.model, ops)
        self.optimizer.ops = ops
        self.step.close()
        self.step = build_step(config, self.model, self.optimizer, ranks, self.step.reducer)

    def disconnect(self) -> None:
        """Let go of memory that GPUs share; an orderly end only."""
        if self.dap_group is not None:
            self.dap_group.disconnect()


def build_training(config: Config, ranks: Ranks, ops: Operations, seed: int, in_parts: bool) -> Training:
    """Model (its initial weights from ``seed``), optimizer and step of a training rank; see ``build_optimizer``."""
    model = build_model(config, seed, ranks)
    use_operations(model, ops)
    group = connect_replica(config, ranks)
    apply_dap(model, group)
    optimizer = build_optimizer(config, model, ranks, ops, in_parts)
    return Training(model, optimizer, build_step(config, model, optimizer, ranks), group)


def parameter_names(model: nn.Module) -> list[str]:
    """Names in registration order: the order of the checkpoint."""
    return [name for name, _ in model.named_parameters()]
