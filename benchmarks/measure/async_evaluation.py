"""Evaluation on ranks of its own beside training: what it costs a step, what a hand-over costs, how a run ends.

    python benchmarks/measure/async_evaluation.py STORE --gpus 4              # 3 train, 1 evaluates; then 3 train alone
    python benchmarks/measure/async_evaluation.py STORE --gpus 8 --eval-gpus 4 --dap 4 --cycles 4 --cycle-steps 40
    python benchmarks/measure/async_evaluation.py --small                # tiny model, generated proteins, two CPU ranks

Two real runs (``scalefold train``) on a prepared store with the same training ranks, batch, seed and chains: one hands
its weights to evaluation ranks after every cycle, the other (left out with --without-alone) never evaluates. Rows come
from their ``metrics.jsonl`` and are appended to benchmarks/results/async_evaluation.csv; with --small only where --csv
says. Every rank is started as torchrun starts it, but by this script: torchrun would end the other ranks as soon as one
leaves with status 4 (budget used up).

``step_ms``: median per number of passes, mean over these; ``beside_ms``: of the steps during which an evaluation ran;
``apart_ms``: of the others of the same run. ``stall_ms``: median time between two cycles that belongs to no step, less
``waited_s``, which training spent in all because the evaluators were behind. ``result_s``: from the last step of a
cycle to its result. ``end_s``: from the last record of the run to the end of its last process. Exit status 1 if a rank
ends badly or an evaluation is missing.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import FOLDER, ROOT, append_rows, facts
from scalefold.processors import processors
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics

CONFIGS = ROOT / "configs"
NEVER = 1_000_000
FILLING = 4  # first steps, in which loader workers fill their queue
BUDGET_USED_UP = 4  # exit status of a training rank whose run ends without the target
WAITED = "training_waited_for_evaluation"


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    train_ranks: int
    eval_ranks: int
    dap: int
    cycles: int
    cycle_steps: int
    small: bool

    @property
    def world(self) -> int:
        """All ranks."""
        return self.train_ranks + self.eval_ranks

    def settings(self, store: Path, run_dir: Path, workers: int) -> list[str]:
        """Configuration of the run: evaluations are never the last word, nothing else writes."""
        return [
            f"parallel.{'ranks' if self.small else 'gpus'}_per_node={self.world}",
            f"parallel.num_eval_ranks={self.eval_ranks}",
            f"parallel.dap_size={self.dap}",
            f"training.global_batch_size={self.train_ranks // self.dap}",
            f"training.num_train_iters={self.cycles * self.cycle_steps}",
            f"training.val_every_iters={self.cycle_steps if self.eval_ranks else NEVER}",
            "training.target_avg_lddt_ca_value=1.0",
            "training.seed=5",
            f"data.store_dir={store}",
            f"data.num_workers={workers}",
            f"execution.warm_up={'true' if self.eval_ranks else 'false'}",  # without: no evaluation to warm up
            f"run.run_dir={run_dir}",
            "run.checkpoint_every_iters=0",
            "run.log_every_iters=1",
        ]


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: exit status per rank (None: killed at the time limit), when the last did."""

    statuses: list[int | None]
    at: float

    def bad_ranks(self, train_ranks: int) -> list[int]:
        """Ranks that ended otherwise than a run without reaching its target ends."""
        return [
            rank
            for rank, status in enumerate(self.statuses)
            if status not in ((0, BUDGET_USED_UP) if rank < train_ranks else (0,))
        ]


