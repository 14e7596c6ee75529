"""Pages with tables that a program writes: between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def card(row: Mapping[str, str]) -> str:
    """``H100`` of ``NVIDIA H100 80GB HBM3``."""
    return row.get("device", row.get("card", "")).removeprefix("NVIDIA ").split(" ")[0]


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every marked table written anew. KeyError for a mark that no function fills."""

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?\n?(<!-- end -->)", replaced, page, flags=re.DOTALL)


def print_or_write(description: str | None, tables: Mapping[str, Callable[[], str]]) -> None:
    """The command line of a program that fills pages: print its tables, or write the pages that show them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE", help="pages to bring up to date")
    arguments = parser.parse_args()
    for page in arguments.write or []:
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print(page)
    if not arguments.write:
        print("\n\n".join(table() for table in tables.values()))


def spread(low: float | None, high: float | None, digits: int = 0) -> str:
    """``140 to 232``; one number where both are the same, a dash where there is none."""
    if low is None or high is None:
        return "–"
    one, other = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return one if one == other else f"{one} to {other}"
