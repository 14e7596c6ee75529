"""What ``scalefold tune`` does, in order: problems, model, search, choices, table and picture."""

import csv
import functools
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from scalefold.errors import ConfigError
from scalefold.kernels import tuning
from scalefold.kernels.tuning import Config
from scalefold.processors import processors
from scalefold.tune import trials
from scalefold.tune.candidates import neighbours, space
from scalefold.tune.device import REPLAYS, Device
from scalefold.tune.model import Forest, augmented, fit, lessons
from scalefold.tune.operation_cases import Case
from scalefold.tune.picture import draw
from scalefold.tune.programs import (
    Problem,
    Program,
    all_cases,
    compile_task,
    daps_of,
    find_problems,
    operations_of,
    run_once,
    start_worker,
)
from scalefold.tune.sound.clock import graph_microseconds
from scalefold.tune.sweep import Sought, Sweep, seek_problem
from scalefold.tune.trials import Trial

SEARCH_SHARE, CHOICES_SHARE = 0.75, 0.95  # of the time, when searching and when settling choices end
Note = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A command line.

    Attributes:
        kernels: parts of names; empty: all.
        workers: processes that compile; 0: all processors but one.
        model: file of a fitted model, made here if it is absent; None: fit anew, keep nothing.
        alone: search without history.
        out: folder for table, picture and a copy of the choices.
    """

    kernels: tuple[str, ...] = ()
    daps: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = ()
    missing: bool = False
    minutes: float = 6.0
    workers: int = 0
    model: Path | None = None
    alone: bool = False
    histories: tuple[Path, ...] = ()
    out: Path = Path("runs/tune")


class Processes:
    """Workers that compile without a GPU, 0: all processors but one. A pool that broke is made anew."""

    def __init__(self, daps: Sequence[int], lengths: Sequence[int], workers: int) -> None:
        self._workers = workers or max(1, processors() - 1)
        self.slots = self._workers + 2
        self._state = (list(daps), list(lengths), tuning.capability(), tuning.device_kind())
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self._workers, context, start_worker, self._state)
        for _ in range(self._workers):
            pool.submit(int)  # a call that finds no idle process starts one
        return pool

    def submit(self, problem: Problem, config: Config) -> "Future[Program]":
        """Compile a candidate some time."""
        try:
            return self._pool.submit(compile_task, problem, config)
        except BrokenProcessPool:
            self._pool = self._new()
            return self._pool.submit(compile_task, problem, config)

    def close(self) -> None:
        """End all workers, whatever they compile."""
        for process in list(self._pool._processes.values()):
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


def fit_model(request: Request, note: Note = print) -> Forest | None:
    """A model of everything that is known; written if the request names a file.

    Raises ConfigError naming the extra without scikit-learn.
    """
    begin = time.monotonic()
    learned = lessons(_own_and_others(request)[1])
    forest = fit(augmented(learned))
    note(f"model of {len(learned)} earlier trials, {time.monotonic() - begin:.0f} s")
    if forest is not None and request.model is not None:
        request.model.parent.mkdir(parents=True, exist_ok=True)
        forest.save(request.model)
        note(f"{request.model}: written")
    return forest


def advice(request: Request, note: Note) -> Forest | None:
    """The model that advises a search: none, that of the request's file, or a new one."""
    if request.alone:
        return None
    if request.model is not None and request.model.is_file():
        return Forest.load(request.model)
    return fit_model(request, note)


def unique_problems(cases: list[Case]) -> list[Problem]:
    """What all cases look up, each once, in the case with most calls.

    The first of each case come first: compiling one leaves all kernels of its case in the cache for the others.
    """
    found: dict[tuple[str, str], tuple[int, Problem]] = {}
    for n in sorted(range(len(cases)), key=lambda n: -cases[n].calls):
        for turn, problem in enumerate(find_problems(cases, n)):
            found.setdefault(problem.key, (turn, problem))
    return [problem for _, problem in sorted(found.values(), key=lambda item: item[0])]


