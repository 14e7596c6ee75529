"""Why an input is left out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """One thing that was left out (``kind`` entry, chain, alignment or target) or is unusual (``note``), and why."""

    kind: str
    name: str
    file: str
    reason: str
