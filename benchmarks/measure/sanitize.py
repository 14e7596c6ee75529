"""compute-sanitizer over every kernel: races in shared memory, or accesses to memory that is nobody's.

    python benchmarks/measure/sanitize.py              # shapes of DAP 8, then DAP 1, with the launch parameters shipped
    python benchmarks/measure/sanitize.py --dap 8 --only layer_norm_linear --minutes 2
    python benchmarks/measure/sanitize.py --tool memcheck

Every operation runs once, forward and backward, under the sanitizer, in several processes at a time, because that
takes far longer than the kernels do; a pool of processes compiles them first. Prints faults by kernel; exit status 1 if
there are some, or if not every case was reached.

``racecheck``: accesses to shared memory that no barrier orders. What asynchronous products and the copy engine do to it
it may not see: ``compile_targets.py --faults`` looks for that. Nor does it follow the barriers on which copies arrive:
of every program that splits its warps around them, libraries' own ones included, it reports each hand-over. Those are
listed and not counted; that their results repeat bit for bit is asked by ``reproducibility.py``.

``memcheck``: every tensor is an allocation of its own, so that reading or writing just behind it is found.
"""

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from common import print_table
from reproducibility import compile_beforehand
from scalefold.processors import processors
from scalefold.tune.operation_cases import Case, training_cases
from scalefold.tune.programs import run_once

DAPS = (8, 1)
TOOLS = {
    "racecheck": ("--print-limit", "0"),
    "memcheck": ("--print-limit", "100", "--report-api-errors", "no"),
}
ENDS = {"racecheck": "RACECHECK SUMMARY", "memcheck": "ERROR SUMMARY"}
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ACCESS = re.compile(r"(Error|Warning): .*?\b(Write|Read) access at (?:void )?([\w:]+)")
INVALID = re.compile(r"(Invalid __\w+__ \w+|Misaligned \w+|Device.* error)")
PLACE = re.compile(r"={5,}\s+at (?:void )?([\w:]+)")
HANDS_OVER = re.compile(r"hopper_|nvjet_")  # programs whose warps wait for copies, ours and those of cuBLAS
HAZARDS = re.compile(r"\[(\d+) hazards?\]")


def hazards(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Hazards of a racecheck report by (kernel, severity); a report without a count is one hazard."""
    found: dict[tuple[str, str], int] = collections.defaultdict(int)
    current, counted = None, True
    for line in lines:
        if access := ACCESS.search(line):
            if not counted and current is not None:
                found[current] += 1
            current, counted = (access[3], access[1].lower()), False
        if current is not None and (number := HAZARDS.search(line)):
            found[current] += int(number[1])
            counted = True
    if not counted and current is not None:
        found[current] += 1
    return dict(found)


def invalid_accesses(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Accesses in a memcheck report by (kernel, what), one per thread that made them."""
    found: dict[tuple[str, str], int] = collections.defaultdict(int)
    what = None
    for line in lines:
        if access := INVALID.search(line):
            what = access[1]
        elif what is not None and (place := PLACE.search(line)):
            found[place[1], what] += 1
            what = None
    return dict(found)


def chosen_cases(daps: list[int], only: list[str], process: int = 0, processes: int = 1) -> dict[str, Case]:
    """Cases by name, in the order in which they run; those of one process of several."""
    cases = {f"dap {dap} {case.name}": case for dap in daps for case in training_cases(dap)}
    chosen = [name for name in cases if not only or any(part in name for part in only)]
    return {name: cases[name] for name in chosen[process::processes]}


def launch(cases: dict[str, Case]) -> None:
    """Run every case once and name it (this is what the sanitizer watches)."""
    for name, case in cases.items():
        run_once(case.build(), backward=case.calls > 0)
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


def run(command: list[str], deadline: float, environment: dict[str, str]) -> list[str]:
    """Cases that a command has run until it ended or the deadline came; the rest of its output is shown."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    ran = [line.removeprefix("ran ") for line in lines if line.startswith("ran ")]
    for line in lines if process.returncode else []:
        if not line.startswith("ran "):
            print(f"  {line}")
    return ran


def watched(
    deadline: float, environment: dict[str, str], command: list[str], report: Path
) -> tuple[list[str], list[str]]:
    """Cases that one process under the sanitizer has run, and the lines of its report."""
    reached = run([command[0], "--log-file", str(report), *command[1:]], deadline, environment)
    return reached, report.read_text(errors="replace").splitlines() if report.exists() else []


def main() -> int:
    """Launch, watch and summarise; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, default="racecheck", help="of the sanitizer")
    parser.add_argument("--dap", type=int, nargs="+", default=list(DAPS), help="training shares, in this order")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of everything")
    parser.add_argument("--processes", type=int, default=6, help="watched at a time")
    parser.add_argument("--launch", type=int, help="only run the cases of this process")
    arguments = parser.parse_args()
    if arguments.launch is not None:
        launch(chosen_cases(arguments.dap, arguments.only, arguments.launch, arguments.processes))
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        parser.error("no compute-sanitizer on this machine: it comes with CUDA's toolkit")
    deadline = time.monotonic() + 60 * arguments.minutes
    if not arguments.only:
        compile_beforehand(arguments.dap, max(1, processors() - 2))
    own = [sys.executable, __file__, "--dap", *map(str, arguments.dap), "--processes", str(arguments.processes)]
    own += ["--only", *arguments.only] if arguments.only else []

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.processes) as pool:
        options = [sanitizer, "--tool", arguments.tool, *TOOLS[arguments.tool]]
        commands = [[*options, *own, "--launch", str(number)] for number in range(arguments.processes)]
        reports = [Path(name) / f"report{number}" for number in range(arguments.processes)]
        environment = NO_CACHE if arguments.tool == "memcheck" else {}
        parts = list(pool.map(partial(watched, deadline, environment), commands, reports))
    wanted = chosen_cases(arguments.dap, arguments.only)
    reached, reports = [case for cases, _ in parts for case in cases], [lines for _, lines in parts]
    return summarise(arguments.tool, list(wanted), reached, reports)


def summarise(tool: str, wanted: list[str], reached: list[str], reports: list[list[str]]) -> int:
    """Print what was found; the exit status."""
    races = tool == "racecheck"
    found = (hazards if races else invalid_accesses)(line for lines in reports for line in lines)
    rows: list[dict[str, object]] = [
        {
            "kernel": kernel,
            "what": what,
            "faults": count,
            "judged": "no" if races and HANDS_OVER.match(kernel) else "yes",
        }
        for (kernel, what), count in found.items()
    ]
    judged = [row for row in rows if row["judged"] == "yes"]
    print_table(rows)
    unfinished = [lines for lines in reports if not any(ENDS[tool] in line for line in lines)]
    for lines in unfinished:
        print("\n".join(["the sanitizer did not finish:", *lines[-20:]]))
    missed = [case for case in wanted if case not in reached]
    if missed:
        print(f"NOT reached: {', '.join(missed)}")
    count = sum(int(str(row["faults"])) for row in judged)
    print(f"{len(reached)} of {len(wanted)} cases, {count} faults in {len(judged)} lines")
    return int(bool(judged) or bool(missed) or bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
