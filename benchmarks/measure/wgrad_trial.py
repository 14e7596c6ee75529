"""Forms of the weight gradients' program against what runs today, sums to the final bf16 gradients included.

    python benchmarks/measure/wgrad_trial.py --out FOLDER [--only PART ...] [--budget-s 95]

One process takes form after form; one that fails or does not end within 60 s costs that process, and the next goes on
with the next form. us: device time in CUDA graphs; "one" is a graph of one call, "four" a graph of four calls on
tensors of their own, per call; "products" is the same without the sums. DRY (WGRAD_DRY=1): without a GPU, nothing is
computed, every program is compiled for 9.0 instead.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from common import graph_microseconds
from scalefold.kernels import tuning
from scalefold.kernels.hopper.gradients.weights import hopper_weight_gradients
from scalefold.kernels.hopper.rows import matrix
from scalefold.kernels.rows import sum_all
from scalefold.kernels.weight_gradient import Product, row_ranges, weight_partials
from scalefold.tune.sound.bits import repeat

DRY = os.environ.get("WGRAD_DRY") == "1"
LIMIT_S = 60
PROGRAMS = 132

# kind: products, n, c, which are transposed, narrow products of today's launch, rows
KINDS = {
    "transition": (2, 1024, 256, (1,), 0, 32768),
    "outer projections": (2, 32, 256, (), 0, 32768),
    "msa projections": (4, 256, 256, (), 0, 32768),
    "msa gated": (1, 256, 256, (), 0, 32768),
    "triangle output": (2, 128, 128, (), 0, 65536),
    "pair gated": (1, 128, 128, (), 0, 65536),
    "pair projections": (4, 128, 128, (), 1, 65536),
}


def form(lines: int, columns: int, rows: int, stages: int, behind: int, swapped: bool = False) -> dict:
    return {"lines": lines, "columns": columns, "rows": rows, "stages": stages, "behind": behind, "swapped": swapped}


FORMS = {
    "transition": [
        form(128, 256, 64, 4, 1), form(128, 256, 64, 4, 0), form(256, 128, 64, 4, 1), form(128, 256, 32, 9, 1),
        form(128, 256, 32, 8, 0), form(128, 256, 128, 2, 0), form(128, 128, 64, 6, 1),
    ],
    "outer projections": [
        form(256, 32, 64, 6, 1, True), form(256, 32, 128, 3, 0, True), form(128, 32, 64, 8, 1, True),
    ],
    "msa projections": [
        form(128, 256, 64, 4, 1), form(128, 256, 64, 4, 0), form(256, 128, 64, 4, 1), form(128, 128, 64, 6, 1),
        form(128, 128, 128, 3, 1),
    ],
    "msa gated": [form(128, 128, 64, 6, 1), form(128, 256, 64, 4, 1), form(128, 128, 128, 3, 0)],
    "triangle output": [form(128, 128, 64, 6, 1), form(128, 64, 64, 8, 1), form(128, 128, 128, 3, 0)],
    "pair gated": [form(128, 128, 64, 6, 1), form(128, 64, 64, 8, 1)],
    "pair projections": [form(128, 128, 64, 6, 1)],
}  # fmt: skip


def all_forms() -> dict[str, tuple[str, dict | None]]:
    """Kind and form (None: what runs today) by name; today's once more at the end of a kind."""
    found: dict[str, tuple[str, dict | None]] = {}
    for kind, forms in FORMS.items():
        found[f"{kind}: today"] = kind, None
        for own in forms:
            name = "{lines}x{columns}, {rows} rows x {stages}, {behind} behind".format(**own)
            found[f"{kind}: {name}"] = kind, own
        found[f"{kind}: today again"] = kind, None
    return found


