"""The program as its own benchmark: ``scalefold train`` as the README starts it, on one GPU and on two, judged.

    python benchmarks/measure/gpu_runs.py --out FOLDER                     # every layout, in 9 minutes on four H100
    python benchmarks/measure/gpu_runs.py --only one_gpu dap2 --passes 4   # some layouts, graphs for up to 4 passes
    python benchmarks/measure/gpu_runs.py --tiny --only dap2           # tiny model on CPU ranks: the same script, tried

Full model, generated proteins (short ones, so that an evaluation is quick), one shared Triton cache. Layouts:
``one_gpu``, ``dap2``, ``dp2`` use up their step budget, twice with one seed; ``train_eval`` is one training and one
evaluation rank; ``target`` reaches its target; ``stop_one_gpu`` and ``stop_dap2`` are asked to stop (SIGTERM) and
resumed; ``phases`` goes from two replicas to DAP 2, in two starts; ``killed`` loses a rank (SIGKILL); ``ruler_one`` and
``ruler_two`` time bare steps with step_time.py and multi_gpu.py. By name only: ``dap4`` and ``ruler_four``, on four.

Every start is judged: exit status of every rank; seconds from ``run_stop`` (``killed``: from the kill) to the end of
its last process; from ``run_start`` to the end of the first step; stall at a checkpoint, which is what the steps after
it took longer than the median of their number of passes; step time over the ruler's; equality of all losses and of the
averaged weights, bit for bit, with the start of the same seed; the log's verdict; and what it left behind. Rows go to
``gpu_runs.csv``; FOLDER also gets ``gpu_runs.json`` (every line with its reason), ``gpu_runs.log`` (what was
printed, stacks of what hung) and the rulers' tables. Exit status 1 if anything falls short or did not run.
"""

import argparse
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common import FOLDER, append_rows, facts, print_table
from gpu_judge import COLUMNS, Line, breakdown, csv_row, judge, timeline
from gpu_layouts import LAYOUTS, STARTS, Plan, Start, places
from gpu_readings import medians, of_this_start, read_record, steady_steps, steps_of
from gpu_starts import Ended, Results, compile_shares, report, run_all
from scalefold.data.made.demo import generate
from scalefold.data.store.prepare import prepare
from scalefold.report.record import METRICS_FILE


def keep_results(plan: Plan, results: Results, out: Path) -> tuple[dict[str, list[Line]], list[dict[str, object]]]:
    """Judge what has ended so far and write all files of ``out`` anew; lines by start, rows of the table."""
    lines = {name: judge(plan, results.ended, name) for name, one in results.ended.items() if not one.start.is_ruler}
    rows = [csv_row(results.ended[name].start, own) for name, own in lines.items()]
    write_log(results, lines, out / "gpu_runs.log")
    details = {
        "facts": facts(),
        "starts": {
            name: {"lines": [asdict(line) for line in own], "seconds": timeline(results.ended[name])}
            | {"start_parts_s": breakdown(results.ended[name]), "step_ms": step_times(plan, results.ended[name])}
            for name, own in lines.items()
        },
        "rulers": {name: one.watched.statuses() for name, one in results.ended.items() if one.start.is_ruler},
        "not_run": results.not_run,
    }
    (out / "gpu_runs.json").write_text(json.dumps(details, indent=1) + "\n")
    (out / "gpu_runs.csv").unlink(missing_ok=True)
    append_rows(out / "gpu_runs.csv", rows)
    keep_tables(plan, out)
    return lines, rows


def keep_tables(plan: Plan, out: Path) -> None:
    """Copies of what rulers have written so far, ended or not: ``ruler_two_step_time.csv``."""
    for start in STARTS:
        for table in sorted(places(plan, start).glob("*.csv")) if start.is_ruler else ():
            shutil.copyfile(table, out / f"{start.name}_{table.name}")


def write_results(plan: Plan, results: Results, out: Path, csv: Path | None) -> bool:
    """Write all files, and the rows to ``csv`` too; print the table; whether everything is met."""
    lines, rows = keep_results(plan, results, out)
    if csv is not None:
        append_rows(csv, rows)
    print_table([{key: row[key] for key in ("layout", *COLUMNS)} for row in rows])
    short = [(name, line) for name, own in lines.items() for line in own if line.met is False]
    for name, line in short:
        report(f"SHORT {name}: {line.name} {line.value}: {line.note}")
    rulers = {name: one for name, one in results.ended.items() if one.start.is_ruler}
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
    """The starts of some layouts, by default of all that two GPUs can run, and those that they are compared with."""
    layouts = set(only) or {start.layout for start in STARTS if start.ranks <= 2}
    layouts |= {s.like for s in STARTS if s.layout in layouts and s.like}
    starts = [start for start in STARTS if start.layout in layouts]
    return [start for start in starts if not (tiny and start.name == "ruler_one")]  # step_time.py needs a GPU


def main() -> int:
    """Run, judge, write; exit status 1 if anything falls short or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("--out", type=Path, help="folder of table, log and details; default: a new one")
    parser.add_argument("--work", type=Path, help="store, runs and caches, kept; default: temporary, removed")
    parser.add_argument("--gpus", type=int, help="GPUs to use; default: as many as a start needs")
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
    csv = None if arguments.out or arguments.tiny else FOLDER / "gpu_runs.csv"
    work = arguments.work or Path(tempfile.mkdtemp(prefix="scalefold-gpu-runs-work-"))
    try:
        for name in ("runs", "starts"):
            shutil.rmtree(work / name, ignore_errors=True)
        store = make_store(work, workers=2 if arguments.tiny else 8)
        a = arguments
        plan = Plan(store, work, a.steps, a.passes, a.tiny, a.workers, a.limit_s, tuple(a.set))
        starts = chosen(arguments.only, arguments.tiny)
        compile_shares(plan, starts)
        gpus = arguments.gpus or count_gpus(starts, arguments.tiny)
        left_s = arguments.budget_s - (time.monotonic() - began)
        results = Results()
        try:
            run_all(plan, starts, gpus, left_s, results, lambda known: keep_results(plan, known, out))
        finally:
            good = write_results(plan, results, out, csv)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    report(f"{'every line is met' if good else 'NOT every line is met'}; details in {out}")
    return int(not good)


def count_gpus(starts: Sequence[Start], tiny: bool) -> int:
    """GPUs to use: two, so that starts on one stand in pairs, or more where a start needs them."""
    import torch

    wanted = max([2, *(start.ranks for start in starts)])
    return wanted if tiny else min(wanted, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
