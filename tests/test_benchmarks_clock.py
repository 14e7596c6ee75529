"""Device times of short calls, on a device and a host whose clocks the test turns: the way to the launch is no part."""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from scalefold.tune.sound import clock  # noqa: E402

KERNEL_US, CYCLES_PER_US = 20.0, 1000.0


class Machine:
    """A queue of work. ``launches_us``: what the next launches take the host, the last one for all that follow."""

    def __init__(self, *launches_us: float) -> None:
        self.host_us = self.free_us = 0.0
        self.launches_us = list(launches_us)
        self.calls = 0

    def queue(self, us: float) -> float:
        """Work that begins once it was launched and the work before has ended; its end."""
        self.free_us = max(self.free_us, self.host_us) + us
        return self.free_us

    def sleep(self, cycles: int) -> None:
        self.queue(cycles / CYCLES_PER_US)

    def replay(self) -> None:
        self.calls += 1
        self.host_us += self.launches_us.pop(0) if len(self.launches_us) > 1 else self.launches_us[0]
        self.queue(KERNEL_US)

    def wait(self, until_us: float) -> None:
        self.host_us = max(self.host_us, until_us)

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.at_us = machine, 0.0

    def record(self) -> None:
        self.at_us = self.machine.queue(0.0)

    def query(self) -> bool:
        return self.at_us <= self.machine.host_us

    def synchronize(self) -> None:
        self.machine.wait(self.at_us)

    def elapsed_time(self, other: "Event") -> float:
        return (other.at_us - self.at_us) / 1e3


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch):
    def build(*launches_us: float) -> Machine:
        machine = Machine(*launches_us)
        monkeypatch.setattr(torch.cuda, "_sleep", machine.sleep)
        monkeypatch.setattr(torch.cuda, "Event", machine.event)
        monkeypatch.setattr(clock, "capture", lambda call, warm_up: SimpleNamespace(replay=machine.replay))
        return machine

    return build


@pytest.mark.parametrize("launch_us", [5.0, 150.0, 20_000.0])
def test_a_replay_takes_what_its_kernels_take_however_long_its_launch(machine_of, launch_us: float) -> None:
    machine = machine_of(launch_us)
    assert clock.graph_microseconds(machine.replay, replays=5, warm_up=1) == pytest.approx(KERNEL_US)
    assert machine.calls < 5 + 6, "late ones are few: the wait grows"


def test_a_replay_for_which_the_host_was_late_does_not_count(machine_of) -> None:
    machine = machine_of(5.0, *[4000.0, 5.0] * 2, 5.0)
    assert clock.graph_microseconds(machine.replay, replays=3, warm_up=1) == pytest.approx(KERNEL_US)


def test_a_host_that_is_always_late_is_not_waited_for_without_end(machine_of) -> None:
    machine = machine_of(1e6)
    assert clock.graph_microseconds(machine.replay, replays=3, warm_up=1) > KERNEL_US
    assert machine.calls < 12


def test_exchanges_are_timed_behind_one_that_is_not_and_as_often_on_every_rank(
    machine_of, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    common = importlib.import_module("common")
    for launches_us in ([150.0], [150.0, 150.0, 150.0, 9000.0, 150.0]):
        machine = machine_of(*launches_us)
        timing = common.time_queued(machine.replay, repeats=5)
        assert timing.median_ms == pytest.approx(KERNEL_US / 1e3)
        assert machine.calls == 3 + 2 * 5


@pytest.mark.gpu
def test_on_a_gpu_a_slow_host_is_no_part_of_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    x, capture = torch.zeros(1 << 20, device="cuda"), clock.capture

    def slow(call, warm_up: int) -> SimpleNamespace:
        graph = capture(call, warm_up)
        return SimpleNamespace(replay=lambda: (time.sleep(2e-3), graph.replay()))

    with torch.cuda.stream(torch.cuda.Stream()):
        expected_us = clock.graph_microseconds(lambda: x.add_(1), replays=20, warm_up=3)
        monkeypatch.setattr(clock, "capture", slow)
        assert clock.graph_microseconds(lambda: x.add_(1), replays=20, warm_up=3) < 2 * expected_us + 10
