"""The equivalence table and the mutation list keep up with the code."""

from pathlib import Path

import pytest

from parity import table
from parity.mutations import MUTATIONS, Mutation


def test_the_document_has_the_place_of_the_generated_table(repository: Path) -> None:
    text = (repository / "docs" / "equivalence.md").read_text()
    assert text.index(table.BEGIN) < text.index(table.END)
    assert "**NO**" not in text


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        (table.Row("x", 1e-6, 1e-5), True),
        (table.Row("x", 1e-4, 1e-5), False),
        (table.Row("x", float("nan"), 1e-5), False),
        (table.Row("x", 0.0, 0.0, 1e-5, 1e-4), True),
        (table.Row("x", 0.0, 0.0, 1e-3, 1e-4), False),
        (table.Row("x", 0.0, 0.0, float("nan"), 1e-4), False),
    ],
)
def test_a_row_passes_only_within_both_bounds(row: table.Row, passes: bool) -> None:
    assert row.passes is passes
    assert ("**NO**" in str(row)) is not passes


def test_only_the_generated_part_of_a_document_changes(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write(document, "new")
    assert document.read_text() == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="must occur once"):
        table.write(document, "new")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.title)
def test_every_mutation_still_finds_its_place(mutation: Mutation, repository: Path) -> None:
    assert (repository / "src" / "scalefold" / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    file, _, test = mutation.test.partition("::")
    assert f"def {test.partition('[')[0]}(" in (repository / "tests" / file).read_text()
