"""Forms of row-wise operations between which launch parameters choose, against the first: errors, bits and time.

    python benchmarks/measure/trials.py                               # all forms, shares of DAP 1 and 2, 2 minutes
    python benchmarks/measure/trials.py --only outer_product --dap 1 --evaluation 320 --csv trial.csv

Outputs and gradients of each form are compared with fp32 and with the errors of the first form, repeated REPEATS times
with memory poisoned in between, and timed in CUDA graphs, forward alone and with backward. Exit status 1 if a result is
worse than ALLOWED times the first form's error, if bits differ, if a form fails, or if one was not reached.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from common import append_rows, facts, graph_microseconds, print_table
from hopper_cases import too_large
from kernels import outputs_of, results, seeds_of
from scalefold.kernels import tuning
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.kernels.triton_ops import TRITON
from scalefold.tune.operation_cases import Case, Inputs, evaluation_cases, training_cases
from scalefold.tune.sound.bits import repeat

REPEATS, REPLAYS = 20, 30

TRITON_FORM, GLUON = {"HOPPER": 0}, {"HOPPER": 1}
Form = dict[str, tuning.Config]


def _tiles(recomputed: bool, *tiles: int) -> tuning.Config:
    return {"RECOMPUTED": int(recomputed), **tuning.tile_config(tiles)}


def transition_forms(c: int, backward: bool) -> dict[str, Form]:
    """Forward by either program; backward by either, or in Triton without storing the hidden layer."""
    parts = ("transition_hopper_input", "transition_hopper_weights")
    names = ("transition_hopper", "transition_hopper_gradient", "transition_hopper_hidden", *parts)
    triton: Form = dict.fromkeys(names, TRITON_FORM)
    if c == 128:
        triton["transition_backward"] = _tiles(False, 128, 64, 8, 3)
    forms = {"Triton": triton, "Gluon forward": triton | {"transition_hopper": GLUON}}
    if backward:
        forms["Gluon backward"] = triton | {"transition_hopper_gradient": GLUON}
    if backward and c == 256:
        forms["Gluon backward, narrow blocks"] = forms["Gluon backward"] | {"transition_hopper_hidden": GLUON}
    if backward and c == 128:
        weights = {"transition_weights": tuning.tile_config((64, 64, 4, 2))}
        forms["recomputed"] = triton | {"transition_backward": _tiles(True, 128, 64, 8, 3)} | weights
        for name in parts:
            forms[f"recomputed, Gluon {name.removeprefix('transition_hopper_')}"] = forms["recomputed"] | {name: GLUON}
        forms["recomputed, Gluon both"] = forms["recomputed"] | dict.fromkeys(parts, GLUON)
    return forms


def outer_product_forms(backward: bool) -> dict[str, Form]:
    """Forward by library and Triton or by Gluon; so both parts of the backward, each alone; all by Gluon."""
    names = ("outer_product_hopper", "outer_product_hopper_operands", "outer_product_hopper_weight")
    library = dict.fromkeys(names, TRITON_FORM)
    forms = {"library": library, "Gluon forward": library | {names[0]: GLUON}}
    if backward:
        forms["Gluon gradients of operands"] = library | {names[1]: GLUON}
        forms["Gluon gradient of the weight"] = library | {names[2]: GLUON}
        forms["Gluon"] = dict.fromkeys(names, GLUON)
    return forms


def forms_of(case: Case) -> dict[str, Form]:
    """Forms of an operation by name, launch parameters by kernel; the first is what others are compared with."""
    backward = case.calls > 0
    if case.operation == "outer_product_update" and not case.shape.startswith("1024x"):
        return outer_product_forms(backward)
    if case.operation == "triangle_project" and backward and case.shape.endswith("x128"):
        stored = {"triangle_project_backward": _tiles(False, 64, 64, 4, 2)}
        weights = {"triangle_project_weights": tuning.tile_config((64, 64, 4, 2))}
        return {"stored": stored, "recomputed": {"triangle_project_backward": _tiles(True, 64, 64, 4, 2)} | weights}
    if case.operation == "layer_norm_linear" and case.shape.endswith("to256+256+256+256"):
        return {"Triton": {"norm_linear_hopper_wide": TRITON_FORM}, "Gluon": {"norm_linear_hopper_wide": GLUON}}
    if case.operation == "gated_output" and case.shape.endswith(("x128from128", "x256from256")):
        return {"Triton": {"gated_output_hopper": TRITON_FORM}, "Gluon": {"gated_output_hopper": GLUON}}
    if case.operation == "transition" and "x64by" not in case.shape:
        return transition_forms(128 if "x128by" in case.shape else 256, backward)
    return {}


def errors(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> dict[str, float]:
    """Relative errors of outputs, then of gradients, by number."""
    pairs = [(n, a, b) for n, (a, b) in enumerate(zip(found, exact, strict=True)) if a is not None and b is not None]
    return {str(n): float((a.float() - b).norm() / b.norm()) for n, a, b in pairs}


def times(inputs: Inputs, backward: bool) -> tuple[float, float]:
    """Microseconds forward, and forward and backward (0 without)."""

    def call() -> Sequence[Tensor]:
        return outputs_of(lambda: inputs.call(TRITON))

    seeds = seeds_of(call())
    with torch.no_grad():
        forward = graph_microseconds(call, REPLAYS, 2)
    if not backward:
        return forward, 0.0
    both = graph_microseconds(lambda: torch.autograd.grad(call(), inputs.leaves, seeds, allow_unused=True), REPLAYS, 2)
    return forward, both


def results_of(inputs: Inputs, backward: bool, table: Operations = TRITON) -> list[Tensor | None]:
    """Outputs, and gradients if they are wanted."""
    if backward:
        return results(lambda: inputs.call(table), inputs.leaves)
    return [*outputs_of(lambda: inputs.call(table))]


def measured(
    inputs: Inputs, exact: Sequence[Tensor | None], backward: bool
) -> tuple[dict[str, float], int, tuple[float, float]]:
    """Errors, repeats whose bits differ, and times of the form in use."""

    def call() -> list[Tensor]:
        return [result for result in results_of(inputs, backward) if result is not None]

    own = errors(results_of(inputs, backward), exact)
    return own, len(repeat(call, REPEATS)), times(inputs, backward)


def rows_of(case: Case, chosen: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row for the first form of a case, then one per other form."""
    inputs, first, backward = case.build(), None, case.calls > 0
    exact = results_of(case.build(torch.float32), backward, REFERENCE)
    for name, configs in forms_of(case).items():
        if first is not None and chosen and not any(part in name for part in chosen):
            continue
        try:
            with ExitStack() as stack:
                for kernel, config in configs.items():
                    stack.enter_context(tuning.override(kernel, config))
                own, differing, us = measured(inputs, exact, backward)
        except Exception as problem:  # what the compiler or a launch refuses; other forms go on
            yield {"case": case.name, "form": name, "status": f"failed: {str(problem).strip()[:150]}"}
            continue
        first = first or (own, us)
        worse = too_large(own, first[0])
        yield {
            "case": case.name,
            "form": name,
            "status": "wrong: " + " ".join(worse) if worse else "bits differ" if differing else "ok",
            "forward_us": round(us[0], 1),
            "gain": f"{100 * (1 - us[0] / first[1][0]):.0f} %",
            "both_us": round(us[1], 1),
            "gain_us": round(first[1][1] - us[1], 1),
            "errors": " ".join(f"{n}:{own[n]:.1e}/{first[0][n]:.1e}" for n in own),
        }


