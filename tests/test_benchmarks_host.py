"""Measurements side by side: GPUs are shared out, time is kept, what hangs or fails is named."""

import csv
import os
import sys
import time

import pytest

WHERE = "import os; from scalefold.processors import own; print(os.environ['CUDA_VISIBLE_DEVICES'], own())"
WRITE = "from common import FOLDER, append_rows; append_rows(FOLDER / 'rows.csv', [{'a': 1}])"


@pytest.fixture
def host(repository, monkeypatch):
    """The script; jobs of its tests are small programs."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    places = [str(repository / "benchmarks" / "measure"), str(repository / "src")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    import host

    monkeypatch.setattr(host, "facts", lambda: {"commit": "abc", "device": "GPU"})
    monkeypatch.setattr(host, "device_name", str)
    yield host
    for name in ("host", "common", "watched"):
        sys.modules.pop(name, None)


def job(host, name, text, seconds=1.0, gpus=1):
    return host.Job(name, seconds, ("-m", "timeit", "-n", "1", "-r", "1", text), gpus)


def statuses(folder):
    with (folder / "gates.csv").open(newline="") as stream:
        return {row["measurement"]: row["status"] for row in csv.DictReader(stream)}


def test_jobs_share_out_gpus_and_wait_for_enough_of_them(host, tmp_path):
    wait = "; import time; time.sleep(0.5)"
    jobs = [job(host, "one", WHERE + wait), job(host, "two", WHERE + wait, gpus=2), job(host, "other", WHERE + wait)]
    assert host.run_jobs(jobs, None, 2, 1.0, tmp_path, tmp_path) == {}
    used = {j.name: (tmp_path / j.name / "output.txt").read_text().split()[0] for j in jobs}
    assert used == {"one": "0", "other": "1", "two": "0,1"}
    assert statuses(tmp_path) == {"one": "0", "two": "0", "other": "0"}


def test_what_fails_or_hangs_is_named_and_the_others_go_on(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "STARTING_S", 1.0)
    monkeypatch.setattr(host, "LENIENCE", 1.0)
    jobs = [
        job(host, "bad", "raise SystemExit('no such card')"),
        job(host, "endless", "import time; time.sleep(600)"),
        job(host, "good", "pass"),
    ]
    begin = time.monotonic()
    bad = host.run_jobs(jobs, None, 2, 1.0, tmp_path, tmp_path)
    assert bad == {"bad": "exit status 1", "endless": "hung and was ended"}
    assert statuses(tmp_path) == {"bad": "1", "endless": "124", "good": "0"}
    assert "no such card" in capsys.readouterr().out
    assert time.monotonic() - begin < 60


def test_none_begins_that_would_end_too_late(host, tmp_path):
    bad = host.run_jobs(
        [job(host, "long", "pass", seconds=600.0), job(host, "short", "pass")], None, 1, 1.0, tmp_path, tmp_path
    )
    assert list(bad) == ["long"]
    assert bad["long"].startswith("left out: takes 600 s")


def test_rows_go_to_the_tables_that_were_named(host, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    assert host.run_jobs([job(host, "rows", WRITE)], None, 1, 1.0, tmp_path, tables) == {}
    assert (tables / "rows.csv").read_text() == "a\n1\n"


def test_jobs_are_chosen_by_name_by_gpus_and_by_what_is_there(host, tmp_path):
    jobs, refused = host.chosen([], None, 1)
    assert {"two GPUs", "four GPUs", "curve"} <= set(refused)
    assert {j.name for j in jobs} | set(refused) == {j.name for j in host.JOBS}
    assert [j.name for j in host.chosen(["curve"], tmp_path, 1)[0]] == ["curve"]
    with pytest.raises(ValueError, match="no measurement stairs; there are: step,"):
        host.chosen(["stairs"], None, 1)


def test_every_command_of_the_list_exists(host, repository, tmp_path):
    """Scripts are there and several ranks are launched."""
    for one in host.JOBS:
        words = one.words(tmp_path)
        assert ("torch.distributed.run" in words) == (one.ranks > 1)
        assert one.ranks in (1, one.gpus)
        assert all(word != "STORE" for word in words)
        scripts = [word for word in words if word.endswith(".py")]
        assert all((repository / "benchmarks" / "measure" / script.rpartition("/")[2]).is_file() for script in scripts)


def test_kernels_of_every_number_of_ranks_are_compiled_first(host, monkeypatch):
    asked = []
    monkeypatch.setattr(host, "compile_ahead", lambda config, overrides: asked.append(overrides[1]))
    host.compile_steps([job for job in host.JOBS if job.gpus <= 2])
    assert asked == ["parallel.dap_size=1", "parallel.dap_size=2"]


def test_a_folder_is_used_again_and_a_host_without_a_gpu_refuses_everything(host, tmp_path):
    for _ in range(2):
        assert host.run_jobs([job(host, "again", "pass")], None, 1, 1.0, tmp_path, tmp_path) == {}
    jobs, refused = host.chosen([], tmp_path, 0)
    assert (jobs, set(refused)) == ([], {one.name for one in host.JOBS})
    assert host.run_jobs(jobs, None, 0, 1.0, tmp_path, tmp_path) == {}
