"""The table in ``docs/faults.md``: one row per fault, written by its test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HEADER = "| fault | `--inject` | seconds | what is said | exit statuses | last checkpoint | log ends with |"


@dataclass(frozen=True)
class Row:
    """One fault; ``statuses`` by rank."""

    name: str
    inject: str
    seconds: str
    says: str
    statuses: tuple[int, ...]
    checkpoint: str
    log: str

    def text(self) -> str:
        """The line of the table."""
        statuses = ", ".join(map(str, self.statuses))
        inject = f"`{self.inject}`" if self.inject else "from outside"
        says = self.says.replace("|", r"\|") or "nothing: the run goes on"
        return f"| {self.name} | {inject} | {self.seconds} | {says} | {statuses} | {self.checkpoint} | {self.log} |"

    def without_seconds(self) -> str:
        """What two runs have in common."""
        return replace(self, seconds="").text()

    @classmethod
    def read(cls, line: str) -> "Row":
        """A row from its line."""
        cells = [cell.strip() for cell in line.replace(r"\|", "\0").strip().strip("|").split("|")]
        name, inject, seconds, says, statuses, checkpoint, log = (cell.replace("\0", "|") for cell in cells)
        inject = "" if inject == "from outside" else inject.strip("`")
        says = "" if says == "nothing: the run goes on" else says
        return cls(name, inject, seconds, says, tuple(map(int, statuses.split(","))), checkpoint, log)


def read_rows(file: Path) -> dict[str, Row]:
    """All rows by name, in their order."""
    lines, first, end = _table(file)
    return {row.name: row for row in map(Row.read, lines[first:end])}


def replace_row(file: Path, row: Row, order: Sequence[str]) -> None:
    """Write a row in the place of the one with its name, or where ``order`` has it."""
    lines, first, end = _table(file)
    rows = {one.name: one for one in map(Row.read, lines[first:end])} | {row.name: row}
    texts = [rows[name].text() for name in order if name in rows]
    file.write_text("\n".join([*lines[:first], *texts, *lines[end:]]) + "\n", encoding="utf-8")


def _table(file: Path) -> tuple[list[str], int, int]:
    """All lines of a file, and where the rows begin and end."""
    lines = file.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEADER) + 2
    return lines, first, next((at for at in range(first, len(lines)) if not lines[at].startswith("| ")), len(lines))
