"""Every sub-layer operation against other implementations: device time in CUDA graphs, both directions, and error.

    python benchmarks/measure/kernels.py                                   # shapes of DAP 1, under three minutes
    python benchmarks/measure/kernels.py --dap 1 2 4 8 --only attention triangle --minutes 8

Variants: ``ours`` (the Triton table), ``plain`` (the definition in PyTorch, bf16), ``compiled`` (torch.compile of the
definition), ``cuequivariance`` and ``fast_trimul`` where they can be imported and have the operation (``rivals.py``).
backward_us is forward and backward minus forward. max_rel_error is the largest relative error of an output or gradient
against the definition in fp32; a variant with one above LARGEST_ERROR is not timed. All variants but the compiled ones
come first; those are compiled most expensive first until the time is used up. Rows are written as they are known. A
variant after which the GPU answers no more, such as by an access to memory that is not there, is named and ends the
script with status 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import FOLDER, answers, append_rows, facts, graph_microseconds, print_table
from rivals import Call, Rival, libraries, rival
from scalefold.kernels.table import REFERENCE
from scalefold.kernels.triton_ops import TRITON
from scalefold.tune.operation_cases import Case, training_cases, triangle_multiplication

REPLAYS = 20
LARGEST_ERROR = 0.1  # rounding stays below it; a wrong operand, weight or direction gives about 1


@dataclass(frozen=True)
class Measured:
    """Device microseconds of one variant and its error."""

    forward_us: float
    backward_us: float
    max_rel_error: float


@dataclass(frozen=True)
class Exact:
    """The definition in fp32: outputs, and gradients in the order of the case's leaves."""

    outputs: list[Tensor | None]
    gradients: list[Tensor | None]


def outputs_of(call: Call) -> list[Tensor]:
    """Forward pass; always a list."""
    result = call()
    return [result] if isinstance(result, Tensor) else list(result)


def seeds_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs, the same for all variants."""
    generator = torch.Generator(device=outputs[0].device).manual_seed(2)
    draws = [torch.randn(o.shape, generator=generator, device=o.device) for o in outputs]
    return [torch.empty_like(o).copy_(draw.bfloat16()) for o, draw in zip(outputs, draws, strict=True)]


def backward(outputs: Sequence[Tensor], leaves: list[Tensor], seeds: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of all leaves, None where a variant has none."""
    return list(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))


def results(call: Call, leaves: list[Tensor]) -> list[Tensor | None]:
    """Outputs and gradients."""
    outputs = outputs_of(call)
    return [o.detach() for o in outputs] + backward(outputs, leaves, seeds_of(outputs))


