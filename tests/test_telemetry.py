"""What ranks say of themselves: one file per node, beside the run, whole after a crash; who held the others up."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from observed_runs import write_slow_ranks
from runs import tiny_config
from scalefold.config import RankLayout
from scalefold.launch.placement import Seat
from scalefold.parallel.ranks import Ranks
from scalefold.run import begin
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank
from scalefold.telemetry.gpu import Meter, Sample, driver_version, find_gpu
from scalefold.telemetry.nodes import NodeLog
from scalefold.telemetry.stragglers import HEAD, read_loads


def lines(run_dir: Path) -> list[dict[str, Any]]:
    (file,) = (run_dir / "telemetry").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


class FakeGpu:
    """Runs slower and hotter with every look, and uses 100 J between two calls."""

    def __init__(self) -> None:
        self.looks, self.joules = 0, 5000.0

    def sample(self) -> Sample:
        self.looks += 1
        return Sample(1800.0 - 100 * self.looks, 400.0 + self.looks, 60.0 + self.looks)

    def energy_j(self) -> float:
        self.joules += 100.0
        return self.joules


def finds(gpu: Any, reason: str | None = None) -> Callable[[str], tuple[Any, str | None]]:
    return lambda uuid: (gpu, reason)


def test_every_cycle_of_a_run_is_one_line_of_its_nodes_file(tiny_store: Path, tmp_path: Path) -> None:
    run_rank(tiny_config(tiny_store, tmp_path), RunOptions())
    found = lines(tmp_path)
    assert [(line["step"], line["steps"], line["rank"], line["result"]) for line in found] == [
        (2, 2, 0, "result_0"),
        (4, 2, 0, "result_0"),
    ]
    for line in found:
        assert 0 <= line["data_ms"] <= line["data_max_ms"]
        assert 0 < line["step_ms"] <= line["step_max_ms"]
        seconds = [built for _, built in line["slowest"]]
        assert len(seconds) == 3
        assert seconds == sorted(seconds, reverse=True)
        assert "clock_mhz" not in line, "a CPU has no such columns"


def test_the_clock_does_not_wait_for_the_last_line(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, leave = [], NodeLog.__exit__

    def spy(self: NodeLog, *error: object) -> None:
        stopped.append('"run_stop"' in (tmp_path / "result_0.txt").read_text())
        leave(self, *error)

    monkeypatch.setattr(NodeLog, "__exit__", spy)
    run_rank(tiny_config(tiny_store, tmp_path), RunOptions())
    assert stopped == [True]


def test_it_can_be_switched_off_and_then_nothing_of_it_exists(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalefold.run.begin.NodeLog", lambda *args: pytest.fail("telemetry began"))
    run_rank(tiny_config(tiny_store, tmp_path, "run.telemetry=false"), RunOptions())
    assert not (tmp_path / "telemetry").exists()


def test_the_gpu_is_measured_between_cycles_and_its_energy_counts_from_the_clocks_start(tmp_path: Path) -> None:
    with NodeLog(tmp_path, "node 1", 3, "train", "result_0", "uuid", finds(FakeGpu())) as log:
        log.begin()
        log.cycle(40, steps=40, step_ms=100.0)
        log.cycle(80, steps=40, step_ms=100.0)
    assert [file.name for file in (tmp_path / "telemetry").iterdir()] == ["node_1.jsonl"]
    first, second, last = lines(tmp_path)
    assert (first["clock_mhz"], first["power_w"], first["temperature_c"], first["energy_j"]) == (1600, 402, 62, 100)
    assert (second["step"], second["energy_j"]) == (80, 100)
    assert (last["step"], last["energy_j"], "steps" in last) == (80, 100, False)
    (load,) = read_loads(tmp_path).ranks
    assert (load.steps, load.energy_j, load.clock_min_mhz, load.temperature_c) == (80, 300, 1400, 64)


def test_a_meter_takes_means_lowest_and_highest_of_all_looks() -> None:
    meter = Meter(FakeGpu())
    meter.look()
    meter.look()
    found = meter.take()
    assert (found["clock_mhz"], found["clock_min_mhz"], found["temperature_c"]) == (1600, 1500, 63)


class LostGpu(FakeGpu):
    def sample(self) -> Sample:
        raise RuntimeError("GPU is lost")


class GpuWithoutCounter(FakeGpu):
    def energy_j(self) -> float:
        raise RuntimeError("Not Supported")


@pytest.mark.parametrize(
    ("gpu", "keys"),
    [(LostGpu(), set()), (GpuWithoutCounter(), {"clock_mhz", "clock_min_mhz", "power_w", "temperature_c"})],
)
def test_what_a_gpu_cannot_say_is_left_out(tmp_path: Path, gpu: FakeGpu, keys: set[str]) -> None:
    with NodeLog(tmp_path, "node1", 0, "train", "result_0", "uuid", finds(gpu)) as log:
        log.cycle(40, steps=40)
    assert lines(tmp_path)[0].keys() - {"time", "result", "rank", "role", "step", "steps"} == keys


def test_without_the_optional_package_there_are_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_gpu("uuid") == (None, None)


@pytest.mark.parametrize(("gpu", "installed", "notes"), [("uuid", False, 1), ("uuid", True, 0), ("", False, 0)])
def test_a_missing_package_is_one_note_where_there_is_a_gpu(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, installed: bool, notes: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(begin, "find_seat", lambda ranks: Seat(0, "node1", gpu))
    monkeypatch.setattr(begin, "is_readable", lambda: installed)
    ranks = Ranks(RankLayout(1), 0, 0, torch.device("cpu"))
    with begin.open_node_log(tiny_config(tiny_store, tmp_path), ranks, tmp_path / "result_0.txt", said.append):
        pass
    assert [line for line in said if "pip install 'scalefold[telemetry]'" in line] == said
    assert len(said) == notes


def test_the_first_rank_says_why_its_gpu_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rank in (0, 1):
        with NodeLog(tmp_path, "node1", rank, "train", "result_0", "uuid", finds(None, "NVMLError: MIG")):
            pass
    assert caplog.text.count("no GPU clock, power and temperature: NVMLError: MIG") == 1


def test_ranks_of_a_node_share_a_file_and_a_line_that_was_cut_costs_only_itself(tmp_path: Path) -> None:
    with NodeLog(tmp_path, "node1", 0, "train", "result_0") as log:
        log.cycle(40, steps=40, step_ms=1.0)
    (file,) = (tmp_path / "telemetry").iterdir()
    file.write_text(file.read_text() + '{"time": 17, "rank": 0, "st')  # the node lost power
    with (
        NodeLog(tmp_path, "node1", 1, "train", "result_0") as one,
        NodeLog(tmp_path, "node1", 0, "train", "result_0") as other,
    ):
        for step in range(100):
            one.cycle(step, steps=1, step_ms=1.0)
            other.cycle(step, steps=1, step_ms=1.0)
    assert {load.rank: load.steps for load in read_loads(tmp_path).ranks} == {0: 140, 1: 100}
    assert sum(text != "" for text in file.read_text().splitlines()) == 202, "both ranks may end the line that was cut"


@pytest.mark.parametrize(
    "line",
    ["17", "[]", "{}", '{"time": 1, "rank": 0, "role": "train"}', "\x00\x00", '{"rank": NaN}']
    + [
        f'{{"time": 1, "rank": 0, "role": "train", "result": "r", {more}}}'
        for more in ('"slowest": [1]', '"step_ms": "x"')
    ],
)
def test_lines_that_are_none_of_ours_are_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "telemetry").mkdir()
    good = '{"time": 1, "rank": 4, "role": "train", "result": "r"}'
    (tmp_path / "telemetry" / "node1.jsonl").write_text(f"{line}\n{good}\n")
    assert [load.rank for load in read_loads(tmp_path).ranks] == [4]


def test_a_full_disk_does_not_hold_up_training(tmp_path: Path, full_disk, caplog) -> None:
    with NodeLog(tmp_path, "node1", 0, "train", "result_0") as log:
        start = time.thread_time()
        for step in range(2000):
            log.cycle(step, slowest=[["chain", 0.5]] * 3)
        assert time.thread_time() - start < 1.0
    assert "no more telemetry" in caplog.text


def test_the_ranks_that_may_cost_the_others_most_come_first(tmp_path: Path) -> None:
    write_slow_ranks(tmp_path)
    found = read_loads(tmp_path)
    assert [load.rank for load in found.ranks] == [1, 3, 0, 2, 4]
    assert [round(load.lag_ms, 3) for load in found.ranks] == [28.0, 25.0, 0.0, 0.0, 0.0]
    assert found.energy_kwh == pytest.approx(1.0)
    assert found.slowest is not None
    assert found.slowest.rank == 1
    assert dict(zip(HEAD, found.rows(8)[1], strict=True)) == {
        "rank": "3", "node": "node1", "does": "trains", "ms per step": "102.0", "data wait, ms": "2.0",
        "SM clock, MHz": "1200", "lowest, MHz": "", "W": "", "°C": "", "may cost, ms": "25.0",
        "slowest chains": "1abc_A 0.50 s",
    }  # fmt: skip


def test_ranks_that_are_alike_have_no_slowest(tmp_path: Path) -> None:
    for rank in (0, 1):
        with NodeLog(tmp_path, "node1", rank, "train", "result_0") as log:
            log.cycle(40, steps=40, step_ms=100.0, data_ms=2.0)
    assert read_loads(tmp_path).slowest is None
    assert read_loads(tmp_path / "nothing").ranks == ()


def test_a_folder_with_several_logs_is_read_for_one_of_them(tmp_path: Path) -> None:
    for result in ("result_0", "result_1"):
        with NodeLog(tmp_path, "node1", 0, "train", result) as log:
            log.cycle(40, steps=40 if result == "result_0" else 7)
    assert read_loads(tmp_path).ranks[0].steps == 7
    assert read_loads(tmp_path, "result_0").ranks[0].steps == 40


def test_of_two_logs_of_the_same_millisecond_the_one_written_last_is_read(tmp_path: Path) -> None:
    (tmp_path / "telemetry").mkdir()
    written = [{"time": 1.0, "result": f"result_{n}", "rank": 0, "role": "train", "steps": n} for n in (1, 2)]
    (tmp_path / "telemetry" / "node1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    assert read_loads(tmp_path).ranks[0].steps == 2


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") is None


@pytest.mark.gpu
def test_a_real_gpu_says_clock_power_temperature_and_energy(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    with NodeLog(tmp_path, "node1", 0, "train", "result_0", uuid) as log:
        log.begin()
        a = torch.randn(4096, 4096, device="cuda")
        for _ in range(200):
            a = torch.nn.functional.normalize(a @ a)
        torch.cuda.synchronize()
        log.cycle(1, steps=1)
    line = lines(tmp_path)[0]
    assert line["clock_mhz"] > 100
    assert 10 < line["power_w"] < 2000
    assert line["energy_j"] >= 0