def run(case: Case, store: Path, folder: Path, workers: int, extra: list[str], limit_s: float) -> Ended:
    """Run all ranks of ``case``; what they print goes to ``folder/rank_N.log``."""
    folder.mkdir(parents=True)
    config = CONFIGS / ("tiny.yaml" if case.small else "base.yaml")
    settings = case.settings(store, folder / "run", workers)
    command = [sys.executable, "-m", "scalefold", "train", str(config), *settings, *extra]
    shared = {"WORLD_SIZE": str(case.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(case.world):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank_{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return await_all(processes, limit_s)


def await_all(processes: list[subprocess.Popen[bytes]], limit_s: float) -> Ended:
    """Wait for all; those that still run after ``limit_s`` are killed."""
    deadline = time.monotonic() + limit_s
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        return Ended([p.poll() for p in processes], time.time())
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- reading a run ----------------------------------------------------------------------------------------------------


def step_ms(metrics: Metrics, chosen: np.ndarray) -> float:
    """Median per number of passes, mean over these; NaN if no step is chosen."""
    kinds = np.unique(metrics.passes[chosen])
    medians = [np.median(metrics.step_ms[chosen & (metrics.passes == passes)]) for passes in kinds]
    return float(np.mean(medians)) if len(medians) else float("nan")


def beside_evaluation(metrics: Metrics) -> np.ndarray:
    """Steps that lay within an evaluation, bool [N]. A result's time is when rank 0 heard of it, a step later."""
    end_s, begin_s = metrics.time_s, metrics.time_s - metrics.step_ms / 1e3
    inside = np.zeros(len(metrics.step), bool)
    for done_s, seconds in zip(metrics.eval_time_s, metrics.eval_seconds, strict=True):
        inside |= (begin_s >= done_s - seconds) & (end_s <= done_s)
    return inside


def between_cycles_s(metrics: Metrics, every: int) -> np.ndarray:
    """Seconds of every cycle after the first that belong to none of its steps, less waiting for the evaluators."""
    last = metrics.step[metrics.step % every == 0]
    time_s = dict(zip(metrics.step.tolist(), metrics.time_s.tolist(), strict=True))
    waited_s = {event["step"]: event["seconds"] for event in metrics.events if event["name"] == WAITED}
    found = []
    for before, after in zip(last[:-1].tolist(), last[1:].tolist(), strict=True):
        steps_s = metrics.step_ms[(metrics.step > before) & (metrics.step <= after)].sum() / 1e3
        found.append(time_s[after] - time_s[before] - steps_s - waited_s.get(before, 0.0))
    return np.array(found)


def result_s(metrics: Metrics) -> np.ndarray:
    """Seconds from the end of a cycle to the moment at which rank 0 knew its result."""
    time_s = dict(zip(metrics.step.tolist(), metrics.time_s.tolist(), strict=True))
    pairs = zip(metrics.eval_step.tolist(), metrics.eval_time_s.tolist(), strict=True)
    return np.array([known_s - time_s[step] for step, known_s in pairs])


def row(case: Case, metrics: Metrics, ended: Ended) -> dict[str, object]:
    """One line of the table."""
    counted, beside = metrics.step > FILLING, beside_evaluation(metrics)
    between_s = between_cycles_s(metrics, case.cycle_steps if case.eval_ranks else NEVER)
    results_s = result_s(metrics)
    waited_s = sum(event["seconds"] for event in metrics.events if event["name"] == WAITED)
    later_s = metrics.eval_seconds[1:]

    def known(value: float, digits: int) -> object:
        return "" if np.isnan(value) else round(float(value), digits)

    return {
        **facts(),
        "case": case.name,
        "train_ranks": case.train_ranks,
        "eval_ranks": case.eval_ranks,
        "dap": case.dap,
        "steps": int(counted.sum()),
        "step_ms": known(step_ms(metrics, counted), 2),
        "beside_ms": known(step_ms(metrics, counted & beside), 2),
        "apart_ms": known(step_ms(metrics, counted & ~beside), 2),
        "data_wait_percent": known(100 * metrics.data_ms[counted].sum() / metrics.step_ms[counted].sum(), 3),
        "stall_ms": known(1e3 * float(np.median(between_s)) if len(between_s) else float("nan"), 1),
        "stall_max_ms": known(1e3 * float(np.max(between_s)) if len(between_s) else float("nan"), 1),
        "waited_s": round(waited_s, 2),
        "evaluations": len(metrics.eval_step),
        "chains": len(metrics.eval_chains[0]) if metrics.eval_chains else 0,
        "first_eval_s": known(metrics.eval_seconds[0] if len(metrics.eval_seconds) else float("nan"), 2),
        "eval_s": known(float(np.median(later_s)) if len(later_s) else float("nan"), 2),
        "result_s": known(float(np.median(results_s)) if len(results_s) else float("nan"), 2),
        "end_s": round(ended.at - metrics.path.stat().st_mtime, 2),
        "statuses": " ".join(map(str, ended.statuses)),
    }


def complaints(case: Case, metrics: Metrics | None, ended: Ended) -> list[str]:
    """What is wrong with a run, in words."""
    found = [f"rank {rank} ended with {ended.statuses[rank]}" for rank in ended.bad_ranks(case.train_ranks)]
    if metrics is None:
        return [*found, "no metrics were written"]
    expected = [case.cycle_steps * (n + 1) for n in range(case.cycles)] if case.eval_ranks else []
    skipped = {e["step"] for e in metrics.events if e["name"] == "evaluation_skipped"}
    missing = sorted(set(expected) - set(metrics.eval_step.tolist()) - skipped)
    if missing:
        found.append(f"{len(missing)} of {case.cycles} evaluations are missing, the first after step {missing[0]}")
    return found


# --- command line -----------------------------------------------------------------------------------------------------


def generated_store(folder: Path) -> Path:
    """A prepared store of 30 generated training and 4 evaluation proteins."""
    from scalefold.data.made.demo import generate
    from scalefold.data.store.prepare import prepare

    made = generate(folder / "raw", seed=3, num_train=30, num_eval=4)
    prepare(made.layout(), folder / "store", report=lambda text: None)
    return folder / "store"


def cases(arguments: argparse.Namespace) -> list[Case]:
    """With evaluation ranks, and (unless left out) the same training ranks alone."""
    train_ranks = arguments.gpus - arguments.eval_gpus
    beside = Case(
        "beside",
        train_ranks,
        arguments.eval_gpus,
        arguments.dap,
        arguments.cycles,
        arguments.cycle_steps,
        arguments.small,
    )
    return [beside] if arguments.without_alone else [beside, replace(beside, name="alone", eval_ranks=0)]


def measure(case: Case, store: Path, folder: Path, arguments: argparse.Namespace, limit_s: float) -> dict[str, object]:
    """Run one case and read it; RuntimeError with the ranks' last lines if anything went wrong."""
    workers = arguments.workers
    if workers is None:
        workers = max(1, (processors() - 2 * case.world) * case.dap // case.train_ranks)
    print(f"{case.name}: {case.train_ranks} ranks train, {case.eval_ranks} evaluate", flush=True)
    ended = run(case, store, folder, workers, arguments.set, limit_s)
    file = folder / "run" / METRICS_FILE
    metrics = read_metrics(file) if file.exists() else None
    wrong = complaints(case, metrics, ended)
    if wrong or metrics is None:
        ranks = ended.bad_ranks(case.train_ranks) or [0]
        tails = ["\n".join((folder / f"rank_{r}.log").read_text().splitlines()[-15:]) for r in ranks[:2]]
        raise RuntimeError(f"{case.name}: {'; '.join(wrong)}\n" + "\n---\n".join(tails))
    return row(case, metrics, ended)


def report(rows: list[dict[str, object]]) -> None:
    """The runs beside each other, and what evaluation cost a step."""
    shown = [name for name in rows[0] if name not in facts()]
    width = max(map(len, shown))
    for name in shown:
        print(f"{name:<{width}}" + "".join(f"{row[name]!s:>16}" for row in rows))
    if rows[0]["beside_ms"] != "" and rows[0]["apart_ms"] != "":
        ratio = float(str(rows[0]["beside_ms"])) / float(str(rows[0]["apart_ms"]))
        print(f"steps during an evaluation / the others of the same run: {ratio:.4f}")
    if len(rows) == 2:
        beside, alone = (float(str(row["step_ms"])) for row in rows)
        print(f"step with evaluation elsewhere / alone: {beside / alone:.4f}")


def main() -> int:
    """Run both cases, print, append; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="prepared data set; generated with --small if absent")
    parser.add_argument("--gpus", type=int, default=2, help="all ranks together")
    parser.add_argument("--eval-gpus", type=int, default=1, help="of them evaluate")
    parser.add_argument("--dap", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--cycle-steps", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--without-alone", action="store_true", help="only the run with evaluation ranks")
    parser.add_argument("--workers", type=int, help="loader processes per replica; default: what the cores allow")
    parser.add_argument("--minutes", type=float, default=8.5, help="of both runs; whoever is late is killed")
    parser.add_argument("--small", action="store_true", help="tiny model on the CPU over gloo")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration")
    parser.add_argument(
        "--csv", type=Path, help="default: benchmarks/results/async_evaluation.csv, nowhere with --small"
    )
    arguments = parser.parse_args()
    train_ranks = arguments.gpus - arguments.eval_gpus
    if train_ranks < 1 or train_ranks % arguments.dap or arguments.cycles * arguments.cycle_steps <= FILLING:
        parser.error("--gpus less --eval-gpus must be a positive multiple of --dap; more than 4 steps are needed")
    if arguments.store is None and not arguments.small:
        parser.error("STORE is missing: give a prepared data set, or --small")
    csv = arguments.csv or (None if arguments.small else FOLDER / "async_evaluation.csv")
    deadline = time.monotonic() + 60 * arguments.minutes
    wanted, rows = cases(arguments), list[dict[str, object]]()
    with tempfile.TemporaryDirectory() as name:
        store = arguments.store or generated_store(Path(name))
        for case in wanted:
            try:
                rows.append(measure(case, store, Path(name) / case.name, arguments, deadline - time.monotonic()))
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                break
            if csv is not None:
                append_rows(csv, rows[-1:])
    complete = len(rows) == len(wanted)
    if complete:
        report(rows)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
