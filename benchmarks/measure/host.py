"""Every measurement that a host's GPUs allow, side by side, each on GPUs and processors of its own.

    python benchmarks/measure/host.py --list                                # names, GPUs, seconds
    python benchmarks/measure/host.py --minutes 9 --out FOLDER              # as many as end in time, first ones first
    python benchmarks/measure/host.py STORE --only step curve --gpus 2      # STORE: prepared chains, where needed

First the step's kernels are compiled, by all processors. A measurement begins when as many GPUs are free as it needs
and it would end in time; what it prints is kept as NAME/output.txt in FOLDER, its rows go to the tables there (without
--out: to benchmarks/results). One that takes more than LENIENCE times its seconds hangs and is ended. Exit status 1 if
one fails or does not run.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (
    BASE,
    FOLDER,
    ONE_LENGTH,
    RESULTS_VARIABLE,
    ROOT,
    SCRIPTS,
    append_rows,
    compile_ahead,
    device_name,
    facts,
    one_sample,
    print_table,
)
from scalefold.processors import own
from watched import Watched

LENIENCE = 2.0
STARTING_S = 60.0  # more for each, for what is not compiled
STATUS_TABLE = "gates.csv"  # exit status of every measurement
STORE = "STORE"
HUNG = 124  # as a shell tells it


@dataclass(frozen=True)
class Job:
    """A measurement.

    Attributes:
        seconds: what it takes on an H100 whose kernels are compiled.
        command: a word that is STORE is the prepared data set.
        ranks: processes of a script that torchrun starts.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    gpus: int = 1
    ranks: int = 1

    @property
    def needs(self) -> str:
        """What it reads beside the repository: STORE, or nothing."""
        return STORE if STORE in self.command else ""

    def words(self, store: Path | None) -> list[str]:
        """Its command line."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command = [str(store) if word == STORE else word for word in self.command]
        return [sys.executable, *(launcher if self.ranks > 1 else []), *command]


def script(name: str, *options: str) -> tuple[str, ...]:
    """A script of this folder."""
    return (str(SCRIPTS / name), *options)


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests"), "-m")
JOBS = (  # the most wanted first
    Job("step", 130, script("step_time.py", "--check", "--profile", "1")),
    Job("two GPUs", 170, script("multi_gpu.py", "--skip-exchanges", "--dap", "2", "1"), gpus=2, ranks=2),
    Job("runs", 900, script("gpu_runs.py", "--passes", "2", "--budget-s", "1800"), gpus=2),
    Job("bits of steps", 110, script("reproducibility.py", "--steps")),
    Job("bits of operations", 110, script("reproducibility.py", "--operations")),
    Job("bits of two GPUs", 150, script("reproducibility.py", "--steps", "--dap", "2", "1"), gpus=2, ranks=2),
    Job("operations", 240, script("kernels.py", "--minutes", "3.5")),
    Job("exchanges", 40, script("symmetric_exchange.py"), gpus=2, ranks=2),
    Job("written exchanges", 40, script("written_exchange.py"), gpus=2, ranks=2),
    Job("evaluation", 150, script("evaluation_time.py")),
    Job("parts", 180, script("small_kernels.py", "--passes", "--repeats", "10", "--minutes", "2.5")),
    Job("shares", 300, script("step_time.py", "--dap-share", "1", "2", "4", "8", "--minutes", "4.5")),
    Job("four GPUs", 200, script("multi_gpu.py", "--skip-exchanges", "--dap", "4"), gpus=4, ranks=4),
    Job("checkpointing", 150, script("step_time.py", "--variant", "ours_ckpt")),
    Job("real chains", 200, script("real_chains.py", STORE)),
    Job("curve", 120, script("training_curve.py", STORE)),
    Job("GPU tests", 400, (*PYTEST, "gpu and not multi_gpu")),
    Job("tests of two GPUs", 350, (*PYTEST, "multi_gpu"), gpus=2),
)


@dataclass(frozen=True)
class Running:
    """A job under way."""

    job: Job
    watched: Watched
    gpus: list[int]


def chosen(names: Sequence[str], store: Path | None, gpus: int) -> tuple[list[Job], dict[str, str]]:
    """Jobs of these names (none: all), and why others of them cannot run. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in {job.name for job in JOBS}]
    if unknown:
        raise ValueError(f"no measurement {', '.join(unknown)}; there are: {', '.join(job.name for job in JOBS)}")
    jobs, refused = [], dict[str, str]()
    for job in JOBS:
        if names and job.name not in names:
            continue
        if job.gpus > gpus:
            refused[job.name] = f"needs {job.gpus} GPUs"
        elif job.needs and store is None:
            refused[job.name] = "needs a STORE"
        else:
            jobs.append(job)
    return jobs, refused


