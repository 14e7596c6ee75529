"""Several GPUs of one host: exchanges, axial and data parallel steps against one GPU, all inside CUDA graphs.

    torchrun --nproc-per-node 4 benchmarks/measure/multi_gpu.py                 # every DAP size that the GPUs allow
    torchrun --nproc-per-node 2 benchmarks/measure/multi_gpu.py --skip-exchanges --passes 1 4 --minutes 5
    torchrun --nproc-per-node 4 benchmarks/measure/multi_gpu.py --skip-exchanges --dap 4 --untimed-one  # in less time
    torchrun --nproc-per-node 2 benchmarks/measure/multi_gpu.py --small --out /tmp/small   # the same on CPU, tiny model

Appends to benchmarks/results/step_time.csv (column ``dap``; ``gpus`` > ``dap`` is data parallel),
benchmarks/results/step_breakdown.csv, module_norms.csv and exchange.csv there, each layout as soon as it is known;
--small writes only where --out says. Before timing, loss and gradient norm of every layout are compared with one GPU,
and the norm of every module with what another rounding does to it: dropout off, same weights, same batch. The
breakdown is of rank 0: kernels that exchange, all other kernels (the copies into what peers read among them), the time
in which only the former work, and the time in which nothing does.
A layout that would not end within --minutes is left out and named. Exit status 1 if one computes something else.
"""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

import torch
import torch.distributed as dist

from common import (
    FOLDER,
    ROOT,
    Timing,
    append_rows,
    capture,
    device_events,
    facts,
    print_table,
    time_calls,
    time_queued,
)
from module_norms import (
    MARGIN,
    SEEDS,
    Norms,
    Weights,
    beyond,
    first_values,
    norm_rows,
    rounded_otherwise,
)
from scalefold.config import Config, RankLayout, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.loading.loader import Batch
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.table import use_operations
from scalefold.parallel.dap.points import apply_dap
from scalefold.parallel.ending import Ending
from scalefold.parallel.ranks import Ranks, prepare_process
from scalefold.step.build import build_model, build_optimizer, build_step, choose_operations, connect_replica
from scalefold.step.graphs import TrainStep
from spans import Span, breakdown, summary
from step_time import enliven, row, without_dropout

MIB = 2**20
EXCHANGE_MIB = (0.25, 1.0, 2.0, 4.0, 8.4, 16.8)
CALLS_PER_GRAPH = 20
Layout = tuple[int, int]  # GPUs that train together, DAP size


@dataclass(frozen=True)
class Host:
    """This process among the ranks of the call."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None  # all ranks, on the CPU
    out: Path | None
    steps: WeakSet[TrainStep] = field(default_factory=WeakSet)  # built here, as long as they live

    @property
    def small(self) -> bool:
        """A tiny model on the CPU."""
        return self.device.type == "cpu"

    def barrier(self) -> None:
        """All ranks go on together."""
        dist.barrier(group=self.control)

    def close_steps(self) -> None:
        """Destroy the graphs that are left: as long as one lives, so do the communicators that it uses."""
        for step in self.steps:
            step.close()

    def keep(self, name: str, rows: list[dict[str, object]]) -> None:
        """Print rows on rank 0 and append them to a table."""
        if self.rank == 0:
            print_table(rows)
            sys.stdout.flush()
            if self.out is not None:
                self.out.mkdir(parents=True, exist_ok=True)
                append_rows(self.out / name, rows)

    def time(self, call: Callable[[], object], repeats: int) -> Timing:
        """Time of single calls, all ranks at once."""
        self.barrier()
        return time_on_host(call, repeats) if self.small else time_calls(call, repeats)


def time_on_host(call: Callable[[], object], repeats: int) -> Timing:
    """The same by the host's clock, for devices that are never ahead of it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return Timing.of(times)


