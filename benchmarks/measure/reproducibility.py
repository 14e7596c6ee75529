"""Same inputs, same seed: same bits? Of every operation, forward and backward, and of whole training steps.

    python benchmarks/measure/reproducibility.py                            # operations of DAP 1, 2, 4, 8, then steps
    python benchmarks/measure/reproducibility.py --operations --dap 1 --only layer_norm_linear
    python benchmarks/measure/reproducibility.py --steps --digests first.json    # again in a new process: must be equal
    torchrun --nproc-per-node 2 benchmarks/measure/reproducibility.py --steps --dap 2 1   # axial parallel; two replicas
    python benchmarks/measure/reproducibility.py --small --repeats 2        # on the CPU, tiny model, to try the script

Each operation runs once and then REPEATS times more, memory poisoned in between (``bits.py``). A step is the program's
own, dropout on, captured in CUDA graphs where a run would do so; state and seed are put back before each one, numbers
of passes take turns, so that graphs find what others left in the memory that they share. Compared are gradients, logged
values and all that the update changes. Appends to benchmarks/results/reproducibility.csv: ``differing`` counts repeats
that are not the first one's equal on some rank. Exit status 1 if any differs or does not run.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import FOLDER, append_rows, facts, print_table
from multi_gpu import Host, build, set_dropout, tell, together
from scalefold.data.loading.loader import Batch
from scalefold.kernels import tuning
from scalefold.processors import processors
from scalefold.step.graphs import TrainStep
from scalefold.step.optimizer import Optimizer
from scalefold.tune import operation_cases
from scalefold.tune.programs import compile_all_cases, run_once, start_worker
from scalefold.tune.sound.bits import differences, repeat
from step_time import module_of

SEED = 11
DAPS = (1, 2, 4, 8)
Layout = tuple[int, int]  # GPUs that train together, DAP size


def result_row(what: str, dap: int, passes: int | str, repeats: int, differing: int | str) -> dict[str, object]:
    """One line of reproducibility.csv; ``passes`` is empty for operations."""
    return {**facts(), "what": what, "dap": dap, "passes": passes, "repeats": repeats, "differing": differing}


# --- operations -------------------------------------------------------------------------------------------------------


def compile_beforehand(daps: Sequence[int], workers: int) -> None:
    """Compile every case in processes without a GPU, whose kernels this one then finds in Triton's cache."""
    context = multiprocessing.get_context("spawn")
    state = (list(daps), [], tuning.capability(), tuning.device_kind())
    with ProcessPoolExecutor(1, context, start_worker, state) as pool:
        pool.submit(compile_all_cases, workers).result()


def operation_rows(daps: Sequence[int], only: Sequence[str], repeats: int) -> list[dict[str, object]]:
    """One row per operation and shape."""
    rows = []
    for dap in daps:
        for case in operation_cases.training_cases(dap):
            if not only or any(part in case.name for part in only):
                rows.append(result_row(case.name, dap, "", repeats, differing_repeats(case, repeats)))
    return rows


def differing_repeats(case: operation_cases.Case, repeats: int) -> int | str:
    """How many repeats differ from the first run, or ``error``; what differs is printed."""
    try:
        inputs = case.build()
        found = repeat(lambda: run_once(inputs, backward=case.calls > 0), repeats)
    except Exception as problem:
        print(f"{case.name}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return "error"
    for different in found:
        print(f"{case.name} DIFFERS: {'; '.join(map(str, different))}", flush=True)
    return len(found)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass
class Beginning:
    """What a step changes, as it was, on the device."""

    optimizer: Optimizer
    saved: list[Tensor]
    counters: tuple[int, int]

    @staticmethod
    def of(optimizer: Optimizer) -> "Beginning":
        """The present state."""
        saved = [buffer.clone() for buffer in state_of(optimizer)]
        return Beginning(optimizer, saved, (optimizer.adam_step, optimizer.num_averaged))

    def restore(self) -> None:
        """Put it back."""
        for buffer, copy in zip(state_of(self.optimizer), self.saved, strict=True):
            buffer.copy_(copy)
        self.optimizer.flat.refresh()
        self.optimizer.adam_step, self.optimizer.num_averaged = self.counters


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """Weights, both moments, averaged weights."""
    return [optimizer.flat.master, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.averaged]


def run_step(step: TrainStep, batch: Batch, passes: int, seed: int) -> list[Tensor]:
    """Logged values, gradients in the optimizer's buffers, and state after one step from ``seed``."""
    torch.manual_seed(seed)
    values = step(batch, passes, 1)
    return [values, *step.optimizer.flat.gradients.values(), *state_of(step.optimizer)]


def differing_modules(step: TrainStep, first: Sequence[Tensor], again: Sequence[Tensor]) -> list[str]:
    """Modules with gradients whose bits differ."""
    flat, found = step.optimizer.flat, set()
    for segment, a, b in zip(flat.gradients, first[1:], again[1:], strict=False):
        for slot in flat.slots:
            place = slice(slot.start - segment.start, slot.stop - segment.start)
            if segment.start <= slot.start < segment.stop and differences([a[place]], [b[place]]):
                found.add(module_of(slot.name))
    return sorted(found)


def step_rows(host: Host, layout: Layout, arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict]:
    """One row per number of passes, and a digest of the first step of each."""
    gpus, dap = layout
    step, batch, config = build(host, gpus, dap, arguments.set)
    set_dropout(step, True)
    passes = [r for r in arguments.passes if r <= config.data.num_recycling_iters + 1]
    step.warm_up(batch, max(passes), lambda text: None)
    beginning, seed = Beginning.of(step.optimizer), SEED + host.rank // dap
    first: dict[int, list[Tensor]] = {}
    flags = torch.zeros(max(passes) + 1, arguments.repeats, dtype=torch.int32)
    for turn in range(-1, arguments.repeats):
        for r in passes:
            beginning.restore()
            found = run_step(step, batch, r, seed)
            if turn < 0:
                first[r] = [tensor.clone() for tensor in found]
            elif differences(first[r], found):
                flags[r, turn] = 1
                modules = ", ".join(differing_modules(step, first[r], found)) or "none"
                print(f"rank {host.rank}: R={r} repeat {turn} DIFFERS; gradients of: {modules}", flush=True)
    if host.control is not None:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=host.control)
    replicas = gpus // dap
    what = "step" if replicas == 1 else f"step of {replicas} replicas"
    rows = [result_row(what, dap, r, arguments.repeats, int(flags[r].sum())) for r in passes]
    return rows, {f"{what} dap {dap} R={r}": digest(first[r]) for r in passes}


