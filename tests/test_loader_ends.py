"""Loader workers end with the process that trains, however it ends."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINER = """
import sys, time
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading.loader import TrainLoader

if __name__ == "__main__":
    loader = TrainLoader(sys.argv[1], FeatureSettings(), num_workers=2)
    loader.spawn()
    print("spawned", flush=True)
    time.sleep(600)
"""


def marked(mark: str) -> list[str]:
    """Processes with ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_workers_fork_server_and_tracker_end_with_a_trainer_that_was_killed(tmp_path):
    program, mark = tmp_path / "trainer.py", f"MARK_OF_TEST={tmp_path}"
    program.write_text(TRAINER)
    name, value = mark.split("=")
    command = [sys.executable, str(program), str(tmp_path / "absent")]
    with subprocess.Popen(command, env=os.environ | {name: value}, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "spawned\n"
        deadline = time.monotonic() + 120
        while len(marked(mark)) < 5 and time.monotonic() < deadline:  # trainer, tracker, fork server, two workers
            time.sleep(0.1)
        assert len(marked(mark)) >= 5
        trainer.kill()
    deadline = time.monotonic() + 120
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(mark) == []
