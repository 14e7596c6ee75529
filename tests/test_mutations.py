"""The planted defects of ``make mutations`` still fit the source they are planted in."""

from pathlib import Path

import pytest

from parity.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.file)
def test_the_text_to_change_occurs_exactly_once(repository: Path, mutation: Mutation) -> None:
    text = (repository / "src" / "scalefold" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new


def test_there_are_ten_defects_in_different_places() -> None:
    assert len({(mutation.file, mutation.old) for mutation in MUTATIONS}) == 10
