"""Several GPUs of one host: exchanges, axial and data parallel steps against one GPU, all inside CUDA graphs.

    torchrun --nproc-per-node 4 benchmarks/multi_gpu.py                 # every DAP size that the GPUs allow
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --skip-exchanges --passes 1 4

Appends to benchmarks/step_time.csv (column ``dap``; ``gpus`` > ``dap`` is data parallel) and benchmarks/exchange.csv.
Before timing, loss and gradient norm of every layout are compared with one GPU: dropout off, same weights, same batch.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from common import FOLDER, Timing, append_rows, capture, facts, print_table, time_calls
from scalefold.compile import TrainStep
from scalefold.config import Config, load_config
from scalefold.data.synthetic import synthetic_batch
from scalefold.kernels import use_operations
from scalefold.parallel.dap import apply_dap
from scalefold.parallel.ranks import RankLayout, Ranks
from scalefold.run import build_model, build_optimizer, build_step, choose_operations, feature_settings, prepare_process
from step_time import enliven, without_dropout

MIB = 2**20
EXCHANGE_MIB = (0.25, 1.0, 2.0, 4.0, 8.4, 16.8)
CALLS_PER_GRAPH = 20


def main() -> int:
    """Measure on all ranks, print and write on rank 0; exit status 1 if a layout computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--skip-exchanges", action="store_true")
    parser.add_argument("--dap", type=int, nargs="*", help="axial sizes; default: all powers of two up to the GPUs")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    if not arguments.skip_exchanges:
        rows = measure_exchanges(world)
        if rank == 0:
            append_rows(arguments.out / "exchange.csv", rows)
            print_table(rows)
    sizes = arguments.dap or [2**n for n in range(4) if 2**n <= world]
    layouts = [(1, 1), *((world, size) for size in sizes if world > 1)]
    good = measure_layouts(layouts, arguments)
    dist.barrier()
    dist.destroy_process_group()
    return int(not good)


def measure_exchanges(world: int) -> list[dict[str, object]]:
    """Microseconds per exchange, by MiB that each rank puts in."""
    rows: list[dict[str, object]] = []
    for mib in EXCHANGE_MIB:
        count = int(mib * MIB / 2) // world * world
        own = torch.randn(count, device="cuda").bfloat16()
        out, gathered = torch.empty_like(own), torch.empty(world * count, device="cuda", dtype=torch.bfloat16)
        part = torch.empty(count // world, device="cuda", dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "all_to_all": lambda out=out, own=own: dist.all_to_all_single(out, own),
            "all_gather": lambda gathered=gathered, own=own: dist.all_gather_into_tensor(gathered, own),
            "reduce_scatter": lambda part=part, own=own: dist.reduce_scatter_tensor(part, own),
            "all_reduce": lambda own=own: dist.all_reduce(own),
        }
        row: dict[str, object] = {**facts(), "gpus": world, "mib_per_rank": mib}
        for name, call in calls.items():
            row[f"{name}_us"] = round(time_exchange(call), 2)
        rows.append(row)
    return rows


def time_exchange(call: Callable[[], object]) -> float:
    """Median microseconds of one call among many in a graph."""

    def many() -> None:
        for _ in range(CALLS_PER_GRAPH):
            call()

    graph = capture(many)
    dist.barrier()
    return 1e3 * time_calls(graph.replay, 15).median_ms / CALLS_PER_GRAPH


def measure_layouts(layouts: list[tuple[int, int]], arguments: argparse.Namespace) -> bool:
    """Check and time each (GPUs, DAP size); (1, 1) is one GPU on its own and comes first."""
    truth: dict[str, float] = {}
    good = True
    rows: list[dict[str, object]] = []
    for gpus, dap in layouts:
        step, batch, config = build(gpus, dap, arguments.set)
        values = first_values(step, batch)
        if (gpus, dap) == (1, 1):
            truth = values
        good &= agrees(values, truth, gpus, dap)
        set_dropout(step, True)
        torch.cuda.reset_peak_memory_stats()
        step.warm_up(batch, max(arguments.passes), lambda text: None)
        for passes in arguments.passes:
            dist.barrier()
            timing = time_calls(lambda p=passes, s=step, b=batch: s(b, p, 1), arguments.repeats)
            rows.append(row(config, gpus, dap, passes, timing))
        del step, batch
        gc.collect()
        torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        append_rows(arguments.out / "step_time.csv", rows)
        print_table(rows)
        summarise(rows)
    return good


