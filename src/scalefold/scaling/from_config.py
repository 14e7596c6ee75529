"""The facts of a configuration that a plan depends on."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from scalefold.config import Config, DataConfig, ModelConfig, load_config
from scalefold.errors import ConfigError
from scalefold.scaling.convergence import Basis
from scalefold.scaling.from_scratch import Phase, with_hours
from scalefold.scaling.plan import Plan, plan
from scalefold.scaling.step_time import Kind
from scalefold.scaling.study import Study, study, usual_noise
from scalefold.scaling.system import SystemSpec

#: Keys of ``data`` that change the size of a sample, and with it step time and memory.
_SIZES = (
    "train_sequence_crop_size",
    "max_msa_clusters",
    "max_extra_msa",
    "max_templates",
    "num_recycling_iters",
    "val_max_sequence_length",
)


def system_spec(config: Config) -> SystemSpec:
    """The system as ``scalefold.scaling.plan`` wants it.

    Raises:
        ConfigError: ranks, batch and DAP size do not fit.
    """
    p = config.parallel
    return SystemSpec(
        name=config.system,
        nodes=p.nodes,
        gpus_per_node=p.gpus_per_node,
        gpu=p.gpu or ("this GPU (parallel.gpu is not set)" if p.gpus_per_node else "CPU"),
        dap_size=p.dap_size,
        num_eval_ranks=p.num_eval_ranks,
        global_batch_size=config.training.global_batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        num_workers=config.data.num_workers,
        cores_per_node=p.cores_per_node,
        precision=config.execution.precision,
        activation_checkpointing=config.execution.activation_checkpointing,
        val_every_iters=config.training.val_every_iters,
        ranks_per_node=p.ranks_per_node,
        is_benchmark=is_benchmark(config),
        in_phases=bool(config.phases),
    )


def phases_of(config: Config) -> list[Phase]:
    """The phases of a run as its plan wants them; none without ``phases``."""
    return [
        Phase(phase.name, system_spec(config.in_phase(index)), phase.until_step, phase.until_lddt_ca)
        for index, phase in enumerate(config.phases)
    ]


def is_benchmark(config: Config) -> bool:
    """Whether model and samples have the benchmark's sizes, for which times and memory are known."""
    same_sizes = all(getattr(config.data, name) == DataConfig.model_fields[name].default for name in _SIZES)
    return config.model == ModelConfig.model_validate({}) and same_sizes


def expectations(config: Config) -> tuple[str, str]:
    """``expected_minutes`` and ``expected_peak_gib`` as a system file should state them, from the shipped tables.

    Minutes by the step time that a plan takes first, then by the published one and the model's; ``open`` where nobody
    knows.
    """
    spec = system_spec(config)
    first = plan(spec)
    minutes = {first.quantities["step time"].source.partition(":")[0]: first.minutes}
    for kind in _KINDS:
        minutes.setdefault(kind, plan(spec, kind=kind).minutes)
    known = [f"{kind} {value:.1f}" for kind, value in minutes.items() if value is not None]
    return ", ".join(known) or "open", _peak(first)


_KINDS: tuple[Kind, ...] = ("published", "guarded", "target")


def _peak(planned: Plan) -> str:
    needed, available = planned.value("memory per GPU"), planned.value("GPU memory")
    if needed is None:
        return "open"
    return f"{needed:.0f} of {available:.0f}" if available is not None else f"{needed:.0f}"


def plan_config(
    file: Path,
    overrides: Sequence[str] = (),
    step_time_csv: Path | None = None,
    eval_time_csv: Path | None = None,
    kind: str | None = None,
    convergence: str = "reference",
    extrapolate: bool = False,
) -> Plan:
    """Plan the system of a file; see ``scalefold.scaling.plan.plan``, and ``from_scratch`` for runs in phases.

    Raises:
        ConfigError: an unknown word, or a table that cannot be read.
    """
    config = load_config(file, list(overrides)).config
    planned = partial(
        plan,
        step_time_csv=step_time_csv,
        eval_time_csv=eval_time_csv,
        kind=None if kind is None else _word("--kind", kind, Kind),
        convergence=_word("--convergence", convergence, Basis),
        extrapolate=extrapolate,
    )
    phases = phases_of(config)
    whole = planned(system_spec(config))
    return with_hours(whole, phases, [planned(phase.spec) for phase in phases]) if phases else whole


def simulate_config(
    file: Path,
    overrides: Sequence[str] = (),
    step_time_csv: Path | None = None,
    eval_time_csv: Path | None = None,
    kind: str | None = None,
    convergence: str = "reference",
    extrapolate: bool = False,
    *,
    runs: int = 10,
    seed: int = 0,
) -> Study:
    """Simulate runs of the system of a file under the usual disturbances. ConfigError if its plan is open."""
    planned = plan_config(file, overrides, step_time_csv, eval_time_csv, kind, convergence, extrapolate)
    basis = _word("--convergence", convergence, Basis)
    noise = usual_noise(planned.spec)
    return study(planned, noise, runs=runs, seed=seed, convergence=basis, extrapolate=extrapolate)


def _word(option: str, given: str, words: Any) -> Any:
    if given not in get_args(words):
        raise ConfigError(f"{option} {given}: must be one of {', '.join(get_args(words))}")
    return given
