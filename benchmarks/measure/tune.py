"""Choose launch parameters of the Triton kernels on this GPU and write them to ``kernels/tuned/<device>.json``.

    python benchmarks/measure/tune.py                                # training shapes of DAP 1, six minutes
    python benchmarks/measure/tune.py --dap 2 4 8 --evaluation 320 704 --minutes 10 --missing
    python benchmarks/measure/tune.py --kernels attention transition --out results
    python benchmarks/measure/tune.py --refine  # present choices against their neighbours, registers limited among them

First every candidate of every problem is compiled by a pool of processes, most expensive problems first; then this
process alone times what has compiled: the operation inside a CUDA graph, forward only for kernels of the forward pass.
Earlier results come first: the present choice, then choices of other machines for the same problem. Left out is what
does not compile, does not launch, races (``rings.py``), or disagrees with the present choice; what is faster by less
than a hundredth does not replace it. What is chosen has given the same bits in REPEATS repeats, with memory poisoned in
between; what differs is dropped and named. At the time limit choices made so far are kept, as rows of ``tuning.csv``.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from scalefold.tune.sound.bits import Difference, repeat
from common import FOLDER, append_rows, facts, graph_microseconds, print_table
from scalefold.tune.operation_cases import Case, Inputs, evaluation_cases, outputs_of, training_cases
from scalefold.tune.sound.rings import ring_faults, unguarded_refills
from scalefold.kernels import tuning
from scalefold.kernels.triton_ops import TRITON
from scalefold.tune.candidates import candidates

COMPILE_SHARE = 0.6  # of the time limit
MAX_CANDIDATES = 20
LARGEST_DIFFERENCE = 0.02  # relative, between candidates: bf16 rounding in another order
REPLAYS = 12
REPEATS = 20  # with equal bits, before a candidate may be chosen
LEAST_GAIN = 0.01  # of the operation's time: less is noise
REGISTERS = (96, 128, 168)  # per thread: five, four and three programs of four warps on a multiprocessor


@dataclass
class Problem:
    """One kernel at one set of fields, met in one case; ``backward``: looked up in the backward pass."""

    kernel: str
    fields: dict[str, int | str]
    case: int
    backward: bool
    candidates: list[tuning.Config] = field(default_factory=list)
    present: tuning.Config = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, tuning.problem_key(self.fields)


def all_cases(daps: list[int], lengths: list[int]) -> list[Case]:
    """The cases of a command line; workers build the same list."""
    training = [case for dap in daps for case in training_cases(dap)]
    return training + [case for length in lengths for case in evaluation_cases(length)]


def run_once(inputs: Inputs, backward: bool) -> list[Tensor]:
    """Outputs, then gradients of all leaves that get one; no autograd graph, whose stream a capture would wait for."""
    outputs = outputs_of(inputs, TRITON)
    found = [output.detach() for output in outputs]
    return found + gradients(outputs, inputs.leaves) if backward else found


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of all leaves; the outputs themselves serve as gradients of the outputs."""
    found = torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@contextmanager
def recorded_lookups() -> Iterator[list[tuple[str, dict[str, int | str]]]]:
    """Collect what kernels look up."""
    found: list[tuple[str, dict[str, int | str]]] = []
    original = tuning.lookup

    def record(name: str, **fields: int | str) -> tuning.Config:
        found.append((name, fields))
        return original(name, **fields)

    tuning.lookup = record
    try:
        yield found
    finally:
        tuning.lookup = original


def find_problems(cases: list[Case], n: int) -> list[Problem]:
    """Run case n with present choices and list what it looks up (worker)."""
    inputs = cases[n].build()
    with recorded_lookups() as forward:
        outputs = outputs_of(inputs, TRITON)
    with recorded_lookups() as backward:
        if cases[n].calls:
            gradients(outputs, inputs.leaves)
    torch.cuda.synchronize()
    return [
        Problem(name, fields, n, is_backward)
        for found, is_backward in ((forward, False), (backward, True))
        for name, fields in found
    ]