def digest(tensors: Sequence[Tensor]) -> str:
    """Hash of the bits of all tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def unequal_digests(file: Path, digests: dict[str, str]) -> list[str]:
    """Steps whose digest in ``file``, of an earlier process, is another; new ones are added to it."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(digests | known, indent=1) + "\n")
    return [name for name, value in digests.items() if known.get(name, value) != value]


# --- command line -----------------------------------------------------------------------------------------------------


def all_step_rows(host: Host, daps: Sequence[int] | None, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Steps of all layouts that these ranks allow, kept one by one; an unequal digest is a row that differs."""
    sizes = [dap for dap in daps or DAPS if host.world % dap == 0]
    rows: list[dict[str, object]] = []
    for dap in sizes:
        own, digests = step_rows(host, (host.world, dap), arguments)
        gc.collect()  # the graphs of this layout, before the next one's
        for name, value in digests.items():
            tell(host, f"{name}: {value[:16]}")
        if arguments.digests is not None and host.rank == 0:
            for name in unequal_digests(arguments.digests, digests):
                print(f"{name} DIFFERS from the process that wrote {arguments.digests}", flush=True)
                own.append(result_row(f"{name}, another process", dap, "", 1, 1))
        rows += keep(host, own, arguments)
    return rows


def keep(host: Host, rows: list[dict[str, object]], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """``rows``, which rank 0 has appended to the table: a call that is cut off later loses none of them."""
    if host.rank == 0 and not arguments.small:
        append_rows(arguments.csv, rows)
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", action="store_true", help="only operations")
    parser.add_argument("--steps", action="store_true", help="only steps (always under torchrun)")
    parser.add_argument(
        "--dap", type=int, nargs="+", help="shares; default: 1 2 4 8, of steps those that the GPUs allow"
    )
    parser.add_argument("--only", nargs="+", default=[], help="operations whose name contains one of these")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--digests", type=Path, help="compare steps with an earlier process; the file is made if absent"
    )
    parser.add_argument("--workers", type=int, default=max(1, processors() - 2), help="that compile; 0: none")
    parser.add_argument("--small", action="store_true", help="tiny model on the CPU, plain operations; no CSV rows")
    parser.add_argument("--csv", type=Path, default=FOLDER / "reproducibility.csv")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    return arguments


def main() -> int:
    """Ask by the ranks that torchrun started, or alone; exit status 1 if anything differs or nothing ran."""
    arguments, started = parse_arguments(), time.monotonic()
    if "RANK" in os.environ:
        return together(lambda host: ask(host, arguments, started), arguments.small, None)
    device = torch.device("cpu") if arguments.small else torch.device("cuda", 0)
    return int(not ask(Host(0, 1, device, None, None), arguments, started))


def ask(host: Host, arguments: argparse.Namespace, started: float) -> bool:
    """Print and append on rank 0; whether something ran and nothing differs."""
    rows: list[dict[str, object]] = []
    if not arguments.steps and host.world == 1 and not arguments.small:
        daps = arguments.dap or DAPS
        if arguments.workers and not arguments.only:
            compile_beforehand(daps, arguments.workers)
        rows += keep(host, operation_rows(daps, arguments.only, arguments.repeats), arguments)
        tell(host, f"operations after {time.monotonic() - started:.0f} s")
    if not arguments.operations:
        rows += all_step_rows(host, arguments.dap if arguments.steps or host.world > 1 else None, arguments)
        tell(host, f"steps after {time.monotonic() - started:.0f} s")
    if host.rank == 0:
        print_table(rows)
    bad = [row for row in rows if row["differing"] != 0]
    tell(host, f"{len(rows)} questions, {len(bad)} with differing bits")
    return bool(rows) and not bad


if __name__ == "__main__":
    sys.exit(main())