def main() -> int:
    """Measure on all ranks, print and write on rank 0; exit status 1 if a layout computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--skip-exchanges", action="store_true")
    parser.add_argument("--dap", type=int, nargs="*", help="axial sizes; default: all powers of two up to the GPUs")
    parser.add_argument("--untimed-one", action="store_true", help="one GPU is only compared with, not timed")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no layout that would end later")
    parser.add_argument("--fp32", action="store_true", help="norms of modules against one GPU in fp32, too (a minute)")
    parser.add_argument("--small", action="store_true", help="tiny model on the CPU, to try the script")
    parser.add_argument("--out", type=Path, help="folder of the tables; default: benchmarks, nowhere with --small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    started = time.monotonic()
    deadline = started + 60 * arguments.minutes

    def measure(host: Host) -> bool:
        if not arguments.skip_exchanges:
            host.keep("exchange.csv", measure_exchanges(host))
        sizes = arguments.dap or [2**n for n in range(4) if 2**n <= host.world]
        return measure_layouts(host, layouts(host.world, sizes), arguments, deadline)

    return together(measure, arguments.small, arguments.out or (None if arguments.small else FOLDER))


def together(measure: Callable[[Host], bool], small: bool, out: Path | None, ending: Ending | None = None) -> int:
    """What the ranks that torchrun started measure together; exit status 1 if it is not what it must be.

    They part in order and within the bound of ``ending``: graphs go before the communicators that these hold. A rank
    that fails leaves at once, without waiting for exchanges that may never end.
    """
    try:
        with ending or Ending() as ending:
            host = join(small, out)
            ending.owner = f"rank {host.rank}"
            ending.add("process groups", dist.destroy_process_group, after_errors=False)
            ending.add("captured steps", host.close_steps, after_errors=False)
            ending.add("waiting for the other ranks", host.barrier, after_errors=False)
            ending.status = int(not measure(host))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    return ending.status


def join(small: bool, out: Path | None) -> Host:
    """Join the ranks that torchrun started."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if small else torch.device("cuda", rank)
    if not small:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if small else "cpu:gloo,cuda:nccl")
    return Host(rank, world, device, dist.new_group(backend="gloo"), out)


def layouts(world: int, sizes: Iterable[int]) -> list[Layout]:
    """One GPU on its own, then all of them: the largest DAP size first, pure data parallelism (DAP 1) last."""
    fitting = sorted({size for size in sizes if world % size == 0}, reverse=True)
    return [(1, 1), *((world, size) for size in fitting if world > 1)]


# --- exchanges --------------------------------------------------------------------------------------------------------


