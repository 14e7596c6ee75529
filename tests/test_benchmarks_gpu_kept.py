"""What the benchmark of runs keeps while starts are under way: judged as they end, and nothing waits for that."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch


def test_a_call_that_is_ended_writes_what_it_has(gpu_runs, starts, layouts, monkeypatch, tmp_path):
    """The start under way and those that wait are named as not run."""
    first, second = layouts.STARTS[:2]
    written = {}

    def begin(plan, start, gpus, left_s):
        raise SystemExit(143)

    monkeypatch.setattr(starts, "begin", begin)
    monkeypatch.setattr(gpu_runs, "make_store", lambda work, workers: tmp_path)
    monkeypatch.setattr(gpu_runs, "chosen", lambda only, tiny: [first, second])
    monkeypatch.setattr(gpu_runs, "write_results", lambda plan, results, out, csv: written.update(results.not_run))
    monkeypatch.setattr(sys, "argv", ["gpu_runs.py", "--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "w")])
    with pytest.raises(SystemExit) as ended:
        gpu_runs.main()
    assert ended.value.code == 143
    assert written == {first.name: "the call was ended before", second.name: "the call was ended before"}


def test_a_call_that_is_killed_has_the_results_of_the_starts_before(starts, layouts, monkeypatch, tmp_path):
    first, second = layouts.STARTS[:2]
    watched = SimpleNamespace(poll=lambda: True, began_at=1.0, ended_at=2.0, hung=False, statuses=lambda: [4])
    acts = {"act": lambda after: None, "watch_the_end": lambda: None, "end": lambda: "how it ended"}

    def begin(plan, start, gpus, left_s):
        if start is second:
            raise SystemExit(143)
        return SimpleNamespace(start=start, watched=watched, gpus=gpus, **acts)

    monkeypatch.setattr(starts, "begin", begin)
    results, kept = starts.Results(), []
    plan, keep = layouts.Plan(tmp_path, tmp_path), lambda known: kept.append(known.ended)
    with pytest.raises(SystemExit):
        starts.run_all(plan, [first, second], 1, 100.0, results, keep)
    assert kept == [{first.name: "how it ended"}]


def test_a_start_is_acted_on_when_that_is_due_however_long_another_is_judged(starts, layouts, monkeypatch, tmp_path):
    """The second start is asked to stop, and ends only then, while the first one is being judged."""
    first, second = layouts.STARTS[0], next(start for start in layouts.STARTS if start.act == "stop")
    results, asked, judged = starts.Results(), threading.Event(), []

    def keep(known):
        judged.append((sorted(known.ended), asked.wait(20.0)))

    def begin(plan, start, gpus, left_s):
        watched = SimpleNamespace(began_at=1.0, ended_at=2.0, hung=False, statuses=lambda: [4], end=lambda: None)
        watched.poll = (lambda: True) if start is first else (lambda: asked.is_set() or judged != [])
        watched.ask_to_stop = asked.set
        one = starts.Running(start, watched, gpus, tmp_path, set())
        steps_are_done = lambda metrics: plan.act_after if first.name in results.ended else 0  # noqa: E731
        monkeypatch.setattr(starts, "num_steps", steps_are_done)
        one.watch_the_end, one.end = lambda: None, lambda: "how it ended"
        return one

    monkeypatch.setattr(starts, "begin", begin)
    starts.run_all(layouts.Plan(tmp_path, tmp_path), [first, second], 2, 100.0, results, keep)
    assert judged[0] == ([first.name], True), "it was asked during the judgement"
    assert results.ended.keys() == {first.name, second.name}


@pytest.mark.parametrize(("limit_s", "budget_s", "ended"), [(0.5, 100.0, True), (200.0, -19.5, False)])
def test_a_start_that_the_budget_ends_is_not_said_to_hang(
    starts, layouts, monkeypatch, tmp_path, capsys, limit_s, budget_s, ended
):
    """Its limit is what was left; only a start that had the time asked for is judged to hang."""
    monkeypatch.setattr(starts, "command", lambda plan, start: [sys.executable, "-c", "input()"])
    monkeypatch.setattr(starts.Watched, "seconds", lambda watched: 31.0)
    monkeypatch.setattr(starts, "cannot_run", lambda *_: "")
    start, plan, results = layouts.STARTS[0], layouts.Plan(tmp_path, tmp_path, limit_s=limit_s), starts.Results()
    starts.run_all(plan, [start], 1, budget_s, results, lambda known: None)
    assert (start.name in results.ended) == ended
    assert (start.name in results.not_run) == (not ended)
    assert ("HUNG" in capsys.readouterr().out) == ended


def test_a_judgement_that_fails_is_said_and_costs_no_start(starts, layouts, monkeypatch, tmp_path, capsys):
    watched = SimpleNamespace(poll=lambda: True, began_at=1.0, ended_at=2.0, hung=False, statuses=lambda: [4])
    acts = {"act": lambda after: None, "watch_the_end": lambda: None, "end": lambda: "how it ended"}

    def begin(plan, start, gpus, left_s):
        return SimpleNamespace(start=start, watched=watched, gpus=gpus, **acts)

    monkeypatch.setattr(starts, "begin", begin)
    results = starts.Results()
    plan, keep = layouts.Plan(tmp_path, tmp_path), lambda known: json.loads("no table")
    starts.run_all(plan, list(layouts.STARTS[:2]), 1, 100.0, results, keep)
    assert len(results.ended) == 2
    assert "could not be kept: JSONDecodeError" in capsys.readouterr().out


def test_tables_of_rulers_are_kept_as_they_come(gpu_runs, starts, layouts, tmp_path):
    plan, out = layouts.Plan(tmp_path, tmp_path / "work"), tmp_path / "out"
    out.mkdir()
    ruler, program = (next(s for s in layouts.STARTS if s.name == name) for name in ("ruler_two", "one_gpu"))
    for start in (ruler, program):
        layouts.places(plan, start).mkdir(parents=True)
        (layouts.places(plan, start) / "step_time.csv").write_text("passes,median_ms\n1,200\n")
    gpu_runs.keep_results(plan, starts.Results(), out)
    (layouts.places(plan, ruler) / "step_time.csv").write_text("passes,median_ms\n1,200\n2,250\n")
    (layouts.places(plan, ruler) / "module_norms.csv").write_text("module,norm\n")
    gpu_runs.keep_results(plan, starts.Results(), out)
    assert sorted(file.name for file in out.glob("*.csv")) == ["ruler_two_module_norms.csv", "ruler_two_step_time.csv"]
    assert (out / "ruler_two_step_time.csv").read_text().endswith("2,250\n")


def test_weights_are_read_once_however_often_they_are_compared(readings, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "last" / "000004"
    folder.mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, folder / "swa_checkpoint.pt")
    first = readings.weights_digest(tmp_path, 4)
    monkeypatch.setattr(torch, "load", None)
    assert first == readings.weights_digest(tmp_path, 4) != ""
