"""Forms of the triangle's batched products against the library: exactness, bits of repeats, times.

    python benchmarks/measure/product_trial.py --out FOLDER [--only whole pair ...] [--seconds 100]

Every form is a process; all compile at once, then one after the other has the GPU, 40 s at most each. Times in
microseconds: ``us``, a replayed call, ``after``, what it adds to a graph behind a producer of its operands; both also
of the library, in the same process. The producer is the projection (forward, 128 channels), copies of both operands
(forward, else) or a copy of the product's gradient behind 64 MB that push the operands out (gradients).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FORMS = {  # values of n, tiles of m, slots, buffers; kinds; channels
    "whole": ((256, 4, 4, 2), ("forward", "apart"), (128, 256)),
    "pair": ((256, 4, 4, 2), ("pair",), (128, 256)),
    "half": ((256, 2, 4, 0), ("forward", "apart"), (64, 128)),
    "halfpair": ((256, 2, 4, 2), ("pair",), (64, 128)),
    "quarter": ((128, 2, 4, 0), ("forward", "apart"), (32, 16, 64)),
    "tall": ((128, 4, 4, 2), ("forward", "apart"), (64, 128)),
    "quarterpair": ((256, 1, 4, 0), ("pair",), (32, 16, 64)),
    "eighth": ((64, 2, 4, 0), ("forward", "apart"), (16, 32)),
}
N = 256


def jobs_of(form):
    _, kinds, channels = FORMS[form]
    return [(c, kind, outgoing) for c in channels for kind in kinds for outgoing in (True, False)]


def call_of(form, kind, outgoing, a, b, d):
    """The form's call: () -> results."""
    from scalefold.kernels.hopper import triangle_product as products

    cut = products.Form(*FORMS[form][0])
    if kind == "forward":
        return lambda: [products.product(a, b, outgoing, cut)]
    gradients = products.gradients if kind == "pair" else products.gradients_apart
    return lambda: list(gradients(a, b, d, outgoing, cut))


def plain_of(kind, outgoing, a, b, d):
    """The library's."""
    if kind == "forward":
        return lambda: [a @ b.mT if outgoing else a.mT @ b]
    return lambda: [d @ b, d.mT @ a] if outgoing else [b @ d.mT, a @ d]


def producer_of(kind, a, b, d):
    """What writes the operands of a call, on the device."""
    import torch

    from scalefold.kernels.ops import triangle

    def draw(*shape, scale=1.0):
        return torch.randn(shape, device="cuda").mul_(scale).bfloat16()

    if kind != "forward":
        scratch, source = torch.empty(1 << 25, device="cuda", dtype=torch.bfloat16), d.clone()

        def produce():
            scratch.fill_(1.0)
            d.copy_(source)

        return produce
    if a.shape[1] != 128:
        sources = a.clone(), b.clone()

        def copy():
            a.copy_(sources[0])
            b.copy_(sources[1])

        return copy
    z, mask = draw(1, N, N, 128), torch.ones(1, N, N, device="cuda", dtype=torch.bfloat16)
    linears = [t for _ in range(4) for t in (draw(128, 128, scale=0.09), draw(128))]
    norm = draw(128), draw(128)

    def project():
        _, own_a, own_b = triangle.triangle_project(z, mask, *norm, *linears)
        return own_a, own_b

    return project


def wait_for_turn():
    """Until the GPU is this process' own, for 40 s."""
    signal.alarm(0)
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody asks any more")
    signal.alarm(40)


