"""Are the bits of a result the same every time? Nothing else finds races, whose errors drown in bf16 tolerances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POISON_BYTES = 2 * 2**30  # more than one operation allocates
FILLS = (float("nan"), None, -3.0)  # what fresh memory holds, in turns; None: what earlier results left
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """One result in one repeat: how many elements differ from the first time, and by how much at most."""

    result: int
    shape: tuple[int, ...]
    elements: int
    largest: float

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"result {self.result} ({shape}): {self.elements} elements, by up to {self.largest:.3g}"


def bits(x: Tensor) -> Tensor:
    """x as integers of its size, so that NaN equals itself and -0 is not 0."""
    return x.view(INTEGERS[x.element_size()])


def differences(first: Sequence[Tensor], again: Sequence[Tensor]) -> list[Difference]:
    """Results whose bits differ; raises ValueError if there are not equally many."""
    found = []
    for n, (a, b) in enumerate(zip(first, again, strict=True)):
        if not torch.equal(bits(a), bits(b)):
            elements = int((bits(a) != bits(b)).sum())
            found.append(Difference(n, tuple(a.shape), elements, float((a.double() - b.double()).abs().max())))
    return found


def poison(turn: int) -> None:
    """Fill the memory that the next results will lie in, so that what nobody wrote shows."""
    fill = FILLS[turn % len(FILLS)]
    if fill is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # else results come back to the blocks of earlier ones
        torch.full((POISON_BYTES // 4,), fill, device="cuda")


def repeat(
    call: Callable[[], Sequence[Tensor]], repeats: int, between: Callable[[int], None] = poison
) -> list[list[Difference]]:
    """Call once, then ``repeats`` times more: the differences from the first time of each repeat that has some."""
    first = [result.clone() for result in call()]
    found = []
    for turn in range(repeats):
        between(turn)
        if different := differences(first, call()):
            found.append(different)
    return found
