"""The profiler's window: what it writes, what it leaves alone, what is refused, and what the report makes of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from observed_runs import event, write_gpu_trace
from runs import TINY, tiny_config
from scalefold.config import ProfileConfig, load_config
from scalefold.errors import ConfigError, LogError
from scalefold.report.record import read_metrics
from scalefold.run import loop as loops
from scalefold.run.begin import RunOptions
from scalefold.run.loop import run_rank
from scalefold.telemetry.profile import UNDER_NSYS, Window
from scalefold.telemetry.trace import group_of, read_anatomies, read_anatomy


def profiled_run(store: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """The trace of steps 2 and 3 of a tiny run."""
    run_rank(tiny_config(store, run_dir, "run.profile={steps: 2-3, ranks: [0]}", *overrides), RunOptions())
    (file,) = (run_dir / "profile").iterdir()
    return json.loads(file.read_text())


def names(trace: dict[str, Any]) -> list[str]:
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]


@pytest.fixture(scope="module")
def profiled(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a window, and what its trace holds."""
    run_dir = tmp_path_factory.mktemp("profiled") / "run"
    return run_dir, profiled_run(tiny_store, run_dir)


def test_a_window_writes_a_chrome_trace_with_named_ranges_for_its_steps(profiled: tuple[Path, dict]) -> None:
    run_dir, found = profiled[0], names(profiled[1])
    assert [name for name in found if name.startswith("step ")] == ["step 2", "step 3"]
    for name in ("data wait", "copy", "forward and backward", "update", "log", "comparison of ranks", "stop code"):
        assert found.count(name) == 2, name
    assert found.count("evaluation") == 1
    assert [file.name for file in (run_dir / "profile").iterdir()] == ["steps_2-3_rank_0.json"]


def test_a_profiled_run_is_the_same_run(profiled: tuple[Path, dict], tiny_store: Path, tmp_path: Path) -> None:
    run_rank(tiny_config(tiny_store, tmp_path / "plain"), RunOptions())
    seen, plain = read_metrics(profiled[0]), read_metrics(tmp_path / "plain")
    assert seen.loss.tolist() == plain.loss.tolist()
    assert seen.eval_lddt_ca.tolist() == plain.eval_lddt_ca.tolist()
    assert (seen.step_ms > 0).all()


def test_a_run_that_ends_inside_its_window_writes_what_it_has(tiny_store: Path, tmp_path: Path) -> None:
    found = names(profiled_run(tiny_store, tmp_path / "run", "training.target_avg_lddt_ca_value=0.001"))
    assert [name for name in found if name.startswith("step ")] == ["step 2"]
    trace = tmp_path / "run" / "profile" / "steps_2-2_rank_0.json"
    stop = re.search(r'"time_ms": (\d+).*"run_stop"', (tmp_path / "run" / "result_0.txt").read_text())
    assert stop is not None
    assert trace.stat().st_mtime >= int(stop[1]) / 1000, "the clock does not wait for the trace"


def test_without_a_window_the_loop_walks_over_a_plain_range_and_nothing_is_wrapped(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = loops.loop

    def spy(run: Any, steps: Any, numbers: Any, *others: Any) -> Any:
        seen["numbers"] = numbers
        outcome = original(run, steps, numbers, *others)
        seen["own"] = [method for owner, method, _ in loops.spans(run, steps) if method in vars(owner)]
        return outcome

    monkeypatch.setattr(loops, "loop", spy)
    monkeypatch.setattr(Window, "open", lambda self: pytest.fail("the window opened"))
    monkeypatch.setattr(Window, "over", lambda self, steps: pytest.fail("steps went through the window"))
    run_rank(tiny_config(tiny_store, tmp_path / "run"), RunOptions())
    assert seen == {"numbers": range(1, 5), "own": []}
    assert not (tmp_path / "run" / "profile").exists()


class Worker:
    def work(self) -> str:
        return "done"


def worked(tmp_path: Path, device: str) -> tuple[dict[int, bool], list[int]]:
    """Steps 1 to 4 of a worker with a window at 2: whether its method was wrapped, and how often training paused."""
    worker, during, paused = Worker(), {}, []
    profile, spans = ProfileConfig(steps="2"), [(worker, "work", "w")]
    window = Window(profile, tmp_path, 0, torch.device(device), lambda: spans, lambda: None, lambda: paused.append(1))
    with window.around(range(1, 5)) as steps:
        for step in steps:
            during[step] = "work" in vars(worker)
            assert worker.work() == "done"
    return during, paused


def test_every_name_is_taken_off_when_the_window_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNDER_NSYS, "1")  # means nothing on a CPU
    assert worked(tmp_path, "cpu") == ({1: False, 2: True, 3: False, 4: False}, [1])
    assert (tmp_path / "profile" / "steps_2-2_rank_0.json").exists()


