"""A real Slurm on this host for tests: munged, slurmctld and several slurmd that each play a node.

Everything lives in one folder and is stopped by process id. Missing packages are installed on Debian as root.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


class SlurmUnavailable(Exception):
    """This host cannot run the cluster; the text says why."""


def install_if_missing() -> None:
    """Install slurm-wlm and munge if programs are missing.

    Raises:
        SlurmUnavailable: not root, not Debian, or the packages cannot be installed.
    """
    if os.geteuid() != 0:
        raise SlurmUnavailable("needs root: slurmd starts jobs for their users")
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise SlurmUnavailable("Slurm is not installed and this is no Debian; install slurm-wlm and munge")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SlurmUnavailable(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")


@dataclass
class Cluster:
    """A running cluster; use as a context manager."""

    folder: Path
    num_nodes: int = 4
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point Slurm's commands at this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True, variables: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands and return its output."""
        environment = self.environment | dict(variables or {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, as a dictionary."""
        words = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hosts(self, names: str) -> list[str]:
        """The nodes of a list such as ``node[0-1]``."""
        return self.run("scontrol", "show", "hostnames", names).split()

    def wait(self, job_id: str, timeout_s: float = 300) -> dict[str, str]:
        """Wait until a job is over; TimeoutError with its last state otherwise."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in FINAL_STATES:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is still {job['JobState']} ({job.get('Reason')}) after {timeout_s} s")
            time.sleep(0.3)
        return job

    def elapsed_s(self, job_id: str) -> int:
        """How long a job has been running."""
        hours, minutes, seconds = map(int, self.job(job_id)["RunTime"].split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def release(self, job_id: str) -> None:
        """Let a requeued job start now rather than after Slurm's usual pause."""
        deadline = time.monotonic() + 60
        while self.job(job_id)["JobState"] != "PENDING":
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is not in the queue again: {self.job(job_id)}")
            time.sleep(0.2)
        time.sleep(2)  # a credential of the second in which the job was ended counts as revoked
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def ranks(self, job_id: str) -> dict[int, tuple[int, str]]:
        """Rank -> process id and node of the training processes of a job: children of Slurm's step daemons."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                daemon = (Path("/proc") / parent / "comm").read_text().startswith("slurmstepd")
            except OSError:
                continue  # ended meanwhile
            facts = dict(line.split("=", 1) for line in lines if "=" in line)
            of_run = "MASTER_ADDR" in facts and facts.get("SLURM_STEP_ID", "").isdigit()
            if daemon and of_run and facts.get("SLURM_JOB_ID") == job_id:
                found[int(facts["SLURM_PROCID"])] = (int(folder.name), facts["SLURMD_NODENAME"])
        return found

    def lose_node(self, name: str, job_id: str) -> None:
        """Take a node away at once, as a power cut does: its daemon, the step daemons and their tasks are killed."""
        for process in self.processes:
            if isinstance(process.args, tuple) and process.args[-1] == name:
                process.kill()
                process.wait()
        for pid, node in self.ranks(job_id).values():
            if node == name:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                for victim in (parent, pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)

    def return_node(self, name: str) -> None:
        """Start a lost node's daemon again."""
        self._daemon("slurmd", "-D", "-N", name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self._wait_until_idle()

    def stop(self) -> None:
        """End the jobs, then every process that was started here, by its id."""
        self._end_jobs()
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _end_jobs(self, timeout_s: float = 60) -> None:
        """Kill what still runs, so that nothing outlives the daemons that would end it."""
        deadline = time.monotonic() + timeout_s
        while ids := self.run("squeue", "-h", "-o", "%A", check=False).split():
            self.run("scancel", "--signal=KILL", "--full", *ids, check=False)
            self.run("scancel", *ids, check=False)
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs {', '.join(ids)} do not end within {timeout_s} s")
            time.sleep(0.5)

    def _start(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self._start_munge()
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._daemon("slurmctld", "-D", "-c")
        for index in range(self.num_nodes):
            self._daemon("slurmd", "-D", "-N", f"node{index}")
        self._wait_until_idle()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755, exist_ok=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = {"key-file": key, "socket": self._munge_socket, "num-threads": 2}
        options |= {f"{name}-file": folder / f"munged.{name}" for name in ("log", "pid", "seed")}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in options.items()))
        deadline = time.monotonic() + 20
        while not self._munge_socket.exists():
            if time.monotonic() > deadline:
                raise SlurmUnavailable(f"munged does not start, see {self.folder / 'log' / 'munged.log'}")
            time.sleep(0.05)

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    def _daemon(self, *command: str) -> None:
        log = self.folder / "log" / f"{'_'.join(part for part in command if not part.startswith('-'))}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command, env=self.environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
            )
        self.processes.append(process)

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
            if states == ["idle"] * self.num_nodes:
                return
            if time.monotonic() > deadline:
                raise SlurmUnavailable(f"nodes are {states} after 60 s, see the logs in {self.folder / 'log'}")
            time.sleep(0.2)

    def _configuration(self) -> str:
        host, (control, *ports) = socket.gethostname(), _free_ports(self.num_nodes + 1)
        nodes = [
            f"NodeName=node{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000"
            for index, port in enumerate(ports)
        ]
        names = f"node[0-{self.num_nodes - 1}]"
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self._munge_socket},cred_expire=30",  # a requeued job waits that long; default 120 s
            "CryptoType=crypto/munge",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder / 'spool'}/%n",
            f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder / 'slurmd.%n.pid'}",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            "JobCompType=jobcomp/none",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "KillWait=30",
            "OverTimeLimit=0",
            "MinJobAge=3600",
            f"FirstJobId={random.randrange(1000, 1_000_000)}",  # ports of runs follow from it
            *nodes,
            f"PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO",
        ]
        return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
