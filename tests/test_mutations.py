"""The planted defects of ``make mutations`` still fit the source they are planted in."""

from pathlib import Path

import pytest

from parity.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.file)
def test_the_text_to_change_occurs_exactly_once(repository: Path, mutation: Mutation) -> None:
    text = (repository / "src" / "scalefold" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new


def test_there_are_thirty_and_more_defects_in_different_places() -> None:
    places = {(mutation.file, mutation.old) for mutation in MUTATIONS}
    assert len(places) == len(MUTATIONS) >= 30
    folders = {mutation.file.split("/")[0] for mutation in MUTATIONS}
    assert folders >= {"model", "kernels", "data", "eval", "mlperf", "report", "run", "step"}
