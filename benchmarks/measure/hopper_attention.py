"""Passes of attention in Gluon against their Triton twins on this GPU: errors, bits and time of every shape.

    python benchmarks/measure/hopper_attention.py                     # all cases, about a minute
    python benchmarks/measure/hopper_attention.py --only triangle_start awkward --passes forward --csv trial.csv

A pool of processes compiles everything first, without the GPU. Then one process runs the jobs one after the other; a
job that hangs or crashes costs that process, which is replaced, and no other job. Each job compares the results with
fp32 and with the twin's, repeats them REPEATS times with memory poisoned in between, and times both in CUDA graphs.
Exit status 1 if a result is worse than ALLOWED times the twin's error, if bits differ, if a job dies, or if one was not
reached.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if "triton" not in sys.modules:  # with it, it is settled
    os.environ.pop("TRITON_INTERPRET", None)

import torch

from common import answers, append_rows, facts, graph_microseconds, print_table
from compile_targets import recorded_launches
from hopper_cases import (
    CASES,
    HOPPER,
    KERNELS,
    TWIN,
    Case,
    Inputs,
    Results,
    configurations,
    errors,
    exact_results,
    inputs_of,
    run,
    run_forward,
    too_large,
)
from scalefold.kernels import tuning
from scalefold.kernels.compiled import ahead
from scalefold.tune.sound.bits import Difference, repeat

WORKERS = 12  # that compile
JOB_SECONDS = 20.0  # the first job of a case also prepares it
REPEATS, REPLAYS = 20, 20


@dataclass(frozen=True)
class Job:
    """One pass of one case with one choice of launch parameters, as text and as values."""

    case: Case
    pass_: str
    config: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.config if name != "HOPPER")

    def chosen(self) -> AbstractContextManager[None]:
        """The launch parameters in use inside the block."""
        return tuning.override(KERNELS[self.pass_], dict(self.config))


def jobs_of(cases: list[Case], passes: list[str]) -> list[Job]:
    """All jobs, case by case."""
    chosen = [(case, pass_) for case in cases for pass_ in case.passes if pass_ in passes]
    with tuning.assume_capability(90):
        return [Job(*pair, tuple(config.items())) for pair in chosen for config in configurations(*pair)]


def compile_job(job: Job) -> str:
    """Compile the Gluon programs of a job into Triton's cache (worker); what went wrong, or nothing."""
    try:
        inputs = inputs_of(job.case, "meta")
        with recorded_launches():  # only shapes are wanted
            saved = run_forward(TWIN, inputs)
        with ahead.compiling_for(90), job.chosen():
            run(job.pass_, HOPPER, inputs, saved)
    except Exception as problem:  # whatever the compiler says, other jobs go on
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[-1][:150]}"
    return ""


def compile_twin(case: Case) -> None:
    """Compile the Triton programs of a case (worker)."""
    inputs = inputs_of(case, "meta")
    with ahead.compiling_for(90):
        saved = run_forward(TWIN, inputs)
        for pass_ in case.passes:
            run(pass_, TWIN, inputs, saved)


def programs(job: Job) -> tuple[object, ...]:
    """Equal for jobs that take the same compiled programs."""
    _, rows, n, _, width = job.case.shape
    config = tuple(item for item in job.config if item[0] != "GROUPS")
    return job.pass_, config, rows % 16 == 0, n, width, job.case.biased


@dataclass
class Prepared:
    """What all jobs of a case share: exact results, those of the twin by pass, and its times."""

    inputs: Inputs
    exact: Results
    twin: dict[str, Results]
    twin_us: dict[str, float]

    @staticmethod
    def of(case: Case) -> "Prepared":
        inputs = inputs_of(case, "cuda")
        saved = run_forward(TWIN, inputs)
        calls = {pass_: partial(run, pass_, TWIN, inputs, saved) for pass_ in case.passes}
        microseconds = {pass_: graph_microseconds(call, REPLAYS, 2) for pass_, call in calls.items()}
        twin = {pass_: call() for pass_, call in calls.items()}
        return Prepared(inputs, exact_results(inputs), twin | {"forward": saved}, microseconds)