def chosen_problems(cases: list[Case], request: Request) -> list[Problem]:
    """The problems that are asked for; ConfigError if there is none."""
    problems = unique_problems(cases)
    if request.kernels:
        problems = [p for p in problems if any(part in p.kernel for part in request.kernels)]
    if request.missing:
        table = tuning.table(tuning.capability())
        problems = [p for p in problems if p.key[1] not in table.get(p.kernel, {})]
    if not problems:
        asked = " ".join(request.kernels) or "all kernels"
        raise ConfigError(f"tune: nothing to tune for {asked}; kernels are {', '.join(tuning.registered())}")
    return problems


def configs_of(problem: Problem, failed: Set[tuple[str, str]] = frozenset()) -> list[Config]:
    """The present choice, those of all tables for the same problem, the present one's neighbours, the whole grid.

    ``failed``: kernels and configurations that made a GPU fail at some problem; they are no candidates at any.
    """
    kernel, key = problem.key
    present = tuning.lookup(kernel, **problem.fields)
    tables = [tuning.read_table(path) for path in sorted(tuning.TABLES.glob("*.json"))]
    others = [table[kernel][key] for table in tables if key in table.get(kernel, {})]
    rest = [*others, *neighbours(present), *space(kernel, problem.fields)]
    return [present, *(config for config in rest if (kernel, trials.config_text(config)) not in failed)]


def first_columns(problems: Sequence[Problem], cases: list[Case], daps: Sequence[int]) -> list[dict[str, object]]:
    """What all trials of each problem share."""
    count = functools.cache(lambda n, backward: operations_of(cases[n], backward))
    found = []
    for problem in problems:
        case = cases[problem.case]
        place = {"kernel": problem.kernel, "problem": problem.key[1], "operation": case.name}
        work = {"dap": daps[problem.case], "calls": case.calls, "operations": count(problem.case, problem.backward)}
        found.append({**trials.facts(), **place, **work})
    return found


def tune(request: Request, note: Note = print) -> list[dict[str, object]]:
    """Search on this machine's GPU, save what wins, write table and picture; the rows of the table.

    Raises ConfigError: no GPU, nothing to tune, or no scikit-learn and no model; DeviceError: the GPU has failed.
    """
    if not torch.cuda.is_available():
        raise ConfigError("tune: no CUDA device: launch parameters are chosen where they are used")
    begin, limit = time.monotonic(), 60 * request.minutes
    processes = Processes(request.daps, request.lengths, request.workers)
    try:
        cases, daps = all_cases(list(request.daps), list(request.lengths)), daps_of(request.daps, request.lengths)
        soughts = _all_sought(cases, daps, request, note)
        note(f"{len(soughts)} problems after {time.monotonic() - begin:.0f} s")
        device = Device(cases)
        sweep = Sweep(soughts, device, processes, trials.own_file(), note)
        why = sweep.run(begin + SEARCH_SHARE * limit)
        note(f"{why} after {time.monotonic() - begin:.0f} s and {len(sweep.trial_seconds)} trials")
    finally:
        processes.close()
        _copy(request.out)
    rows = []
    for row in sweep.choose(begin + CHOICES_SHARE * limit):
        rows.append(row)
        _keep(request.out, row)
    note(f"{len(rows)} of {len(soughts)} problems settled after {time.monotonic() - begin:.0f} s")
    note(_shares(soughts, rows, device, cases, daps, begin + limit))
    _picture(request.out, note)
    return rows


def _all_sought(cases: list[Case], daps: Sequence[int], request: Request, note: Note) -> list[Sought]:
    """All searches, with what an earlier call has found."""
    problems = chosen_problems(cases, request)
    columns = first_columns(problems, cases, daps)
    forest, (own, others) = advice(request, note), _own_and_others(request)
    failed = trials.that_made_gpu_fail([*own, *others])
    soughts = [seek_problem(p, row, configs_of(p, failed), forest) for p, row in zip(problems, columns, strict=True)]
    resumed = sum(sought.resume(own) for sought in soughts)
    note(f"{resumed} trials of an earlier call")
    return soughts


