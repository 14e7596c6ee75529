"""Rendered jobs on a real Slurm: four nodes of this host, CPU ranks over gloo, signals, requeue, instances."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import SMALLEST
from scalefold.checkpoint import Checkpoints, read_state
from scalefold.config import load_config
from scalefold.launch.render import render_sbatch
from scalefold.mlperf.logfile import Log, read_log
from slurm_cluster import Cluster, SlurmUnavailable, install_if_missing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
ENDLESS = ["training.num_train_iters=1000000", "run.checkpoint_every_iters=2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        install_if_missing()
        running = Cluster(folder).__enter__()
    except SlurmUnavailable as error:
        pytest.skip(str(error))
    with running:
        yield running


Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, tiny_store: Path, repository: Path, tmp_path: Path) -> Submit:
    """Render configs/cpu_2x2.yaml at its smallest, submit it and return the job's number."""

    def submit_job(*overrides: str) -> str:
        shared = [
            *SMALLEST,
            "training.seed=null",
            "training.global_batch_size=3",
            f"data.store_dir={tiny_store}",
            f"run.run_dir={tmp_path}",
            f"launch.venv={sys.prefix}",
            f"launch.cache_dir={tmp_path}/cache",
            "launch.network_check_gb_per_s=null",
            *overrides,
        ]
        file = repository / "configs" / "cpu_2x2.yaml"
        job = tmp_path / "job.sbatch"
        job.write_text(render_sbatch(load_config(file, shared).config, file, repository, shared))
        return cluster.run("sbatch", "--parsable", str(job))

    return submit_job


@pytest.fixture
def jobs(tmp_path: Path) -> "Jobs":
    return Jobs(tmp_path)


class Jobs:
    """What jobs left in their folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def output(self, job_id: str) -> str:
        file = self.folder / f"slurm-{job_id}.out"
        return file.read_text() if file.exists() else "(no output)"

    def run_dir(self, job_id: str, index: int = 0) -> Path:
        return self.folder / f"job_{job_id}" / f"run_{index}"

    def newest(self, job_id: str) -> int:
        """Iteration of the newest checkpoint, 0 without one."""
        folder = Checkpoints(self.run_dir(job_id) / "checkpoints").newest()
        return read_state(folder).iteration if folder else 0

    def wait_for_checkpoint(self, job_id: str, beyond: int = 0, timeout_s: float = 180) -> int:
        deadline = time.monotonic() + timeout_s
        while (iteration := self.newest(job_id)) <= beyond:
            assert time.monotonic() < deadline, self.output(job_id)
            time.sleep(0.2)
        return iteration

    def wait_for_output(self, job_id: str, text: str, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output(job_id):
            assert time.monotonic() < deadline, self.output(job_id)
            time.sleep(0.2)


def log(run_dir: Path, name: str) -> Log:
    return read_log(run_dir / name)


def status(found: Log) -> str | None:
    return found.status


def test_a_job_repeats_its_run_over_two_nodes_with_fresh_seeds(cluster: Cluster, submit: Submit, jobs: Jobs) -> None:
    job_id = submit("launch.repeats=2", "training.target_avg_lddt_ca_value=0.001", "launch.network_check_gb_per_s=0")
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), jobs.output(job_id)
    assert "network check: 4 ranks" in jobs.output(job_id)
    found = [log(jobs.run_dir(job_id, i), f"result_{i}.txt") for i in range(2)]
    assert [status(one) for one in found] == ["success", "success"]
    assert [one.value("number_of_nodes") for one in found] == [2, 2]
    assert found[0].value("seed") != found[1].value("seed")
    assert found[0].need("run_stop").time_ms < found[1].need("run_start").time_ms


def test_a_requeued_job_continues_and_a_cancelled_one_keeps_its_checkpoint(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    job_id = submit(*ENDLESS, "data.num_workers=1")
    before = jobs.wait_for_checkpoint(job_id)
    cluster.run("scontrol", "requeue", job_id)
    jobs.wait_for_output(job_id, "run 0: exit status 4")
    kept = jobs.newest(job_id)
    assert kept >= before
    assert status(log(jobs.run_dir(job_id), "result_0.txt")) == "aborted"
    cluster.release(job_id)
    jobs.wait_for_checkpoint(job_id, beyond=kept)
    assert (jobs.run_dir(job_id) / f"result_0.resumed_{kept:06d}.txt.training.part").exists()
    cluster.run("scancel", job_id)
    assert cluster.wait(job_id)["JobState"] == "CANCELLED"
    jobs.wait_for_output(job_id, "cancelled")
    assert jobs.output(job_id).count("run 0: exit status 4") == 2, jobs.output(job_id)
    assert jobs.newest(job_id) > kept
    assert not (jobs.run_dir(job_id) / "finished").exists()
    first, second = metrics_steps(jobs.run_dir(job_id), kept)
    assert first[-1] == kept
    assert second[0] == kept + 1


def metrics_steps(run_dir: Path, kept: int) -> tuple[list[int], list[int]]:
    """Steps written up to the checkpoint and after it."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row.get("kind") == "step" or "loss" in row]
    cut = steps.index(kept) + 1
    return steps[:cut], steps[cut:]


def test_the_time_limit_ends_in_a_checkpoint_and_the_queue(cluster: Cluster, submit: Submit, jobs: Jobs) -> None:
    job_id = submit(*ENDLESS, "launch.signal_grace_s=120")
    jobs.wait_for_checkpoint(job_id)
    elapsed_min = cluster.elapsed_s(job_id) // 60
    cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={elapsed_min + 2}")  # one to two minutes are left
    jobs.wait_for_output(job_id, "time limit is near: stopping", timeout_s=180)
    jobs.wait_for_output(job_id, "run 0: exit status 4")
    deadline = time.monotonic() + 60
    while (job := cluster.job(job_id))["JobState"] != "PENDING":
        assert time.monotonic() < deadline, (job, jobs.output(job_id))
        time.sleep(0.3)
    assert job["Restarts"] == "1"
    assert jobs.newest(job_id) > 0
    cluster.run("scancel", job_id)


def test_two_weak_instances_run_at_once_each_on_its_nodes_and_miss_the_target(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    job_id = submit("launch.instances=2", "training.num_train_iters=12", "training.val_every_iters=4")
    job = cluster.wait(job_id)
    assert (job["NumNodes"], job["JobState"], job["ExitCode"]) == ("4", "FAILED", "4:0"), "4: target not reached"
    found = [log(jobs.run_dir(job_id, i), f"result_{i}.txt") for i in range(2)]
    assert [one.value("number_of_nodes") for one in found] == [2, 2]
    assert found[0].value("seed") != found[1].value("seed")
    assert [status(one) for one in found] == ["aborted", "aborted"]
    assert all((jobs.run_dir(job_id, i) / "finished").exists() for i in range(2))
    assert [one.need("epoch_start").metadata["instance"] for one in found] == [0, 1]
    spans = [(one.need("run_start").time_ms, one.need("run_stop").time_ms) for one in found]
    assert max(start for start, _ in spans) < min(stop for _, stop in spans), "the instances ran one after another"
