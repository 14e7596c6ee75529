"""One rank's share of a whole training step at DAP P, alone on one GPU; ``step_time.py --dap-share 2 4 8`` runs it.

    python benchmarks/measure/step_time.py --dap-share 2 4 8 --profile 1   # R = 1..4, and kernels by name at R = 1
    python benchmarks/measure/step_time.py --dap-share 2 4 --small --csv /tmp/share.csv   # on the CPU, tiny model

The program's own step of a rank of a DAP group of P, with the same kernels, launch parameters and numbers of launches,
captured in CUDA graphs; its peers are absent (``absent_peers.py``), so exchanges move the same bytes inside this GPU,
wait for nobody, and values are not those of a real group. What is left out is the wire, nothing else; P = 1 is the step
of one GPU, for comparison. Appends to

* ``dap_share.csv``: step, computing, exchanges alone, gaps, kernels, and milliseconds by part of the model
  (``regions.py``): ``stacks`` is what the ranks share, ``repeated`` the sum of all that every rank computes in full;
* ``exchange_alone.csv`` beside it: microseconds of the exchanges themselves, as ``exchange_symmetric.csv`` has them
  among GPUs: the difference is the wire;
* with ``--profile R``, ``dap_share_kernels.csv``: every kernel of the share by name.

Where ``step_breakdown.csv`` beside it has steps of two GPUs at DAP 2, computing and gaps are compared with theirs.
Before timing, exchanges are compared with plain indexing, and steps from the same state and seed must give the same
finite values, bit for bit. Exit status 1 if not.
"""

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absent_peers import direct_alone, group_alone, ranks_alone
from common import (
    BASE,
    FOLDER,
    ONE_LENGTH,
    ROOT,
    Timing,
    append_rows,
    compile_ahead,
    device_events,
    facts,
    graph_microseconds,
    one_sample,
    print_table,
    read_rows,
    time_calls,
)
from multi_gpu import CALLS_PER_GRAPH, EXCHANGE_MIB, MIB, time_on_host
from regions import PARTS, SHARED, Marks, by_part, is_mark, mark_parts
from scalefold.config import Config, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.loading.loader import Batch
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.table import use_operations
from scalefold.parallel.dap.collectives import Lasts
from scalefold.parallel.dap.direct import DirectExchanges
from scalefold.parallel.dap.peer_memory import LANE
from scalefold.parallel.dap.points import apply_dap
from scalefold.parallel.ranks import Ranks, prepare_process
from scalefold.step.build import build_model, build_optimizer, build_step, choose_operations
from scalefold.step.graphs import TrainStep, preserved
from spans import Span, against_two_gpus, breakdown, covered_ms
from step_time import enliven

SEED = 11
SAME = 10  # steps from one state
LONGEST = 40  # kernels that are printed
SHOWN = ("total_ms", "calls", "mean_us", "parts", "kernel")
OF_BREAKDOWN = ("computing_ms", "exchange_alone_ms", "gaps_ms", "kernels", "exchanges", "direct_ms", "barrier_ms")


@dataclass
class Share:
    """A rank's step at DAP ``size`` without its peers."""

    size: int
    config: Config
    step: TrainStep
    batch: Batch
    marks: Marks

    @property
    def on_gpu(self) -> bool:
        """Whether it is captured and profiled; on a CPU it only runs."""
        return self.batch.buffer.is_cuda

    def call(self, passes: int) -> Callable[[], Tensor]:
        """The step with R passes."""
        return lambda: self.step(self.batch, passes, 1)

    def warm_up(self, passes: int, marked: bool) -> None:
        """Compile and capture every number of passes up to ``passes``, with or without marks."""
        self.step.close()
        self.marks.on = marked
        self.step.warm_up(self.batch, passes, lambda text: print(f"  DAP {self.size}: {text}", flush=True))


def configuration(size: int, small: bool, overrides: list[str]) -> Config:
    """One replica of ``size`` ranks with a batch of one sample."""
    file = ROOT / "configs" / ("tiny.yaml" if small else "base.yaml")
    return load_config(file, [*one_sample(size, "ranks" if small else "gpus"), *overrides]).config


@contextmanager
def share_of(size: int, small: bool, overrides: list[str]) -> Iterator[Share]:
    """The step of the first of ``size`` ranks; its process group ends with the block."""
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    with ranks_alone(size, device) as ranks:
        share = build(configuration(size, small, overrides), ranks)
        try:
            yield share
        finally:
            share.step.close()


