"""Time every launch parameter of some problems, for replays of searches (``tuning_replay.py``).

    python benchmarks/measure/tuning_sweeps.py --minutes 9 --csv benchmarks/results/tuning_sweeps.csv
    python benchmarks/measure/tuning_sweeps.py --set held-out --minutes 5 --csv benchmarks/results/tuning_held_out.csv
    CUDA_VISIBLE_DEVICES=1 python benchmarks/measure/tuning_sweeps.py --set drawn --part 1/4 ...   # of four GPUs

Three sets: ``development`` and ``held-out``, on which the search was chosen (the second was held out from the choice of
its first form), and ``drawn``: the problems of ``tuning_problems.csv``, which ``tuning_draw.py`` drew when the search
was fixed. Tables of parts are joined by appending all but the first line.

All other processors compile while this process times what they have finished: results compared with the present
choice's, bits in REPEATS repeats with memory poisoned in between, then the operation inside a CUDA graph. What does not
compile, does not fit, races, disagrees or does not launch is a row with its error. In the time that is left the fastest
are timed again, as further rows. A table that exists is continued, also after a candidate that made the GPU fail, which
ends the sweep with exit status 2: whatever this process tried next would fail with it.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import FOLDER, print_table, read_rows
from scalefold.errors import DeviceError
from scalefold.kernels import tuning
from scalefold.tune import trials
from scalefold.tune.candidates import space
from scalefold.tune.command import Processes, first_columns
from scalefold.tune.device import Device
from scalefold.tune.operation_cases import Case
from scalefold.tune.programs import (
    Problem,
    Program,
    all_cases,
    daps_of,
    find_problems,
)
from scalefold.tune.trials import Trial, config_text, parse_config

DRAWN = Path(__file__).with_name("tuning_problems.csv")


@dataclass(frozen=True)
class Swept:
    """Problems of one set, and the shares and evaluated lengths they belong to.

    Each is a kernel, how the name of its operation begins, and the key of the problem (empty: the first there).
    """

    daps: tuple[int, ...]
    problems: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...] = ()


SETS = {
    "development": Swept(
        (1, 4),
        (
            ("transition_forward", "transition 1x256x256x128"),
            ("transition_forward", "transition 1x128x64x256"),
            ("transition_backward", "transition 1x256x256x128"),
            ("transition_backward", "transition 1x1024x64x64"),
            ("norm_linear_backward", "layer_norm_linear 1x128x256x256"),
            ("norm_linear_backward", "layer_norm_linear 1x64x256x128"),
            ("attention_backward_queries", "attention 1x256x256x4h32"),
            ("attention_backward_queries", "attention 1x32x256x8h32"),
        ),
    ),
    "held-out": Swept(
        (4, 8),
        (
            ("gated_output_backward", "gated_output 1x32x256x128"),
            ("gated_output_forward", "gated_output 1x32x256x256"),
            ("outer_product_forward", "outer_product_update 128x64x256"),
            ("norm_linear_forward", "layer_norm_linear 1x128x256x64"),
            ("attention_backward_keys", "attention 1x256x256x8h8"),
            ("global_attention_rows_backward", "global_attention 1x1024x64x64"),
            ("transition_forward", "transition 1x1024x32x64"),
            ("norm_linear_backward", "layer_norm_linear 1x256x256x64"),
            ("triangle_output_backward", "triangle_output 4x32x256x64"),
            ("outer_product_weight", "outer_product_update 128x32x256"),
        ),
    ),
    "drawn": Swept(
        (1, 2, 4, 8),
        tuple((row["kernel"], row["operation"], row["problem"]) for row in read_rows(DRAWN)),
        (256, 320, 448, 576, 704),
    ),
}
TOGETHER = 6  # problems: those that come after them may find no time
REPEATS = 6
CLOSE = 1.1  # times the fastest: what is timed again
RESERVED = 0.12  # of the time, for that
Job = tuple[Problem, tuning.Config]


def swept_problems(cases: list[Case], wanted: Sequence[tuple[str, ...]]) -> list[Problem]:
    """The problems of a set, in order; ValueError if the model no longer has one."""
    found = []
    for kernel, begin, *key in wanted:
        numbers = [n for n, case in enumerate(cases) if case.name.startswith(begin)]
        problems = [p for n in numbers for p in find_problems(cases, n) if [*p.key] == [kernel, *(key or p.key[1:])]]
        if not problems:
            raise ValueError(f"no case `{begin}...` looks up {kernel}")
        found.append(problems[0])
    return found


def jobs(problem: Problem, limit: int | None, done: set[tuple[str, str, str]]) -> list[Job]:
    """What is left to try of a problem: its first, then the longest to compile, so that all processes end together."""
    configs = [tuning.lookup(problem.kernel, **problem.fields), *space(problem.kernel, problem.fields)]
    fresh = list(dict.fromkeys(map(config_text, configs)))[:limit]
    missing = [parse_config(text) for text in fresh if (*problem.key, text) not in done]
    rest = sorted(missing[1:], key=lambda config: -code_size(config))
    return [(problem, config) for config in [*missing[:1], *rest]]


def code_size(config: tuning.Config) -> float:
    """Elements of a tile that a warp holds, in all stages that are compiled: what a compiler's time grows with."""
    tile = math.prod(value for name, value in config.items() if name.startswith("BLOCK"))
    return tile / config.get("num_warps", 4) * (2 + config.get("num_stages", config.get("STAGES", 1)))


