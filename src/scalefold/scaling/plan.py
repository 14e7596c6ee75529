"""What a system will need and how long it will take, with the source of every number.

A number that nobody measured, published or modelled for this system is left open with the reason, never guessed.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scalefold.errors import ConfigError
from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.scaling.convergence import Basis, samples_to_converge
from scalefold.scaling.simulate import RunTimes, simulate
from scalefold.scaling.step_time import (
    REFERENCE_EVAL_TIMES,
    REFERENCE_STEP_TIMES,
    VENDOR,
    EvalTime,
    Kind,
    StepTime,
    find_eval_time,
    find_step_time,
    gpu_family,
    read_eval_times,
    read_step_times,
)
from scalefold.scaling.system import SystemSpec

#: Usable memory as drivers report it, GiB.
GPU_MEMORY_GIB = {"H100": 79.6, "H200": 139.8, "A100": 79.2}


@dataclass(frozen=True)
class Assumptions:
    """Numbers that a plan takes for granted where nothing better is given; each is printed with the plan.

    Hand-over and first evaluation are the guarded values of the analytic model. Start and first cycle are the slowest
    of all measured starts of the program on one and two H100, on a small store from local memory: nobody measured how
    a file system and ranks of 260 nodes change them. Seconds per sample are those of the deepest alignments measured,
    not the mean, and memory is measured on one H200.
    """

    start_s: float = 0.1
    first_cycle_extra_s: float = 0.6
    start_source: str = "measured (benchmarks/results/gpu_runs.csv, store_index.csv)"
    hand_over_s: float = 0.3
    first_eval_extra_s: float = 5.0
    core_s_per_sample: float = 0.94
    core_s_source: str = "measured: 20,000 rows x 500 residues; 0.07 on average (benchmarks/results/data_pipeline.csv)"
    loader_headroom: float = 1.3
    runtime_gib: float = 3.0
    activations_gib: float = 36.4
    activations_source: str = "run on one H200 that evaluates too held 38.3 GiB (benchmarks/results/real_chains.csv)"
    checkpointed_peak_gib: float = 7.2
    checkpointed_source: str = "measured on one H200 with checkpointing, R = 4 (benchmarks/results/step_time.csv)"


@dataclass(frozen=True)
class Quantity:
    """One number of a plan, or the reason why it is open."""

    name: str
    value: float | None
    unit: str
    source: str

    def text(self) -> str:
        """``time to train            2.17 min    source``."""
        digits = ",.0f" if self.value is not None and self.value >= 1e4 else ",.4g"
        shown = "open" if self.value is None else f"{self.value:{digits}} {self.unit}"
        return f"{self.name:<34}{shown:>22}   {self.source}"


@dataclass(frozen=True)
class Plan:
    """Everything :func:`plan` found out about one system."""

    spec: SystemSpec
    quantities: dict[str, Quantity]
    warnings: list[str]
    times: RunTimes | None = field(default=None, repr=False)

    def value(self, name: str) -> float | None:
        """A quantity's number; KeyError for a name that plans do not have."""
        return self.quantities[name].value

    @property
    def minutes(self) -> float | None:
        """Predicted time to train."""
        return self.value("time to train")

    @property
    def fits(self) -> bool | None:
        """Whether the expected peak fits the GPU; None if either is unknown."""
        needed, available = self.value("memory per GPU"), self.value("GPU memory")
        return None if needed is None or available is None else needed <= available

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data; an open quantity has the value null and its reason as source."""
        quantities = {q.name: {"value": q.value, "unit": q.unit, "source": q.source} for q in self.quantities.values()}
        shape = {name: getattr(self.spec, name) for name in ("world_size", "dp_size", "local_batch_size")}
        found = {"quantities": quantities, "warnings": self.warnings, "minutes": self.minutes, "fits": self.fits}
        return {**asdict(self.spec), **shape, **found}

    def text(self) -> str:
        """The plan as a table with sources, and its warnings."""
        s = self.spec
        head = f"{s.name}: {s.world_size} ranks = {s.dp_size} replicas x DAP-{s.dap_size}"
        lines = [f"{head} + {s.num_eval_ranks} for evaluation; samples per replica and iteration: {s.local_batch_size}"]
        lines += [quantity.text() for quantity in self.quantities.values()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def plan(
    spec: SystemSpec,
    *,
    step_time_csv: Path | str | None = None,
    eval_time_csv: Path | str | None = None,
    kind: Kind | None = None,
    convergence: Basis = "reference",
    extrapolate: bool = False,
    assumptions: Assumptions = Assumptions(),
) -> Plan:
    """Plan one system.

    Args:
        step_time_csv, eval_time_csv: measured tables (see :mod:`scalefold.scaling.step_time`); they come before the
            shipped published and modelled values.
        kind: use this kind of step and evaluation time only; None takes the first of measured, estimated,
            guarded, published, target.
        convergence: whether samples to converge are the reference's or those of NVIDIA's published runs.
        extrapolate: allow batches at which nobody observed convergence.

    Raises:
        ConfigError: a table cannot be read.
    """
    builder = _Builder(spec, assumptions)
    builder.vendor()
    step = find_step_time(
        _tables(step_time_csv), spec.gpu, spec.precision, spec.dap_size, spec.activation_checkpointing, kind
    )
    evaluation = find_eval_time(_eval_tables(eval_time_csv), spec.gpu, kind)
    builder.memory(step if spec.is_benchmark else None)
    builder.step(step)
    builder.loader()
    builder.evaluation(evaluation)
    times = builder.time_to_train(convergence, extrapolate)
    return Plan(spec, builder.quantities, builder.warnings, times)


def scaling_rows(plans: Sequence[Plan], kind: str = "modelled") -> list[dict[str, str]]:
    """Rows of a scaling table (kind, system, accelerators, minutes, source) of the plans that have a time."""
    return [
        {
            "kind": kind,
            "system": p.spec.name,
            "accelerators": str(p.spec.world_size),
            "minutes": f"{p.minutes:.3f}",
            "source": p.quantities["step time"].source,
        }
        for p in plans
        if p.minutes is not None
    ]


def write_scaling_csv(rows: Sequence[dict[str, str]], path: Path | str) -> Path:
    """Write rows of :func:`scaling_rows`; the report reads this file. Raises ConfigError if there is no row."""
    if not rows:
        raise ConfigError(f"{path}: no system has a planned time, nothing to write")
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
    return path


def _tables(path: Path | str | None) -> list[StepTime]:
    return (read_step_times(path) if path is not None else []) + read_step_times(REFERENCE_STEP_TIMES)


def _eval_tables(path: Path | str | None) -> list[EvalTime]:
    return (read_eval_times(path) if path is not None else []) + read_eval_times(REFERENCE_EVAL_TIMES)


class _Builder:
    """Collects the quantities of one plan in the order in which they depend on each other."""

    def __init__(self, spec: SystemSpec, assumptions: Assumptions) -> None:
        self.spec, self.assumed = spec, assumptions
        self.quantities: dict[str, Quantity] = {}
        self.warnings: list[str] = []

    def put(self, name: str, value: float | None, unit: str, source: str) -> None:
        self.quantities[name] = Quantity(name, value, unit, source)

    def get(self, name: str) -> float | None:
        return self.quantities[name].value

    def vendor(self) -> None:
        """Where only the vendor knows the GPU: its NVLink domain, and that groups stay inside a node of it."""
        spec, vendor = self.spec, VENDOR.get(gpu_family(self.spec.gpu))
        if vendor is None:
            return
        source = f"DAP groups stay inside a node of {vendor.gpus_per_node}; {vendor.text()}"
        self.put("NVLink domain", vendor.nvlink_gpus, "GPUs", source)
        if max(spec.gpus_per_node, spec.dap_size) > vendor.gpus_per_node:
            self.warnings.append(
                f"a node of {vendor.system} has {vendor.gpus_per_node} GPUs, whatever NVLink joins (vendor): "
                f"gpus_per_node {spec.gpus_per_node} and dap_size {spec.dap_size} must fit there"
            )

    def _gpu_memory(self) -> tuple[float | None, str]:
        """GiB of the GPU and who says so."""
        spec, family = self.spec, gpu_family(self.spec.gpu)
        if spec.gpu_memory_gib:
            return spec.gpu_memory_gib, "given"
        if family in GPU_MEMORY_GIB:
            return GPU_MEMORY_GIB[family], "as the driver reports it"
        if family in VENDOR:
            return VENDOR[family].memory_gib, f"vendor's figure, {VENDOR[family].memory_gb:g} GB"
        return None, f"not known for {shown_gpu(spec.gpu)}"

    def memory(self, step: StepTime | None) -> None:
        spec, assumed = self.spec, self.assumed
        available, known = self._gpu_memory()
        self.put("GPU memory", available, "GiB", known)
        if not spec.is_benchmark:
            self.put("memory per GPU", None, "GiB", "not the benchmark's model: measure one step")
        elif step is not None and step.peak_gib is not None:
            self.put("memory per GPU", step.peak_gib, "GiB", f"peak of {step.source}")
        elif spec.activation_checkpointing:
            peak = assumed.checkpointed_peak_gib + assumed.runtime_gib
            source = f"{assumed.checkpointed_source} + {assumed.runtime_gib:g} for CUDA and NCCL"
            self.put("memory per GPU", peak, "GiB", source)
        else:
            states = states_gib()
            activations = assumed.activations_gib / spec.dap_size * (1 if spec.precision == "bf16" else 2)
            source = (
                f"states {states:.1f} + activations {activations:.1f} + {assumed.runtime_gib:g} for CUDA and NCCL; "
            )
            self.put(
                "memory per GPU", states + activations + assumed.runtime_gib, "GiB", source + assumed.activations_source
            )
        needed = self.get("memory per GPU")
        if needed is not None and available is not None and needed > available:
            self.warnings.append(
                f"expected {needed:.0f} GiB exceed {available:.0f} GiB: raise dap_size or set activation_checkpointing"
            )

    def step(self, step: StepTime | None) -> None:
        spec = self.spec
        if not spec.is_benchmark:
            self.put("step time", None, "ms", "not the benchmark's model: measure it")
        elif step is None:
            what = f"{shown_gpu(spec.gpu)}, {spec.precision}, DAP-{spec.dap_size}"
            self.put("step time", None, "ms", f"nothing known for {what}: measure it and give --step-times")
        else:
            samples = f"{spec.local_batch_size} x " if spec.local_batch_size > 1 else ""
            source = f"{step.kind}: {samples}{step.step_ms:g} ms, {step.source}"
            self.put("step time", step.step_ms * spec.local_batch_size, "ms", source)
            if step.kind in ("guarded", "target") and step.gpu in VENDOR:
                self.warnings.append(
                    f"no step was ever measured on a {step.gpu}: time and minutes are a model's on the vendor's "
                    "figures; run `make bench-gpu` there and give --step-times benchmarks/results/step_time.csv"
                )
        step_ms = self.get("step time")
        rate = None if step_ms is None else spec.global_batch_size / step_ms * 1000
        self.put("throughput", rate, "samples/s", "global batch / step time")

    def loader(self) -> None:
        spec, assumed = self.spec, self.assumed
        train_nodes = (spec.world_size - spec.num_eval_ranks) / (spec.world_size / spec.nodes)
        streams = min(spec.dp_size / train_nodes, spec.dp_size)
        throughput = self.get("throughput")
        rate = None if throughput is None else throughput / spec.dp_size
        per_node = None if rate is None else rate * streams
        self.put("loader demand per node", per_node, "samples/s", f"{streams:g} sample streams per training node")
        self.put("core-seconds per sample", assumed.core_s_per_sample, "s", assumed.core_s_source)
        workers = None if rate is None else math.ceil(rate * assumed.core_s_per_sample * assumed.loader_headroom)
        source = f"per replica, {assumed.loader_headroom:g} x headroom; configured: {spec.num_workers}"
        self.put("workers needed", workers, "processes", source)
        if workers is None:
            return
        if workers > spec.num_workers:
            self.warnings.append(f"{workers} loader workers per replica are needed, num_workers is {spec.num_workers}")
        if spec.cores_per_node is not None and workers * streams > spec.cores_per_node:
            self.warnings.append(
                f"{workers * streams:.0f} loader workers per node are needed, a node has {spec.cores_per_node} cores"
            )

    def evaluation(self, evaluation: EvalTime | None) -> None:
        spec = self.spec
        ranks = spec.num_eval_ranks or spec.world_size
        where = f"{ranks} evaluation ranks" if spec.num_eval_ranks else f"all {ranks} ranks, training waits"
        if evaluation is None or not spec.is_benchmark:
            what = shown_gpu(spec.gpu) if spec.is_benchmark else "this model"
            self.put("evaluation", None, "s", f"nothing known for {what}: measure it and give --eval-times")
        else:
            source = f"{evaluation.kind}, {where}: {evaluation.source}"
            self.put("evaluation", evaluation.seconds_on(ranks), "s", source)

    def time_to_train(self, basis: Basis, extrapolate: bool) -> RunTimes | None:
        spec = self.spec
        step_ms, eval_s = self.get("step time"), self.get("evaluation")
        effective = spec.global_batch_size * spec.gradient_accumulation_steps
        if spec.in_phases:
            self._no_time(
                "trains in phases: known for the benchmark's checkpoint and one batch only; see the hours below"
            )
            return None
        try:
            known = samples_to_converge(effective, basis, extrapolate)
        except ConfigError as error:
            self._no_time(str(error))
            return None
        if not spec.is_benchmark or step_ms is None or eval_s is None:
            self._no_time("needs step time and evaluation time of the benchmark")
            return None
        if known.extrapolated:
            self.warnings.append(f"convergence at batch {effective} is extrapolated: nobody observed it")
        steps = known.mean_samples / spec.global_batch_size
        times = self._run_times(step_ms / 1000, eval_s)
        spread = [
            _minutes(times, (known.mean_samples + sign * known.sd_samples) / spec.global_batch_size) for sign in (-1, 1)
        ]
        self.put("iterations", steps, "", f"{known.mean_samples:,.0f} samples, {known.source}")
        assumed = self.assumed
        source = (
            f"{spread[0]:.2f} to {spread[1]:.2f} for one sd of convergence; start {assumed.start_s:g} s, first cycle "
            f"+{assumed.first_cycle_extra_s:g} s {assumed.start_source}, hand-over {assumed.hand_over_s:g} s (assumed)"
        )
        self.put("time to train", _minutes(times, steps), "min", source)
        self._check_overlap(times)
        return times

    def _run_times(self, step_s: float, eval_s: float) -> RunTimes:
        spec, assumed = self.spec, self.assumed
        asynchronous = spec.num_eval_ranks > 0
        return RunTimes(
            step_s=step_s,
            num_cycles=1,
            eval_s=eval_s,
            cycle_iters=spec.val_every_iters,
            start_s=assumed.start_s,
            first_cycle_extra_s=assumed.first_cycle_extra_s,
            first_eval_s=eval_s + assumed.first_eval_extra_s,
            asynchronous=asynchronous,
            hand_over_s=assumed.hand_over_s if asynchronous else 0.0,
            num_replicas=spec.dp_size,
            ranks_per_replica=spec.dap_size,
            local_batch_size=spec.local_batch_size,
        )

    def _check_overlap(self, times: RunTimes) -> None:
        cycle_s = times.cycle_iters * times.step_s
        if times.asynchronous and times.eval_s > cycle_s:
            self.warnings.append(
                f"an evaluation takes {times.eval_s:.1f} s, a cycle {cycle_s:.1f} s: training will wait; "
                "raise num_eval_ranks or make evaluation faster"
            )

    def _no_time(self, reason: str) -> None:
        self.put("iterations", None, "", reason)
        self.put("time to train", None, "min", reason)


def shown_gpu(name: str) -> str:
    """Family of a known GPU, any other name as it was given."""
    family = gpu_family(name)
    return name if family == name.upper() else family


def states_gib() -> float:
    """Weights, both Adam moments and averaged weights in fp32, a bf16 copy and fp32 gradients: 22 bytes a parameter."""
    return 22 * PARAMETERS_COUNT / 2**30


def _minutes(times: RunTimes, steps: float) -> float:
    """Simulated minutes for a mean number of steps: between the two whole numbers of cycles around it."""
    cycles = max(1.0, steps / times.cycle_iters)
    low = math.floor(cycles)
    below, above = (simulate(replace(times, num_cycles=n)).minutes for n in (low, low + 1))
    return below + (cycles - low) * (above - below)
