"""The judge of a long run: what grows is found, what only fluctuates is not."""

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def soak(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks" / "measure")
    return importlib.import_module("soak")


def rows(**columns: np.ndarray) -> list[dict[str, object]]:
    """Rows of a run that is flat but for ``columns``."""
    noise = np.random.default_rng(1).normal(1.0, 0.01, 100)
    flat = dict.fromkeys(("memory_mib", "files", "processes", "step_cpu_ms", "step_ms"), 100.0 * noise)
    whole = flat | columns
    return [{"step": 20 * i, "device_gib": "", **{k: v[i] for k, v in whole.items()}} for i in range(len(noise))]


def test_a_flat_run_passes_and_so_does_one_that_is_slower_by_the_clock_alone(soak: ModuleType) -> None:
    table, flat = soak.judge(rows(), full=False)
    assert flat
    assert [line["quantity"] for line in table] == ["memory_mib", "files", "processes", "step_cpu_ms"]
    assert soak.judge(rows(step_ms=np.linspace(100, 300, 100)), full=False)[1]
    assert not soak.judge(rows(step_ms=np.linspace(100, 300, 100)), full=True)[1]


@pytest.mark.parametrize("name", ["memory_mib", "files", "processes", "step_cpu_ms"])
def test_what_grows_is_found_and_what_settles_at_the_start_is_not(soak: ModuleType, name: str) -> None:
    table, flat = soak.judge(rows(**{name: np.linspace(100, 125, 100)}), full=False)
    assert not flat
    assert [line["quantity"] for line in table if not line["flat"]] == [name]
    settles = np.concatenate([np.linspace(50, 100, 30), np.full(70, 100.0)])
    assert soak.judge(rows(**{name: settles}), full=False)[1]


def test_rows_of_another_kind_of_run_stay_in_the_file(soak: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "soak.csv"
    soak.keep(file, "full", [{"kind": "full", "step": 1}])
    soak.keep(file, "tiny", [{"kind": "tiny", "step": 1}])
    soak.keep(file, "tiny", [{"kind": "tiny", "step": 2}])
    assert file.read_text().split() == ["kind,step", "full,1", "tiny,2"]


def test_this_process_is_seen_with_its_memory_and_files(soak: ModuleType) -> None:
    import os

    assert soak.children(os.getpid())[0] == os.getpid()
    assert soak.proportional_kib(os.getpid()) > 1024
    before = soak.open_files(os.getpid())
    read, write = os.pipe()
    assert soak.open_files(os.getpid()) - before == {"pipe:[#]": 2}
    os.close(read)
    os.close(write)
    assert soak.cpu_seconds(os.getpid()) > 0


def test_rows_hold_what_was_seen_during_their_steps(soak: ModuleType) -> None:
    nan = np.full(40, np.nan)
    metrics = SimpleNamespace(step=np.arange(1, 41), step_ms=np.full(40, 500.0), passes=np.ones(40), peak_gib=nan)
    ten = Counter({"pipe:[#]": 10})
    samples = [soak.Sample(t / 4, 1 + t // 2, 100.0 + t, ten, 3, t / 8) for t in range(80)]  # two looks a step
    found = soak.rows_of("tiny", samples, metrics)
    assert found[-1]["step"] == 40
    assert found[-1]["memory_mib"] == 178.5
    assert {row["step_cpu_ms"] for row in found[1:]} == {250.0}
    assert {(row["files"], row["processes"], row["step_ms"], row["device_gib"]) for row in found} == {
        (10, 3, 500.0, "")
    }


def test_numbers_of_passes_that_are_drawn_at_random_are_no_growth(soak: ModuleType) -> None:
    passes = np.array([1, 1, 1, 3, 1, 3, 3, 3])
    found = soak.even_step_ms(SimpleNamespace(passes=passes, step_ms=100.0 * passes))
    assert found.tolist() == [200.0] * 8
    slower = 100.0 * passes * np.array([1, 1, 1, 1, 1, 1, 1, 1.2])
    assert soak.even_step_ms(SimpleNamespace(passes=passes, step_ms=slower))[-1] == pytest.approx(240.0)


def test_kinds_of_files_that_there_are_more_of_are_named(soak: ModuleType) -> None:
    counts = [(50, 5), (50, 5), (30, 2), (62, 5), (40, 2)]  # (pipes, processes)
    samples = [
        soak.Sample(1.0, step, 1.0, Counter({"pipe:[#]": pipes, "/dev/null": 3}), processes, 1.0)
        for step, (pipes, processes) in enumerate(counts, 1)
    ]
    assert soak.more_files(samples) == {"pipe:[#]": 12}
