"""Find uniform registers that a kernel's machine code reads before anything has written them.

An assembler fault (ptxas of CUDA 12.8, which Triton brings for compute capability 9.0; that of 12.9 is right): where
the right operand of a product of warp groups stays in shared memory over a loop, and the left one comes in registers,
the sum of the operand's descriptor and a step moves in front of the instruction that makes the descriptor. The product
then reads anything: results are wrong, or the address is nobody's. Every path from the first instruction to a read is
followed; a write under a condition counts as a write.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import triton.knobs

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;", re.MULTILINE)
FUNCTION = re.compile(r"^\s*Function : ", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
REGISTER = re.compile(r"\bUR(\d+)\b")
ADDRESS = re.compile(r"\b0x[0-9a-f]+\b")
CONDITION = re.compile(r"!?U?P\d|\S*DIV\b")
PREDICATE = re.compile(r"U?P(\d|T)")
WRITERS = ("U", "R2UR", "S2UR", "LDCU", "VOTEU", "REDUX", "CREDUX", "SYNCS", "ELECT")


class Instruction(NamedTuple):
    """``@UP0 UIADD3.X UR5, UR4, ...``: address, under a condition or not, name without dots, all of it, operands."""

    address: int
    conditional: bool
    name: str
    text: str
    operands: tuple[str, ...]

    @property
    def targets(self) -> list[int]:
        """Addresses among the operands."""
        return [int(word, 16) for operand in self.operands for word in ADDRESS.findall(operand)]

    @property
    def written(self) -> int:
        """Place among the operands of what it writes, behind a predicate if it writes that too."""
        both = len(self.operands) > 1 and PREDICATE.fullmatch(self.operands[0]) and not self.name.endswith("SETP")
        return 1 if both else 0

    def writes(self) -> set[int]:
        """Numbers of uniform registers."""
        first = self.operands[self.written] if self.operands else ""
        if not self.name.startswith(WRITERS) or not (whole := REGISTER.fullmatch(first)):
            return set()
        count = 4 if ".128" in self.text else 2 if ".64" in self.text or ".WIDE" in self.text else 1
        return set(range(int(whole[1]), int(whole[1]) + count))

    def reads(self) -> set[int]:
        """Numbers of uniform registers, of pairs and fours those that are certain."""
        found: set[int] = set()
        for place, operand in enumerate(self.operands):
            if place == self.written and self.writes():
                continue
            for number in map(int, REGISTER.findall(operand)):
                if operand.startswith("gdesc[") and self.name.endswith("GMMA"):  # of the left operand, then the right
                    left_in_registers = place > 1 and re.fullmatch(r"R\d+(\.reuse)?", self.operands[place - 1])
                    found |= {number + 2, number + 3} | (set() if left_in_registers else {number, number + 1})
                else:
                    found |= {number, number + 1} if operand.startswith(("desc[", "gdesc[")) else {number}
        return found


def disassembled(cubin: bytes) -> str:
    """Instructions and resource usage of a compiled kernel, as Triton's ``cuobjdump`` prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resource_usage(text: str) -> tuple[int, int]:
    """Registers per thread and bytes per thread in local memory, where spilled registers go; text: of ``disassembled``.

    Raises:
        ValueError: it is not the text of a kernel.
    """
    found = USAGE.findall(text)
    if not found:
        raise ValueError("no resource usage in what the disassembler prints")
    return max(int(registers) for registers, _ in found), sum(int(stack) for _, stack in found)


def unwritten_reads(text: str) -> list[str]:
    """What reads a uniform register that nothing has written on some path, one line each; text: of ``disassembled``."""
    return [fault for function in FUNCTION.split(text) for fault in _of_function(list(_instructions(function)))]


def _instructions(text: str) -> Iterator[Instruction]:
    for address, condition, name, operands in INSTRUCTION.findall(text):
        own = tuple(operand.strip() for operand in operands.split(",")) if operands else ()
        yield Instruction(int(address, 16), bool(condition), name.split(".")[0], f"{name} {operands}", own)


def _of_function(code: list[Instruction]) -> list[str]:
    follows, writes = _followers(code), [instruction.writes() for instruction in code]
    written: list[set[int] | None] = [None] * len(code)  # on every path to it
    waiting = [0] if code else []
    if code:
        written[0] = set()
    while waiting:
        here = waiting.pop()
        known = (written[here] or set()) | writes[here]
        for place in follows[here]:
            before = written[place]
            now = known if before is None else before & known
            if now != before:
                written[place] = now
                waiting.append(place)
    return [
        f"{one.text} at {one.address:#x} reads UR{number}, which nothing has written"
        for one, known in zip(code, written, strict=True)
        if known is not None
        for number in sorted(one.reads() - known)
    ]


def _followers(code: list[Instruction]) -> list[list[int]]:
    """Which instructions may come after each."""
    places = {one.address: place for place, one in enumerate(code)}
    meeting: dict[str, list[int]] = {}  # by barrier register: where those that it waits for go on
    found = []
    for place, one in enumerate(code):
        after = [place + 1] if place + 1 < len(code) else []
        if one.name == "BSSY":
            meeting[one.operands[0]] = one.targets
        if one.name in ("EXIT", "RET", "BRX"):
            after = after if one.conditional else []
        elif one.name in ("BRA", "JMP"):
            stays = one.conditional or CONDITION.match(one.operands[0]) or not one.targets
            after = [places[target] for target in one.targets if target in places] + (after if stays else [])
        elif one.name == "CALL":
            after += [places[target] for target in one.targets if target in places]
        elif one.name == "BSYNC":
            ends = [places[target] for target in meeting.get(one.operands[0], []) if target in places]
            after = ends + (after if one.conditional or not ends else [])
        found.append(after)
    return found