def gluon_partials(products: list[Product], own: dict) -> list[Tensor]:
    """Partial gradients by the program."""
    left, right = [p.d.flatten(0, -2) for p in products], [p.a.flatten(0, -2) for p in products]
    if own["swapped"]:
        left, right = right, left
    (count, width), c, number = left[0].shape, right[0].shape[1], len(products)
    ds = [matrix(x, own["rows"], own["lines"]) for x in left]
    operands = [matrix(x, own["rows"], own["columns"]) for x in right]
    transposed = sum((p.transposed != own["swapped"]) << n for n, p in enumerate(products))
    tiles = number * (width // own["lines"]) * (c // own["columns"])
    per_range, ranges = row_ranges(count, own["rows"], tiles, PROGRAMS)
    partials = torch.empty(ranges, number * width * c, dtype=torch.float32, device=left[0].device)
    absent = 4 - number
    hopper_weight_gradients[(tiles, ranges)](
        *ds, *ds[:1] * absent, *operands, *operands[:1] * absent, partials, width, c, count, per_range,
        COUNT=number, TRANSPOSED=transposed, STAGES=own["stages"], BEHIND=own["behind"], num_warps=4,
    )  # fmt: skip
    return list(partials.split([width * c] * number, 1))


def draw(kind: str, seed: int, rows: int, device: str) -> list[Product]:
    """Products of a kind; today's narrow ones come last."""
    count, n, c, transposed, narrow, _ = KINDS[kind]
    random = None if device == "meta" else torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    shape = (1, rows // 256, 256)
    shared = normal(*shape, c)
    operands = [shared if kind not in ("transition", "triangle output") else normal(*shape, c) for _ in range(count)]
    products = [Product(normal(*shape, n), a, m in transposed) for m, a in enumerate(operands)]
    return products + [Product(normal(4, *shape).movedim(0, -1), shared) for _ in range(narrow)]


def partials_of(products: list[Product], own: dict | None) -> list[Tensor]:
    return weight_partials(products) if own is None else gluon_partials([p for p in products if p.width > 4], own)


def call(products: list[Product], own: dict | None) -> list[Tensor]:
    """Final gradients."""
    return sum_all(partials_of(products, own), torch.bfloat16)


def exact(product: Product) -> Tensor:
    d, a = product.d.flatten(0, -2).double(), product.a.flatten(0, -2).double()
    return (a.t() @ d if product.transposed else d.t() @ a).flatten()


def us(action, replays: int) -> float:
    return 1.0 if DRY else round(graph_microseconds(action, replays, 2), 2)


@functools.lru_cache(maxsize=10)
def inputs_of(kind: str, seed: int, rows: int) -> list[Product]:
    return draw(kind, seed, rows, "meta" if DRY else "cuda")


@functools.lru_cache(maxsize=2)
def exact_of(kind: str, rows: int) -> list[Tensor]:
    return [exact(product) for product in inputs_of(kind, 0, rows)]


def worst(found: list[Tensor], right: list[Tensor]) -> float:
    pairs = zip(found, right, strict=False)  # without the narrow one
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def measure(key: str) -> dict:
    """What is known of a form."""
    (kind, own), found = all_forms()[key], {}
    for share in (1, 2):
        rows = KINDS[kind][-1] // share
        sets = [inputs_of(kind, seed, rows) for seed in range(4)]
        mine = call(sets[0], own)
        if not DRY:
            found[f"{share} error"] = worst(mine, exact_of(kind, rows))
            found[f"{share} differ"] = len(repeat(lambda: call(sets[0], own), 20))
        found[f"{share} one"] = us(lambda: call(sets[0], own), 25)
        found[f"{share} four"] = round(us(lambda: [call(products, own) for products in sets], 15) / 4, 2)
        found[f"{share} products"] = round(us(lambda: [partials_of(products, own) for products in sets], 15) / 4, 2)
    return found


def compiled(key: str) -> str:
    """Without a GPU: what the assembler says of the programs of a form."""
    import re

    from compile_hopper import assembler_log
    from compile_targets import compile_launch, compiled_races, recorded_launches

    with tuning.assume_capability(90), recorded_launches() as launches:
        measure(key)
    words = []
    seen = set()
    for launch in launches:
        if launch.kernel.fn.__name__ in seen:
            continue
        seen.add(launch.kernel.fn.__name__)
        program = compile_launch(launch, 90)
        log = assembler_log(program.asm["ptx"])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
        words.append(
            f"{launch.kernel.fn.__name__} grid {launch.grid} shared {program.metadata.shared / 1024:.1f} spills {spilled}"
            f" {re.findall(r'C75..', log)} {compiled_races(program)}"
        )
    return "; ".join(words)


def serve(pipe) -> None:
    """Form after form, on a stream of its own."""
    with nullcontext() if DRY else torch.cuda.stream(torch.cuda.Stream()):
        while key := pipe.recv():
            try:
                found = measure(key)
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

    def ask(self, key: str, seconds: float) -> dict:
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(key)
            found = self.pipe.recv() if self.pipe.poll(seconds) else {"failed": f"no end within {seconds:.0f} s"}
        except (EOFError, OSError) as problem:
            found = {"failed": f"the process ended: {problem!r}"}
        if "failed" in found:  # the context may be broken
            self.end()
        return found

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.process = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--only", nargs="+", default=[], help="forms whose name contains one of these")
    parser.add_argument("--budget-s", type=float, default=95)
    arguments = parser.parse_args()
    begin = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    keys = [key for key in all_forms() if not arguments.only or any(part in key for part in arguments.only)]
    if DRY:
        for key in keys:
            print(key, "|", compiled(key), flush=True)
        return 0
    runner = Runner()
    print("us of a call alone / one of four / its products without sums; all rows, then half of them; relative errors")
    with (arguments.out / "wgrad_trial.jsonl").open("a") as kept:
        for key in keys:
            left = begin + arguments.budget_s - time.monotonic()
            found = runner.ask(key, min(LIMIT_S, left)) if left > 1 else {"failed": "not reached"}
            print_row(key, found)
            kept.write(json.dumps({"key": key, "seconds": round(time.monotonic() - begin, 1)} | found) + "\n")
            kept.flush()
    runner.end()
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


def print_row(key: str, found: dict) -> None:
    if "failed" in found:
        print(f"{key:52} FAILED {found['failed']}", flush=True)
        return
    cells = ""
    for share in (1, 2):
        one, four, products = (found[f"{share} {name}"] for name in ("one", "four", "products"))
        error, differ = (found[f"{share} {name}"] for name in ("error", "differ"))
        cells += f"{one:7.1f} /{four:7.1f} /{products:7.1f}  {error:.2e}, {differ} differ |"
    print(f"{key:52}{cells}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