def main() -> int:
    """Print a row per form; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--evaluation", type=int, nargs="+", default=[], help="chains of these lengths, forward only")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--forms", nargs="+", default=[], help="forms whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=2.0, help="later cases are not started")
    parser.add_argument("--csv", type=Path, help="also append rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    deadline, known, found, late = time.monotonic() + 60 * arguments.minutes, facts(), [], 0
    cases = [case for dap in arguments.dap for case in training_cases(dap)]
    cases += [case for length in arguments.evaluation for case in evaluation_cases(length)]
    cases = [case for case in cases if forms_of(case)]
    cases = [case for case in cases if not arguments.only or any(part in case.name for part in arguments.only)]
    empty = dict.fromkeys(("case", "form", "status", "forward_us", "gain", "both_us", "gain_us", "errors"), "")
    with torch.cuda.stream(torch.cuda.Stream()):  # one for everything, captures included
        for case in cases:
            if time.monotonic() > deadline:
                print(f"{case.name}: not reached")
                late += 1
                continue
            for row in rows_of(case, arguments.forms):
                found.append(empty | row)
                print("  ".join(str(value) for value in row.values()), flush=True)
                if arguments.csv:
                    append_rows(arguments.csv, [known | found[-1]])
            torch.cuda.empty_cache()
    print_table([{name: value for name, value in row.items() if name != "errors"} for row in found])
    return int(not found or late > 0 or any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
