"""Rendered jobs on a real Slurm: four nodes of this host, CPU ranks over gloo, signals, requeue, instances."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runs import SMALLEST
from scalefold.config import load_config
from scalefold.launch.render import render_sbatch
from scalefold.launch.status import status
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.report.record import read_metrics
from scalefold.step.checkpoint import Checkpoints, read_state
from slurm_cluster import Cluster, SlurmUnavailable, install_if_missing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
HANGS_S = 300  # Slurm alone may let a requeued job wait for two minutes
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
    """Render configs/cpu_2x2.yaml at its smallest, submit it and return the job's number.

    ``edit`` is what an administrator changes in the file by hand, ``variables`` the environment of the submission.
    """

    def submit_job(
        *overrides: str, edit: tuple[str, str] = ("", ""), continue_job: int | None = None, **variables: str
    ) -> str:
        shared = [
            *SMALLEST,
            "training.seed=null",
            "training.global_batch_size=3",
            f"data.store_dir={tiny_store}",
            f"run.run_dir={tmp_path}/run s",
            f"launch.venv={sys.prefix}",
            f"launch.cache_dir={tmp_path}/cache",
            "launch.network_check_gb_per_s=null",
            *overrides,
        ]
        file = repository / "configs" / "cpu_2x2.yaml"
        job = tmp_path / "run s" / "job.sbatch"
        job.parent.mkdir(exist_ok=True)
        text = render_sbatch(load_config(file, shared).config, file, repository, shared, continue_job)
        assert edit[0] in text
        job.write_text(text.replace(*edit) if edit[0] else text)
        return cluster.run("sbatch", "--parsable", str(job), variables=variables)

    return submit_job


@pytest.fixture
def jobs(tmp_path: Path) -> "Jobs":
    return Jobs(tmp_path / "run s")


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

    def wait_for_checkpoint(self, job_id: str, beyond: int = 0, timeout_s: float = HANGS_S) -> int:
        deadline = time.monotonic() + timeout_s
        while (iteration := self.newest(job_id)) <= beyond:
            assert time.monotonic() < deadline, self.output(job_id)
            time.sleep(0.2)
        return iteration

    def wait_for_output(self, job_id: str, text: str, timeout_s: float = HANGS_S) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output(job_id):
            assert time.monotonic() < deadline, self.output(job_id)
            time.sleep(0.2)


def log(run_dir: Path, name: str) -> Log:
    return read_log(run_dir / name)


def test_a_job_repeats_its_run_over_two_nodes_with_fresh_seeds_and_judges_every_log(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    """DAP groups and evaluation ranks land on their nodes although the user's environment asks for another order."""
    shape = ["parallel.dap_size=2", "parallel.num_eval_ranks=2", "training.global_batch_size=1"]
    short = ["training.target_avg_lddt_ca_value=0.001", "launch.network_check_gb_per_s=0"]
    job_id = submit("launch.repeats=2", *shape, *short, SLURM_DISTRIBUTION="cyclic")
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), jobs.output(job_id)
    output = jobs.output(job_id)
    assert "network check: 4 ranks" in output
    first, second = cluster.hosts(job["NodeList"])
    line = f"placement: 4 ranks on 2 nodes: {first}: 0-1, {second}: 2-3; DAP-2 groups inside nodes; 2-3 evaluate on"
    assert output.count(line) == 2
    (placed,) = [e for e in read_metrics(jobs.run_dir(job_id)).events if e["name"] == "placement"]
    assert placed["nodes"] == {first: "0-1", second: "2-3"}
    for index in range(2):
        (summary,) = [text for text in output.splitlines() if text.startswith(f"run_{index} ")]
        assert "reached" in summary
        assert "well-formed log of a non-benchmark configuration" in summary
    (seen,) = status(str(jobs.folder))
    assert (seen.job_id, seen.expected, [run.state for run in seen.runs]) == (job_id, 2, ["reached", "reached"])
    found = [log(jobs.run_dir(job_id, i), f"result_{i}.txt") for i in range(2)]
    assert [one.status for one in found] == ["success", "success"]
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
    assert log(jobs.run_dir(job_id), "result_0.txt").status == "aborted"
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
    assert_no_traceback(jobs.output(job_id))


def assert_no_traceback(output: str) -> None:
    """Stop signals reach every process of a rank, also the one that tracks shared memory."""
    assert "Traceback" not in output, output
    assert "resource_tracker" not in output, output


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
    jobs.wait_for_output(job_id, "time limit is near: stopping")
    jobs.wait_for_output(job_id, "run 0: exit status 4")
    deadline = time.monotonic() + 60
    while (job := cluster.job(job_id))["JobState"] != "PENDING":
        assert time.monotonic() < deadline, (job, jobs.output(job_id))
        time.sleep(0.3)
    assert job["Restarts"] == "1"
    assert jobs.newest(job_id) > 0
    assert_no_traceback(jobs.output(job_id))
    cluster.run("scancel", job_id)


LOSSES = [*ENDLESS, "parallel.step_timeout_s=20", "parallel.startup_timeout_s=120"]


