"""Find memory that a program changes in place while one of its warps may still have to read it.

A tile that is smaller than a program has threads is held by several warps, each of which loads it, and one of them
stores it. Where a program changes such a tile in place, a warp that is late by more than the way to memory and back
reads what has been stored already, and adds to it again. The same holds for a tile that is stored in one order of
threads and loaded in another. Results are wrong now and then; neither the compiler nor sanitizers of shared memory see
it. A barrier between the two makes it sound: ``unordered_accesses`` reads a kernel in Triton's GPU dialect and names
those without.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scalefold.kernels.compiled.rings import NAME, SPECIALIZED, Operation, parse

ONE_WARP = '"ttg.num-warps" = 1 :'
BARRIERS = ("gpu.barrier", "ttg.barrier")
ARGUMENT = re.compile(r"(%[\w.$-]+): !tt\.ptr<")
ALIAS = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)
LOADS = ("tt.load", "ttg.async_copy_global_to_local")
CARRIED = re.compile(rf"({NAME.pattern}) = ({NAME.pattern})")
LOOPS = ("scf.for", "scf.while")
TURNS = 2  # of a loop: what its end leaves meets its beginning once


class Access(NamedTuple):
    """A load or store of an argument; ``layout``: which threads hold what; ``shared``: several warps hold the same."""

    layout: str
    shared: bool


@dataclass
class _Walk:
    """State of one run through a program: arguments that a value may point into, and accesses since a barrier."""

    layouts: Mapping[str, str]
    bases: dict[str, frozenset[str]] = field(default_factory=dict)
    loads: dict[str, set[Access]] = field(default_factory=dict)
    stores: dict[str, set[Access]] = field(default_factory=dict)
    faults: set[str] = field(default_factory=set)

    def run(self, operations: Sequence[Operation]) -> None:
        """Every branch from the state before it, and every loop TURNS times."""
        for operation in operations:
            points_to = operation.operands if "!tt.ptr<" in operation.text else []
            if operation.regions:
                self.carry(operation)
                for _ in range(TURNS if operation.kind in LOOPS else 1):
                    self.branch(operation.regions)
                last = [region[-1] for region in operation.regions if region]
                points_to = [name for end in last if end.kind == "scf.yield" for name in end.operands]
            elif operation.kind in BARRIERS:
                self.loads, self.stores = {}, {}
            elif operation.kind in LOADS:
                self.load(operation)
                points_to = []
            elif operation.kind == "tt.store":
                self.store(operation)
            self.bases[operation.result] = self.of(points_to)

    def branch(self, regions: Sequence[Sequence[Operation]]) -> None:
        """Each region by itself; afterwards what any of them left."""
        before, after = (self.loads, self.stores), ({}, {})
        for region in regions:
            self.loads, self.stores = ({base: set(found) for base, found in kind.items()} for kind in before)
            self.run(region)
            for kept, found in zip(after, (self.loads, self.stores), strict=True):
                for base, accesses in found.items():
                    kept.setdefault(base, set()).update(accesses)
        self.loads, self.stores = after

    def carry(self, operation: Operation) -> None:
        """What a loop carries points where its first value does."""
        for name, first in CARRIED.findall(operation.text):
            self.bases[name] = self.of([first])

    def of(self, names: Sequence[str]) -> frozenset[str]:
        """Arguments that any of the values points into; ``%name#i`` is one of the results ``%name``."""
        return frozenset().union(*(self.bases.get(name.partition("#")[0], frozenset()) for name in names))

    def load(self, operation: Operation) -> None:
        """What was stored in another order of threads, or is read by other warps, may not be there yet."""
        access = self.access(operation)
        for base in self.of(operation.operands[:1]):
            for other in self.stores.get(base, ()):
                if access.shared or access.layout != other.layout:
                    self.faults.add(f"{base} is stored and then read by other threads, no barrier between")
            self.loads.setdefault(base, set()).add(access)

    def store(self, operation: Operation) -> None:
        """Other warps that read the same may do so after it; one that alone read a value has it before."""
        access = self.access(operation)
        for base in self.of(operation.operands[:1]):
            if any(other.shared for other in self.loads.get(base, ())):
                self.faults.add(f"{base} is read by several warps and then stored, no barrier between")
            self.stores.setdefault(base, set()).add(access)

    def access(self, operation: Operation) -> Access:
        """Of a load or store, by the type of its pointers."""
        found = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<[^>]*>, (.*)>", operation.text)
        if not found:
            return Access("scalar", True)
        shape = [int(size) for size in found[1].rstrip("x").split("x")]
        layout = _first_layout(found[2])
        return Access(layout, self.held_by_several(layout, shape))

    def held_by_several(self, layout: str, shape: Sequence[int]) -> bool:
        """Whether more than one warp holds an element of a tensor; a layout that is not known may be so."""
        if sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout):
            dim, parent = int(sliced[1]), sliced[2]
            whole = [*shape[:dim], 1, *shape[dim:]]
            return self.held_by_several(parent, whole)
        text = self.layouts.get(layout, layout)
        if text.startswith("#ttg.blocked"):
            per_thread, lanes, warps = (
                _numbers(text, key) for key in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
            )
            return any(
                count > 1 and size < one * wide * count
                for size, one, wide, count in zip(shape, per_thread, lanes, warps, strict=True)
            )
        return True


def _numbers(text: str, key: str) -> list[int]:
    found = re.search(rf"{key} = \[([\d, ]*)\]", text)
    return [int(number) for number in found[1].split(",")] if found and found[1] else []


def _first_layout(text: str) -> str:
    """The layout at the beginning of what follows a tensor's element type."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if depth < 0:
            return text[:end]
    return text


def unordered_accesses(ttgir: str) -> list[str]:
    """Arguments that a kernel loads and stores by different threads without a barrier between, one line each.

    Threads are taken to keep to their own elements where both accesses have one layout that gives each element to one
    warp. Arguments are taken to be different memory. A program of groups of warps orders them in ways that are not
    followed: empty for it.
    """
    if not ttgir or SPECIALIZED in ttgir or ONE_WARP in ttgir:
        return []
    walk = _Walk(dict(ALIAS.findall(ttgir)))
    signature = next(line for line in ttgir.splitlines() if "tt.func public" in line)
    walk.bases = {name: frozenset((name,)) for name in ARGUMENT.findall(signature)}
    walk.run(parse(ttgir))
    return sorted(walk.faults)
