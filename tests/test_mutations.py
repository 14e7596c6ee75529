"""The planted defects of ``make mutations`` cover the package; that they fit its source see test_parity_tools.py."""

from parity.mutations import MUTATIONS


def test_there_are_thirty_and_more_defects_in_different_places() -> None:
    places = {(mutation.file, mutation.old) for mutation in MUTATIONS}
    assert len(places) == len(MUTATIONS) >= 30
    folders = {mutation.file.split("/")[0] for mutation in MUTATIONS}
    assert folders >= {"model", "kernels", "data", "eval", "mlperf", "report", "run", "step"}