def build(gpus: int, dap: int, overrides: list[str]) -> tuple[TrainStep, dict[str, torch.Tensor], Config]:
    """A step whose ranks form ``gpus / dap`` replicas; every rank takes part."""
    settings = [
        f"parallel.gpus_per_node={gpus}",
        f"parallel.dap_size={dap}",
        f"training.global_batch_size={gpus // dap}",
    ]
    config = load_config(FOLDER.parent / "configs" / "base.yaml", [*settings, *overrides]).config
    prepare_process(config)
    rank = dist.get_rank()
    ranks = Ranks(RankLayout(gpus, dap), rank if gpus > 1 else 0, rank, torch.device("cuda", rank))
    if gpus > 1:
        ranks.train_group = dist.group.WORLD
        groups = [dist.new_group(ranks.layout.dap_group(first)) for first in range(0, gpus, dap)] if dap > 1 else []
        ranks.dap_group = groups[rank // dap] if groups else None
    ops = choose_operations(config, ranks)
    model = build_model(config, 0, ranks)
    enliven(model)
    use_operations(model, ops)
    apply_dap(model, ranks.dap_group)
    without_dropout(model)
    step = build_step(config, model, build_optimizer(config, model, ranks, ops), ranks)
    step.model = model  # type: ignore[attr-defined]
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device=ranks.device).features
    return step, batch, config


def set_dropout(step: TrainStep, on: bool) -> None:
    """Put the benchmark's dropout rates back for timing."""
    rates = {"MSARowAttentionWithPairBias": 0.15, "StructureTransition": 0.1, "StructureModule": 0.1}
    for module in step.model.modules():  # type: ignore[attr-defined]
        if hasattr(module, "dropout"):
            module.dropout = rates.get(type(module).__name__, 0.25) if on else 0.0


def first_values(step: TrainStep, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss, terms and gradient norm of one eager step; weights are put back."""
    from scalefold.compile import preserved

    with preserved(step.optimizer):
        values = TrainStep.__call__(_Eager(step), batch, 1, 1)  # type: ignore[arg-type]
    return dict(zip(step.names, values.tolist(), strict=True))


class _Eager(TrainStep):
    """The same step without graphs."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(step.objective, step.optimizer, step.reducer, step.micro_batch_size, 1, step.train_group)
        self._names_of = step

    def _forward_backward(self, *args, **kwargs) -> torch.Tensor:
        values = super()._forward_backward(*args, **kwargs)
        self._names_of.names = self.names
        return values


def agrees(values: dict[str, float], truth: dict[str, float], gpus: int, dap: int) -> bool:
    """Within what bf16 sums in another order explain."""
    loss = abs(values["loss"] / truth["loss"] - 1)
    norm = abs(values["grad_norm"] / truth["grad_norm"] - 1)
    good = loss < 2e-3 and norm < 2e-2
    if dist.get_rank() == 0:
        print(
            f"gpus {gpus} dap {dap}: loss {values['loss']:.5f} ({loss:.1e}), "
            f"norm {values['grad_norm']:.5f} ({norm:.1e})"
        )
        print("  ok" if good else "  DIFFERS from one GPU", flush=True)
    return good


def row(config: Config, gpus: int, dap: int, passes: int, timing: Timing) -> dict[str, object]:
    """One line of step_time.csv."""
    return {
        **facts(),
        "variant": "ours",
        "gpus": gpus,
        "dap": dap,
        "precision": config.execution.precision,
        "passes": passes,
        "median_ms": round(timing.median_ms, 2),
        "p10_ms": round(timing.p10_ms, 2),
        "p90_ms": round(timing.p90_ms, 2),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def summarise(rows: list[dict[str, object]]) -> None:
    """Mean over passes per layout, and its ratio to one GPU."""
    means: dict[tuple[object, object], float] = {}
    for key in dict.fromkeys((r["gpus"], r["dap"]) for r in rows):
        own = [float(str(r["median_ms"])) for r in rows if (r["gpus"], r["dap"]) == key]
        means[key] = sum(own) / len(own)
    one = means[(1, 1)]
    for (gpus, dap), mean in means.items():
        print(f"gpus {gpus} dap {dap}: mean over R {mean:.1f} ms, one GPU / this {one / mean:.2f}")


if __name__ == "__main__":
    sys.exit(main())
