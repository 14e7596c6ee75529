"""Machine code of every kernel, made without a GPU, as a table that two commits can be compared by.

    python benchmarks/measure/machine_code.py --out before.csv                 # shapes of DAP 1, 2, 4, 8, for 9.0
    python benchmarks/measure/machine_code.py --dap 8 --only attention --out after.csv
    python benchmarks/measure/machine_code.py --compare before.csv after.csv

One row per different kernel: registers, stack and shared memory, how many instructions of which kind, and a hash of the
instructions with their operands. Where a parameter lies (constant bank 0) and addresses of jumps are left out of the
hash: an argument that moved is no other code. Rows are written as they are made; a kernel that is in the table already
is not compiled again. ``--compare`` prints what differs; exit status 1 if a kernel has other
instructions, more registers, stack or shared memory, or is in one table only.
"""

import argparse
import collections
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import append_rows, print_table, read_rows
from compile_targets import Launch, compile_launch, different_launches, identity, shape_cases
from scalefold.kernels.compiled.machine_code import disassembled, resource_usage

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)
PLACES = re.compile(r"c\[0x0\]\[[^]]*\]|(?<=BRA )(?:!?U?P\d, )?0x[0-9a-f]+|(?<=BSSY B\d, )0x[0-9a-f]+")
KEY = ("case", "kernel", "turn")
SIZES = ("registers", "stack", "shared", "instructions", "global_reads", "global_writes")
GLOBAL_READS, GLOBAL_WRITES = ("LDG", "LDGSTS", "UTMALDG"), ("STG", "UTMASTG", "ATOMG", "RED")


def operation(instruction: str) -> str:
    """``LDG.E.128`` of ``@P0 LDG.E.128 R4, [R2.64]``."""
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def described(compiled: Any) -> dict[str, object]:
    """Columns of one compiled kernel; see the module."""
    text = disassembled(compiled.asm["cubin"])
    instructions = [match[1] for match in INSTRUCTION.finditer(text)]
    if not instructions:
        raise ValueError(f"no machine code in what cuobjdump prints of {compiled.metadata.name}")
    (registers, stack), counts = resource_usage(text), collections.Counter(map(operation, instructions))
    del counts["NOP"]  # they fill up the last block
    placeless = "\n".join(PLACES.sub("_", instruction) for instruction in instructions)

    def total(kinds: tuple[str, ...]) -> int:
        return sum(count for name, count in counts.items() if name.split(".")[0] in kinds)

    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": counts.total(),
        "global_reads": total(GLOBAL_READS),
        "global_writes": total(GLOBAL_WRITES),
        "hash": hashlib.sha256(placeless.encode()).hexdigest()[:16],
        "counts": " ".join(f"{name}:{count}" for name, count in sorted(counts.items())),
    }


def launches(daps: list[int], only: str, target: int) -> Iterator[tuple[dict[str, object], Launch]]:
    """Every different kernel of the cases with its key; several launches of one kernel in a case are numbered."""
    cases = [case for case in shape_cases(daps, []) if only in case[0]]
    for name, found in different_launches(cases, target, lambda launch: identity(launch, target)):
        turns: dict[str, int] = collections.Counter()
        for launch in found:
            kernel = f"{launch.kernel.fn.__module__.removeprefix('scalefold.kernels.')}.{launch.kernel.fn.__name__}"
            yield {"case": name, "kernel": kernel, "turn": turns[kernel]}, launch
            turns[kernel] += 1


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What names a kernel in a table."""
    return tuple(str(row[name]) for name in KEY)


def write(table: Path, daps: list[int], only: str, target: int) -> int:
    """Append the kernels that ``table`` lacks; the exit status."""
    known = {key_of(row) for row in read_rows(table)} if table.exists() else set()
    made = 0
    for key, launch in launches(daps, only, target):
        if key_of(key) not in known:
            append_rows(table, [{**key, **described(compile_launch(launch, target))}])
            made += 1
    print(f"{made} kernels compiled for {target / 10}, {len(known)} were in {table}")
    return int(not made and not known)


def compare(before: Path, after: Path) -> int:
    """Print kernels whose machine code differs; the exit status."""
    old, new = ({key_of(row): row for row in read_rows(file)} for file in (before, after))
    worse, rows = 0, []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        if a["hash"] == b["hash"] and all(a[size] == b[size] for size in SIZES):
            continue
        other = "order, operands" if a["counts"] == b["counts"] else changed_counts(a["counts"], b["counts"])
        sizes = {size: a[size] if a[size] == b[size] else f"{a[size]} -> {b[size]}" for size in SIZES}
        worse += a["counts"] != b["counts"] or any(int(b[size]) > int(a[size]) for size in SIZES)
        rows.append({**dict(zip(KEY, key, strict=True)), **sizes, "other": other})
    print_table(sorted(rows, key=lambda row: (row["kernel"], row["case"])))
    alone = sorted(old.keys() ^ new.keys())
    for key in alone:
        print(f"only in {before if key in old else after}: {' '.join(key)}")
    both = len(old.keys() & new.keys())
    print(f"{both} kernels in both tables, {both - len(rows)} with equal machine code, {worse} with other instructions")
    return int(bool(worse) or bool(alone) or not both)


def changed_counts(before: str, after: str) -> str:
    """``FFMA +2 LDG.E -1``: how the numbers of instructions changed."""
    a, b = ({n: int(c) for n, c in (part.rsplit(":", 1) for part in text.split())} for text in (before, after))
    changes = {name: b.get(name, 0) - a.get(name, 0) for name in sorted(a.keys() | b.keys())}
    return " ".join(f"{name} {change:+}" for name, change in changes.items() if change)


def main() -> int:
    """Write a table or compare two; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--out", type=Path, help="table to write or to complete")
    either.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--dap", type=int, nargs="+", default=[1, 2, 4, 8], help="training shares")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--target", type=int, default=90, choices=[80, 90])
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    return write(arguments.out, arguments.dap, arguments.only, arguments.target)


if __name__ == "__main__":
    sys.exit(main())
