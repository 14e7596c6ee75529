"""A live run of ``scalefold tune``, and what its choices make of a rank's share of a step, without the command line.

    python benchmarks/measure/tuning_live.py --minutes 9 --dap 4 8 --model model.npz --out runs/tune
    python benchmarks/measure/tuning_live.py --shares runs/tune/nvidia_h100_80gb_hbm3.json --minutes 6   # the same GPU

The first searches all kernels at these shapes. The second times shares of a step (``dap_share.py``, one pass) in turns
without and with the choices, each in processes of its own, and appends to ``tuning_live.csv``; ``choices`` says which.
The third turn, without them again, is made if the time allows. The device's table of choices is put aside meanwhile.
Rows are written as they come.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import FOLDER, SCRIPTS, append_rows, print_table, read_rows
from scalefold.kernels import tuning
from scalefold.tune.command import Request, table_text, tune

TURNS = ("before", "after", "before")  # the second time, if it can be had: how far the machine drifts


@contextmanager
def choices_in_force(choices: Path | None) -> Iterator[None]:
    """The device's table is a copy of ``choices``, or none; what was there comes back at the end."""
    table = tuning.TABLES / f"{tuning.device_kind()}.json"
    wanted = choices.read_bytes() if choices is not None else None  # it may be that table itself
    aside = table.with_name(f"{table.name}.aside")
    if table.exists():
        table.replace(aside)
    try:
        if wanted is not None:
            table.write_bytes(wanted)
        yield
    finally:
        table.unlink(missing_ok=True)
        if aside.exists():
            aside.replace(table)


def share_rows(daps: list[int], minutes: float, extra: list[str]) -> list[dict[str, str]]:
    """What ``step_time.py --dap-share`` measures in a process of its own; whatever it wrote before it failed."""
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / "dap_share.csv"
        command = [sys.executable, str(SCRIPTS / "step_time.py"), "--dap-share", *map(str, daps), "--passes", "1"]
        status = subprocess.run([*command, "--minutes", f"{minutes:.2f}", "--csv", str(csv), *extra]).returncode
        if status:
            print(f"step_time.py: exit status {status}", flush=True)
        return read_rows(csv) if csv.exists() else []


def time_shares(arguments: argparse.Namespace) -> bool:
    """All turns that the time is enough for; whether both kinds of choices were timed.

    Until both are, each turn has an equal part of what is left, and takes place whatever an earlier one took: that may
    have compiled. Only a turn that was made before is left out, if what the shortest took is more than is left.
    """
    end, timed, shortest_s = time.monotonic() + 60 * arguments.minutes, set[str](), float("inf")
    for turn in TURNS:
        left_s = end - time.monotonic()
        if left_s < (shortest_s if turn in timed else 0.0):
            print(f"shares {turn} the search: LEFT OUT, the time of --minutes is used up", flush=True)
            break
        with choices_in_force(arguments.shares if turn == "after" else None):
            begin = time.monotonic()
            minutes = (end - begin) / 60 / max(1, len({*TURNS} - timed))
            rows = share_rows(arguments.dap, minutes, ["--small"] if arguments.small else [])
        append_rows(arguments.csv, [{"choices": turn, **row} for row in rows])
        print_table([{"choices": turn, **row} for row in rows])
        timed |= {turn} if rows else set()
        shortest_s = min(shortest_s, time.monotonic() - begin)
        print(f"shares {turn} the search: {time.monotonic() - begin:.0f} s", flush=True)
    return timed == set(TURNS)


def search(arguments: argparse.Namespace) -> bool:
    """What ``scalefold tune`` does; whether anything was settled."""
    daps, kernels = tuple(arguments.dap), tuple(arguments.kernels)
    rows = tune(
        Request(
            kernels=kernels,
            daps=daps,
            minutes=arguments.minutes,
            workers=arguments.workers,
            model=arguments.model,
            alone=arguments.no_history,
            out=arguments.out,
        ),
        lambda text: print(text, flush=True),
    )
    print(table_text(rows), flush=True)
    return bool(rows)


def main() -> int:
    """Search, or time shares; exit status 1 if nothing came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--kernels", nargs="+", default=[], help="parts of kernels' names; default: all")
    parser.add_argument("--model", type=Path, help="a fitted model, for machines without scikit-learn")
    parser.add_argument("--no-history", action="store_true", help="search from nothing, to compare with")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile; 0: all processors but one")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--shares", type=Path, metavar="CHOICES", help="instead: shares of a step with these")
    parser.add_argument("--csv", type=Path, default=FOLDER / "tuning_live.csv", help="of shares: table to append to")
    parser.add_argument("--small", action="store_true", help="of shares: tiny model on the CPU, to try the script")
    arguments = parser.parse_args()
    if arguments.shares and not arguments.shares.is_file():
        parser.error(f"--shares {arguments.shares}: no such file; give a table of choices")
    return int(not (time_shares if arguments.shares else search)(arguments))


if __name__ == "__main__":
    sys.exit(main())