def build(config: Config, ranks: Ranks) -> Share:
    """As ``multi_gpu.build`` does it, with marks around the parts of the model and dropout as it trains."""
    ops = choose_operations(config, ranks)
    model = build_model(config, 0, ranks)
    enliven(model)
    use_operations(model, ops)
    apply_dap(model, group_alone(ranks) if ranks.layout.dap_size > 1 else None)
    step = build_step(config, model, build_optimizer(config, model, ranks, ops), ranks)
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device=ranks.device)
    return Share(ranks.layout.dap_size, config, step, batch, mark_parts(model, step))


# --- measurement ------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Measure all shares of a command line of ``step_time.py``; exit status 1 if one is not what it must be."""
    started, small = time.monotonic(), arguments.small
    csv = arguments.csv or (None if small else FOLDER / "dap_share.csv")
    prepare_process(configuration(1, small, arguments.set))
    if not small:
        for size in arguments.dap_share:
            compile_ahead(BASE, [*one_sample(size), ONE_LENGTH, *arguments.set])
        print(f"shares have compiled after {time.monotonic() - started:.0f} s", flush=True)
    rows, good, longest_s = [], True, 0.0
    for size in arguments.dap_share:
        begin = time.monotonic()
        if begin + longest_s > started + 60 * arguments.minutes:
            print(f"DAP {size}: LEFT OUT, the time of --minutes is used up", flush=True)
            continue
        found = measure(size, arguments, csv)
        good &= found is not None
        rows += found or []
        let_go(small)
        longest_s = max(longest_s, time.monotonic() - begin)
        print(f"DAP {size}: {time.monotonic() - begin:.0f} s, {time.monotonic() - started:.0f} s in all", flush=True)
    if csv is not None and (breakdowns := csv.with_name("step_breakdown.csv")).exists():
        print_table(against_two_gpus(rows, read_rows(breakdowns)))
    return int(not good)


def let_go(small: bool) -> None:
    """Give the memory of a share back before the next one."""
    gc.collect()
    if not small:
        torch.cuda.empty_cache()


def measure(size: int, arguments: argparse.Namespace, csv: Path | None) -> list[dict[str, Any]] | None:
    """Rows of one share, one per number of passes, which are written; None if it is not what it must be."""
    if not arguments.small:
        exchanges = exchange_rows(size) if size > 1 else []
        if exchanges is None:
            return None
        keep(csv, "exchange_alone.csv", exchanges)
        torch.cuda.reset_peak_memory_stats()
    with share_of(size, arguments.small, arguments.set) as share:
        passes = [r for r in arguments.passes if r <= share.config.data.num_recycling_iters + 1]
        share.warm_up(max(passes), marked=False)
        if not same_values(share, passes[0]):
            return None
        rows = {r: timing_row(share, r, arguments.repeats) for r in passes}
        if share.on_gpu:
            share.warm_up(max(passes), marked=True)
            for r in passes:
                spans = spans_of(share.call(r))
                rows[r] |= profile_row(spans, rows[r]["median_ms"])
                if r in (arguments.profile or []):
                    keep_kernels(csv, size, r, spans)
    keep(csv, csv.name if csv else "", list(rows.values()))
    return list(rows.values())


def same_values(share: Share, passes: int) -> bool:
    """Whether steps from the same state and seed give the same finite values."""
    found = []
    for _ in range(SAME):
        torch.manual_seed(SEED)
        with preserved(share.step.optimizer):
            found.append(share.call(passes)().clone())
    good = bool(torch.isfinite(found[0]).all()) and all(torch.equal(found[0], other) for other in found[1:])
    words = f"{SAME} times the same" if good else "NOT ALWAYS THE SAME"
    print(f"DAP {share.size}: loss {found[0][0]:.4f}, {words}", flush=True)
    return good


def timing_row(share: Share, passes: int, repeats: int) -> dict[str, Any]:
    """First columns of a row: the step without marks and profiler."""
    timing: Timing = (time_calls if share.on_gpu else time_on_host)(share.call(passes), repeats)
    peak = torch.cuda.max_memory_reserved() / 2**30 if share.on_gpu else 0.0
    times = {name: round(value, 2) for name, value in vars(timing).items()}
    print(f"DAP {share.size}, R = {passes}: {timing.median_ms:.2f} ms", flush=True)  # the profile may not end
    return {**facts(), "dap": share.size, "passes": passes, **times, "peak_gib": round(peak, 2)}


