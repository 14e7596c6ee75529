"""Damaged and random files for every reader: only ScaleFoldErrors may come out, within 5 s and 1 GiB each.

    python benchmarks/measure/fuzz.py --inputs 100000 --jobs 8 --csv benchmarks/results/fuzz.csv   # all readers
    python benchmarks/measure/fuzz.py --inputs 5000 --reader hhr --seed 7                  # one, nothing recorded

Each reader runs in child processes with limits on memory and on processor time per input. Of every 50 inputs 49 are
mutations of good samples (the same ones for the same seed, however many processes share them), the others come from
hypothesis. An input that breaks a rule is written to ``--keep`` with what came of it; exit status 1 if there is any.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from common import append_rows, facts

SECONDS_PER_INPUT = 5
BYTES_PER_INPUT = 1 << 30
HYPOTHESIS_SHARE = 0.02
REPORT_EVERY_S = 10


@dataclass
class Tally:
    """What came of the inputs so far."""

    inputs: int = 0
    accepted: int = 0
    errors: Counter = field(default_factory=Counter)
    failures: list[list] = field(default_factory=list)  # [index, what]
    slowest_s: float = 0.0
    peak_mib: float = 0.0


class OutOfTime(BaseException):
    """Raised by the timer; no reader can catch it by accident."""


def _alarm(*_: object) -> None:
    raise OutOfTime(f"more than {SECONDS_PER_INPUT} s of processor time")


class Runner:
    """Feeds one reader and keeps the tally; the index of the input under way stands in ``progress`` for the parent."""

    def __init__(self, reader, folder: Path, keep: Path, progress: Path) -> None:
        self.reader, self.folder, self.keep, self.progress = reader, folder, keep, progress
        self.tally = Tally()
        self.start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def feed(self, data: bytes, index: int) -> None:
        """Read one input under the limits."""
        from scalefold.errors import ScaleFoldError

        tally, start = self.tally, time.process_time()
        tally.inputs += 1
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_INPUT)
            try:
                self.reader.read(self.folder, data)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            tally.accepted += 1
        except ScaleFoldError as error:
            tally.errors[type(error).__name__] += 1
            if not str(error).isprintable():
                self._fail(data, index, f"a message of several lines: {error!r:.300}")
        except (Exception, OutOfTime) as error:
            self._fail(data, index, f"{type(error).__name__}: {error!s:.300}")
        tally.slowest_s = max(tally.slowest_s, time.process_time() - start)

    def _fail(self, data: bytes, index: int, what: str) -> None:
        self.tally.failures.append([index, what])
        self.keep.mkdir(parents=True, exist_ok=True)
        if len(self.tally.failures) <= 50:
            (self.keep / f"{self.reader.name}-{index}").write_bytes(data)

    def save(self) -> None:
        """Leave the tally where the parent finds it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.tally.peak_mib = (peak - self.start_kib) / 1024
        temporary = self.progress.with_suffix(".tmp")
        temporary.write_text(json.dumps(vars(self.tally)))
        temporary.replace(self.progress)


def run_mutations(runner: Runner, seed: int, first: int, last: int) -> None:
    """Inputs ``first`` to ``last`` of the reader's endless list of mutations."""
    from fuzz_readers import mutate

    saved = time.monotonic()
    for index in range(first, last):
        rng = random.Random(f"{runner.reader.name} {seed} {index}")
        runner.feed(mutate(rng, runner.reader.samples), index)
        if index == first or time.monotonic() - saved > 1:
            runner.save()
            saved = time.monotonic()


def run_hypothesis(runner: Runner, seed: int, count: int) -> None:
    """Inputs that owe nothing to the samples but their words: bytes, texts, JSON."""
    import hypothesis
    from hypothesis import HealthCheck, Phase
    from hypothesis import strategies as st

    from fuzz_readers import TOKENS

    words = sorted({word for sample in runner.reader.samples for word in sample[:4000].split()})[:200]
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    values = st.recursive(
        leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4)
    )
    pieces = st.sampled_from([*words, *TOKENS, b"\n", b" "]) | st.binary(max_size=8)
    inputs = (
        st.lists(pieces, max_size=30).map(b" ".join) | st.binary(max_size=300) | values.map(json.dumps).map(str.encode)
    )

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(count, 1),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(inputs)
    def feed(data: bytes) -> None:
        runner.feed(data, -runner.tally.inputs)

    feed()


def child(arguments: argparse.Namespace) -> None:
    """One reader in this process: mutations ``--first`` to ``--last``, and after the very last one hypothesis."""
    import fuzz_readers

    folder = arguments.work / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runner = Runner(fuzz_readers.build(folder)[arguments.reader], folder, arguments.keep, arguments.work / "tally.json")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES_PER_INPUT,) * 2)
    signal.signal(signal.SIGPROF, _alarm)
    runner.save()
    run_mutations(runner, arguments.seed, arguments.first, max(arguments.first, arguments.last))
    if arguments.last == num_mutations(arguments):
        run_hypothesis(runner, arguments.seed, arguments.inputs - arguments.last)
    runner.save()