def neighbours(config: tuning.Config) -> list[tuning.Config]:
    """One parameter a step up or down, tile and warps together, or the registers of a thread limited."""
    found: list[tuning.Config] = []
    for name, value in config.items():
        if name in ("num_stages", "STAGES"):
            found += [config | {name: n} for n in (value - 1, value + 1) if 1 <= n <= 5]
        elif name.startswith("BLOCK") or name in ("num_warps", "ROWS", "GROUPS", "SEQUENCES", "PROGRAMS"):
            found += [config | {name: n} for n in (value // 2, value * 2) if n]
        elif name == "LIBRARY" and value > 1:  # into how many ranges a weight gradient's rows are split
            found += [config | {name: n} for n in (value // 2, value * 2)]
    rows = next((name for name in ("BLOCK_M", "BLOCK_Q") if name in config), None)
    if rows is not None:
        found += [config | {"maxnreg": n} for n in REGISTERS]
        found += [config | {rows: config[rows] // 2, "num_warps": config["num_warps"] // 2}]
        found += [config | {rows: config[rows] * 2, "num_warps": config["num_warps"] * 2}]
    return [c for c in found if 1 <= c.get("num_warps", 1) <= 16]


def choices(problem: Problem, refine: bool) -> list[tuning.Config]:
    """The present choice, then its neighbours (``refine``) or history and the candidates of ``tune_candidates``."""
    kernel, key = problem.key
    present, *others = candidates(kernel, **problem.fields)
    if refine:
        others = neighbours(present)
    else:
        tables = [json.loads(path.read_text()) for path in sorted(tuning.TABLES.glob("*.json"))]
        others = [table[kernel][key] for table in tables if key in table.get(kernel, {})] + others
    ordered = [present]
    for config in others:
        if config not in ordered:
            ordered.append(config)
    return ordered[:MAX_CANDIDATES]


_worker_cases: list[Case] = []


def start_worker(daps: list[int], lengths: list[int]) -> None:
    """State of a worker: the list of cases."""
    _worker_cases.extend(all_cases(daps, lengths))


def find_task(n: int) -> list[Problem]:
    """``find_problems`` in a worker; a case that fails is printed and left out."""
    try:
        return find_problems(_worker_cases, n)
    except Exception as problem:
        print(f"{_worker_cases[n].name} does not run: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
        return []
    finally:
        torch.cuda.empty_cache()


@contextmanager
def recorded_kernels() -> Iterator[list[Any]]:
    """Collect the compiled kernels that are launched."""
    kernels: list[Any] = []
    original = JITFunction.run

    def record(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        kernels.append(original(self, *arguments, **options))
        return kernels[-1]

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield kernels
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


@functools.cache
def races(ttgir: str, ptx: str, num_warps: int) -> bool:
    """Whether a compiled kernel may overwrite what an unfinished product reads."""
    return bool(ring_faults(ttgir) or unguarded_refills(ptx, num_warps))


def compile_task(problem: Problem, config: tuning.Config) -> bool:
    """Run the case once with a candidate, so that the on-disk cache holds its kernels.

    False if it does not run, or if a kernel races.
    """
    try:
        with tuning.override(problem.kernel, config, **problem.fields), recorded_kernels() as kernels:
            run_once(_worker_cases[problem.case].build(), problem.backward)
        torch.cuda.synchronize()
        racing = [k.name for k in kernels if races(k.asm["ttgir"], k.asm["ptx"], k.metadata.num_warps)]
    except Exception:  # whatever the compiler or the driver says, this candidate is not for this GPU
        return False
    finally:
        torch.cuda.empty_cache()
    if racing:
        print(f"{problem.kernel} {problem.key[1]}: {config} races in {', '.join(racing)}", flush=True)
    return not racing


def unique(problems: list[Problem], cases: list[Case]) -> list[Problem]:
    """Each problem once, in its most frequent case; most expensive first (calls times elements)."""
    cost = {p.case: (1 + cases[p.case].calls) for p in problems}
    size = {n: sum(leaf.numel() for leaf in cases[n].build().leaves) for n in cost}
    ordered = sorted(problems, key=lambda p: (-cost[p.case] * size[p.case] * (2 if p.backward else 1), p.key))
    return list({p.key: p for p in reversed(ordered)}.values())[::-1]


def compile_all(pool: ProcessPoolExecutor, problems: list[Problem], refine: bool, deadline: float) -> None:
    """Keep of every problem's candidates those that ran before the deadline, and the present choice if it was late."""
    futures: dict[Future[bool], tuple[Problem, tuning.Config]] = {}
    for problem in problems:
        configs = choices(problem, refine)
        problem.present, problem.candidates = configs[0], []
        for config in configs:
            futures[pool.submit(compile_task, problem, config)] = (problem, config)
    done, late = wait(futures, timeout=max(0.0, deadline - time.monotonic()))
    for future in late:
        future.cancel()
    ran = sum(1 for future in done if future.exception() is None and future.result())
    print(
        f"{len(futures)} candidates: {ran} run, {len(done) - ran} do not, {len(late)} left for lack of time", flush=True
    )
    for future, (problem, config) in futures.items():
        kept = config == problem.present if future in late else future.exception() is None and future.result()
        if kept:
            problem.candidates.append(config)


def microseconds(inputs: Inputs, backward: bool) -> float:
    """Device time of the operation in a CUDA graph: median of replays."""
    return graph_microseconds(lambda: run_once(inputs, backward), REPLAYS, 1)


def agrees(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether every result is within LARGEST_DIFFERENCE of the present choice's."""
    return all(
        bool((a.float() - b.float()).norm() <= LARGEST_DIFFERENCE * b.float().norm() + 1e-6)
        for a, b in zip(found, expected, strict=True)
    )


def time_problem(problem: Problem, inputs: Inputs) -> dict[str, float]:
    """Microseconds of the operation per candidate, in their order (keys: configurations as JSON)."""
    expected, times = None, {}
    for config in problem.candidates:
        text = json.dumps(config, sort_keys=True)
        try:
            with tuning.override(problem.kernel, config, **problem.fields):
                found = run_once(inputs, problem.backward)
                expected = expected or found
                if agrees(found, expected):
                    times[text] = microseconds(inputs, problem.backward)
                else:
                    print(f"{problem.kernel} {problem.key[1]}: {text} disagrees", flush=True)
        except Exception as error:
            print(f"{problem.kernel} {problem.key[1]}: {text}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    print(
        f"{problem.kernel} {problem.key[1]}: " + ", ".join(f"{us:.1f} {text}" for text, us in times.items()), flush=True
    )
    return times


def differing_repeats(problem: Problem, inputs: Inputs, config: tuning.Config) -> list[list[Difference]]:
    """Repeats, memory poisoned in between, in which the operation gives other bits than the first time."""
    with tuning.override(problem.kernel, config, **problem.fields):
        return repeat(lambda: run_once(inputs, problem.backward), REPEATS)


def without_differing(
    problem: Problem, times: dict[str, float], differing: Callable[[tuning.Config], list[list[Difference]]]
) -> dict[str, float]:
    """Times without the candidates whose bits differ from run to run, as far as they would have been chosen."""
    left = dict(times)
    while left:
        config = fastest(left)
        found = differing(json.loads(config))
        if not found:
            break
        del left[config]
        print(
            f"{problem.kernel} {problem.key[1]}: {config} is dropped: {len(found)} of {REPEATS} repeats differ,"
            f" {found[0][0]}",
            flush=True,
        )
    return left


def fastest(times: dict[str, float]) -> str:
    """The first candidate, or one that is faster by more than LEAST_GAIN."""
    best, first = min(times, key=lambda config: times[config]), next(iter(times))
    return first if times[best] > (1 - LEAST_GAIN) * times[first] else best


def choose(problem: Problem, case: Case, times: dict[str, float]) -> tuple[tuning.Config, dict[str, object]]:
    """The fastest candidate and its row of the table; the first one is the present choice, unless that was dropped."""
    best, first = fastest(times), next(iter(times.values()))
    row: dict[str, object] = {
        "kernel": problem.kernel,
        "problem": problem.key[1],
        "operation": case.name,
        "timed": "forward+backward" if problem.backward else "forward",
        "default_us": round(first, 1),
        "best_us": round(times[best], 1),
        "candidates": len(times),
        "config": best,
    }
    return json.loads(best), row


def time_all(problems: list[Problem], cases: list[Case], deadline: float) -> list[dict[str, object]]:
    """Time, choose and save; one row per problem reached before the deadline. Later problems see earlier choices."""
    rows = []
    inputs, built = None, -1
    for problem in problems:
        if time.monotonic() > deadline:
            break
        if problem.candidates == [problem.present]:  # nothing else was compiled in time
            continue
        if problem.case != built:
            inputs, built = None, problem.case
            torch.cuda.empty_cache()
            inputs = cases[built].build()
        assert inputs is not None
        differing = functools.partial(differing_repeats, problem, inputs)
        times = without_differing(problem, time_problem(problem, inputs), differing)
        if not times:
            print(f"{problem.kernel} {problem.key[1]}: NO candidate is sound, {problem.present} stays", flush=True)
            continue
        config, row = choose(problem, cases[built], times)
        tuning.save(tuning.device_kind(), {problem.kernel: {problem.key[1]: config}})
        rows.append(row)
    return rows


def chosen_problems(pool: ProcessPoolExecutor, cases: list[Case], kernels: list[str], missing: bool) -> list[Problem]:
    """Problems of all cases, limited to kernels whose name contains one of ``kernels``."""
    found = [problem for problems in pool.map(find_task, range(len(cases))) for problem in problems]
    problems = unique(found, cases)
    if kernels:
        problems = [p for p in problems if any(part in p.kernel for part in kernels)]
    if missing:
        table = tuning.table(tuning.capability())
        problems = [p for p in problems if p.key[1] not in table.get(p.kernel, {})]
    return problems


def main() -> int:
    """Sweep what the command line asks for; exit status 1 if nothing could be timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=[], help="only kernels whose name contains one of these")
    parser.add_argument("--dap", type=int, nargs="*", default=[1], help="training shares, default 1")
    parser.add_argument("--evaluation", type=int, nargs="*", default=[], metavar="LENGTH", help="chains, forward only")
    parser.add_argument("--missing", action="store_true", help="only problems without a tuned entry")
    parser.add_argument("--refine", action="store_true", help="try neighbours of the present choices only")
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit of the whole sweep")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path, help="also copy the table and tuning.csv here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: launch parameters are chosen where they are used")
    begin, limit = time.monotonic(), 60 * arguments.minutes
    cases = all_cases(arguments.dap, arguments.evaluation)
    context = multiprocessing.get_context("spawn")
    state = (arguments.dap, arguments.evaluation)
    with ProcessPoolExecutor(arguments.workers, context, start_worker, state) as pool:
        problems = chosen_problems(pool, cases, arguments.kernels, arguments.missing)
        print(f"{len(problems)} problems in {len(cases)} cases after {time.monotonic() - begin:.0f} s", flush=True)
        compile_all(pool, problems, arguments.refine, begin + COMPILE_SHARE * limit)
        pool.shutdown(cancel_futures=True)
    print(f"timing from {time.monotonic() - begin:.0f} s on", flush=True)
    rows = time_all(problems, cases, begin + limit)
    append_rows(FOLDER / "tuning.csv", [{**facts(), **row} for row in rows])
    print_table(rows)
    print(f"{len(rows)} of {len(problems)} problems in {time.monotonic() - begin:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for path in (tuning.TABLES / f"{tuning.device_kind()}.json", FOLDER / "tuning.csv"):
            if path.exists():
                shutil.copy(path, arguments.out)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
