"""Time every launch parameter of four kernels at two shapes each, for replays of searches (``tuning_replay.py``).

    python benchmarks/measure/tuning_sweeps.py --minutes 9 --csv benchmarks/results/tuning_sweeps.csv

All other processors compile while this process times what they have finished: results compared with the present
choice's, bits in REPEATS repeats with memory poisoned in between, then the operation inside a CUDA graph. What does not
compile, does not fit, races, disagrees or does not launch is a row with its error. In the time that is left the fastest
are timed again, as further rows. A table that exists is continued.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch

from common import FOLDER, print_table
from scalefold.kernels import tuning
from scalefold.tune import trials
from scalefold.tune.candidates import space
from scalefold.tune.command import first_columns
from scalefold.tune.device import Device
from scalefold.tune.operation_cases import Case
from scalefold.tune.programs import (
    Problem,
    Program,
    all_cases,
    compile_task,
    daps_of,
    find_problems,
    start_worker,
)
from scalefold.tune.trials import Trial, config_text, parse_config

DAPS = (1, 4)
SWEPT = (  # kernel, what its operation's name contains
    ("transition_forward", "transition 1x256x256x128"),
    ("transition_forward", "transition 1x128x64x256"),
    ("transition_backward", "transition 1x256x256x128"),
    ("transition_backward", "transition 1x1024x64x64"),
    ("norm_linear_backward", "layer_norm_linear 1x128x256x256"),
    ("norm_linear_backward", "layer_norm_linear 1x64x256x128"),
    ("attention_backward_queries", "attention 1x256x256x4h32"),
    ("attention_backward_queries", "attention 1x32x256x8h32"),
)
REPEATS = 6
CLOSE = 1.1  # times the fastest: what is timed again
RESERVED = 0.12  # of the time, for that
Job = tuple[Problem, tuning.Config]


def swept_problems(cases: list[Case]) -> list[Problem]:
    """The eight, in order; ValueError if the model no longer has one."""
    found = []
    for kernel, part in SWEPT:
        numbers = [n for n, case in enumerate(cases) if case.name.startswith(part)]
        problems = [p for n in numbers for p in find_problems(cases, n) if p.kernel == kernel]
        if not problems:
            raise ValueError(f"no case `{part}...` looks up {kernel}")
        found.append(problems[0])
    return found


def jobs(problems: list[Problem], limit: int | None, done: set[tuple[str, str, str]]) -> list[Job]:
    """What is left to try, the problems in turns, so that a sweep that ends early has something of each."""
    rows = []
    for turn, problem in enumerate(problems):
        configs = [tuning.lookup(problem.kernel, **problem.fields), *space(problem.kernel, problem.fields)]
        fresh = list(dict.fromkeys(map(config_text, configs)))[:limit]
        rows += [(n, turn, problem, text) for n, text in enumerate(fresh) if (*problem.key, text) not in done]
    return [(problem, parse_config(text)) for _, _, problem, text in sorted(rows, key=lambda row: row[:2])]


def compiled(pool: ProcessPoolExecutor, todo: list[Job], seconds: float) -> Iterator[tuple[Job, Program]]:
    """Programs as they are finished; ends at the limit."""
    futures = {pool.submit(compile_task, *job): job for job in todo}
    try:
        for future in as_completed(futures, timeout=max(0.0, seconds)):
            yield futures[future], future.result()
    except (TimeoutError, BrokenProcessPool) as error:
        left = sum(not future.done() for future in futures)
        print(f"compiling ended with {left} left: {type(error).__name__}", flush=True)


def row_of(
    columns: dict[str, object], config: tuning.Config, program: Program, device: Device, problem: Problem
) -> Trial:
    """Try one candidate that was compiled."""
    figures = {name: value for name, value in vars(program).items() if name != "error"}
    trial = Trial(**columns, config=config_text(config), **figures, error=program.error, search="sweep")  # type: ignore[arg-type]
    if program.error:
        return trial
    us, bits, error = device.try_out(problem, config, REPEATS)
    return replace(trial, us=us if us is None else round(us, 2), bits=bits, error=error)


def closest(rows: list[Trial]) -> list[Trial]:
    """Trials within CLOSE of the fastest of their problem, fastest first."""
    least: dict[tuple[str, str], float] = {}
    sound = [row for row in rows if row.is_sound]
    for row in sound:
        least[row.key] = min(row.us or 0.0, least.get(row.key, float("inf")))
    return sorted(
        (r for r in sound if (r.us or 0.0) <= CLOSE * least[r.key]), key=lambda r: (r.us or 0.0) / least[r.key]
    )


def again(rows: list[Trial], problems: list[Problem], devices: dict[int, Device], end: float) -> Iterator[Trial]:
    """Time the close ones once more, until the limit."""
    by_key = {problem.key: problem for problem in problems}
    for row in closest(rows):
        if time.monotonic() > end:
            return
        problem = by_key[row.key]
        us, bits, error = devices[problem.case].try_out(problem, parse_config(row.config), REPEATS)
        yield replace(row, us=us if us is None else round(us, 2), bits=bits, error=error)


def summary(rows: list[Trial]) -> list[dict[str, object]]:
    """One line per problem."""
    found = []
    for key in dict.fromkeys(row.key for row in rows):
        own = [row for row in rows if row.key == key]
        sound = sorted((row for row in own if row.is_sound), key=lambda row: row.us or 0.0)
        counts: dict[str, object] = {"kernel": key[0], "problem": key[1], "rows": len(own), "sound": len(sound)}
        counts["differ"] = sum(row.bits == "differ" for row in own)
        counts["spill"] = sum(bool(row.spill_bytes) for row in own)
        if sound:
            counts |= {"best_us": sound[0].us, "median_us": sound[len(sound) // 2].us, "best": sound[0].config}
        found.append(counts)
    return found


def main() -> int:
    """Sweep; exit status 1 if nothing was timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole sweep")
    parser.add_argument("--csv", type=Path, default=FOLDER / "tuning_sweeps.csv", help="table to append to")
    parser.add_argument("--limit", type=int, help="at most that many configurations of each problem")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times come from one")
    begin, limit = time.monotonic(), 60 * arguments.minutes
    cases = all_cases(list(DAPS), [])
    problems = swept_problems(cases)
    shared = first_columns(problems, cases, daps_of(DAPS, []))
    columns = {problem.key: row for problem, row in zip(problems, shared, strict=True)}
    devices = {problem.case: Device(cases) for problem in problems}
    rows = trials.read(arguments.csv) if arguments.csv.exists() else []
    todo = jobs(problems, arguments.limit, {(*row.key, row.config) for row in rows})
    print(f"{len(todo)} to try of {len(problems)} problems, {arguments.workers} processes compile", flush=True)
    state = (list(DAPS), [], tuning.capability())
    pool = ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), start_worker, state)
    said = 0.0
    for (problem, config), program in compiled(pool, todo, (1 - RESERVED) * limit - (time.monotonic() - begin)):
        rows.append(row_of(columns[problem.key], config, program, devices[problem.case], problem))
        trials.append(arguments.csv, rows[-1:])
        if time.monotonic() > said + 20:
            said = time.monotonic()
            print(
                f"{said - begin:4.0f} s: {len(rows)} rows, {rows[-1].kernel} {rows[-1].config} {rows[-1].us}",
                flush=True,
            )
    for process in list(pool._processes.values()):  # what still compiles is not wanted any more
        process.terminate()
    pool.shutdown(cancel_futures=True)
    for row in again(rows, problems, devices, begin + limit):
        rows.append(row)
        trials.append(arguments.csv, [row])
    print_table(summary(rows))
    print(f"{len(rows)} rows in {time.monotonic() - begin:.0f} s")
    return 0 if any(row.is_sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