def num_mutations(arguments: argparse.Namespace) -> int:
    """Inputs that are mutations."""
    return round(arguments.inputs * (1 - HYPOTHESIS_SHARE))


def fuzz_reader(reader: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One reader to the end, its inputs dealt to ``--jobs`` processes; a row of the table."""
    total, started = Tally(), time.monotonic()
    ends = [num_mutations(arguments) * job // arguments.jobs for job in range(arguments.jobs + 1)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for part in pool.map(lambda ends: fuzz_part(reader, arguments, started, *ends), pairwise(ends)):
            _add(total, part)
    print(f"{reader}: {total.inputs} inputs, {len(total.failures)} failures, {time.monotonic() - started:.0f} s")
    for index, what in total.failures[:20]:
        print(f"  {reader} input {index}: {what}")
    return {
        **{name: facts()[name] for name in ("date", "commit")},
        "reader": reader,
        "seed": arguments.seed,
        "inputs_asked": arguments.inputs,
        "inputs": total.inputs,
        "accepted": total.accepted,
        "errors": " ".join(f"{name}:{count}" for name, count in sorted(total.errors.items())),
        "failures": len(total.failures),
        "slowest_s": f"{total.slowest_s:.3f}",
        "peak_mib": f"{total.peak_mib:.0f}",
        "seconds": f"{time.monotonic() - started:.0f}",
    }


def fuzz_part(reader: str, arguments: argparse.Namespace, started: float, first: int, last: int) -> Tally:
    """Inputs ``first`` to ``last`` of a reader, over as many children as they kill."""
    total, crashes = Tally(), 0
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{reader}-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        while True:
            code = _run_child(reader, arguments, work, (first, last), started)
            part = _read_tally(work / "tally.json")
            _add(total, part)
            if code == 0 or crashes >= 20 or _is_late(arguments, started):
                return total
            if part.inputs == 0:
                raise SystemExit(f"{reader}: the child ended with status {code} before its first input")
            crashes += 1
            first += part.inputs + 1
            total.failures.append([first - 1, f"the process ended with status {code} within a second of this input"])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_late(arguments: argparse.Namespace, started: float) -> bool:
    return arguments.seconds is not None and time.monotonic() - started > arguments.seconds


def _run_child(reader: str, arguments: argparse.Namespace, work: Path, part: tuple[int, int], started: float) -> int:
    """Exit status of a child; one that outlives ``--seconds`` is asked to end, its tally stands."""
    (work / "tally.json").unlink(missing_ok=True)
    options = {"reader": reader, "inputs": arguments.inputs, "seed": arguments.seed, "keep": arguments.keep}
    first, last = part
    command = [sys.executable, __file__, "--child", f"--work={work}", f"--first={first}", f"--last={last}"]
    process = subprocess.Popen([*command, *(f"--{name}={value}" for name, value in options.items())])
    told = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - told > REPORT_EVERY_S:
            told = time.monotonic()
            print(f"{reader}: {first + _read_tally(work / 'tally.json').inputs} of {first} to {last}", flush=True)
        if _is_late(arguments, started):
            process.kill()
            process.wait()
            return 0
    return process.returncode


def _read_tally(path: Path) -> Tally:
    if not path.exists():
        return Tally()
    content = json.loads(path.read_text())
    return Tally(**{**content, "errors": Counter(content["errors"])})


def _add(total: Tally, part: Tally) -> None:
    total.inputs, total.accepted = total.inputs + part.inputs, total.accepted + part.accepted
    total.errors += part.errors
    total.failures += part.failures
    total.slowest_s, total.peak_mib = max(total.slowest_s, part.slowest_s), max(total.peak_mib, part.peak_mib)


def main() -> int:
    """All readers, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="per reader")
    parser.add_argument("--reader", action="append", help="this one only; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop a reader after this time and record what it reached")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share a reader's inputs")
    parser.add_argument("--csv", type=Path, help="append a row per reader")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_failures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.reader = arguments.reader[0]
        child(arguments)
        return 0
    failures = 0
    for reader in arguments.reader or READERS:
        row = fuzz_reader(reader, arguments)
        failures += int(str(row["failures"]))
        if arguments.csv:
            append_rows(arguments.csv, [row])
    print(f"{failures} failures")
    return int(failures > 0)


READERS = (
    *("mmcif", "a3m", "sto", "hhr", "clusters", "obsolete", "duplicates", "evaluation_list", "chains_table"),
    *("structure_pickle", "super_index", "yaml", "override", "checkpoint", "run_state", "mlperf_log", "report_log"),
    *("metrics", "rejected", "manifest", "store_index", "structure_record", "alignment_record", "template_record"),
    *("tuned_table", "download_list", "download_ids", "download_bucket"),
)

if __name__ == "__main__":
    sys.exit(main())