def measure_exchanges(host: Host) -> list[dict[str, object]]:
    """Microseconds per exchange, by MiB that each rank puts in."""
    rows: list[dict[str, object]] = []
    for mib in EXCHANGE_MIB[:1] if host.small else EXCHANGE_MIB:
        count = int(mib * MIB / 2) // host.world * host.world
        own = torch.randn(count, device=host.device).bfloat16()
        out, gathered = torch.empty_like(own), own.new_empty(host.world * count)
        part = own.new_empty(count // host.world)
        calls: dict[str, Callable[[], object]] = {
            "all_to_all": lambda out=out, own=own: dist.all_to_all_single(out, own),
            "all_gather": lambda gathered=gathered, own=own: dist.all_gather_into_tensor(gathered, own),
            "reduce_scatter": lambda part=part, own=own: dist.reduce_scatter_tensor(part, own),
            "all_reduce": lambda own=own: dist.all_reduce(own),
        }
        if host.small:
            del calls["reduce_scatter"]  # gloo has none in bf16
        row: dict[str, object] = {**facts(), "gpus": host.world, "mib_per_rank": mib}
        rows.append(row | {f"{name}_us": round(time_exchange(host, call), 2) for name, call in calls.items()})
    return rows


def time_exchange(host: Host, call: Callable[[], object]) -> float:
    """Median microseconds of one call among many in a graph."""

    def many() -> None:
        for _ in range(CALLS_PER_GRAPH):
            call()

    replay = many if host.small else capture(many).replay
    host.barrier()
    timing = (time_on_host if host.small else time_queued)(replay, 15)
    return 1e3 * timing.median_ms / CALLS_PER_GRAPH


# --- steps ------------------------------------------------------------------------------------------------------------


def measure_layouts(host: Host, wanted: list[Layout], arguments: argparse.Namespace, deadline: float) -> bool:
    """Check, time and take apart each layout; one GPU on its own comes first and is what the others must equal."""
    truth: dict[str, float] = {}
    truth_norms: list[Norms] = []
    exact_norms: list[Norms] = []
    roundings: list[Weights] = []
    good, longest_s = True, 0.0
    means: dict[Layout, dict[int, float]] = {}
    for gpus, dap in wanted:
        begin = time.monotonic()
        if not agree(host, begin + longest_s < deadline):
            tell(host, f"gpus {gpus} dap {dap}: LEFT OUT, the time of --minutes is used up")
            continue
        step, batch, config = build(host, gpus, dap, arguments.set)
        if not roundings and not host.small:  # small computes in fp32
            roundings = [rounded_otherwise(step.optimizer.flat, seed) for seed in SEEDS]
        values, norms = first_values(step, batch, roundings)
        if not truth:
            truth, truth_norms = values, norms
            exact_norms = norms_in_fp32(host, roundings, config) if arguments.fp32 else []
        let_go(host)  # the eager step's memory is not the graphs'
        good &= agrees(host, values, truth, gpus, dap)
        if gpus > 1 and norms:
            keep_norms(host, (gpus, dap), norm_rows(norms, truth_norms, exact_norms))
        compared_s = time.monotonic() - begin
        if gpus > 1 or not arguments.untimed_one:
            means[gpus, dap] = measure_steps(host, step, batch, config, (gpus, dap), arguments)
        del step, batch
        let_go(host)
        if not host.small:
            left_gib = torch.cuda.memory_reserved() / 2**30
            tell(host, f"gpus {gpus} dap {dap}: {left_gib:.2f} GiB stay reserved once it is gone")
        taken_s = time.monotonic() - begin
        tell(host, f"gpus {gpus} dap {dap}: built and compared in {compared_s:.0f} s, done after {taken_s:.0f} s")
        longest_s = max(longest_s, taken_s)
    for line in summary(means):
        tell(host, line)
    return good


def let_go(host: Host) -> None:
    """Give memory that nothing uses back to the device.

    What the allocator keeps for the stream of an eager step serves neither the stream of a capture nor its graphs: a
    layout would be charged for both.
    """
    gc.collect()
    if not host.small:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_steps(
    host: Host,
    step: TrainStep,
    batch: Batch,
    config: Config,
    layout: Layout,
    arguments: argparse.Namespace,
) -> dict[int, float]:
    """Milliseconds of a step by number of passes; rows are written."""
    set_dropout(step, True)
    if not host.small:
        torch.cuda.reset_peak_memory_stats()
    slices = config.data.num_recycling_iters + 1
    passes = [r for r in arguments.passes if r <= slices]
    step.warm_up(batch, max(passes), lambda text: None)
    times = {r: host.time(lambda r=r: step(batch, r, 1), arguments.repeats) for r in passes}
    host.keep("step_time.csv", [row(config, "ours", r, timing, *layout) for r, timing in times.items()])
    if not host.small:
        parts = [profile(host, lambda r=r: step(batch, r, 1), times[r].median_ms) for r in passes]
        known = [{**facts(), "variant": "ours", "gpus": layout[0], "dap": layout[1], "passes": r} for r in passes]
        host.keep("step_breakdown.csv", [a | b for a, b in zip(known, parts, strict=True)])
    return {r: timing.median_ms for r, timing in times.items()}


def build(host: Host, gpus: int, dap: int, overrides: list[str]) -> tuple[TrainStep, Batch, Config]:
    """A step whose ranks form ``gpus / dap`` replicas; every rank takes part."""
    settings = [
        f"parallel.{'ranks' if host.small else 'gpus'}_per_node={gpus}",
        f"parallel.dap_size={dap}",
        f"training.global_batch_size={gpus // dap}",
    ]
    file = ROOT / "configs" / ("tiny.yaml" if host.small else "base.yaml")
    config = load_config(file, [*settings, *overrides]).config
    prepare_process(config)
    ranks = Ranks(RankLayout(gpus, dap), host.rank if gpus > 1 else 0, host.rank, host.device)
    if gpus > 1:
        ranks.train_group = dist.group.WORLD
        groups = [dist.new_group(ranks.layout.dap_group(first)) for first in range(0, gpus, dap)] if dap > 1 else []
        ranks.dap_group = groups[host.rank // dap] if groups else None
        ranks.dap_control_group = host.control
    ops = choose_operations(config, ranks)
    model = build_model(config, 0, ranks)
    enliven(model)
    use_operations(model, ops)
    apply_dap(model, connect_replica(config, ranks))
    without_dropout(model)
    step = build_step(config, model, build_optimizer(config, model, ranks, ops), ranks)
    step.model = model  # type: ignore[attr-defined]
    host.steps.add(step)
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device=ranks.device)
    return step, batch, config


def set_dropout(step: TrainStep, on: bool) -> None:
    """Put the benchmark's dropout rates back for timing."""
    rates = {"MSARowAttentionWithPairBias": 0.15, "StructureTransition": 0.1, "StructureModule": 0.1}
    for module in step.model.modules():  # type: ignore[attr-defined]
        if hasattr(module, "dropout"):
            module.dropout = rates.get(type(module).__name__, 0.25) if on else 0.0


def norms_in_fp32(host: Host, roundings: Sequence[Weights], config: Config) -> list[Norms]:
    """Norms by module of plain operations on one GPU in fp32; the process is as ``config`` has it afterwards."""
    plain = ["precision=fp32", "kernels=reference", "activation_checkpointing=true"]
    step, batch, _ = build(host, 1, 1, [f"execution.{setting}" for setting in plain])
    norms = first_values(step, batch, roundings)[1]
    prepare_process(config)
    return norms


def keep_norms(host: Host, layout: Layout, rows: list[dict[str, object]]) -> None:
    """Write the norms by module and name those that differ from one GPU's by more than rounding explains."""
    gpus, dap = layout
    if host.rank == 0 and host.out is not None:
        append_rows(host.out / "module_norms.csv", [{**facts(), "gpus": gpus, "dap": dap, **row} for row in rows])
    far = ", ".join(beyond(rows)) or "none"
    tell(host, f"  of {len(rows)} modules, norms differ by more than {MARGIN} times another rounding's: {far}")


def agrees(host: Host, values: dict[str, float], truth: dict[str, float], gpus: int, dap: int) -> bool:
    """Within what bf16 sums in another order explain; fp32 on the CPU."""
    loss = abs(values["loss"] / truth["loss"] - 1)
    norm = abs(values["grad_norm"] / truth["grad_norm"] - 1)
    good = loss < (2e-5 if host.small else 2e-3) and norm < (1e-4 if host.small else 2e-2)
    tell(
        host,
        f"gpus {gpus} dap {dap}: loss {values['loss']:.5f} ({loss:.1e}), norm {values['grad_norm']:.5f} ({norm:.1e})",
    )
    tell(host, "  ok" if good else "  DIFFERS from one GPU")
    return good


def agree(host: Host, yes: bool) -> bool:
    """Rank 0's answer, on all ranks."""
    answer = [yes]
    dist.broadcast_object_list(answer, src=0, group=host.control)
    return answer[0]


def tell(host: Host, text: str) -> None:
    """One line, once."""
    if host.rank == 0:
        print(text, flush=True)


# --- breakdown --------------------------------------------------------------------------------------------------------


def profile(host: Host, call: Callable[[], object], wall_ms: float) -> dict[str, object]:
    """Breakdown of one call on rank 0; the others do it too, because it exchanges."""
    if host.rank:
        host.barrier()
        call()
        torch.cuda.synchronize()
        return {}
    on_device = device_events(lambda: (host.barrier(), call()))  # all begin once the profiler is ready
    kernels = [e for e in on_device if not e.name.startswith("nccl:")]  # that would be a mark around kernels
    return breakdown([Span(e.name, e.time_range.start, e.time_range.end) for e in kernels], wall_ms)


if __name__ == "__main__":
    sys.exit(main())