def child(form):
    """Compile, wait for leave, measure: a JSON line per job."""
    import torch
    from triton.runtime.jit import JITFunction

    from common import graph_microseconds
    from scalefold.tune.sound.bits import repeat

    signal.alarm(75)
    torch.set_grad_enabled(False)
    torch.cuda.init()
    random = torch.Generator("cuda").manual_seed(1)

    def operands(c):
        shape = (4, c // 4, N, N) if c == 256 else (1, c, N, N)
        return [torch.randn(shape, generator=random, device="cuda").bfloat16() for _ in range(3)]

    original = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **k: original(self, *a, grid=grid, warmup=True, **k)
    failed = {}
    for n, (c, kind, outgoing) in enumerate(jobs_of(form)):
        try:
            given = operands(c)
            call_of(form, kind, outgoing, *given)()
            producer_of(kind, *given)()
        except Exception as problem:
            failed[n] = str(problem).strip()[-300:]
    JITFunction.run = original
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    wait_for_turn()
    with torch.cuda.stream(torch.cuda.Stream()):
        for n, (c, kind, outgoing) in enumerate(jobs_of(form)):
            row = {"form": form, "c": c, "kind": kind, "side": "outgoing" if outgoing else "incoming"}
            if n in failed:
                print(json.dumps(row | {"status": "does not compile: " + failed[n]}), flush=True)
                continue
            a, b, d = operands(c)
            call, plain = call_of(form, kind, outgoing, a, b, d), plain_of(kind, outgoing, a, b, d)
            outs, theirs = call(), plain()
            torch.cuda.synchronize()
            exact = plain_of(kind, outgoing, a.float(), b.float(), d.float())()
            for name, found in (("error", outs), ("lib_error", theirs)):
                pairs = zip(found, exact, strict=True)
                row[name] = f"{max(float((own.float() - true).norm() / true.norm()) for own, true in pairs):.3e}"
            row["same"] = all(map(torch.equal, outs, theirs))
            del exact, outs, theirs
            row["differ"] = len(repeat(call, 20))
            torch.cuda.empty_cache()
            for name, one in (("lib_us", plain), ("us", call)):
                row[name] = round(graph_microseconds(one, 40, 3), 1)
            produce = producer_of(kind, a, b, d)
            alone = graph_microseconds(produce, 40, 3)
            for name, of in (("lib_after", lambda *given: plain_of(kind, outgoing, *given)),
                             ("after", lambda *given: call_of(form, kind, outgoing, *given))):  # fmt: skip

                def both(of=of, produce=produce, a=a, b=b, d=d):
                    made = produce()
                    return of(*(made or (a, b)), d)()

                row[name] = round(graph_microseconds(both, 40, 3) - alone, 1)
            print(json.dumps(row), flush=True)


class Reader(threading.Thread):
    """Lines of a process, as they come."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process, self.ready, self.rows = process, False, []
        self.start()

    def run(self):
        for line in self.process.stdout:
            text = line.decode().strip()
            self.ready |= text == "ready"
            if text.startswith("{"):
                self.rows.append(json.loads(text))


def table(rows, out):
    """All rows, by shape."""
    names = ("c", "kind", "side", "form", "us", "lib_us", "after", "lib_after", "error", "lib_error", "same", "differ")
    rows = sorted(rows, key=lambda r: (-r.get("c", 0), r.get("kind", "") != "forward", r.get("side", "")))
    lines = ["".join(f"{name:>10}" for name in names)]
    lines += ["".join(f"{r.get(name, '')!s:>10}" for name in names) + "  " + r.get("status", "") for r in rows]
    print("\n".join(lines))
    (out / "product_trial.txt").write_text("\n".join(lines) + "\n")
    (out / "product_trial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ending(form, process, state, out):
    """A row about a process that did not end well."""
    last = (out / f"product_{form}.err").read_text().strip().splitlines()[-1:]
    return {"form": form, "status": f"{state}, status {process.returncode} {last}"[:300]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--only", nargs="+", default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    running, rows = {}, []
    for form in (f for f in FORMS if f in arguments.only):
        log = (arguments.out / f"product_{form}.err").open("w")
        command = [sys.executable, __file__, "--child", form]
        running[form] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    readers = {form: Reader(process) for form, process in running.items()}
    waiting = dict(running)
    while waiting and time.monotonic() < deadline:
        for form in [f for f, p in waiting.items() if p.poll() is not None]:
            rows.append(ending(form, waiting.pop(form), "died early", arguments.out))
        form = next((f for f in waiting if readers[f].ready), None)
        if form is None:
            time.sleep(0.05)
            continue
        process, start = waiting.pop(form), time.monotonic()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        state = "ended"
        try:
            process.wait(timeout=max(0.1, min(42.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            state = "cut off"
        readers[form].join(2)
        rows += readers[form].rows
        if process.returncode:
            rows.append(ending(form, process, state, arguments.out))
        print(f"{form}: {time.monotonic() - start:.1f} s", flush=True)
    for form, process in waiting.items():
        process.kill()
        rows.append(ending(form, process, "not reached, ready" if readers[form].ready else "not ready", arguments.out))
    table(rows, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
