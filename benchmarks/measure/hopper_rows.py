"""Check and time the row-wise Gluon programs of compute capability 9.0 beside their Triton twins.

    python benchmarks/measure/hopper_rows.py                        # shares of DAP 1 and 2, and a few awkward rows
    python benchmarks/measure/hopper_rows.py --only gradient --out results --seconds 140

First a pool of processes compiles every program with every set of launch parameters, on tensors without memory. Then
one worker checks and times them in turns; a program that hangs or breaks the device costs its own row: the worker is
ended and another one goes on after it. Per row: error against fp32 in units of the twin's (``ratio``, at most 1.2 is
asked for), how many of 20 repeats differ with memory poisoned in between, microseconds of both inside CUDA graphs.
Rows go to hopper_rows.csv as they come. Exit status 1 if a program failed, erred or differed.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

import operation_cases
from bits import repeat
from common import FOLDER, append_rows, facts, graph_microseconds
from hopper_cases import HopperCase, Results, Ways, cases, training_shares
from scalefold.kernels import tuning

REPEATS, REPLAYS, CALLS = 20, 15, 4  # CALLS per graph
LARGEST_RATIO, LEAST_ERROR = 1.2, 1e-3
COMPILE_PROCESSES, COMPILE_SECONDS, VARIANT_SECONDS, START_SECONDS = 12, 100.0, 12.0, 60.0
PRINTED = ("case", "config", "ratio", "differing", "gluon_us", "twin_us", "verdict")
Variant = tuple[int, int]  # number of the case, number of its launch parameters
TWIN = -1  # in their place: the Triton kernel


def all_cases(only: str) -> list[HopperCase]:
    """Shares of DAP 1 and 2, and an odd number of tiles that is less than there are programs."""
    found = [*training_shares(1), *training_shares(2), *cases((1, 5, 64))]
    return [case for case in found if only in case.name]


def variants(found: list[HopperCase]) -> list[Variant]:
    """All launch parameters for the first case of each program, the default for the others."""
    first = {case.program: n for n, case in reversed(list(enumerate(found)))}
    counts = [len(case.configs()) if first[case.program] == n else 1 for n, case in enumerate(found)]
    return [(n, config) for n, count in enumerate(counts) for config in range(count)]


def to_compile(found: list[HopperCase]) -> list[Variant]:
    """Every program with every launch parameters once, then the twins of all cases."""
    own = {(found[n].program, config): (n, config) for n, config in reversed(variants(found))}
    return [*own.values(), *((n, TWIN) for n in range(len(found)))]


def errors(found: Results, exact: Results) -> list[float]:
    """Relative errors, one per result; NaN counts as infinite."""
    differences = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(found, exact, strict=True)]
    return [float(torch.nan_to_num(difference, nan=torch.inf)) for difference in differences]


def compile_variant(only: str, variant: Variant) -> str | None:
    """Compile a program or a twin where no device is needed (worker of the pool); what went wrong, or None."""
    from scalefold.kernels.ahead import compiling_for

    case = all_cases(only)[variant[0]]
    try:
        with torch.no_grad(), operation_cases.on_device("meta"), compiling_for(90):
            ways = case.build()
            if variant[1] == TWIN:
                ways.twin()
            elif ways.obstacle is None:
                with tuning.override(case.kernel, case.configs()[variant[1]]):
                    ways.gluon()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[-300:]}"
    return None


def compile_all(only: str) -> None:
    """Fill Triton's cache, for as long as COMPILE_SECONDS."""
    start = time.monotonic()
    pool = ProcessPoolExecutor(min(COMPILE_PROCESSES, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_variant, only, variant): variant for variant in to_compile(all_cases(only))}
    done, late = wait_for(futures, timeout=COMPILE_SECONDS)
    for future in done:
        if problem := future.result():
            print(f"variant {futures[future]} does not compile: {problem}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(done)} compiled, {len(late)} not, in {time.monotonic() - start:.0f} s", flush=True)


