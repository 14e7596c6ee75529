"""Bits and device time of every operation on a GPU, as a table that two commits can be compared by.

    python benchmarks/measure/kernel_digests.py --out before.csv                    # shapes of DAP 1, then DAP 8
    python benchmarks/measure/kernel_digests.py --dap 2 --only attention --out after.csv
    python benchmarks/measure/kernel_digests.py --compare before.csv after.csv

One row per case: a SHA-256 of all outputs and gradients for inputs drawn from a fixed seed, in memory that was poisoned
before, and the median time of the captured call, forward and backward. Run both commits on one GPU, with one version of
Triton. ``--compare`` prints every case; exit status 1 if bits differ or a case is in one table only.
"""

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import append_rows, facts, graph_microseconds, print_table, read_rows
from reproducibility import compile_beforehand
from scalefold.kernels.triton_ops import TRITON
from scalefold.processors import processors
from scalefold.tune.operation_cases import training_cases
from scalefold.tune.programs import run_once
from scalefold.tune.sound.bits import poison

REPLAYS = 40
ELEMENTS = 2**24 + 5  # of the optimizer's buffers: the last block is not full
Build = Callable[[], Callable[[], Sequence[Tensor]]]


def digest(results: Sequence[Tensor]) -> str:
    """Hash of the bits, shapes and types of all results."""
    total = hashlib.sha256()
    for result in results:
        total.update(f"{tuple(result.shape)} {result.dtype}".encode())
        total.update(result.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def optimizer_call() -> Callable[[], Sequence[Tensor]]:
    """One update of flat buffers, and the sum of squares of the gradient."""
    generator = torch.Generator("cuda").manual_seed(3)
    param, grad, exp_avg = (torch.randn(ELEMENTS, generator=generator, device="cuda") for _ in range(3))
    exp_avg_sq, averaged, copy = exp_avg.square(), param.clone(), param.bfloat16()
    scalars = torch.tensor([0.5, 1e-3, 0.4, 0.2, 0.0], device="cuda")

    def call() -> Sequence[Tensor]:
        buffers = [param.clone(), grad.bfloat16(), exp_avg.clone(), exp_avg_sq.clone(), averaged.clone(), copy.clone()]
        TRITON.adam_swa(*buffers, scalars, 0.9, 0.999, 1e-6, 0.9)
        return [*buffers, TRITON.sum_of_squares(grad)]

    return call


def mask_call() -> Callable[[], Sequence[Tensor]]:
    """A dropout mask; each call draws anew, so the digest is that of the first one."""
    torch.manual_seed(5)
    return lambda: [TRITON.dropout_mask((1, 1, 256, 128), 0.25, torch.device("cuda"))]


def builds(dap: int) -> Iterator[tuple[str, Build]]:
    """Every case of a share by name; the operations without shares belong to DAP 1."""
    for case in training_cases(dap):

        def build(case=case) -> Callable[[], Sequence[Tensor]]:
            inputs = case.build()
            return lambda: run_once(inputs, backward=case.calls > 0)

        yield f"dap{dap} {case.name}", build
    if dap == 1:
        yield from (("optimizer", optimizer_call), ("dropout_mask", mask_call))


def measured(name: str, build: Build) -> dict[str, object]:
    """The row of one case."""
    poison(0)
    call = build()
    found = digest(call())
    return {**facts(), "case": name, "sha256": found, "median_us": round(graph_microseconds(call, REPLAYS, 3), 2)}


def write(table: Path, daps: list[int], only: str) -> int:
    """Append a row per case; the exit status."""
    rows = []
    for name, build in (pair for dap in daps for pair in builds(dap) if only in pair[0]):
        rows.append(measured(name, build))
        append_rows(table, rows[-1:])
        print(f"{rows[-1]['sha256'][:16]} {rows[-1]['median_us']:9.2f} us  {name}", flush=True)  # type: ignore[index]
        torch.cuda.empty_cache()
    return int(not rows)


def compare(before: Path, after: Path) -> int:
    """Print bits and times of two tables side by side; the exit status."""
    old, new = ({row["case"]: row for row in read_rows(file)} for file in (before, after))
    rows: list[dict[str, object]] = []
    for case in (case for case in old if case in new):
        times = float(old[case]["median_us"]), float(new[case]["median_us"])
        same = "equal" if old[case]["sha256"] == new[case]["sha256"] else "DIFFER"
        rows.append(
            {"case": case, "bits": same, "before_us": times[0], "after_us": times[1], "ratio": times[1] / times[0]}
        )
    print_table(rows)
    for case in sorted(old.keys() ^ new.keys()):
        print(f"only in {before if case in old else after}: {case}")
    differing = sum(row["bits"] != "equal" for row in rows)
    if rows:
        ratios = [float(str(row["ratio"])) for row in rows]
        print(f"{len(rows)} cases, {differing} with other bits; time after/before {statistics.median(ratios):.3f}")
    return int(bool(differing) or old.keys() != new.keys() or not rows)


def main() -> int:
    """Write a table or compare two; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--out", type=Path, help="table to append to")
    either.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--dap", type=int, nargs="+", default=[1, 8], help="training shares")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--workers", type=int, default=max(1, processors() - 2), help="that compile; 0: none")
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    if arguments.workers and not arguments.only:
        compile_beforehand(arguments.dap, arguments.workers)
    return write(arguments.out, arguments.dap, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
