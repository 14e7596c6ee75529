"""Input gradients of projections in Gluon against their Triton twin on this GPU: errors, bits and time of every shape.

    python benchmarks/measure/hopper_gradient.py                     # all cases, about a minute
    python benchmarks/measure/hopper_gradient.py --only starting gate --minutes 1 --csv trial.csv
    python benchmarks/measure/hopper_gradient.py --compile           # without a GPU: what each program uses

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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # must be settled before triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

import operation_cases
from bits import repeat
from common import append_rows, facts, graph_microseconds, print_table
from operation_cases import Draw, Rows
from scalefold.kernels import ahead, tuning
from scalefold.kernels.hopper import input_gradient as hopper
from scalefold.kernels.ops import linear
from scalefold.kernels.reference import LAYER_NORM_EPS
from tune_candidates import CANDIDATES

KERNEL, C = hopper.KERNEL, hopper.CHANNELS
ALLOWED, SLACK = 1.2, 1e-3  # times the twin's own error; what is no error of a bf16 result
WORKERS, JOB_SECONDS, READY_SECONDS = 12, 20.0, 60.0  # the first job of a case also prepares it
REPEATS, REPLAYS, CALLS = 20, 15, 4  # CALLS per graph: a call follows another one, as in training
Results = list[Tensor]


@dataclass(frozen=True)
class Case:
    """``count`` projections and a narrow one (heads > 0). transposed: rows stored with their dimensions exchanged;
    columns: x lies channels first, as the product of a triangle does, and no gradient comes through a residual
    connection; thorough: worth all launch parameters.
    """

    name: str
    rows: Rows
    count: int = 4
    heads: int = 4
    transposed: bool = False
    columns: bool = False
    thorough: bool = False


def _cases(suffix: str, rows: Rows, thorough: bool) -> list[Case]:
    return [
        Case(f"starting{suffix}", rows, thorough=thorough),
        Case(f"ending{suffix}", (rows[0], rows[2], rows[1]), transposed=True),
        Case(f"gate{suffix}", rows, 1, 0, thorough=thorough),
        Case(f"product{suffix}", rows, 1, 0, columns=True, thorough=thorough),
    ]


CASES = [*_cases("", (1, 256, 256), True), *_cases("_dap2", (1, 128, 256), False), *_cases("_few", (1, 5, 64), False)]


class Arguments(NamedTuple):
    """Of ``input_gradient``, but for the row mask."""

    x: Tensor
    norm: list[Tensor]
    weights: list[Tensor]
    ds: list[Tensor]
    has_bias: list[bool]
    through: Tensor | None

    @property
    def rest(self) -> tuple[list[Tensor], list[Tensor], list[bool], Tensor | None]:
        """What follows x, norm and mask."""
        return self.weights, self.ds, self.has_bias, self.through


def arguments_of(case: Case, device: str) -> Arguments:
    """The same random values every time; no values on ``meta``."""
    with operation_cases.on_device(device):
        draw = Draw(False, torch.bfloat16)
        batch, i, j = case.rows
        x = draw(*case.rows, C, transposed=case.transposed)
        if case.columns:
            x = draw(batch, C, i, j).permute(0, 2, 3, 1)
        norm, weights = draw.norm(C), [draw.weight(C, C) for _ in range(case.count)]
        ds = [draw(*case.rows, C, transposed=case.transposed) for _ in range(case.count)]
        if case.count == 1:  # half of what the gates' kernel stores
            ds = [draw(*case.rows, 2 * C).chunk(2, -1)[1]]
        if case.heads:
            weights.append(draw.weight(case.heads, C))
            ds.append(linear._in_rows_of(x, draw(batch, case.heads, i, j).movedim(1, -1)))
        has_bias = [False] * (case.count - 1) + [True] + [False] * bool(case.heads)
        through = None if case.columns else draw(*case.rows, C, transposed=case.transposed)
    return Arguments(x, norm, weights, ds, has_bias, through)


def exact_results(given: Arguments) -> Results:
    """Gradient of x and layer norm in fp32; sums over rows in fp64."""
    x, (weight, bias) = given.x.float(), (p.float() for p in given.norm)
    d = torch.stack([g.float() @ w.float() for g, w in zip(given.ds, given.weights, strict=True)]).sum(0)
    hat = F.layer_norm(x, (C,), None, None, LAYER_NORM_EPS)
    rstd = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS)
    scaled = d * weight
    dx = (scaled - scaled.mean(-1, keepdim=True) - hat * (scaled * hat).mean(-1, keepdim=True)) * rstd
    biased = given.ds[given.has_bias.index(True)]
    sums = [s.double().flatten(0, -2).sum(0) for s in (d * hat, d, biased)]
    return [dx if given.through is None else dx + given.through.float(), hat * weight + bias, *sums]


def run_hopper(given: Arguments) -> Results:
    """Gradient of x, layer norm and partial sums by the Gluon program."""
    return list(hopper.input_gradient(given.x, given.norm[0], given.norm[1], *given.rest))


def run_twin(given: Arguments) -> Results:
    """The same by the Triton program."""
    with tuning.override(KERNEL, {"HOPPER": 0}):
        return list(linear.input_gradient(given.x, given.norm[0], given.norm[1], None, *given.rest))


def errors(found: Results, exact: Results) -> list[float]:
    """Relative errors, sums one by one; no number counts as infinite."""
    dx, normed, partials = found
    values = [dx, normed, *partials.double().sum(0).split(C)]
    relative = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(values, exact, strict=True)]
    return [float(torch.nan_to_num(error, nan=torch.inf)) for error in relative]


@dataclass(frozen=True)
class Job:
    """One case with one choice of launch parameters."""

    case: Case
    config: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.config if name != "HOPPER")

    @property
    def program(self) -> tuple[object, ...]:
        """Equal for jobs that take the same compiled program."""
        return self.config, self.case.count, self.case.heads, self.case.columns


def jobs_of(cases: list[Case]) -> list[Job]:
    """All launch parameters of thorough cases, the first ones of others."""
    jobs = []
    for case in cases:
        own = [config for config in CANDIDATES[KERNEL]({"c": C, "n": case.count * C}) if config["HOPPER"]]
        jobs += [Job(case, tuple(config.items())) for config in (own if case.thorough else own[:1])]
    return jobs


def compile_job(job: Job) -> str:
    """Compile the Gluon program of a job into Triton's cache (worker); what went wrong, or nothing."""
    try:
        with ahead.compiling_for(90), tuning.override(KERNEL, dict(job.config)):
            run_hopper(arguments_of(job.case, "meta"))
    except Exception as problem:  # whatever the compiler says, other jobs go on
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[-1][:150]}"
    return ""