def measure(job: Job, prepared: Prepared) -> dict[str, object]:
    """Errors, bits and times of one job, as columns of its row."""

    twin_us = prepared.twin_us[job.pass_]

    def call() -> Results:
        return run(job.pass_, HOPPER, prepared.inputs, prepared.twin["forward"])

    def errors_of(found: Results) -> dict[str, float]:
        return errors(found, prepared.exact, prepared.inputs.mask)

    with job.chosen():
        own, other = errors_of(call()), errors_of(prepared.twin[job.pass_])
        worse = too_large(own, other)
        different: list[list[Difference]] = repeat(lambda: list(call().values()), REPEATS)
        us = graph_microseconds(call, REPLAYS, 2)
    return {
        "us": round(us, 1),
        "twin_us": round(twin_us, 1),
        "gain": f"{100 * (1 - us / twin_us):.0f} %",
        "errors": " ".join(f"{name}:{own[name]:.1e}/{other[name]:.1e}" for name in own),
        "repeats_that_differ": len(different),
        "status": "wrong: " + " ".join(worse) if worse else "bits differ" if different else "ok",
    }


def serve(pipe: Connection) -> None:
    """Run jobs from the pipe on the GPU (worker); an answer per job."""
    torch.cuda.init()
    present: tuple[Case, Prepared] | None = None
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        try:
            if present is None or present[0] != job.case:
                present = None  # frees the memory of the last case first
                torch.cuda.empty_cache()
                present = job.case, Prepared.of(job.case)
            pipe.send(measure(job, present[1]))
        except Exception as problem:  # a launch that is refused; a context that is lost ends the process
            pipe.send({"status": f"failed: {type(problem).__name__}: {str(problem).strip()[:150]}"})
            if not answers():
                return


class Runner:
    """A process that runs jobs, replaced when one of them hangs or crashes."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def run(self, job: Job) -> dict[str, object]:
        """The answer to a job, or how it died."""
        if self._process is None or not self._process.is_alive():
            self.start()
        try:
            self._pipe.send(job)
            if self._pipe.poll(JOB_SECONDS):
                return self._pipe.recv()
            status = f"hangs: no answer in {JOB_SECONDS:.0f} s"
        except (EOFError, BrokenPipeError):
            status = "crashed"
        self.stop()
        return {"status": status}

    def start(self) -> None:
        self.stop()
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(60) or self._pipe.recv() != "ready":
            raise RuntimeError("the process with the GPU does not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(JOB_SECONDS)
            self._process = None


def rows_of(jobs: list[Job], broken: dict[Job, str], deadline: float) -> Iterator[dict[str, object]]:
    """A row per job: what does not compile is not run, what is late is named."""
    runner, deadly = Runner(), dict[tuple[object, ...], str]()
    empty = dict.fromkeys(("us", "twin_us", "gain", "errors", "repeats_that_differ"), "")
    for job in jobs:
        if broken.get(job):
            found: dict[str, object] = {"status": f"does not compile: {broken[job]}"}
        elif time.monotonic() > deadline:
            found = {"status": "not reached"}
        elif programs(job) in deadly:
            found = {"status": f"not run: it {deadly[programs(job)]}"}
        else:
            found = runner.run(job)
            if str(found["status"]).startswith(("hangs", "crashed")):
                deadly[programs(job)] = f"{found['status']} in {job.case.name}"
        yield {"case": job.case.name, "pass": job.pass_, "config": job.text, **empty, **found}
    runner.stop()


def compile_all(jobs: list[Job]) -> dict[Job, str]:
    """What went wrong, by job."""
    different = {programs(job): job for job in jobs}
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case in dict.fromkeys(job.case for job in jobs):
            pool.submit(compile_twin, case)
        found = dict(zip(different, pool.map(compile_job, different.values()), strict=True))
    return {job: found.get(programs(job), "") for job in jobs}


def main() -> int:
    """Print a line per job; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of cases (default: all)")
    parser.add_argument("--passes", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--minutes", type=float, default=2.4, help="later jobs are not started")
    parser.add_argument("--csv", type=Path, help="also append rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    start = time.monotonic()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    jobs = jobs_of(cases, arguments.passes)
    broken = compile_all(jobs)
    print(f"{len(jobs)} jobs, compiled in {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    for row in rows_of(jobs, broken, start + 60 * arguments.minutes):
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    print_table([{name: value for name, value in row.items() if name != "errors"} for row in rows])
    if arguments.csv:
        append_rows(arguments.csv, [facts() | row for row in rows])
    print(f"{time.monotonic() - start:.0f} s")
    return int(not rows or any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