def compiled(pool: Processes, todo: list[list[Job]], seconds: float) -> Iterator[tuple[Job, Program]]:
    """Programs as they are finished, of jobs by problem; ends at the limit.

    The first of each problem goes ahead: it leaves in the cache what all others of its operation need.
    """
    end, others = time.monotonic() + seconds, {own[0][0].key: own[1:] for own in todo if own}
    pending = {pool.submit(*own[0]): own[0] for own in todo if own}
    while pending and time.monotonic() < end:
        for future in wait(pending, max(0.0, end - time.monotonic()), FIRST_COMPLETED).done:
            if time.monotonic() > end:  # compiling may be far ahead of timing
                break
            job = pending.pop(future)
            pending |= {pool.submit(*other): other for other in others.pop(job[0].key, [])}
            if future.exception() is None:  # else the process died; a further call tries again
                yield job, future.result()
    if pending:
        print(f"{len(pending) + sum(map(len, others.values()))} are left: the time is over", flush=True)


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


def keep(rows: list[Trial], row: Trial, device: Device, file: Path) -> None:
    """Take up a row, on the disk; DeviceError if its candidate was the last one that this process can try."""
    rows.append(row)
    trials.append(file, [row])
    if row.error and not device.works:
        raise DeviceError(
            f"the GPU fails with {row.kernel} {row.config} ({row.error}); the same command goes on after it"
        )


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
        yield replace(row, **trials.facts(), us=us if us is None else round(us, 2), bits=bits, error=error)  # type: ignore[arg-type]


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


def sweep(arguments: argparse.Namespace) -> list[Trial]:
    """Compile, time and write; all rows of the table."""
    begin, limit, swept = time.monotonic(), 60 * arguments.minutes, SETS[arguments.set]
    lengths = list(swept.lengths)
    pool = Processes(swept.daps, lengths, arguments.workers)
    cases = all_cases(list(swept.daps), lengths)
    number, count = arguments.part
    problems = swept_problems(cases, swept.problems[number::count])
    shared = first_columns(problems, cases, daps_of(swept.daps, lengths))
    columns = {problem.key: row for problem, row in zip(problems, shared, strict=True)}
    devices = {problem.case: Device(cases) for problem in problems}
    rows = trials.read(arguments.csv) if arguments.csv.exists() else []
    done = {(*row.key, row.config) for row in rows}
    failed = trials.that_made_gpu_fail(trials.history())
    todo = [jobs(problem, arguments.limit, done) for problem in problems]
    print(f"{time.monotonic() - begin:4.0f} s: {sum(map(len, todo))} to try of {len(problems)} problems", flush=True)
    said = 0.0
    try:
        for first in range(0, len(todo), TOGETHER):
            batch = todo[first : first + TOGETHER]
            for (problem, config), program in compiled(pool, batch, begin + (1 - RESERVED) * limit - time.monotonic()):
                device = devices[problem.case]
                if (problem.kernel, config_text(config)) in failed:
                    program = replace(program, error="made a GPU fail at another problem")
                row = row_of(columns[problem.key], config, program, device, problem)
                keep(rows, row, device, arguments.csv)
                if time.monotonic() > said + 20:
                    said = time.monotonic()
                    print(f"{said - begin:4.0f} s: {len(rows)} rows, {rows[-1].kernel} {rows[-1].config}", flush=True)
    finally:
        pool.close()  # what still compiles is not wanted any more
    print(f"{time.monotonic() - begin:4.0f} s: all compiled and timed once, or the time is over", flush=True)
    for row in again(rows, problems, devices, begin + limit):
        keep(rows, row, devices[problems[0].case], arguments.csv)
    return rows


def part_of(text: str) -> tuple[int, int]:
    """``0/2``: the first of two parts."""
    number, count = map(int, text.split("/"))
    if not 0 <= number < count:
        raise ValueError(text)
    return number, count


def main() -> int:
    """Sweep; exit status 1 if nothing was timed, 2 if the GPU failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="development", help="which problems")
    parser.add_argument("--part", type=part_of, default=(0, 1), metavar="K/N", help="every Nth problem, from K = 0 on")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole sweep")
    parser.add_argument("--csv", type=Path, default=FOLDER / "tuning_sweeps.csv", help="table to append to")
    parser.add_argument("--limit", type=int, help="at most that many configurations of each problem")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile; 0: all processors but one")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times come from one")
    begin = time.monotonic()
    try:
        rows = sweep(arguments)
    except DeviceError as error:
        print(error, flush=True)
        return 2
    print_table(summary(rows))
    print(f"{len(rows)} rows in {time.monotonic() - begin:.0f} s")
    return 0 if any(row.is_sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