def test_a_killed_rank_sends_the_job_to_other_nodes_and_it_goes_on(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    job_id = submit(*LOSSES, "launch.sbatch_options=[--exclude=node3]")
    kept = jobs.wait_for_checkpoint(job_id)
    pid, node = cluster.ranks(job_id)[2]
    os.kill(pid, signal.SIGKILL)
    jobs.wait_for_output(job_id, f"run 0: suspect node {node}")
    cluster.release(job_id)
    assert set(cluster.hosts(cluster.job(job_id)["ExcNodeList"])) == {node, "node3"}
    jobs.wait_for_checkpoint(job_id, beyond=jobs.newest(job_id))
    assert {there for _, there in cluster.ranks(job_id).values()}.isdisjoint({node, "node3"})
    assert list(jobs.run_dir(job_id).glob("result_0.resumed_*"))
    assert jobs.newest(job_id) > kept
    (seen,) = status(str(jobs.run_dir(job_id).parent))
    assert node in seen.suspect_nodes
    cluster.run("scancel", job_id)
    cluster.wait(job_id)


def test_a_node_that_goes_down_is_replaced_by_a_spare_one_at_once(cluster: Cluster, submit: Submit, jobs: Jobs) -> None:
    job_id = submit(*LOSSES, "launch.spare_nodes=1")
    jobs.wait_for_checkpoint(job_id)
    node = cluster.ranks(job_id)[3][1]
    cluster.lose_node(node, job_id)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")  # or after SlurmdTimeout
    jobs.wait_for_output(job_id, f"run 0: suspect node {node}")
    jobs.wait_for_checkpoint(job_id, beyond=jobs.newest(job_id))
    assert cluster.job(job_id)["Restarts"] == "0"
    assert node not in {there for _, there in cluster.ranks(job_id).values()}
    cluster.run("scancel", job_id)
    cluster.wait(job_id)
    cluster.return_node(node)


def test_losses_without_progress_end_the_job_after_the_allowed_number_of_tries(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    """A frozen rank is found by the watch of the others (exit status 5), then by Slurm, whose patience is cut here."""
    endless = [*LOSSES, "run.checkpoint_every_iters=1000000", "launch.restarts=0"]
    job_id = submit(*endless, edit=("--wait=60", "--wait=5"))
    jobs.wait_for_output(job_id, "0: step")
    os.kill(cluster.ranks(job_id)[3][0], signal.SIGSTOP)
    job = cluster.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "5:0", "0")
    output = jobs.output(job_id)
    assert "Gave no more sign of life, last seen: rank 3" in output
    assert "run 0: lost 1 times from the same point (start): giving up" in output


def test_a_job_that_cannot_start_says_why_before_any_clock(cluster: Cluster, submit: Submit, jobs: Jobs) -> None:
    cyclic = ["parallel.dap_size=2", "parallel.num_eval_ranks=0", "training.global_batch_size=2"]
    wanted = {
        submit(*cyclic, edit=("--distribution=block", "--distribution=cyclic")): "spans nodes, and shares a node's",
        submit("launch.drop_caches_command=cat /none"): "launch.drop_caches_command failed, see the lines above",
        submit(continue_job=99): "--continue-job 99: there is no folder",
        submit("launch.venv=null", "launch.container_image=a.sqsh"): "launch.container_image needs pyxis",
    }
    for job_id, message in wanted.items():
        job = cluster.wait(job_id)
        assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), jobs.output(job_id)
        assert message in jobs.output(job_id)
        assert not list(jobs.run_dir(job_id).glob("result_*")), "a clock has run"


def test_a_folder_with_spaces_is_taken_by_sbatch(cluster: Cluster, repository: Path, tmp_path: Path) -> None:
    command = ["launch", "configs/dgx_h100_1x8.yaml", "run.run_dir=runs/a b", "launch.gpu_request=none", "--dry-run"]
    shown = subprocess.run(
        [sys.executable, "-m", "scalefold", *command], cwd=repository, capture_output=True, text=True
    )
    job = tmp_path / "job.sh"
    job.write_text(shown.stdout.replace("--ntasks-per-node=8", "--ntasks-per-node=2"))  # these nodes are small
    cluster.run("sbatch", "--test-only", str(job))


def test_two_weak_instances_run_at_once_each_on_its_nodes_and_miss_the_target(
    cluster: Cluster, submit: Submit, jobs: Jobs
) -> None:
    job_id = submit("launch.instances=2", "training.num_train_iters=12", "training.val_every_iters=4")
    job = cluster.wait(job_id)
    assert (job["NumNodes"], job["JobState"], job["ExitCode"]) == ("4", "FAILED", "4:0"), "4: target not reached"
    found = [log(jobs.run_dir(job_id, i), f"result_{i}.txt") for i in range(2)]
    assert [one.value("number_of_nodes") for one in found] == [2, 2]
    assert found[0].value("seed") != found[1].value("seed")
    assert [one.status for one in found] == ["aborted", "aborted"]
    assert all((jobs.run_dir(job_id, i) / "finished").exists() for i in range(2))
    assert [one.need("epoch_start").metadata["instance"] for one in found] == [0, 1]
    spans = [(one.need("run_start").time_ms, one.need("run_stop").time_ms) for one in found]
    assert max(start for start, _ in spans) < min(stop for _, stop in spans), "the instances ran one after another"
