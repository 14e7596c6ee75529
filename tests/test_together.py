"""Scripts of several GPUs let go in order: captured graphs before the communicators that these hold, within a bound."""

import subprocess
import sys
from pathlib import Path

import pytest

from processes import free_port

PREAMBLE = """
import sys, time
import torch.distributed as dist
import multi_gpu
from scalefold.parallel.ending import Ending

class Step:
    def close(self):
        print("graphs", flush=True)

def measure(host):
    host.steps.add(step)
    print("measured", flush=True)
    return good

destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: print("communicators", flush=True)
step, good = Step(), True
"""
CALL = "\nsys.exit(multi_gpu.together(measure, True, None, Ending(limit_s=0.5)))"


@pytest.fixture
def alone(repository):
    """Runs lines as the only rank of a call; what it prints, its errors and exit status."""

    def run(lines: str) -> tuple[list[str], str, int]:
        environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        folders = ":".join(str(repository / folder) for folder in ("src", "benchmarks/measure"))
        done = subprocess.run(
            [sys.executable, "-c", PREAMBLE + lines + CALL],
            env={"PATH": str(Path(sys.executable).parent), "PYTHONPATH": folders, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.stdout.split(), done.stderr, done.returncode

    return run


def test_graphs_go_before_the_communicators_that_they_hold(alone):
    out, _, status = alone("")
    assert out == ["measured", "graphs", "communicators"]
    assert status == 0


def test_what_is_not_as_it_must_be_is_the_exit_status(alone):
    out, _, status = alone("good = False")
    assert out == ["measured", "graphs", "communicators"]
    assert status == 1


@pytest.mark.parametrize("good", [True, False])
def test_communicators_that_do_not_end_are_named_within_the_bound_and_the_status_stays(alone, good):
    _, errors, status = alone(f"dist.destroy_process_group, good = lambda: time.sleep(100), {good}")
    assert "error: rank 0: process groups did not end within 0 s; leaving with status" in errors
    assert status == int(not good)


def test_a_rank_that_fails_leaves_at_once_and_says_why(alone):
    out, errors, status = alone("measure = lambda host: host.nothing")
    assert out == []
    assert "AttributeError: 'Host' object has no attribute 'nothing'" in errors
    assert status == 1


def test_a_step_is_known_to_the_host_that_built_it(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import multi_gpu

    host = multi_gpu.Host(0, 1, multi_gpu.torch.device("cpu"), None, None)
    step, _, _ = multi_gpu.build(host, 1, 1, [])
    assert list(host.steps) == [step]
