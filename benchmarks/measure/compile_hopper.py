"""Compile the Gluon programs of attention for compute capability 9.0 without a GPU, and judge the machine code.

    python benchmarks/measure/compile_hopper.py                          # every choice of launch parameters
    python benchmarks/measure/compile_hopper.py --only triangle_start --passes keys --first

One line per program: registers, spills, shared memory, and the instructions per score of the shortest loop with
products (one row of one consumer; forward counts the branch of masked keys, which rows without any do not take). Exit
status 1 if one needs more shared memory than there is, or if the assembler serializes its products: they then wait for
one another.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if "triton" not in sys.modules:  # with it, it is settled
    os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from common import print_table
from compile_targets import SHARED_LIMIT, compile_launch, recorded_launches
from hopper_cases import CASES, HOPPER, KERNELS, TWIN, Case, configurations, inputs_of, run, run_forward
from scalefold.kernels import tuning

SERIALIZED = ("C7512", "C7514")  # products wait for each other: too few registers, or accumulators cross a loop's edge
INJECTED = "C7517"  # one wait was added
THREADS = 128  # of a consumer
LINES = 64  # of scores of a consumer
LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
JUMP = re.compile(r"BRA[^`]*`\((\.L_\w+)\)")


def assembler_log(ptx: str) -> str:
    """What ptxas says about a program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", f"{path}.o"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def machine_code(cubin: bytes) -> str:
    """The program as nvdisasm writes it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def innermost_loops(code: str) -> list[list[str]]:
    """Instructions between the target of a jump backwards and the jump, of loops that hold no other."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
    jumps = [(labels.get(jump[1], n + 1), n) for n, text in enumerate(instructions) if (jump := JUMP.search(text))]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [instructions[first : last + 1] for first, last in inner]


def per_score(code: str, keys: int, lines: int = LINES) -> tuple[float, str]:
    """Instructions per score of the shortest loop with products, and the six most frequent of them."""
    loops = [loop for loop in innermost_loops(code) if any("HGMMA" in text for text in loop)]
    if not loops:
        return float("nan"), ""
    loop = min(loops, key=len)
    kinds = collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in loop)
    scores = lines * keys / THREADS
    return len(loop) / scores, " ".join(f"{kind}:{count / scores:.2f}" for kind, count in kinds.most_common(6))


def compiled_programs(
    chosen: Sequence[tuple[Case, str]], first: bool
) -> Iterator[tuple[Case, str, tuning.Config, Any]]:
    """Every program that the launch parameters of these passes of cases ask for."""
    for case, pass_ in chosen:
        with tuning.assume_capability(90):
            inputs, configs = inputs_of(case, "meta"), configurations(case, pass_)
            with recorded_launches():
                saved = run_forward(TWIN, inputs)
            for config in configs[:1] if first else configs:
                with tuning.override(KERNELS[pass_], config), recorded_launches() as launches:
                    run(pass_, HOPPER, inputs, saved)
                yield case, pass_, config, compile_launch(launches[0], 90)


def row_of(case: Case, pass_: str, config: tuning.Config, compiled: Any) -> dict[str, object]:
    """What one program uses."""
    log = assembler_log(compiled.asm["ptx"])
    keys = tuning.power_of_two(case.shape[2])
    each, kinds = per_score(machine_code(compiled.asm["cubin"]), keys)
    return {
        "case": case.name,
        "pass": pass_,
        "config": " ".join(f"{name}={value}" for name, value in config.items() if name != "HOPPER"),
        "shared_kib": round(compiled.metadata.shared / 1024, 1),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        "serialized": sum(log.count(code) for code in SERIALIZED),
        "waits_added": log.count(INJECTED),
        "instructions_per_score": round(each, 2),
        "most_frequent": kinds,
    }


def main() -> int:
    """Print a line per program; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of cases (default: all)")
    parser.add_argument("--passes", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--first", action="store_true", help="only the first choice of launch parameters")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    chosen = [(case, pass_) for case in cases for pass_ in case.passes if pass_ in arguments.passes]
    rows = []
    for program in compiled_programs(chosen, arguments.first):
        rows.append(row_of(*program))
        print(*rows[-1].values(), sep="  ", flush=True)
    print_table([{name: value for name, value in row.items() if name != "most_frequent"} for row in rows])
    too_large = [row for row in rows if 1024 * float(str(row["shared_kib"])) > SHARED_LIMIT[90]]
    return int(not rows or bool(too_large) or any(row["serialized"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
