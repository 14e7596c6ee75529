"""The program as its own benchmark: ``scalefold train`` as the README starts it, on one GPU and on two, judged.

    python benchmarks/measure/gpu_runs.py --out FOLDER                     # every layout, in 9 minutes on two H100
    python benchmarks/measure/gpu_runs.py --only one_gpu dap2 --passes 4   # some layouts, graphs for up to 4 passes
    python benchmarks/measure/gpu_runs.py --tiny --only dap2           # tiny model on CPU ranks: the same script, tried

Full model, generated proteins (short ones, so that an evaluation is quick), one shared Triton cache. Layouts:
``one_gpu``, ``dap2``, ``dp2`` use up their step budget, twice with one seed; ``train_eval`` is one training and one
evaluation rank; ``target`` reaches its target; ``stop_one_gpu`` and ``stop_dap2`` are asked to stop (SIGTERM) and
resumed; ``killed`` loses a rank (SIGKILL); ``ruler_one`` and ``ruler_two`` time bare steps with step_time.py and
multi_gpu.py.

Every start is judged: exit status of every rank; seconds from ``run_stop`` (``killed``: from the kill) to the end of
its last process; from ``run_start`` to the end of the first step; stall at a checkpoint, which is what the steps after
it took longer than the median of their number of passes; step time over the ruler's; equality of all losses and of the
averaged weights, bit for bit, with the start of the same seed; the log's verdict; and what it left behind. Rows go to
``gpu_runs.csv``; FOLDER also gets ``gpu_runs.json`` (every line with its reason) and ``gpu_runs.log`` (what was
printed, stacks of what hung). Exit status 1 if anything falls short or did not run.
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import scalefold
from common import FOLDER, ROOT, SCRIPTS, append_rows, facts, print_table, read_rows
from scalefold.data.made.demo import generate
from scalefold.data.store.prepare import prepare
from scalefold.errors import LogError
from scalefold.report.record import METRICS_FILE
from watched import Watched, torchrun

TARGET_REACHED, STEPS_DONE, RANK_LOST = 0, 4, 5  # exit statuses of ``scalefold train``
KILLED, ENDED_BY_LAUNCHER = 128 + 9, 128 + 15  # as a shell tells them
STOP_TO_EXIT_S, START_S, STALL_MS, OVER_RULER_PERCENT = 10.0, 2.0, 50.0, 2.0  # the lines
FILLING = 4  # first steps, in which loader workers fill their queue
AFTER_CHECKPOINT = 3  # steps in which a checkpoint's stall may show
STEP_TIMEOUT_S = 20  # of the start that loses a rank; half of it passes before a silent rank is noticed
END_LIMIT_S = 45  # from run_stop on: longer than the program itself allows for its end
NEVER = 1_000_000
OF_AN_ABORTED_RUN = ("official checker: Failed checks for eval_accuracy", "status:")
EXPECTED_VERDICTS = {True: ("valid", "non_benchmark"), False: ("aborted",)}  # by: reaches its target
TINY = [
    "model.evoformer.num_blocks=1",
    "model.structure.num_blocks=2",
    "model.structure.dropout=0.1",
    *(f"model.{stack}.{kind}_dropout=0.2" for stack in ("extra_msa", "evoformer") for kind in ("msa", "pair")),
    "data.train_sequence_crop_size=16",
    "data.max_msa_clusters=6",
    "data.max_extra_msa=8",
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What all starts share. ``passes``: graphs for up to that many where speed and bits are the subject."""

    store: Path
    work: Path
    steps: int = 24
    passes: int = 2
    tiny: bool = False
    workers: int = 6
    limit_s: float = 200.0
    extra: tuple[str, ...] = ()

    @property
    def evaluate_every(self) -> int:
        """Three evaluations."""
        return max(1, self.steps // 3)

    @property
    def save_every(self) -> int:
        """Two checkpoints, far apart, the second one after the last step."""
        return max(1, self.steps // 2)

    @property
    def act_after(self) -> int:
        """Steps after which a run is asked to stop or loses a rank: before its first checkpoint."""
        return max(2, self.steps // 4)


@dataclass(frozen=True)
class Start:
    """One start of the program and what it must do.

    ``like``: the start whose losses and weights it must have; ``after``: the start that must have ended before, whose
    run it resumes.
    """

    name: str
    layout: str
    ranks: int = 1
    dap: int = 1
    eval_ranks: int = 0
    many_passes: bool = True
    settings: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (STEPS_DONE,)
    act: str = ""  # "stop" or "kill"
    like: str = ""
    after: str = ""

    @property
    def run_name(self) -> str:
        """Its run folder: a resumed start's is that of the start before."""
        return self.after or self.name

    @property
    def replicas(self) -> int:
        """Samples per step."""
        return (self.ranks - self.eval_ranks) // self.dap


def twice(layout: str, **shape: Any) -> list[Start]:
    """The same start two times."""
    return [Start(layout, layout, **shape), Start(f"{layout} again", layout, like=layout, **shape)]


def stopped(layout: str, like: str, **shape: Any) -> Start:
    """A start that is asked to stop."""
    return Start(layout, layout, act="stop", like=like, **shape)


def resumed(layout: str, like: str, **shape: Any) -> Start:
    """The continuation of a stopped one, to the end."""
    return Start(f"{layout} resumed", layout, after=layout, like=like, **shape)


TWO = {"ranks": 2, "statuses": (STEPS_DONE, STEPS_DONE)}
STARTS = [  # in this order; starts on one GPU stand in pairs
    *twice("one_gpu"),
    *twice("dap2", dap=2, **TWO),
    *twice("dp2", **TWO),
    Start("train_eval", "train_eval", 2, eval_ranks=1, many_passes=False, statuses=(STEPS_DONE, 0)),
    Start(
        "target",
        "target",
        many_passes=False,
        settings=("training.target_avg_lddt_ca_value=0.001",),
        statuses=(TARGET_REACHED,),
    ),
    stopped("stop_one_gpu", like="one_gpu"),
    Start("ruler_one", "ruler_one", statuses=(0,)),
    resumed("stop_one_gpu", like="one_gpu"),
    Start(
        "killed",
        "killed",
        2,
        dap=2,
        many_passes=False,
        act="kill",
        settings=(f"parallel.step_timeout_s={STEP_TIMEOUT_S}", f"training.val_every_iters={NEVER}"),
        statuses=(RANK_LOST, KILLED),
    ),
    stopped("stop_dap2", like="dap2", dap=2, **TWO),
    resumed("stop_dap2", like="dap2", dap=2, **TWO),
    Start("ruler_two", "ruler_two", 2, dap=2, statuses=(0, 0)),
]
LAYOUTS = list(dict.fromkeys(start.layout for start in STARTS))


def settings(plan: Plan, start: Start) -> list[str]:
    """Overrides of the system file for one start."""
    size = "ranks" if plan.tiny else "gpus"
    passes = plan.passes if start.many_passes else 1
    return [
        f"parallel.{size}_per_node={start.ranks}",
        f"parallel.dap_size={start.dap}",
        f"parallel.num_eval_ranks={start.eval_ranks}",
        f"training.global_batch_size={start.replicas}",
        "submission.org=generated",
        "submission.platform=gpu_runs",
        f"training.num_train_iters={plan.steps}",
        f"training.val_every_iters={plan.evaluate_every}",
        "training.target_avg_lddt_ca_value=1.0",
        "training.opt_learning_rate_warmup_steps=10",
        "training.seed=5",
        f"data.store_dir={plan.store}",
        f"data.num_workers={plan.workers}",
        f"data.num_recycling_iters={passes - 1}",
        "data.val_max_sequence_length=64",
        f"run.run_dir={run_dir(plan, start)}",
        f"run.checkpoint_every_iters={plan.save_every}",
        "run.log_every_iters=1",
        *(TINY if plan.tiny else []),
        *start.settings,
        *plan.extra,
    ]


def run_dir(plan: Plan, start: Start) -> Path:
    """Where the program writes."""
    return plan.work / "runs" / start.run_name.replace(" ", "_")


def places(plan: Plan, start: Start) -> Path:
    """Where this script keeps what the start printed and what is needed to judge it."""
    return plan.work / "starts" / start.name.replace(" ", "_")


def command(plan: Plan, start: Start) -> list[str]:
    """The command line of one start."""
    if start.layout.startswith("ruler"):
        program = [sys.executable, *ruler(plan, start)]
    else:
        config = ROOT / "configs" / ("tiny.yaml" if plan.tiny else "base.yaml")
        program = [sys.executable, "-m", "scalefold", "train", str(config), *settings(plan, start)]
        program += ["--resume"] if start.after else []
    return torchrun(start.ranks, places(plan, start), free_port(), program) if start.ranks > 1 else program


def ruler(plan: Plan, start: Start) -> list[str]:
    """Script and arguments that time bare steps of the same shapes into a table in the start's folder."""
    passes = ["--repeats", "10", "--passes", *map(str, range(1, plan.passes + 1))]
    overrides = [f"data.num_recycling_iters={plan.passes - 1}", *(TINY if plan.tiny else []), *plan.extra]
    shared = [*passes, *(word for override in overrides for word in ("--set", override))]
    if start.ranks == 1:
        return [str(SCRIPTS / "step_time.py"), "--csv", str(places(plan, start) / "step_time.csv"), *shared]
    small = ["--small"] if plan.tiny else []
    script = [str(SCRIPTS / "multi_gpu.py"), "--skip-exchanges", "--dap", "2", "1", *small]
    return [*script, "--out", str(places(plan, start)), *shared]


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a start ended, and what it left at that moment. ``acted_at``: when it was asked to stop or lost a rank."""

    start: Start
    watched: Watched
    acted_at: float | None
    shared_memory: set[str]
    partial: list[str]

    @property
    def folder(self) -> Path:
        """Copies of its record and log."""
        return self.watched.folder


@dataclass
class Running:
    """A start under way on some GPUs."""

    start: Start
    watched: Watched
    gpus: list[int]
    run: Path
    shared_memory: set[str]
    acted_at: float | None = None
    looked_after_s: float = 0.0

    def act(self, after_steps: int) -> None:
        """Ask it to stop or kill a rank, once, when it has done ``after_steps`` steps."""
        if not self.start.act or self.acted_at or num_steps(self.run / METRICS_FILE) < after_steps:
            return
        self.acted_at = time.time()
        if self.start.act == "stop":
            self.watched.ask_to_stop()
        else:
            self.watched.kill_rank(self.start.ranks - 1)

    def watch_the_end(self) -> None:
        """Once the log has ``run_stop``, the processes have little time left."""
        if self.watched.seconds() > self.looked_after_s:
            self.looked_after_s = self.watched.seconds() + 0.5
            logs = [file for file in self.run.glob("result_*") if file.stat().st_mtime >= self.watched.began_at]
            if any('"run_stop"' in file.read_text(errors="replace") for file in logs):
                self.looked_after_s = float("inf")
                self.watched.limit_s = min(self.watched.limit_s, self.watched.seconds() + END_LIMIT_S)

    def end(self) -> Ended:
        """What the judgement needs, kept apart: a resumed start goes on in the same folder."""
        for file in [self.run / METRICS_FILE, *self.run.glob("result_*")]:
            if file.is_file() and file.stat().st_mtime >= self.watched.began_at:
                shutil.copy2(file, self.watched.folder / file.name)
        added = shared_memory() - self.shared_memory
        return Ended(self.start, self.watched, self.acted_at, added, partial_files(self.run))


@dataclass
class Results:
    """All starts of the call."""

    ended: dict[str, Ended] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


def run_all(plan: Plan, starts: Sequence[Start], gpus: int, budget_s: float) -> Results:
    """Run the starts in order, as many side by side as there are GPUs; none begins that would not end in time."""
    results, waiting, running = Results(), list(starts), []
    free, began, last_s = list(range(gpus)), time.monotonic(), {1: 1.0, 2: 1.0}
    try:
        while waiting or running:
            left_s = budget_s - (time.monotonic() - began)
            while waiting and (reason := cannot_run(waiting[0], results, gpus, left_s, last_s)):
                results.not_run[waiting[0].name] = reason
                report(f"{waiting.pop(0).name}: NOT RUN: {reason}")
            if waiting and may_begin(waiting[0], running, free):
                start = waiting.pop(0)
                taken = [free.pop(0) for _ in range(start.ranks)]
                running.append(begin(plan, start, taken, left_s))
            for one in list(running):
                one.act(plan.act_after)
                one.watch_the_end()
                if one.watched.poll():
                    running.remove(one)
                    free = sorted(free + one.gpus)
                    seconds = (one.watched.ended_at or 0.0) - one.watched.began_at
                    last_s[one.start.ranks] = seconds
                    results.ended[one.start.name] = one.end()
                    hung = ", HUNG and was ended" if one.watched.hung else ""
                    report(f"{one.start.name}: {seconds:.1f} s, statuses {one.watched.statuses()}{hung}")
            time.sleep(0.03)
    finally:
        for one in running:
            one.watched.end()
    return results


def cannot_run(start: Start, results: Results, gpus: int, left_s: float, last_s: Mapping[int, float]) -> str:
    """Why a start never will begin; empty if it may."""
    if start.ranks > gpus:
        return f"needs {start.ranks} GPUs"
    if start.after in results.not_run:
        return f"{start.after} did not run"
    if left_s < last_s[start.ranks]:
        return f"{left_s:.0f} s are left of --budget-s, the last start of this size took {last_s[start.ranks]:.0f} s"
    return ""


def may_begin(start: Start, running: list[Running], free: list[int]) -> bool:
    """Whether there are GPUs for it and the run it continues has ended."""
    return len(free) >= start.ranks and start.after not in {one.start.name for one in running}


def begin(plan: Plan, start: Start, gpus: list[int], left_s: float) -> Running:
    """Start it on these GPUs."""
    package = str(Path(scalefold.__file__).resolve().parents[1])
    environment = {
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "TRITON_CACHE_DIR": str(plan.work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(plan.work / "inductor"),
    }
    environment |= {"OMP_NUM_THREADS": "1"} if plan.tiny else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    limit_s = max(30.0, min(plan.limit_s, left_s + 20))
    before = shared_memory()
    watched = Watched(command(plan, start), places(plan, start), environment, limit_s, start.ranks)
    watched.start()
    return Running(start, watched, gpus, run_dir(plan, start), before)


def num_steps(metrics: Path) -> int:
    """Steps in the record so far."""
    return metrics.read_text(errors="replace").count('"kind": "step"') if metrics.exists() else 0


def shared_memory() -> set[str]:
    """Names in the host's shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def partial_files(folder: Path) -> list[str]:
    """Files under temporary names."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return [str(p) for p in paths if p.name.startswith(".") or ".partial" in p.name or p.suffix == ".tmp"]


def report(line: str) -> None:
    """One line, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_record(file: Path) -> list[Row]:
    """Complete lines of a record; none if there is no record."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]


def of_this_start(record: list[Row]) -> list[Row]:
    """What a resumed start added: everything from its ``resume`` event on."""
    resumed = [i for i, row in enumerate(record) if row["kind"] == "event" and row["name"] == "resume"]
    return record[resumed[-1] :] if resumed else record


def steps_of(record: list[Row]) -> list[Row]:
    """Its steps."""
    return [row for row in record if row["kind"] == "step"]


def start_parts(record: list[Row]) -> dict[str, float]:
    """Seconds from ``run_start`` to the end of each part of the start, the first step last; empty if unknown.

    The first step's time counts from the moment when the loader was started.
    """
    event = next((row for row in record if row["kind"] == "event" and row["name"] == "start"), None)
    first = next(iter(steps_of(record)), None)
    if event is None or first is None:
        return {}
    parts = {key.removesuffix("_s"): value for key, value in event.items() if key.endswith("_s") and key != "time_s"}
    return parts | {"first_step": parts["loader_started"] + first["step_ms"] / 1e3}


def steady_steps(steps: list[Row], save_every: int) -> list[Row]:
    """Steps whose time nothing disturbs: the queue is full and no checkpoint was just begun."""
    return [row for row in steps[FILLING:] if (row["step"] - 1) % save_every >= AFTER_CHECKPOINT]


def medians(steps: Iterable[Row]) -> dict[int, float]:
    """Median milliseconds of a step by number of passes."""
    by_passes: dict[int, list[float]] = {}
    for row in steps:
        by_passes.setdefault(int(row["passes"]), []).append(row["step_ms"])
    return {passes: statistics.median(values) for passes, values in by_passes.items()}


def checkpoint_stall_ms(steps: list[Row], save_every: int) -> float | None:
    """The longest stall: what the steps after one checkpoint took in all beyond their medians; None if none was made.

    A step's time is that between two ends of steps on the device, so it holds whatever the host did in between.
    """
    usual = medians(steady_steps(steps, save_every))
    stalls: dict[int, float] = {}
    for row in steps:
        saved = (row["step"] - 1) // save_every * save_every
        if usual and saved >= steps[0]["step"] and row["step"] - saved <= AFTER_CHECKPOINT:
            expected = usual.get(int(row["passes"]), min(usual.values()))
            stalls[saved] = stalls.get(saved, 0.0) + max(0.0, row["step_ms"] - expected)
    return max(stalls.values(), default=None)


def over_ruler_percent(own: Mapping[int, float], ruler_ms: Mapping[int, float]) -> float | None:
    """How much longer a step takes than the ruler says, mean over the numbers of passes that both know."""
    common = own.keys() & ruler_ms.keys()
    if not common:
        return None
    return 100.0 * (sum(own[p] for p in common) / sum(ruler_ms[p] for p in common) - 1)


def different_steps(steps: list[Row], truth: list[Row], whole: bool) -> str:
    """Where losses, terms or norms differ in any bit from those of another start; empty if nowhere.

    ``whole``: both must have the same steps; else ``steps`` may end earlier.
    """
    expected = {row["step"]: bits(row) for row in truth}
    if not steps or (whole and [row["step"] for row in steps] != list(expected)):
        return f"{len(steps)} steps where the other start has {len(expected)}"
    wrong = [row for row in steps if bits(row) != expected.get(row["step"])]
    if not wrong:
        return ""
    first, other = bits(wrong[0]), expected.get(wrong[0]["step"], {})
    key = next(key for key in first if first[key] != other.get(key))
    return f"{len(wrong)} of {len(steps)} steps, first {wrong[0]['step']}: {key} {first[key]!r}, not {other.get(key)!r}"


def bits(row: Row) -> dict[str, Any]:
    """What two starts with one seed must share, as the record has it: every digit."""
    values = {key: row.get(key) for key in ("passes", "loss", "grad_norm", "lr", "samples")}
    return values | {f"term {name}": value for name, value in row.get("terms", {}).items()}


def weights_digest(run: Path, step: int) -> str:
    """SHA-256 over names and bytes of the averaged weights after ``step``; empty without that checkpoint."""
    import torch

    file = run / "checkpoints" / "last" / f"{step:06d}" / "swa_checkpoint.pt"
    if not file.exists():
        return ""
    digest = hashlib.sha256()
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def result_file(ended: Ended) -> Path | None:
    """The log that a start wrote: joined, or the training ranks' part of it."""
    files = [f for f in ended.folder.glob("result_*") if (".resumed_" in f.name) == bool(ended.start.after)]
    whole = [f for f in files if f.suffix == ".txt"]
    return next(iter(whole or [f for f in files if f.name.endswith(".training.part")]), None)


def log_times(ended: Ended) -> dict[str, float]:
    """Seconds since the epoch of the log's milestones."""
    from scalefold.mlperf.log.logfile import read_log

    file = result_file(ended)
    try:
        log = read_log(file) if file is not None else None
    except LogError:
        return {}
    keys = ("init_start", "init_stop", "run_start", "run_stop")
    found = {key: log.first(key) for key in keys} if log is not None else {}
    return {key: event.time_ms / 1e3 for key, event in found.items() if event is not None}


def log_verdict(ended: Ended) -> tuple[str, str]:
    """The verdict of ``scalefold check`` and its first line; ``aborted`` if the run's end is all that is wrong.

    A log that ends early or begins late lacks more than its target: there every line must be legal, the last one an
    aborted ``run_stop``.
    """
    from scalefold.mlperf.judge.check import check_log
    from scalefold.mlperf.log.logfile import read_log

    file = result_file(ended)
    if file is None:
        return "no log", "no result file"
    try:
        log, verdict = read_log(file), check_log(file)
    except LogError as error:
        return "invalid", str(error)
    part = bool(ended.start.act or ended.start.after)
    others = [reason for reason in verdict.reasons if not part and not reason.startswith(OF_AN_ABORTED_RUN)]
    aborted = log.status == "aborted" and not log.broken_lines and not others
    return ("aborted" if aborted else verdict.kind), (others[0] if others else verdict.headline)


def ruler_ms(folder: Path, gpus: int, dap: int) -> dict[int, float]:
    """Medians of a ruler's table by passes; empty without rows."""
    file = folder / "step_time.csv"
    rows = read_rows(file) if file.exists() else []
    chosen = [row for row in rows if (int(row["gpus"]), int(row["dap"])) == (gpus, dap)]
    return {int(row["passes"]): float(row["median_ms"]) for row in chosen}


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One judgement; ``met`` None: nothing to judge, and ``note`` says why."""

    name: str
    value: Any
    met: bool | None
    note: str = ""


def at_most(name: str, value: float | None, limit: float, missing: str, needed: bool = True) -> Line:
    """A figure against its limit; a ``needed`` one that is missing falls short."""
    if value is None:
        return Line(name, "", False if needed else None, missing)
    return Line(name, round(value, 3), value <= limit, f"at most {limit:g}")


def judge_statuses(start: Start, statuses: Sequence[int | None], hung: bool) -> Line:
    """Every rank's status; torchrun may have ended those that were still on their way when the first one left."""
    text = " ".join("none" if status is None else str(status) for status in statuses)
    wanted = " ".join(map(str, start.statuses))
    first_left = any(status == STEPS_DONE for status in statuses)
    pairs = zip(statuses, start.statuses, strict=True)
    good = all(own == want or (own == ENDED_BY_LAUNCHER and first_left) for own, want in pairs)
    return Line("exit_status", text, good and not hung, f"expected {wanted}" + (", hung and was ended" if hung else ""))


def judge_end(ended: Ended, times: Mapping[str, float]) -> Line:
    """From ``run_stop``, or from the loss of a rank, to the end of the last process."""
    killed = ended.start.act == "kill"
    since = ended.acted_at if killed else times.get("run_stop")
    limit = STEP_TIMEOUT_S + STOP_TO_EXIT_S if killed else STOP_TO_EXIT_S
    until = ended.watched.ended_at
    seconds = until - since if since is not None and until is not None else None
    return at_most("stop_to_exit_s", seconds, limit, "no rank was killed" if killed else "the log has no run_stop")


def judge_ruler(start: Start, steps: list[Row], plan: Plan, ended: Mapping[str, Ended]) -> Line:
    """Step time over that of the ruler of the same layout, if it ran in this call."""
    name, shape = "step_over_ruler_percent", (start.ranks - start.eval_ranks, start.dap)
    tables = [ended[ruler].folder for ruler in ("ruler_one", "ruler_two") if ruler in ended]
    known = next((found for found in (ruler_ms(folder, *shape) for folder in tables) if found), {})
    if start.act == "kill" or not known:
        reason = "ended too early" if start.act == "kill" else "no ruler of this layout ran in this call"
        return Line(name, "", None, reason)
    percent = over_ruler_percent(medians(steady_steps(steps, plan.save_every)), known)
    return at_most(name, percent, OVER_RULER_PERCENT, "too few steps", needed=False)


def judge_bits(start: Start, plan: Plan, ended: Mapping[str, Ended]) -> Line:
    """Losses of all steps, and the averaged weights after the last one, against the start with the same seed."""
    if not start.like or start.like not in ended:
        return Line("losses_equal", "", None, "no other start with this seed" + (" ran" if start.like else ""))
    other = ended[start.like]
    whole = start.act != "stop"
    own, truth = (steps_of(read_record(e.folder / METRICS_FILE)) for e in (ended[start.name], other))
    problem = different_steps(own, truth, whole)
    if not problem and whole:
        digests = [weights_digest(run_dir(plan, s), plan.steps) for s in (start, other.start)]
        problem = "" if digests[0] and digests[0] == digests[1] else "the averaged weights differ or were not saved"
    return Line("losses_equal", "no" if problem else "yes", not problem, problem or f"with {start.like}, bit for bit")


def judge_left(ended: Ended) -> Line:
    """Processes, names in shared memory that are still there, files under temporary names."""
    still = sorted(ended.shared_memory & shared_memory())
    left = [*ended.watched.left, *(f"/dev/shm/{name}" for name in still), *ended.partial]
    return Line("left_behind", len(left), not left, "; ".join(left) or "nothing")


def judge(plan: Plan, ended: Mapping[str, Ended], name: str) -> list[Line]:
    """All lines of one start of the program."""
    one = ended[name]
    start, times = one.start, log_times(one)
    record = of_this_start(read_record(one.folder / METRICS_FILE))
    steps, (log_kind, log_note) = steps_of(record), log_verdict(one)
    stall = checkpoint_stall_ms(steps, plan.save_every)
    outlives_a_checkpoint = not start.act and TARGET_REACHED not in start.statuses[:1]
    return [
        judge_statuses(start, one.watched.statuses(), one.watched.hung),
        judge_end(one, times),
        at_most("start_to_first_step_s", start_parts(record).get("first_step"), START_S, "no first step recorded"),
        at_most("checkpoint_stall_ms", stall, STALL_MS, "no step after a checkpoint", needed=outlives_a_checkpoint),
        judge_ruler(start, steps, plan, ended),
        judge_bits(start, plan, ended),
        Line("log_verdict", log_kind, log_kind in EXPECTED_VERDICTS[TARGET_REACHED in start.statuses[:1]], log_note),
        judge_left(one),
        Line("steps", len(steps), bool(steps)),
    ]


COLUMNS = (
    "steps",
    "exit_status",
    "stop_to_exit_s",
    "start_to_first_step_s",
    "checkpoint_stall_ms",
    "step_over_ruler_percent",
    "losses_equal",
    "log_verdict",
    "left_behind",
)


def csv_row(start: Start, lines: Sequence[Line]) -> dict[str, object]:
    """One row of gpu_runs.csv."""
    values = {line.name: line.value for line in lines}
    return {**facts(), "layout": start.name, **{column: values[column] for column in COLUMNS}}


def timeline(one: Ended) -> dict[str, float]:
    """Seconds of each part of a start, from its launch to the end of its last process."""
    marks = {"launch": one.watched.began_at, **log_times(one), "end": one.watched.ended_at or 0.0}
    names = list(marks)
    return {f"{a} to {b}": round(marks[b] - marks[a], 2) for a, b in itertools.pairwise(names)}


def breakdown(one: Ended) -> dict[str, float]:
    """Seconds from ``run_start`` to the end of each part of the start."""
    record = of_this_start(read_record(one.folder / METRICS_FILE))
    return {name: round(seconds, 3) for name, seconds in start_parts(record).items()}


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(plan: Plan, results: Results, out: Path, csv: Path | None) -> bool:
    """Judge, print the table, write all files; whether everything is met."""
    runs = {name: one for name, one in results.ended.items() if not one.start.layout.startswith("ruler")}
    rulers = {name: one for name, one in results.ended.items() if name not in runs}
    lines = {name: judge(plan, results.ended, name) for name in runs}
    rows = [csv_row(runs[name].start, own) for name, own in lines.items()]
    write_log(results, lines, out / "gpu_runs.log")
    details = {
        "facts": facts(),
        "starts": {
            name: {"lines": [asdict(line) for line in own], "seconds": timeline(runs[name])}
            | {"start_parts_s": breakdown(runs[name]), "step_ms": step_times(plan, runs[name])}
            for name, own in lines.items()
        },
        "rulers": {name: one.watched.statuses() for name, one in rulers.items()},
        "not_run": results.not_run,
    }
    (out / "gpu_runs.json").write_text(json.dumps(details, indent=1) + "\n")
    if csv is not None:
        append_rows(csv, rows)
    print_table([{key: row[key] for key in ("layout", *COLUMNS)} for row in rows])
    short = [(name, line) for name, own in lines.items() for line in own if line.met is False]
    for name, line in short:
        report(f"SHORT {name}: {line.name} {line.value}: {line.note}")
    bad_rulers = [name for name, one in rulers.items() if one.watched.statuses() != list(one.start.statuses)]
    for name in bad_rulers:
        report(f"SHORT {name}: statuses {rulers[name].watched.statuses()}")
    for name, reason in results.not_run.items():
        report(f"NOT RUN {name}: {reason}")
    return bool(rows) and not (short or bad_rulers or results.not_run)


def step_times(plan: Plan, one: Ended) -> dict[int, float]:
    """Median step by number of passes."""
    record = of_this_start(read_record(one.folder / METRICS_FILE))
    found = medians(steady_steps(steps_of(record), plan.save_every))
    return {passes: round(value, 2) for passes, value in sorted(found.items())}


def write_log(results: Results, lines: Mapping[str, Sequence[Line]], file: Path, tail: int = 60) -> None:
    """One file with everything that was printed: the end of it, and more where a start fell short."""
    parts: list[str] = []
    for name, one in results.ended.items():
        own = lines.get(name, [])
        printed = one.watched.output()
        failed = one.watched.hung or any(line.met is False for line in own)
        parts += [f"===== {name}: {' '.join(one.watched.command)}"]
        parts += [f"seconds: {timeline(one)}", f"from run_start to the end of, s: {breakdown(one)}"] if own else []
        parts += [f"{'short' if line.met is False else 'ok':6s}{line.name} {line.value} ({line.note})" for line in own]
        parts += [f"----- output, {len(printed)} lines", *printed[-(600 if failed else tail) :], ""]
    parts += [f"===== {name}: NOT RUN: {reason}" for name, reason in results.not_run.items()]
    file.write_text("\n".join(parts) + "\n")


def make_store(work: Path, workers: int) -> Path:
    """Generated proteins of 24 to 32 residues, prepared; kept from an earlier call in the same folder."""
    store = work / "store"
    if not (store / "manifest.json").exists():
        made = generate(work / "raw", seed=3, num_train=40, num_eval=4)
        prepare(made.layout(), store, workers, report=lambda line: None)
    return store


def chosen(only: Sequence[str], tiny: bool) -> list[Start]:
    """The starts of some layouts, and those that they are compared with."""
    layouts = set(only) or set(LAYOUTS)
    layouts |= {s.like for s in STARTS if s.layout in layouts and s.like}
    starts = [start for start in STARTS if start.layout in layouts]
    return [start for start in starts if not (tiny and start.name == "ruler_one")]  # step_time.py needs a GPU


def main() -> int:
    """Run, judge, write; exit status 1 if anything falls short or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("--out", type=Path, help="folder of table, log and details; default: a new one")
    parser.add_argument("--work", type=Path, help="store, runs and caches, kept; default: temporary, removed")
    parser.add_argument("--gpus", type=int, help="GPUs to use; default: those that are there, at most 2")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--passes", type=int, default=2, help="most recycling passes, where they are the subject")
    parser.add_argument("--workers", type=int, default=6, help="loader processes per rank")
    parser.add_argument("--budget-s", type=float, default=510.0, help="begin nothing that would end later")
    parser.add_argument("--limit-s", type=float, default=200.0, help="a start that takes longer hangs")
    parser.add_argument("--tiny", action="store_true", help="tiny model on CPU ranks, to try the script")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further configuration")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # ends what was started, too
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    began = time.monotonic()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="scalefold-gpu-runs-"))
    out.mkdir(parents=True, exist_ok=True)
    csv = out / "gpu_runs.csv" if arguments.out else None if arguments.tiny else FOLDER / "gpu_runs.csv"
    work = arguments.work or Path(tempfile.mkdtemp(prefix="scalefold-gpu-runs-work-"))
    try:
        for name in ("runs", "starts"):
            shutil.rmtree(work / name, ignore_errors=True)
        store = make_store(work, workers=2 if arguments.tiny else 8)
        a = arguments
        plan = Plan(store, work, a.steps, a.passes, a.tiny, a.workers, a.limit_s, tuple(a.set))
        gpus = arguments.gpus or count_gpus(arguments.tiny)
        left_s = arguments.budget_s - (time.monotonic() - began)
        results = run_all(plan, chosen(arguments.only, arguments.tiny), gpus, left_s)
        good = write_results(plan, results, out, csv)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    report(f"{'every line is met' if good else 'NOT every line is met'}; details in {out}")
    return int(not good)


def count_gpus(tiny: bool) -> int:
    """Starts side by side, in GPUs."""
    import torch

    return 2 if tiny else min(2, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