def error(found: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """Largest relative error of all results that both have."""
    pairs = [(a.float(), b) for a, b in zip(found, exact, strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def measure(own: Rival, exact: Exact) -> Measured:
    """Compare one variant with fp32 and time it, forward alone and with backward; ValueError if it is not the same."""
    call, leaves = own.call, own.leaves
    difference = error(results(call, leaves), exact.outputs + own.arrange(exact.gradients))
    if not difference <= LARGEST_ERROR:
        raise ValueError(f"not the operation: an output or gradient is {difference:.2g} of its size away from fp32")
    seeds = seeds_of(outputs_of(call))
    with torch.no_grad():
        forward = graph_microseconds(lambda: outputs_of(call), REPLAYS, 2)
    both = graph_microseconds(lambda: backward(outputs_of(call), leaves, seeds), REPLAYS, 2)
    return Measured(forward, both - forward, difference)


def exact_results(case: Case) -> Exact:
    """The definition in fp32 on the same values."""
    inputs = case.build(torch.float32)
    found = results(lambda: inputs.call(REFERENCE), inputs.leaves)
    count = len(found) - len(inputs.leaves)
    return Exact(found[:count], found[count:])


def attempt(case: Case, variant: str, build: Callable[[], Rival | None], exact: Exact) -> dict | None:
    """One row, None if the variant has no form of the case, or with the reason printed: it may not take a shape.

    Raises:
        SystemExit: the GPU does not serve this process any more.
    """
    try:
        if (own := build()) is None:
            return None
        found = measure(own, exact)
    except Exception as problem:
        print(
            f"  {case.name}: {variant} cannot be measured: {type(problem).__name__}: {str(problem)[:160]}", flush=True
        )
        if torch.cuda.is_initialized() and not answers():
            print(f"{case.name}: {variant} BROKE the GPU's context: all rows before are written, no other can follow")
            sys.exit(1)
        return None
    return {
        "operation": case.operation,
        "shape": case.shape,
        "variant": variant,
        "forward_us": round(found.forward_us, 1),
        "backward_us": round(found.backward_us, 1),
        "max_rel_error": f"{found.max_rel_error:.2e}",
    }


def quick_variants(case: Case, libraries: Mapping[str, Any]) -> Iterator[dict]:
    """Rows of everything that needs no long compilation; ``libraries``: of the rivals, by variant."""
    inputs, exact = case.build(), exact_results(case)
    builds: dict[str, Callable[[], Rival | None]] = {
        "ours": lambda: Rival(lambda: inputs.call(TRITON), inputs.leaves),
        "plain": lambda: Rival(lambda: inputs.call(REFERENCE), inputs.leaves),
    }
    builds |= {name: partial(rival, case, inputs, name, library) for name, library in libraries.items()}
    for name, build in builds.items():
        if (row := attempt(case, name, build, exact)) is not None:
            yield row


def compiled_variant(case: Case) -> list[dict]:
    """Row of torch.compile of the definition."""
    torch._dynamo.reset()
    inputs, exact = case.build(), exact_results(case)
    compiled = torch.compile(lambda: inputs.call(REFERENCE), dynamic=False)
    row = attempt(case, "compiled", lambda: Rival(compiled, inputs.leaves), exact)
    return [] if row is None else [row]


def compiled_variants(cases: list[Case], rows: list[dict], deadline: float) -> Iterator[dict]:
    """Compile the cases, most time per step (plain) first, until the deadline."""
    time_of = {(row["operation"], row["shape"]): row["forward_us"] + row["backward_us"] for row in rows}
    cost = {case.name: case.calls * time_of.get((case.operation, case.shape), 0.0) for case in cases}
    for done, case in enumerate(sorted(cases, key=lambda case: -cost[case.name])):
        if time.monotonic() > deadline:
            print(f"compiled: {done} of {len(cases)} cases in the time limit")
            return
        yield from compiled_variant(case)
        torch.cuda.empty_cache()


def chosen_cases(daps: list[int], only: list[str]) -> list[Case]:
    """Training cases, with the whole triangle multiplication at DAP 1."""
    cases = [case for dap in daps for case in training_cases(dap)]
    if 1 in daps:
        cases += [triangle_multiplication((1, 256, 256), 128, outgoing, 52) for outgoing in (True, False)]
    return [case for case in cases if not only or any(part in case.name for part in only)]


def main() -> int:
    """Measure, print and append; exit status 1 if there was nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=2.5, help="no compilation starts later than this")
    parser.add_argument("--csv", type=Path, default=FOLDER / "kernels.csv")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes - 15
    cases, others, known, rows = chosen_cases(arguments.dap, arguments.only), libraries(), facts(), []
    with torch.cuda.stream(torch.cuda.Stream()):  # one for everything, captures included
        for case in cases:
            for row in quick_variants(case, others):
                append_rows(arguments.csv, [{**known, **row}])
                rows.append(row)
            torch.cuda.empty_cache()
        for row in compiled_variants(cases, [row for row in rows if row["variant"] == "plain"], deadline):
            append_rows(arguments.csv, [{**known, **row}])
            rows.append(row)
    rows.sort(key=lambda row: (row["operation"], row["shape"]))
    print_table(rows)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