def test_exchanges_of_other_threads_are_over_before_what_was_recorded_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that begins to record during the collection costs the events of others."""
    order: list[str] = []
    stop = torch.profiler.profile.stop
    monkeypatch.setattr(torch.profiler.profile, "stop", lambda self: (order.append("collected"), stop(self)))
    window = Window(
        ProfileConfig(steps="2"),
        tmp_path,
        0,
        torch.device("cpu"),
        lambda: [(Worker(), "work", "w")],
        lambda: order.append("settled"),
        lambda: order.append("paused"),
    )
    with window.around(range(1, 5)) as steps:
        assert list(steps) == [1, 2, 3, 4]
    assert order == ["settled", "collected", "paused"]


def test_nsys_is_given_the_range_and_the_names_and_no_trace_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setenv(UNDER_NSYS, "1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    assert worked(tmp_path, "cuda")[1] == [1]
    assert calls == ["start", "step 2", "w", "pop", "pop", "stop"]
    assert not (tmp_path / "profile").exists()


def test_another_rank_has_no_window(tmp_path: Path) -> None:
    profile = ProfileConfig(steps="1-2", ranks=(1,))
    steps = range(1, 5)
    with Window(profile, tmp_path, 0, torch.device("cpu"), list, lambda: None, lambda: None).around(steps) as walk:
        assert walk is steps


def test_a_full_disk_costs_the_trace_and_not_the_run(tiny_store: Path, tmp_path: Path, full_disk, caplog) -> None:
    run_rank(tiny_config(tiny_store, tmp_path / "run", "run.profile.steps=2-3"), RunOptions())
    assert "is the disk full?" in caplog.text
    assert list((tmp_path / "run" / "profile").iterdir()) == []
    assert read_metrics(tmp_path / "run").step.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("{steps: 1190-1201}", "the run ends after step 1200"),
        ("{steps: 0-3}", "counted from 1"),
        ("{steps: 9-8}", "FIRST-LAST"),
        ("{steps: 1-101}", "at most 100 steps"),
        ("{steps: from 3}", "should match pattern"),
        ("{steps: true}", "run.profile.steps"),
        ("{steps: 5, ranks: [1]}", "rank 1 is not there, the run has ranks 0 to 0"),
        ("{steps: 5, ranks: []}", "one rank or more"),
        ("{steps: 5, ranks: [0, 0]}", "each once"),
        ("{step: 5}", "unknown key `run.profile.step`"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_line(profile: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(TINY, [f"run.profile={profile}"])
    assert "\n" not in str(error.value)


def test_a_rank_that_only_evaluates_cannot_be_profiled(repository: Path) -> None:
    shape = ["parallel.ranks_per_node=4", "parallel.num_eval_ranks=1", "training.global_batch_size=3"]
    with pytest.raises(ConfigError, match="rank 3 only evaluates; ranks 0 to 2 train"):
        load_config(TINY, [*shape, "run.profile={steps: 5, ranks: [0, 3]}"])


def test_a_single_step_may_be_a_number() -> None:
    assert list(load_config(TINY, ["run.profile.steps=20"]).config.run.profile.window) == [20]
    assert list(load_config(TINY, ["run.profile.steps=20-24"]).config.run.profile.window) == [20, 21, 22, 23, 24]
    assert load_config(TINY).config.run.profile.window == range(0)


# --- what the report makes of it --------------------------------------------------------------------------------------


def test_a_gpu_trace_is_split_into_host_groups_of_kernels_exchange_and_idle(tmp_path: Path) -> None:
    found = read_anatomy(write_gpu_trace(tmp_path))
    assert (found.steps, found.step_ms, found.on_gpu, found.launches) == (2, 10.0, True, 4)
    assert found.host == {"data wait": 1.0, "replay": 2.0, "other": 1.0}
    assert found.work == {"attention": 4.0, "exchange": 3.0, "matrix products": 1.0, "copies and fills": 1.0}
    assert (found.exchange_alone_ms, found.idle_ms) == (2.0, 2.0)
    assert found.longest[0] == ("backward_rows", 1.0, 4.0)
    assert ["GPU: idle", "2.00", "20.0 %"] in found.rows()


def test_the_trace_of_a_cpu_run_is_split_into_host_and_operators(profiled: tuple[Path, dict]) -> None:
    (found,) = read_anatomies(profiled[0])
    assert (found.steps, found.on_gpu) == (2, False)
    assert sum(found.host.values()) == pytest.approx(found.step_ms)
    assert found.host["forward and backward"] > found.host["update"] > 0
    assert 0 < sum(found.work.values()) < found.step_ms
    assert found.work["matrix products"] > 0
    assert {row[0] for row in found.rows()} >= {"host: data wait", "operators: matrix products"}


def test_own_time_leaves_out_what_lies_inside(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    operators = [event("cpu_op", "aten::matmul", 1, 5), event("cpu_op", "aten::mm", 2, 4)]
    file.write_text(json.dumps({"traceEvents": [event("user_annotation", "step 1", 0, 6), *operators]}))
    found = read_anatomy(file)
    assert found.work == {"single operations": 2.0, "matrix products": 2.0}


def test_every_kernel_of_ours_has_a_group(repository: Path) -> None:
    text = "\n".join(file.read_text() for file in (repository / "src/scalefold/kernels").rglob("*.py"))
    programs = set(re.findall(r"@(?:triton|gluon)\.jit.*\n(?:@.*\n)*def (\w+)", text))
    # by another program, as a part for some of its groups of warps, or given to it
    called = (r"(?<!def )\b(\w+)\(", r"\((\w+), \(", r"\bTask\((\w+), ")
    launched = programs.difference(*(re.findall(pattern, text) for pattern in called))
    assert launched >= {"hopper_forward", "hopper_keys"}
    assert len(launched) > 20
    assert {name for name in launched if name.startswith("hopper_") and group_of(name) == "attention"} == {
        "hopper_forward",
        "hopper_keys",
        "hopper_rows",
    }
    assert {name: group for name in launched if (group := group_of(name)) in ("other", "single operations")} == {}


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": 1}', '{"traceEvents": [1]}', '{"traceEvents": []}'])
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "steps_1-2_rank_0.json"
    file.write_text(text)
    with pytest.raises(LogError, match=r"steps_1-2_rank_0\.json: no .*delete it"):
        read_anatomy(file)


@pytest.mark.gpu
def test_the_trace_of_a_gpu_shows_the_kernels_that_a_replay_starts(tmp_path: Path) -> None:
    class Step:
        def __init__(self) -> None:
            self.x, self.graph = torch.randn(512, 512, device="cuda"), torch.cuda.CUDAGraph()
            torch.mm(self.x, self.x)  # handles of the library are no part of a graph
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.y = torch.mm(self.x, self.x).relu()

        def replay(self) -> None:
            self.graph.replay()

    step = Step()
    spans, profile = [(step, "replay", "replay")], ProfileConfig(steps="2-3")
    window = Window(profile, tmp_path, 0, torch.device("cuda"), lambda: spans, lambda: None, lambda: None)
    with window.around(range(1, 5)) as steps:
        for _ in steps:
            step.replay()
    (found,) = read_anatomies(tmp_path)
    assert (found.steps, found.on_gpu) == (2, True)
    assert found.launches in {2, 3}  # the library may split the product and sum its parts in a kernel of its own
    assert found.work["matrix products"] > 0
    assert found.host["replay"] > 0
    assert 0 < found.idle_ms < found.step_ms
