"""Every sub-layer operation against other implementations: device time in CUDA graphs, both directions, and error.

    python benchmarks/measure/kernels.py                                   # shapes of DAP 1, under three minutes
    python benchmarks/measure/kernels.py --dap 1 2 4 8 --only attention triangle --minutes 8

Variants: ``ours`` (the Triton table), ``plain`` (the definition in PyTorch, bf16), ``compiled`` (torch.compile of the
definition), ``cuequivariance`` where it can be imported and has the operation. backward_us is forward and backward
minus forward. max_rel_error is the largest relative error of an output or gradient against the definition in fp32.
All variants but the compiled ones come first; those are compiled most expensive first until the time is used up. Rows
are written as they are known.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import FOLDER, append_rows, facts, graph_microseconds, print_table
from scalefold.kernels.table import REFERENCE
from scalefold.kernels.triton_ops import TRITON
from scalefold.tune.operation_cases import Case, Inputs, training_cases, triangle_multiplication

REPLAYS = 20
Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    """Device microseconds of one variant and its error."""

    forward_us: float
    backward_us: float
    max_rel_error: float


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


def measure(call: Call, leaves: list[Tensor], exact: list[Tensor | None]) -> Measured:
    """Time one variant, forward alone and with backward, and compare it with fp32."""
    difference = error(results(call, leaves), exact)
    seeds = seeds_of(outputs_of(call))
    with torch.no_grad():
        forward = graph_microseconds(lambda: outputs_of(call), REPLAYS, 2)
    both = graph_microseconds(lambda: backward(outputs_of(call), leaves, seeds), REPLAYS, 2)
    return Measured(forward, both - forward, difference)


def exact_results(case: Case) -> list[Tensor | None]:
    """The definition in fp32 on the same values."""
    inputs = case.build(torch.float32)
    return results(lambda: inputs.call(REFERENCE), inputs.leaves)


def cuequivariance_call(case: Case, inputs: Inputs, cueq: Any) -> Call | None:
    """The library's own form of a case, or None where it has none."""
    leaves = inputs.leaves
    if case.operation == "attention" and case.shape.endswith("_bias"):
        *projected, bias = leaves
        heads = bias.shape[1]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in projected)
        mask = torch.ones(q.shape[0], q.shape[1], 1, 1, q.shape[3], dtype=torch.bool, device=q.device)
        scale = q.shape[-1] ** -0.5
        return lambda: cueq.triangle_attention(q, k, v, bias[:, None], mask, scale).transpose(2, 3)
    if case.operation != "triangle_multiplication":
        return None
    z, norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias, *linears = leaves
    weights, biases = linears[0::2], linears[1::2]  # a, a gate, b, b gate, out, out gate
    direction = case.shape.rsplit("_", 1)[1]
    mask = torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)

    def call() -> Tensor:
        update = cueq.triangle_multiplicative_update(
            z,
            direction=direction,
            mask=mask,
            norm_in_weight=norm_in_weight,
            norm_in_bias=norm_in_bias,
            norm_out_weight=norm_out_weight,
            norm_out_bias=norm_out_bias,
            p_in_weight=torch.cat([weights[0], weights[2]]),
            p_in_bias=torch.cat([biases[0], biases[2]]),
            g_in_weight=torch.cat([weights[1], weights[3]]),
            g_in_bias=torch.cat([biases[1], biases[3]]),
            p_out_weight=weights[4],
            p_out_bias=biases[4],
            g_out_weight=weights[5],
            g_out_bias=biases[5],
        )
        return z + update

    return call


def attempt(case: Case, variant: str, call: Call, leaves: list[Tensor], exact: list[Tensor | None]) -> dict | None:
    """One row, or None with the reason printed: another implementation may not take a shape or a capture."""
    try:
        found = measure(call, leaves, exact)
    except Exception as problem:
        print(
            f"  {case.name}: {variant} cannot be measured: {type(problem).__name__}: {str(problem)[:160]}", flush=True
        )
        return None
    return {
        "operation": case.operation,
        "shape": case.shape,
        "variant": variant,
        "forward_us": round(found.forward_us, 1),
        "backward_us": round(found.backward_us, 1),
        "max_rel_error": f"{found.max_rel_error:.2e}",
    }


def quick_variants(case: Case, cueq: Any) -> list[dict]:
    """Rows of everything that needs no long compilation."""
    inputs, exact = case.build(), exact_results(case)
    calls: dict[str, Call | None] = {
        "ours": lambda: inputs.call(TRITON),
        "plain": lambda: inputs.call(REFERENCE),
        "cuequivariance": cuequivariance_call(case, inputs, cueq) if cueq is not None else None,
    }
    rows = [attempt(case, name, call, inputs.leaves, exact) for name, call in calls.items() if call is not None]
    return [row for row in rows if row is not None]


def compiled_variant(case: Case) -> list[dict]:
    """Row of torch.compile of the definition."""
    torch._dynamo.reset()
    inputs, exact = case.build(), exact_results(case)
    compiled = torch.compile(lambda: inputs.call(REFERENCE), dynamic=False)
    row = attempt(case, "compiled", compiled, inputs.leaves, exact)
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


def library() -> Any:
    """cuequivariance_torch, or None with the reason printed."""
    try:
        return importlib.import_module("cuequivariance_torch")
    except ImportError as problem:
        print(f"without cuEquivariance: {problem}")
        return None


def main() -> int:
    """Measure, print and append; exit status 1 if there was nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=2.5, help="no compilation starts later than this")
    parser.add_argument("--csv", type=Path, default=FOLDER / "kernels.csv")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes - 15
    cases, cueq, known, rows = chosen_cases(arguments.dap, arguments.only), library(), facts(), []
    with torch.cuda.stream(torch.cuda.Stream()):  # one for everything, captures included
        for case in cases:
            found = quick_variants(case, cueq)
            append_rows(arguments.csv, [{**known, **row} for row in found])
            rows += found
            torch.cuda.empty_cache()
        for row in compiled_variants(cases, [row for row in rows if row["variant"] == "plain"], deadline):
            append_rows(arguments.csv, [{**known, **row}])
            rows.append(row)
    rows.sort(key=lambda row: (row["operation"], row["shape"]))
    print_table(rows)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