def spans_of(call: Callable[[], object]) -> list[Span]:
    """Kernels of one call, marks among them."""
    return [Span(e.name, e.time_range.start, e.time_range.end) for e in device_events(call)]


def profile_row(spans: list[Span], wall_ms: float) -> dict[str, Any]:
    """Remaining columns: what the device did, and by part of the model.

    A program that is launched early is there while the one before it ends: no time counts twice.
    """
    kernels = [span for span in spans if not is_mark(span)]
    found = breakdown(kernels, wall_ms)
    parts = by_part(spans)
    repeated = [span for part, own in parts.items() if part != SHARED for span in own]
    row = {name: found[name] for name in OF_BREAKDOWN}
    row |= {f"{part}_ms": round(covered_ms(parts.get(part, [])), 2) for part in PARTS}
    return row | {"repeated_ms": round(covered_ms(repeated), 2), "repeated_kernels": len(repeated)}


def keep(csv: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    """Print rows and append them to a table beside ``csv``."""
    print_table(rows)
    sys.stdout.flush()
    if csv is not None:
        append_rows(csv.with_name(name), rows)


def keep_kernels(csv: Path | None, size: int, passes: int, spans: list[Span]) -> None:
    """Append every kernel by name, longest first, with its part of the model where it has one; print the longest."""
    times: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, set[str]] = defaultdict(set)
    for part, own in by_part(spans).items():
        for span in own:
            parts[span.name].add(part)
    for span in spans:
        if not is_mark(span):
            times[span.name].append(span.stop_us - span.start_us)
    known = {**facts(), "dap": size, "passes": passes}
    rows: list[dict[str, Any]] = [
        known
        | {"total_ms": f"{sum(own) / 1e3:.4f}", "calls": len(own), "mean_us": f"{sum(own) / len(own):.2f}"}
        | {"parts": "+".join(sorted(parts[name])) or "exchange", "kernel": name[:120]}
        for name, own in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    if csv is not None:
        append_rows(csv.with_name("dap_share_kernels.csv"), rows)
    print(f"DAP {size}, R = {passes}: the {LONGEST} longest of {len(rows)} kernels")
    print_table(
        [{key: row[key] for key in ("total_ms", "calls", "mean_us", "parts", "kernel")} for row in rows[:LONGEST]]
    )


# --- exchanges --------------------------------------------------------------------------------------------------------


def exchange_rows(size: int) -> list[dict[str, Any]] | None:
    """Microseconds of the direct exchanges of ``size`` ranks within one GPU; None if one moves something else."""
    own, rows = direct_alone(size, torch.device("cuda", 0)), []
    for mib in EXCHANGE_MIB:
        x = torch.randn(int(mib * MIB / 2) // (size * LANE) * size, LANE, device="cuda").bfloat16()
        row: dict[str, Any] = {**facts(), "dap": size, "mib_per_rank": mib}
        for name, (call, expected) in exchange_calls(own, x).items():
            if not torch.equal(call(), expected):
                print(f"DAP {size}: {name} of {mib} MiB is NOT plain indexing", flush=True)
                return None
            row[f"{name}_us"] = round(graph_microseconds(repeated(call), 15, 1) / CALLS_PER_GRAPH, 2)
        rows.append(row)
    return rows


def exchange_calls(own: DirectExchanges, x: Tensor) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Exchanges of x [n P, LANE], and what they give where every peer holds the same.

    An all-to-all that arrives gives x itself: part p lies where peer p's would. One that is too large for that goes by
    stages and gives what each peer would send, this rank's part.
    """
    part = x.chunk(own.size)[own.rank]
    arrives = own.arrivals is not None and own.arrivals.place(x.nbytes, keep=False) is not None
    return {
        "all_to_all": (
            lambda: own.all_to_all([x[None]], 1, 0, Lasts.SHORT)[0].flatten(0, 1),
            x if arrives else part.repeat(own.size, 1),
        ),
        "all_gather": (lambda: own.all_gather(x, 0, Lasts.SHORT), x.repeat(own.size, 1)),
        "reduce_scatter": (lambda: own.reduce_scatter(x, 0), part * own.size),
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """The call as often as a graph of ``symmetric_exchange.py`` holds it."""

    def many() -> None:
        for _ in range(CALLS_PER_GRAPH):
            call()

    return many
