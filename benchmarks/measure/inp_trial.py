"""Trial forms of the gradients of gated outputs and of a triangle's output against the present programs, on one GPU.

    PYTHONPATH=wt/src:wt/benchmarks/measure python inp_trial.py --out $OUT [--only PART ...] [--budget-s 95]

All programs are compiled first by all processors. Then one process takes form after form; one that fails or does not
end in time costs that process. us: device time in CUDA graphs, of a graph of one call / of one of four calls on tensors
of their own. ``differ``: values with other bits than the present result (sums left out); ``errors``: of all results
against fp32, this form's / the present one's; ``repeats``: how many of 20 repeats have other bits than the first.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor

import inp_forms
import inp_hopper
from common import graph_microseconds
from compile_targets import compile_launch, recorded_launches
from scalefold.kernels import tuning
from scalefold.kernels.hopper import gated_attention as hopper
from scalefold.kernels.ops import gated_output
from scalefold.kernels.ops.linear import input_gradient
from scalefold.tune.sound.bits import repeat

LIMIT_S = 60
# name: (leading shape as it lies, channels, transposed view, scales)
SHAPES = {
    "msa row": ((1, 128, 256), 256, False, True),
    "msa column": ((1, 128, 256), 256, True, False),
    "start": ((1, 256, 256), 128, False, True),
    "end": ((1, 256, 256), 128, True, True),
    "start/2": ((1, 128, 256), 128, False, True),
    "msa row/2": ((1, 64, 256), 256, False, True),
    "msa column/2": ((1, 128, 128), 256, True, False),
    "end/2": ((1, 256, 128), 128, True, True),
    "msa row/8": ((1, 16, 256), 256, False, True),
    "start/8": ((1, 32, 256), 128, False, True),
    "msa column/8": ((1, 32, 128), 256, False, False),
}
OUTPUTS = {"pairs": (256, 256), "pairs/2": (128, 256), "pairs/8": (32, 256)}


def tiles(*values: int) -> dict:
    return tuning.tile_config(values)


GATED = {
    "present": None,
    "gluon": {"gluon": 1},
    "triton, scales once": {},
    "triton, scales once, 64 32 4 3": {"config": tiles(64, 32, 4, 3)},
    "triton, scales once, 64 64 4 1": {"config": tiles(64, 64, 4, 1)},
    "triton, scales once, 64 64 4 2": {"config": tiles(64, 64, 4, 2)},
    "triton, scales once, 64 64 8 2": {"config": tiles(64, 64, 8, 2)},
    "triton, scales once, 64 128 8 1": {"config": tiles(64, 128, 8, 1)},
    "triton, scales once, 32 64 4 2": {"config": tiles(32, 64, 4, 2)},
    "triton, scales once, sums by product": {"product": True},
}
BOTH = {
    "present": None,
    "gluon": {"gluon": 1},
    "mixed": {"mixed": True, "config": tiles(64, 64, 4, 3)},
    "halves": {"mixed": False, "config": tiles(64, 64, 4, 3)},
    "mixed, 2 stages": {"mixed": True, "config": tiles(64, 64, 4, 2)},
    "mixed, 128 columns": {"mixed": True, "config": tiles(64, 128, 4, 1)},
}


def all_forms() -> dict[str, tuple[str, dict | None, list[str]]]:
    """Most promising first; present last again."""
    forms: dict = {}
    for name in ("present", "gluon"):
        forms[f"gated: {name}"] = ("gated", GATED[name], list(SHAPES))
    for name in BOTH:
        forms[f"both: {name}"] = ("both", BOTH[name], list(OUTPUTS))
    for name in list(GATED)[2:]:
        shapes = list(SHAPES) if name in ("triton, scales once", "triton, scales once, sums by product") else [
            "msa row", "msa column", "start", "end", "start/8", "msa row/8"]
        forms[f"gated: {name}"] = ("gated", GATED[name], shapes)
    forms["gated: present, again"] = ("gated", None, list(SHAPES))
    forms["both: present, again"] = ("both", None, list(OUTPUTS))
    return forms


def generator(seed: int, device: str):
    random = None if device == "meta" else torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random, device=device).mul_(scale).bfloat16()

    def scales(*shape: int, rate: float) -> Tensor:
        return (torch.rand(shape, generator=random, device=device) >= rate).float() / (1 - rate)

    return normal, scales


def draw_gated(seed: int, label: str, device: str) -> tuple:
    shape, c, transposed, dropped = SHAPES[label]
    normal, scales = generator(seed, device)
    d, o, gate = (normal(*shape, c) for _ in range(3))
    if transposed:
        d, o, gate = (x.transpose(1, 2) for x in (d, o, gate))
    dropout = scales(1, 1, d.shape[2], c, rate=0.15 if c == 256 else 0.25) if dropped else None
    return d, o, gate, dropout, normal(c, c, scale=c**-0.5)


def call_gated(inputs: tuple, arguments: dict | None) -> list[Tensor]:
    d, o, gate, dropout, weight = inputs
    if arguments is None:
        return list(gated_output._gradients(*inputs))
    if "gluon" in arguments:
        return list(hopper.gated_output_gradient(*inputs))
    return list(inp_forms.gated_gradient(*inputs, **arguments))


def exact_gated(inputs: tuple) -> list[Tensor]:
    d, o, gate, dropout, weight = (None if x is None else x.float() for x in inputs)
    update = d if dropout is None else d * dropout
    opening, d_gated = gate.sigmoid(), update @ weight
    return [
        d_gated * opening, d_gated * o * opening * (1 - opening), update, o * opening,
        update.bfloat16().double().flatten(0, -2).sum(0),
    ]  # fmt: skip


def draw_both(seed: int, label: str, device: str) -> tuple:
    i, j = OUTPUTS[label]
    normal, _ = generator(seed, device)
    c = 128
    x, z, projected, d_out = normal(1, c, i, j), normal(1, i, j, c), normal(1, i, j, 2 * c), normal(1, i, j, c)
    norms = [normal(c, scale=0.3) + n % 2 for n in (1, 0, 1, 0)]
    weights = [normal(c, c, scale=c**-0.5) for _ in range(2)]
    return x.permute(0, 2, 3, 1), z, norms, weights, projected, d_out


def call_both(inputs: tuple, arguments: dict | None) -> list[Tensor]:
    x, z, norms, weights, projected, d_out = inputs
    d_x, d_z = projected.chunk(2, -1)
    if arguments is None:
        first = input_gradient(x, *norms[:2], None, [weights[0]], [d_x], [True], None)
        second = input_gradient(z, *norms[2:], None, [weights[1]], [d_z], [True], d_out)
    elif "gluon" in arguments:
        first, second = inp_hopper.hopper_both(x, z, norms[:2], norms[2:], *weights, projected, d_out)
    else:
        first, second = inp_forms.both_gradients(x, z, norms[:2], norms[2:], *weights, d_x, d_z, d_out, **arguments)
    return [first[0], first[1], second[0], second[1], first[2], second[2]]


def exact_both(inputs: tuple) -> list[Tensor]:
    x, z, norms, weights, projected, d_out = inputs
    results, sums = [], []
    for value, own, weight, d in zip((x, z), (norms[:2], norms[2:]), weights, projected.chunk(2, -1), strict=True):
        value, d = value.float().requires_grad_(), d.float()
        own = [p.float().requires_grad_() for p in own]
        normed = torch.nn.functional.layer_norm(value, (128,), *own)
        dx, *d_norm = torch.autograd.grad(normed, [value, *own], d @ weight.float())
        results += [dx.detach(), normed.detach()]
        sums.append(torch.cat([*d_norm, d.flatten(0, -2).sum(0)]).double())
    results[2] = results[2] + d_out.float()
    return [*results, *sums]


KINDS = {"gated": (draw_gated, call_gated, exact_gated, 1), "both": (draw_both, call_both, exact_both, 2)}


def compile_one(job: tuple[str, str]) -> str:
    key, label = job
    kind, arguments, _ = all_forms()[key]
    draw, call, _, _ = KINDS[kind]
    try:
        with tuning.assume_capability(90), recorded_launches() as launches:
            call(draw(0, label, "meta"), arguments)
        for launch in launches:
            compile_launch(launch, 90)
    except Exception as problem:
        return f"{label}: {type(problem).__name__}: {str(problem).strip()[-100:]}".replace("\n", " ")
    return ""


@functools.cache
def inputs_of(kind: str, seed: int, label: str) -> tuple:
    return KINDS[kind][0](seed, label, "cuda")


def error(found: Tensor, right: Tensor) -> float:
    if right.dtype == torch.float64:  # sums over all tiles
        found = found.double().sum(0)
    return float((found.double() - right.double()).norm() / right.double().norm())


def measure(kind: str, arguments: dict | None, label: str) -> dict:
    _, call, exact, sums = KINDS[kind]
    sets = [inputs_of(kind, seed, label) for seed in range(4)]
    mine, theirs, right = call(sets[0], arguments), call(sets[0], None), exact(sets[0])
    own = {
        "differ": [int((a.view(torch.int16) != b.view(torch.int16)).sum()) for a, b in zip(mine[:-sums], theirs[:-sums])],
        "errors": [[error(a, r), error(b, r)] for a, b, r in zip(mine, theirs, right, strict=True)],
    }
    del mine, theirs, right
    own["repeats"] = len(repeat(lambda: call(sets[0], arguments), 20, lambda turn: None))

    def four() -> None:
        for inputs in sets:
            call(inputs, arguments)

    own["one"] = round(graph_microseconds(lambda: call(sets[0], arguments), 15, 2), 2)
    own["four"] = round(graph_microseconds(four, 8, 1) / 4, 2)
    return own


def serve(pipe) -> None:
    """Form after form, shape after shape, on a stream of its own."""
    with torch.cuda.stream(torch.cuda.Stream()):
        while job := pipe.recv():
            try:
                found = measure(*job)
                torch.cuda.synchronize()
            except Exception as problem:
                traceback.print_exc()
                found = {"failed": f"{type(problem).__name__}: {str(problem).strip()[:120]}".replace("\n", " ")}
            pipe.send(found)


class Runner:
    """A process that serves; started again when it is lost."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.process = None
        self.start()

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, job: tuple, seconds: float) -> dict:
        if self.process is None:
            self.start()
        try:
            self.pipe.send(job)
            found = self.pipe.recv() if self.pipe.poll(seconds) else {"failed": f"no end within {seconds:.0f} s"}
        except (EOFError, OSError) as problem:
            found = {"failed": f"the process ended: {problem!r}"}
        if "failed" in found:  # the context may be broken
            self.process.kill()
            self.process.join(10)
            self.process = None
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--only", nargs="+", default=[], help="forms whose name contains one of these")
    parser.add_argument("--budget-s", type=float, default=95)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--compile", action="store_true", help="no more than that")
    arguments = parser.parse_args()
    begin = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    forms = {k: v for k, v in all_forms().items() if not arguments.only or any(p in k for p in arguments.only)}
    jobs = [(key, label) for key, (_, _, labels) in forms.items() for label in labels if "again" not in key]
    runner = None if arguments.compile else Runner()  # imports while the pool compiles
    faults: dict[tuple[str, str], str] = {}
    with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
        for job, fault in zip(jobs, pool.map(compile_one, jobs, chunksize=1), strict=True):
            if fault:
                faults[job] = fault
    print(f"compiled after {time.monotonic() - begin:.0f} s; faults: {faults}", flush=True)
    if runner is None:
        return int(bool(faults))
    with (arguments.out / "inp_trial.jsonl").open("a") as kept:
        for key, (kind, form, labels) in forms.items():
            broken = 0
            for label in labels:
                left = begin + arguments.budget_s - time.monotonic()
                if left < 1 or broken == 2:
                    found = {"failed": "not reached"}
                elif (key, label) in faults:
                    found = {"failed": f"compiling: {faults[key, label]}"}
                else:
                    found = runner.ask((kind, form, label), min(LIMIT_S if not broken else 15, left))
                    broken += "failed" in found
                line = {"key": key, "shape": label, "seconds": round(time.monotonic() - begin, 1)} | found
                kept.write(json.dumps(line) + "\n")
                kept.flush()
                if "failed" in found:
                    print(f"{key:46} {label:13} FAILED {found['failed']}", flush=True)
                else:
                    errors = " ".join(f"{a:.1e}/{b:.1e}" for a, b in found["errors"])
                    print(
                        f"{key:46} {label:13} {found['one']:6.1f} /{found['four']:6.1f}  differ {found['differ']} "
                        f"repeats {found['repeats']} errors {errors}", flush=True,
                    )  # fmt: skip
    if runner.process is not None:
        runner.process.kill()
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