def _own_and_others(request: Request) -> tuple[list[Trial], list[Trial]]:
    """Trials of this search, which it goes on from, and everything else that is known."""
    now, mode = trials.facts(), "alone" if request.alone else "history"
    mine = [now[name] for name in ("device", "torch", "code")] + [mode]
    own, others = [], []
    for trial in trials.history(request.histories):
        (own if [trial.device, trial.torch, trial.code, trial.search] == mine else others).append(trial)
    return own, others


@contextmanager
def presents(soughts: list[Sought]) -> Iterator[None]:
    """The choices before the search, whatever the table says now."""
    with ExitStack() as stack:
        for sought in soughts:
            config = trials.parse_config(sought.blanks[0].config)
            stack.enter_context(tuning.override(sought.problem.kernel, config, **sought.problem.fields))
        yield


def _shares(
    soughts: list[Sought],
    rows: list[dict[str, object]],
    device: Device,
    cases: list[Case],
    daps: Sequence[int],
    deadline: float,
) -> str:
    """Summed operations of a training step before and after; each that changed is timed with both choices."""
    names = [str(row["operation"]) for row in rows if row["best_us"] != row["default_us"]]
    changed = [n for n, case in enumerate(cases) if case.calls and case.name in names]
    totals: dict[int, list[float]] = {}
    left = sorted(changed, key=lambda n: -names.index(cases[n].name))  # the largest gains are its end
    while left and time.monotonic() < deadline:
        n = left.pop()
        with presents(soughts):
            before = _operation_us(device, n)
        total = totals.setdefault(daps[n], [0.0, 0.0])
        total[0] += cases[n].calls * before / 1000
        total[1] += cases[n].calls * _operation_us(device, n) / 1000
    lines = [
        f"DAP {dap}: operations with other choices take {a:.2f} ms before, {b:.2f} ms after ({b / a - 1:+.1%})"
        for dap, (a, b) in sorted(totals.items())
    ]
    lines += (
        [f"the time is over: {len(left)} of {len(changed)} changed operations were not timed again"] if left else []
    )
    return "\n".join(lines) or "no operation has another choice"


def _operation_us(device: Device, case: int) -> float:
    inputs = device.inputs(case)
    return graph_microseconds(lambda: run_once(inputs, True), 4 * REPLAYS, 1)


def _keep(out: Path, row: dict[str, object]) -> None:
    """A settled problem: its row of the table, and the copies with it."""
    _copy(out)
    _append(out / "tuning.csv", {**trials.facts(), **row, "config": json.dumps(row["config"], sort_keys=True)})


def _copy(out: Path) -> None:
    """Copies of choices and trials in the folder of the request."""
    for file in (tuning.TABLES / f"{tuning.device_kind()}.json", trials.own_file()):
        if file.is_file():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, out)


def _picture(out: Path, note: Note) -> None:
    """What the search came to, if it can be drawn: everything else is there by now."""
    if not trials.own_file().is_file():
        return
    try:
        draw(trials.read(trials.own_file()), out / "tuning.svg")
    except ImportError as error:
        note(f"no picture: {error}")


def _append(file: Path, row: dict[str, object]) -> None:
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def table_text(rows: list[dict[str, object]]) -> str:
    """The choices as an aligned table, the largest gains first."""
    if not rows:
        return "nothing was settled"
    shown = sorted(rows, key=lambda row: -_gain(row))
    cells = [["kernel", "problem", "before us", "after us", "gain", "tried", "choice"]]
    for row in shown:
        config = row["config"]
        text = trials.config_text(config) if isinstance(config, dict) else str(config)
        times = [str(row["default_us"]), str(row["best_us"]), f"{_gain(row):.1%}", str(row["candidates"])]
        cells.append([str(row["kernel"]), str(row["problem"]), *times, text])
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _gain(row: dict[str, object]) -> float:
    before, after = float(str(row["default_us"])), float(str(row["best_us"]))
    return 1 - after / before if math.isfinite(before) and before else 0.0
