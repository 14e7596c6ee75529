"""Pages with tables that a program writes: between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

import re
from collections.abc import Callable, Mapping, Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every marked table written anew. KeyError for a mark that no function fills."""

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?\n?(<!-- end -->)", replaced, page, flags=re.DOTALL)


def spread(low: float | None, high: float | None, digits: int = 0) -> str:
    """``140 to 232``; one number where both are the same, a dash where there is none."""
    if low is None or high is None:
        return "–"
    one, other = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return one if one == other else f"{one} to {other}"