def measured(case: HopperCase, config: tuning.Config, ways: Ways, exact: Results, twin_us: float) -> dict[str, Any]:
    """Errors, differing repeats and time of one set of launch parameters."""
    with tuning.override(case.kernel, config):
        found, twin = errors(ways.gluon(), exact), errors(ways.twin(), exact)
        ratios = [own / max(other, 1e-9) for own, other in zip(found, twin, strict=True)]
        differing = len(repeat(ways.gluon, REPEATS))
        microseconds = timed(ways.gluon)
    wrong = any(r > LARGEST_RATIO and error > LEAST_ERROR for r, error in zip(ratios, found, strict=True))
    return {
        "config": " ".join(f"{name}={value}" for name, value in config.items()),
        "errors": " ".join(f"{error:.2e}" for error in found),
        "twin_errors": " ".join(f"{error:.2e}" for error in twin),
        "ratio": round(max(ratios), 3),
        "differing": differing,
        "gluon_us": round(microseconds, 1),
        "twin_us": round(twin_us, 1),
        "verdict": "wrong" if wrong else "differs" if differing else "ok",
    }


def attempt(case: HopperCase, config: tuning.Config, *rest: Any) -> dict[str, Any]:
    """``measured``; launch parameters that do not fit are named, a broken device ends the worker."""
    try:
        return measured(case, config, *rest)
    except (ValueError, AssertionError) as problem:
        return {"verdict": f"fails: {str(problem)[:200]}"}


def timed(call: Any) -> float:
    """Microseconds of a call that is followed by the same call."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    return graph_microseconds(several, REPLAYS, 1) / CALLS


def work(only: str, skipped: int) -> None:
    """Measure all variants but the first ``skipped``, a JSON line each (worker)."""
    found, before = all_cases(only), None
    chosen = variants(found)[skipped:]
    with torch.no_grad():
        for number, config in chosen:
            case = found[number]
            if before != number:
                ways = case.build()
                exact, twin_us, before = ways.exact(), timed(ways.twin), number
            if ways.obstacle is not None:
                row = {"verdict": f"obstacle: {ways.obstacle}"}
            else:
                row = attempt(case, case.configs()[config], ways, exact, twin_us)
            print("ROW " + json.dumps(row), flush=True)


def lines_of(process: subprocess.Popen) -> Queue:
    """Lines of a process, read by a thread; None at its end."""
    lines: Queue = Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def rows_of(only: str, count: int, deadline: float) -> Iterator[dict[str, Any]]:
    """One row per variant, from as many workers as it takes."""
    done = 0
    while done < count and time.monotonic() < deadline:
        command = [sys.executable, __file__, "--only", only, "--skip", str(done)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines, patience, said = lines_of(process), START_SECONDS, ""
        while done < count:
            try:
                line = lines.get(timeout=max(0.1, min(patience, deadline - time.monotonic())))
            except Empty:
                yield {"verdict": "hangs"}
                done += 1
                break
            if line is None:
                yield {"verdict": f"fails: {said[-200:].strip()}"}
                done += 1
                break
            said = said + line if not line.startswith("ROW ") else ""
            if line.startswith("ROW "):
                yield json.loads(line[4:])
                done, patience = done + 1, VARIANT_SECONDS
        process.kill()
        process.wait()


def main() -> int:
    """Compile, then measure; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of hopper_rows.csv")
    parser.add_argument("--seconds", type=float, default=145.0, help="no row after so long")
    parser.add_argument("--skip", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.skip is not None:
        work(arguments.only, arguments.skip)
        return 0
    deadline = time.monotonic() + arguments.seconds
    found = all_cases(arguments.only)
    chosen = variants(found)
    compile_all(arguments.only)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    empty = dict.fromkeys(("config", "errors", "twin_errors", "ratio", "differing", "gluon_us", "twin_us"), "")
    for (number, config), measure in zip(chosen, rows_of(arguments.only, len(chosen), deadline), strict=False):
        case = found[number]
        stated = {"config": " ".join(f"{name}={value}" for name, value in case.configs()[config].items())}
        rows.append({**facts(), "case": case.name, **empty, **stated, **measure})
        append_rows(arguments.out / "hopper_rows.csv", rows[-1:])
        print("  ".join(f"{name} {rows[-1][name]}" if name != "case" else case.name for name in PRINTED), flush=True)
    print(f"{len(rows)} of {len(chosen)} variants measured")
    return int(len(rows) < len(chosen) or any(row["verdict"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