def compile_twin(case: Case) -> None:
    """Compile the Triton program of a case (worker)."""
    with ahead.compiling_for(90):
        run_twin(arguments_of(case, "meta"))


def compile_all(jobs: list[Job]) -> dict[Job, str]:
    """What went wrong, by job."""
    different = {job.program: job for job in reversed(jobs)}
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for case in dict.fromkeys(job.case for job in jobs):
            pool.submit(compile_twin, case)
        found = dict(zip(different, pool.map(compile_job, different.values()), strict=True))
    return {job: found[job.program] for job in jobs}


def timed(call: Callable[[], Results]) -> float:
    """Microseconds of a call that is followed by the same call."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    return graph_microseconds(several, REPLAYS, 1) / CALLS


class Prepared:
    """What all jobs of a case share: arguments, exact results, errors of the twin, and its time."""

    def __init__(self, case: Case) -> None:
        self.arguments = arguments_of(case, "cuda")
        self.exact = exact_results(self.arguments)
        self.twin_errors = errors(run_twin(self.arguments), self.exact)
        self.twin_us = timed(lambda: run_twin(self.arguments))


def measure(job: Job, prepared: Prepared) -> dict[str, object]:
    """Errors, bits and times of one job, as columns of its row."""

    def call() -> Results:
        return run_hopper(prepared.arguments)

    with tuning.override(KERNEL, dict(job.config)):
        given = prepared.arguments
        obstacle = hopper.obstacle(given.x, None, *given.rest)
        if obstacle:
            return {"status": f"obstacle: {obstacle}"}
        own = errors(call(), prepared.exact)
        limits = [max(ALLOWED * error, SLACK) for error in prepared.twin_errors]
        worse = [n for n, (error, limit) in enumerate(zip(own, limits, strict=True)) if error > limit]
        different = repeat(call, REPEATS)
        us = timed(call)
    return {
        "us": round(us, 1),
        "twin_us": round(prepared.twin_us, 1),
        "gain": f"{100 * (1 - us / prepared.twin_us):.0f} %",
        "errors": " ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(own, prepared.twin_errors, strict=True)),
        "repeats_that_differ": len(different),
        "status": f"wrong: results {worse}" if worse else "bits differ" if different else "ok",
    }


def serve(pipe: Connection) -> None:
    """Run jobs from the pipe on the GPU (worker); an answer per job. A context that is lost ends the process."""
    torch.cuda.init()
    torch.set_grad_enabled(False)
    present: tuple[Case, Prepared] | None = None
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        try:
            if present is None or present[0] != job.case:
                present = None  # frees the memory of the last case first
                torch.cuda.empty_cache()
                present = job.case, Prepared(job.case)
            pipe.send(measure(job, present[1]))
        except Exception as problem:  # a launch that is refused
            pipe.send({"status": f"failed: {type(problem).__name__}: {str(problem).strip()[:150]}"})
            torch.cuda.synchronize()


class Runner:
    """A process that runs jobs, replaced when one of them hangs or crashes."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def run(self, job: Job) -> dict[str, object]:
        """The answer to a job, or how it died."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._pipe.send(job)
            if self._pipe.poll(JOB_SECONDS):
                return self._pipe.recv()
            status = f"hangs: no answer in {JOB_SECONDS:.0f} s"
        except (EOFError, BrokenPipeError):
            status = "crashed"
        self.stop()
        return {"status": status}

    def _start(self) -> None:
        self.stop()
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(READY_SECONDS) or self._pipe.recv() != "ready":
            raise RuntimeError("the process with the GPU does not start")

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join(JOB_SECONDS)
            self._process = None


def rows_of(jobs: list[Job], broken: dict[Job, str], deadline: float) -> Iterator[dict[str, object]]:
    """A row per job: what does not compile is not run, what is late is named, and what hung is not tried again."""
    runner, deadly = Runner(), dict[tuple[object, ...], str]()
    empty = dict.fromkeys(("us", "twin_us", "gain", "errors", "repeats_that_differ"), "")
    for job in jobs:
        if broken[job]:
            found: dict[str, object] = {"status": f"does not compile: {broken[job]}"}
        elif time.monotonic() > deadline:
            found = {"status": "not reached"}
        elif job.program in deadly:
            found = {"status": f"not run: it {deadly[job.program]}"}
        else:
            found = runner.run(job)
            if str(found["status"]).startswith(("hangs", "crashed")):
                deadly[job.program] = f"{found['status']} in {job.case.name}"
        yield {"case": job.case.name, "config": job.text, **empty, **found}
    runner.stop()


def uses(job: Job) -> dict[str, object]:
    """Shared memory, spills, and products that wait for one another, of the program of a job."""
    from compile_hopper import SERIALIZED, assembler_log
    from compile_targets import compile_launch, recorded_launches

    with tuning.assume_capability(90), tuning.override(KERNEL, dict(job.config)), recorded_launches() as launches:
        run_hopper(arguments_of(job.case, "meta"))
    compiled = compile_launch(launches[0], 90)
    log = assembler_log(compiled.asm["ptx"])
    return {
        "case": job.case.name,
        "config": job.text,
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        "spills": next(line.strip() for line in log.splitlines() if "bytes spill" in line),
        "serialized": sum(log.count(code) for code in SERIALIZED),
    }


def main() -> int:
    """Print a line per job; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of cases (default: all)")
    parser.add_argument("--minutes", type=float, default=1.8, help="later jobs are not started")
    parser.add_argument("--csv", type=Path, help="also append rows here")
    parser.add_argument("--compile", action="store_true", help="only compile, and say what each program uses")
    arguments = parser.parse_args()
    jobs = jobs_of([case for case in CASES if not arguments.only or case.name in arguments.only])
    if arguments.compile:
        rows = [uses(job) for job in {job.program: job for job in reversed(jobs)}.values()]
        print_table(rows)
        return int(not rows or any(row["serialized"] for row in rows))
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    start = time.monotonic()
    broken = compile_all(jobs)
    print(f"{len(jobs)} jobs, compiled in {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    for row in rows_of(jobs, broken, start + 60 * arguments.minutes):
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
        if arguments.csv:
            append_rows(arguments.csv, [facts() | row])
    print_table([{name: value for name, value in row.items() if name != "errors"} for row in rows])
    print(f"{time.monotonic() - start:.0f} s")
    return int(not rows or any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
