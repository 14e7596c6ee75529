"""The end of a process: order, bound, and whose word counts."""

import logging
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from scalefold.autopsy import read_last_words
from scalefold.errors import RankLostError, TrainingError
from scalefold.parallel.ending import Ending, LastWords, forget_last_words
from scalefold.parallel.ranks import RankLayout, Ranks


def test_everything_is_let_go_of_in_reverse_order() -> None:
    order: list[str] = []
    with Ending() as ending:
        ending.add("groups", lambda: order.append("groups"))
        ending.add("graphs", lambda: order.append("graphs"))
        ending.add("workers", lambda: order.append("workers"))
    assert order == ["workers", "graphs", "groups"]


def test_after_an_error_the_device_is_left_alone_and_the_first_error_is_the_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    order: list[str] = []

    def breaks() -> None:
        raise RuntimeError("connection closed by peer")

    def lives(ending: Ending) -> None:
        with ending:
            ending.owner = "rank 1 of 4 on node02"
            ending.add("groups", lambda: order.append("groups"), after_errors=False)
            ending.add("files", lambda: order.append("files"))
            ending.add("workers", breaks)
            raise RankLostError("rank 3 is gone")

    ending = Ending()
    with caplog.at_level(logging.WARNING), pytest.raises(RankLostError, match="rank 3"):
        lives(ending)
    assert order == ["files"]
    assert ending.status == RankLostError.exit_status
    assert "rank 1 of 4 on node02: workers: RuntimeError: connection closed by peer" in caplog.text


def test_an_orderly_end_that_fails_is_an_error() -> None:
    with pytest.raises(OSError, match="disk full"), Ending() as ending:
        ending.add("files", lambda: (_ for _ in ()).throw(OSError("disk full")))


def test_an_end_that_stands_is_named_and_left_with_the_earned_status(capsys: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    gone = threading.Event()

    def leave(status: int) -> None:
        left.append(status)
        gone.set()

    with Ending(limit_s=0.05, leave=leave) as ending:
        ending.owner, ending.status = "rank 0 of 2 on node01", 4
        ending.add("process groups", gone.wait)
        ending.add("loader workers", lambda: None)
    assert left == [4]
    message = "error: rank 0 of 2 on node01: process groups did not end within 0 s; leaving with status 4\n"
    assert capsys.readouterr().err == message


def test_a_process_that_stands_at_its_end_is_gone_within_the_bound() -> None:
    program = """
        import time
        from scalefold.parallel.ending import Ending
        with Ending(limit_s=0.2) as ending:
            ending.status = 6
            ending.add("captured steps", lambda: time.sleep(60))
    """
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 6
    assert "captured steps did not end" in result.stderr
    assert time.monotonic() - start < 50


def test_last_words_are_kept_even_where_no_more_file_can_be_opened(tmp_path: Path) -> None:
    words = LastWords(tmp_path, Ranks(RankLayout(1), 0, 0, torch.device("cpu"), host="node01"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            (tmp_path / "other").open("w")
        words(TrainingError("not finite: loss"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    (entry,) = read_last_words(tmp_path)
    assert (entry["rank"], entry["host"], entry["error"], entry["lost"]) == (0, "node01", "not finite: loss", False)
    forget_last_words(tmp_path)
    assert read_last_words(tmp_path) == []


def test_of_many_ranks_that_lost_another_a_few_keep_what_all_say(tmp_path: Path) -> None:
    for rank in range(20):
        LastWords(tmp_path, Ranks(RankLayout(20), rank, 0, torch.device("cpu")))(RankLostError("rank 3 is gone"))
    LastWords(tmp_path, Ranks(RankLayout(20), 19, 0, torch.device("cpu")))(ValueError("a defect"))
    words = read_last_words(tmp_path)
    assert len(words) == 9
    assert words[0]["error"] == "ValueError: a defect"  # an error of its own comes first
