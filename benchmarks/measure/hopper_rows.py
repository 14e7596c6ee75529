"""Row-wise operations in Gluon against their Triton twins on this GPU: errors, bits and time at every share.

    python benchmarks/measure/hopper_rows.py                          # all operations, shares of DAP 1 and 2
    python benchmarks/measure/hopper_rows.py --only outer_product_update --dap 1 --csv trial.csv

Each case runs its operation with the tables preferring Triton, then Gluon. Outputs and gradients are compared with fp32
and with the twin's errors, Gluon's are repeated REPEATS times with memory poisoned in between, and both are timed in
CUDA graphs, forward alone and with backward. Exit status 1 if a result is worse than ALLOWED times the twin's error, if
bits differ, if a case takes no Gluon program, or if one was not reached.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bits import repeat
from common import append_rows, facts, graph_microseconds, print_table
from hopper_cases import too_large
from kernels import exact_results, outputs_of, results, seeds_of
from operation_cases import Case, Inputs, training_cases
from scalefold.kernels import tuning
from scalefold.kernels.hopper import rows
from scalefold.kernels.triton_ops import TRITON

KERNELS = ("outer_product_hopper", "transition_hopper")
OPERATIONS = ("outer_product_update", "transition")
REPEATS, REPLAYS = 20, 30


@contextmanager
def preferring(hopper: int) -> Iterator[None]:
    """The tables prefer Gluon (1) or Triton (0) for all of KERNELS."""
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(tuning.override(name, {"HOPPER": hopper}))
        yield


def errors(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> dict[str, float]:
    """Relative errors of outputs, then of gradients, by number."""
    pairs = [(n, a, b) for n, (a, b) in enumerate(zip(found, exact, strict=True)) if a is not None and b is not None]
    return {str(n): float((a.float() - b).norm() / b.norm()) for n, a, b in pairs}


def times(inputs: Inputs) -> tuple[float, float]:
    """Microseconds forward, and forward and backward."""

    def call() -> Sequence[Tensor]:
        return outputs_of(lambda: inputs.call(TRITON))

    seeds = seeds_of(call())
    with torch.no_grad():
        forward = graph_microseconds(call, REPLAYS, 2)
    both = graph_microseconds(lambda: torch.autograd.grad(call(), inputs.leaves, seeds, allow_unused=True), REPLAYS, 2)
    return forward, both


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the Gluon programs that are launched inside the block."""
    names: list[str] = []
    originals = {name: value for name, value in vars(rows).items() if name.startswith("hopper_")}

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> object:
            names.append(self.name)
            return originals[self.name][grid]

    for name in originals:
        setattr(rows, name, Counted(name))
    try:
        yield names
    finally:
        for name, value in originals.items():
            setattr(rows, name, value)


def measure(case: Case) -> dict[str, object]:
    """The row of one case."""
    inputs, exact = case.build(), exact_results(case)

    def call() -> list[Tensor]:
        found = results(lambda: inputs.call(TRITON), inputs.leaves)
        return [result for result in found if result is not None]

    with preferring(0):
        twin_errors, twin_us = errors(results(lambda: inputs.call(TRITON), inputs.leaves), exact), times(inputs)
    with preferring(1), counted_launches() as launched:
        own_errors = errors(results(lambda: inputs.call(TRITON), inputs.leaves), exact)
    with preferring(1):
        worse, different, own_us = too_large(own_errors, twin_errors), repeat(call, REPEATS), times(inputs)
    status = "wrong: " + " ".join(worse) if worse else "bits differ" if different else "ok"
    return {
        "operation": case.operation,
        "shape": case.shape,
        "programs": " ".join(sorted(set(launched))),
        "forward_us": round(own_us[0], 1),
        "twin_forward_us": round(twin_us[0], 1),
        "both_us": round(own_us[1], 1),
        "twin_both_us": round(twin_us[1], 1),
        "errors": " ".join(f"{n}:{own_errors[n]:.1e}/{twin_errors[n]:.1e}" for n in own_errors),
        "status": status if launched else "no Gluon program ran",
    }


def chosen_cases(daps: Sequence[int], only: Sequence[str]) -> list[Case]:
    """Cases of the operations that have such a program, where one takes the shape."""
    cases = [case for dap in daps for case in training_cases(dap) if case.operation in OPERATIONS]
    fitting = [case for case in cases if "1024x" not in case.shape and "x64by" not in case.shape]
    return [case for case in fitting if not only or any(part in case.name for part in only)]


def main() -> int:
    """Print a row per case; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=2.0, help="later cases are not started")
    parser.add_argument("--csv", type=Path, help="also append rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    deadline, known = time.monotonic() + 60 * arguments.minutes, facts()
    cases, found = chosen_cases(arguments.dap, arguments.only), []
    with torch.cuda.stream(torch.cuda.Stream()):  # one for everything, captures included
        for case in cases:
            if time.monotonic() > deadline:
                print(f"{case.name}: not reached")
                continue
            found.append(measure(case))
            print("  ".join(str(value) for value in found[-1].values()), flush=True)
            if arguments.csv:
                append_rows(arguments.csv, [known | found[-1]])
            torch.cuda.empty_cache()
    print_table([{name: value for name, value in row.items() if name != "errors"} for row in found])
    return int(not found or len(found) < len(cases) or any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
