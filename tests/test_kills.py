"""Kills at random moments: a few here, ``SCALEFOLD_KILLS=20`` for as many as a release should stand."""

import os
from pathlib import Path

import pytest

from random_kills import kill_and_compare

KILLS = int(os.environ.get("SCALEFOLD_KILLS", "2"))


@pytest.mark.faults
@pytest.mark.timeout(1800 * (1 + KILLS))
@pytest.mark.own_work(600 * (1 + KILLS))
@pytest.mark.parametrize(
    "layout",
    [
        "single",
        pytest.param("dp2", marks=pytest.mark.distributed),
        pytest.param("dap2", marks=pytest.mark.distributed),
    ],
)
def test_a_run_that_is_killed_at_random_moments_equals_an_uninterrupted_one(
    tiny_store: Path, tmp_path: Path, layout: str
) -> None:
    assert kill_and_compare(tiny_store, tmp_path, layout, KILLS, seed=5) == []
