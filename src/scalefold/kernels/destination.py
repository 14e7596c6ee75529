"""Where an operand of an exchange belongs, for the program that makes it to write it there."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Destination:
    """Memory of all ranks that share a sample, set aside for one result of an exchange.

    Operations may be given one. Whoever writes the operand there says so and returns in its place a tensor of its
    shape whose values nobody may read; whoever cannot returns the operand.

    Args:
        place: of the result, in what each rank set aside.
        received: the result of this rank, whole once all ranks have met.
        parts: by rank, where in its result this rank's operand belongs: the part of that rank, or all of it.
        written: what has been launched writes all parts.
    """

    place: int
    received: Tensor
    parts: Sequence[Tensor]
    written: bool = False


OfOperands = tuple[Destination | None, Destination | None]  # of a and b of a triangle multiplication