def run_jobs(
    jobs: Sequence[Job], store: Path | None, gpus: int, minutes: float, out: Path, tables: Path = FOLDER
) -> dict[str, str]:
    """Run them side by side, none that would end after ``minutes``; what did not end well, and how.

    Output goes to ``out``, rows to ``tables``, those of ``gates.csv`` (exit status, seconds) as each ends.
    """
    until = time.monotonic() + 60 * minutes
    if torch.cuda.is_available():
        compile_steps(jobs)
    waiting, running, bad = list(jobs), list[Running](), dict[str, str]()
    processors = own()
    share = max(1, len(processors) // max(1, gpus))
    free = list(range(gpus))
    try:
        while waiting or running:
            for job in list(waiting):
                left_s = until - time.monotonic()
                if job.seconds > left_s:
                    bad[job.name] = f"left out: takes {job.seconds:.0f} s, {max(0.0, left_s):.0f} s are left"
                    waiting.remove(job)
                elif job.gpus <= len(free):
                    taken, free = free[: job.gpus], free[job.gpus :]
                    parts = [p for gpu in taken for p in processors[gpu * share : (gpu + 1) * share]] or processors
                    running.append(begin(job, store, taken, parts, min(left_s, limit_s(job)), out, tables))
                    waiting.remove(job)
            for one in list(running):
                if one.watched.poll():
                    running.remove(one)
                    free = sorted(free + one.gpus)
                    bad |= end(one, tables)
            time.sleep(0.05)
    finally:
        for one in running:
            one.watched.end()
    return bad


def compile_steps(jobs: Sequence[Job]) -> None:
    """The kernels of a step of one GPU, and of as many as jobs share a sample among."""
    for dap in sorted({1, *(job.ranks for job in jobs)}):
        compile_ahead(BASE, [*one_sample(dap), ONE_LENGTH])


def limit_s(job: Job) -> float:
    """Seconds after which it hangs."""
    return LENIENCE * job.seconds + STARTING_S


def begin(
    job: Job, store: Path | None, gpus: list[int], processors: list[int], limit_s: float, out: Path, tables: Path
) -> Running:
    """Start a job on these GPUs and processors."""
    print(f"{time.strftime('%H:%M:%S')} {job.name}: on GPU {', '.join(map(str, gpus))}", flush=True)
    environment = {
        "CUDA_VISIBLE_DEVICES": ",".join(map(device_name, gpus)),
        "OMP_NUM_THREADS": str(max(1, len(processors) // (4 * len(gpus)))),
        RESULTS_VARIABLE: str(tables.resolve()),
    }
    folder = out / job.name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call with this folder
    watched = Watched(job.words(store), folder, environment, limit_s)
    before = own()
    os.sched_setaffinity(0, processors)  # which its processes inherit: what one compiles does not slow another
    try:
        watched.start()
    finally:
        os.sched_setaffinity(0, before)
    return Running(job, watched, gpus)


def end(one: Running, tables: Path) -> dict[str, str]:
    """Say and keep how a job ended; its name and that, if badly."""
    seconds = round((one.watched.ended_at or 0.0) - one.watched.began_at)
    status = HUNG if one.watched.hung else one.watched.statuses()[0]
    told = "hung and was ended" if one.watched.hung else f"exit status {status}"
    print(f"{time.strftime('%H:%M:%S')} {one.job.name}: {told}, {seconds} s", flush=True)
    append_rows(tables / STATUS_TABLE, [{**facts(), "measurement": one.job.name, "status": status, "seconds": seconds}])
    if status == 0:
        return {}
    print("\n".join(f"    {line[:200]}" for line in one.watched.output()[-8:]), flush=True)
    return {one.job.name: told}


def main() -> int:
    """Choose, compile, run; exit status 1 if one fails or does not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path, help="prepared data set")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these measurements")
    parser.add_argument("--gpus", type=int, help="GPUs to use; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin none that would end later")
    parser.add_argument("--out", type=Path, help="folder of tables and output; default: benchmarks/results, a new one")
    parser.add_argument("--list", action="store_true", help="say what there is, measure nothing")
    arguments = parser.parse_args()
    if arguments.list:
        print_table([{"name": j.name, "GPUs": j.gpus, "seconds": j.seconds, "needs": j.needs} for j in JOBS])
        return 0
    gpus = arguments.gpus or torch.cuda.device_count()
    try:
        jobs, bad = chosen(arguments.only, arguments.store, gpus)
    except ValueError as error:
        parser.error(str(error))
    out = arguments.out or Path(tempfile.mkdtemp(prefix="scalefold-host-"))
    out.mkdir(parents=True, exist_ok=True)
    bad |= run_jobs(jobs, arguments.store, gpus, arguments.minutes, out, arguments.out or FOLDER)
    for name, reason in bad.items():
        print(f"NOT MEASURED {name}: {reason}")
    print(f"{len(jobs) - len(bad.keys() & {job.name for job in jobs})} measurements; what they printed: {out}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
