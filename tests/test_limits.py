"""What a test is charged with: its own computing and that of its processes, not the hours of a busy machine."""

import subprocess
import sys
import time

from conftest import computed_s

BUSY = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.3: pass"


def test_waiting_costs_nothing() -> None:
    before = computed_s()
    time.sleep(0.5)
    assert computed_s() - before < 0.2


def test_computing_counts_here_and_in_processes_that_have_ended() -> None:
    before = computed_s()
    exec(BUSY)
    own = computed_s()
    assert own - before >= 0.25
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert computed_s() - own >= 0.25
