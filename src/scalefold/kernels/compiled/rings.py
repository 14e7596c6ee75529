"""Find buffers in shared memory that an unfinished tensor-core product still reads while the program refills them.

A compiler fault (triton-lang/triton#6691): a load whose tile feeds an asynchronous product and another operation gets
a ring with one slot too few, so that a copy that runs ahead lands in the slot that the product of the iteration before
reads. The result is wrong now and then, by amounts that tolerances of bf16 hide. It shows in the compiled program, so
no GPU is needed: ``ring_faults`` walks the text of a kernel in Triton's GPU dialect, loops iteration by iteration, with
the few integers that choose slots, and keeps the products that no wait has ended.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ROUNDS = 12  # of a loop, at most: twice the most slots of a ring; a fault shows again in every later turn
NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
LOCATION = re.compile(r'\s*loc\((?:[^()"]|"[^"]*"|\((?:[^()]|\([^()]*\))*\))*\)')
WRITES = ("ttg.async_copy_global_to_local", "ttg.local_store", "ttng.async_tma_copy_global_to_local")
SPECIALIZED = "ttg.warp_specialize"
PLAIN_REGIONS = ("module", "tt.func")  # run as they stand
PURE_REGIONS = ('"tt.reduce"', '"tt.scan"', "tt.map_elementwise")  # elementwise arithmetic: no buffer in them
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.divsi": lambda a, b: int(a / b),
    "arith.remsi": lambda a, b: a - b * int(a / b),
    "arith.minsi": min,
    "arith.maxsi": max,
}
COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
COMPARISONS["ge"] = operator.ge


class Slot(NamedTuple):
    """One slot of a ring; ``index`` None: which one is unknown."""

    ring: str
    index: int | None

    def meets(self, other: "Slot") -> bool:
        """Whether both may be the same memory."""
        return self.ring == other.ring and (None in (self.index, other.index) or self.index == other.index)


Value = int | Slot | None  # None: nothing that decides about slots


@dataclass
class Operation:
    """One line of the program: results, kind, operands before the types, and nested regions."""

    result: str
    kind: str
    text: str
    operands: list[str]
    regions: list[list["Operation"]] = field(default_factory=list)


def ring_faults(ttgir: str) -> list[str]:
    """Refills of slots that an unfinished product may read, one line each; empty for a sound kernel.

    Empty for a Gluon program of several groups of warps too: the compiler makes no rings there, and what orders its
    slots, barriers in shared memory, is not followed.
    """
    if SPECIALIZED in ttgir:
        return []
    walk = _Walk()
    walk.run(parse(ttgir))
    return sorted(walk.faults)


def unguarded_refills(ptx: str, num_warps: int) -> list[str]:
    """Copies after a wait for products without a barrier between, in the text of a PTX program; one line each.

    A wait ends the products of its own four warps, and other warps' products may still read the same slot.
    """
    waited, found = 0, []
    for number, line in enumerate(ptx.splitlines() if num_warps > 4 else [], 1):
        if "wgmma.wait_group" in line:
            waited = number
        elif re.search(r"\bbar(rier)?\.(cta\.)?sync", line):
            waited = 0
        elif waited and re.search(r"\bcp\.async\.(c[ag]|bulk\.tensor)", line):
            found.append(f"copy in line {number} after the wait in line {waited}, no barrier between")
            waited = 0
    return found


def parse(ttgir: str) -> list[Operation]:
    """The nested operations of a module."""
    open_blocks: list[list[Operation]] = [[]]
    for line in ttgir.splitlines():
        text = LOCATION.sub("", line).strip()
        if not text or text.startswith(("#", "//", "^")):
            continue
        if text.startswith("}"):
            open_blocks.pop()
            if text.endswith("{"):
                open_blocks.append(_open_region(open_blocks[-1][-1]))
            continue
        open_blocks[-1].append(_operation(text))
        if text.endswith("{"):
            open_blocks.append(_open_region(open_blocks[-1][-1]))
    return open_blocks[0]


def _open_region(owner: Operation) -> list[Operation]:
    owner.regions.append([])
    return owner.regions[-1]


def _operation(text: str) -> Operation:
    result, rest = "", text
    if found := re.match(r"(%[\w.$-]+)(?::\d+)? = (.*)", text):
        result, rest = found.groups()
    kind = re.split(r"[\s(]", rest, maxsplit=1)[0]
    return Operation(result, kind, rest, NAME.findall(re.split(r"\s:\s|\s->\s", rest)[0]))


class _Walk:
    """State of one run through a program: integers and slots by name, and the products in flight, oldest first."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.flying: list[list[Slot]] = []
        self.rings: dict[str, str] = {}
        self.faults: set[str] = set()

    def run(self, operations: Sequence[Operation]) -> list[Value]:
        """Values of the final yield, empty without one."""
        yielded: list[Value] = []
        for operation in operations:
            if operation.kind == "scf.yield":
                yielded = self.read(operation.operands)
            elif operation.regions:
                self.define(operation.result, self.region(operation))
            else:
                self.define(operation.result, self.step(operation))
        return yielded

    def read(self, names: Sequence[str]) -> list[Value]:
        """What is known of named values."""
        return [self.values.get(name) for name in names]

    def define(self, name: str, values: list[Value]) -> None:
        """Results of an operation: ``%name`` is the first, ``%name#i`` each of several."""
        self.values[name] = values[0] if values else None
        self.values.update({f"{name}#{i}": value for i, value in enumerate(values)})

    def region(self, operation: Operation) -> list[Value]:
        """Run an operation that has regions."""
        if operation.kind == "scf.for":
            return self.loop(operation)
        if operation.kind == "scf.if":
            return self.branch(operation)
        if operation.kind in PLAIN_REGIONS:
            return self.run(operation.regions[0])
        if operation.kind not in PURE_REGIONS:
            raise ValueError(f"rings of a program with {operation.kind} cannot be judged")
        return []

    def loop(self, operation: Operation) -> list[Value]:
        """Turns of a loop; ROUNDS of them where there are more or nobody knows how many."""
        counter, *bounds = operation.operands[:4]
        arguments, initial = operation.operands[4::2], operation.operands[5::2]
        first, end, step = self.read(bounds)
        count = ROUNDS
        if isinstance(first, int) and isinstance(end, int) and isinstance(step, int):
            count = min(ROUNDS, len(range(first, end, step)))
        carried = self.read(initial)
        for turn in range(count):
            self.values[counter] = first + turn * step if isinstance(first, int) and isinstance(step, int) else None
            self.values.update(zip(arguments, carried, strict=True))
            carried = self.run(operation.regions[0])
        return carried

    def branch(self, operation: Operation) -> list[Value]:
        """The region that is taken; where that is unknown each, from the same state, keeping the most in flight."""
        (condition,) = self.read(operation.operands[:1])
        regions = operation.regions if len(operation.regions) > 1 else [*operation.regions, []]
        if isinstance(condition, int):
            return self.run(regions[0 if condition else 1])
        before, after, results = self.flying, [], []
        for region in regions:
            self.flying = list(before)
            results.append(self.run(region))
            after.append(self.flying)
        self.flying = max(after, key=len)
        return [a if a == b else None for a, b in zip(*results, strict=False)]

    def step(self, operation: Operation) -> list[Value]:
        """Any other operation."""
        kind, values = operation.kind, self.read(operation.operands)
        if kind == "ttg.local_alloc":
            return [self.allocate(operation)]
        if kind == "ttg.memdesc_index":
            base, index = values[:2]
            return [base._replace(index=index if isinstance(index, int) else None) if isinstance(base, Slot) else None]
        if kind.startswith("ttg.memdesc_"):
            return values[:1]
        if kind in WRITES or kind == "ttg.local_dealloc":
            self.write(next((v for v in values if isinstance(v, Slot)), None), kind)
        elif kind == "ttng.warp_group_dot":
            slots = [value for value in values[:2] if isinstance(value, Slot)]
            self.flying = [*self.flying, slots] if "isAsync = true" in operation.text else []
        elif kind == "ttng.warp_group_dot_wait":
            pending = int(re.search(r"pendings = (\d+)", operation.text)[1])  # type: ignore[index]
            self.flying = self.flying[max(0, len(self.flying) - pending) :]
            return values
        return [scalar(operation, values)]

    def allocate(self, operation: Operation) -> Slot:
        """A ring: one per line of the program, whatever loop that is in. One with a value is written at once."""
        shape = re.search(r"memdesc<([0-9x]+)x", operation.text)
        self.rings[operation.result] = shape[1] if shape else "?"
        slot = Slot(operation.result, None)
        if operation.operands:
            self.write(slot, operation.kind)
        return slot

    def write(self, slot: Slot | None, kind: str) -> None:
        """Note a fault for each product in flight that may read what is overwritten."""
        if slot is None:
            return
        for product in self.flying:
            if any(slot.meets(other) for other in product):
                where = f"slot {slot.index} of {slot.ring} ({self.rings.get(slot.ring, '?')})"
                self.faults.add(f"{kind} to {where} while a product reads it")


def scalar(operation: Operation, values: list[Value]) -> Value:
    """The integer that an operation yields, or None."""
    kind, text = operation.kind, operation.text
    if kind == "arith.constant":
        found = re.match(r"arith\.constant (?:(true)|(false)|(-?\d+) :)", text)
        return None if not found else 1 if found[1] else 0 if found[2] else int(found[3])
    if kind == "arith.select" and len(values) == 3:
        return values[2 - values[0]] if isinstance(values[0], int) else None
    if not values or not all(isinstance(value, int) for value in values):
        return None
    numbers = [value for value in values if isinstance(value, int)]
    if kind in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
        return numbers[0]
    if kind == "arith.cmpi":
        return int(COMPARISONS[text.split()[1].rstrip(",")[-2:]](*numbers))
    return ARITHMETIC[kind](*numbers) if kind in ARITHMETIC else None
