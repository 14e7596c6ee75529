"""Runs that are killed at random moments and resumed must equal an uninterrupted one, bit for bit.

``python tests/random_kills.py --layout dap2 --rounds 20`` prints each kill and exits with 1 if anything differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from processes import free_port
from runs import SMALLEST, TINY
from scalefold.report.record import read_metrics
from scalefold.step.checkpoint import AVERAGED_FILE, RESUMABLE_FILE, Checkpoints

LAYOUTS = {"single": (1, 1), "dp2": (2, 1), "dap2": (2, 2)}
STEPS = 10
LIMIT_S = 300.0


@dataclass
class Start:
    """The processes of one start of the program."""

    processes: list[subprocess.Popen]
    outputs: list[Path]
    started_s: float = field(default_factory=time.monotonic)

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit statuses; what outlives the limit says where it stands, is killed, and is an error."""
        try:
            return [process.wait(max(0.1, self.started_s + limit_s - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.send_signal(signal.SIGABRT)  # the fault handler prints the stacks of all threads
            time.sleep(2)
            raise AssertionError(f"still running after {limit_s:.0f} s:\n{self.text()}") from None
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def running(self) -> bool:
        """Whether no process has ended."""
        return all(process.poll() is None for process in self.processes)

    def text(self) -> str:
        """What all processes printed, the end of it."""
        return "\n".join(output.read_text(errors="replace")[-8000:] for output in self.outputs)


class Victim:
    """One run in a folder of its own, started as often as it takes."""

    def __init__(self, store: Path, run_dir: Path, layout: str) -> None:
        self.store, self.run_dir = store, run_dir
        self.num_ranks, self.dap_size = LAYOUTS[layout]
        self._starts = 0
        run_dir.mkdir(parents=True)

    def start(self) -> Start:
        """Start it, from its newest checkpoint if there is one."""
        self._starts += 1
        resumes = Checkpoints(self.run_dir / "checkpoints").newest() is not None
        how = ["--resume"] if resumes else ["--result-index", str(self._starts)]
        overrides = [
            *SMALLEST,
            f"data.store_dir={self.store}",
            f"run.run_dir={self.run_dir}",
            "run.checkpoint_every_iters=1",
            f"training.num_train_iters={STEPS}",
            f"parallel.ranks_per_node={self.num_ranks}",
            f"parallel.dap_size={self.dap_size}",
            "parallel.startup_timeout_s=120",
            "parallel.step_timeout_s=60",
        ]
        command = [sys.executable, "-m", "scalefold", "train", str(TINY), *overrides, *how]
        port, processes, outputs = free_port(), [], []
        for rank in range(self.num_ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.num_ranks, "MASTER_PORT": port}
            env = os.environ | {"MASTER_ADDR": "127.0.0.1", "PYTHONFAULTHANDLER": "1"}
            env |= {key: str(value) for key, value in place.items()}
            outputs.append(self.run_dir / f"output_{self._starts}_{rank}.txt")
            with outputs[-1].open("w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=env))
        return Start(processes, outputs)

    def num_steps(self) -> int:
        """Lines of the record so far."""
        file = self.run_dir / "metrics.jsonl"
        return file.read_text(errors="replace").count('"kind": "step"') if file.exists() else 0

    def kill(self, choose: random.Random, startup_s: float) -> str | None:
        """Start it and kill a random rank at a random moment; what happened, or None if it ended before.

        One in five is killed before its first step, which a start takes ``startup_s`` to reach; any other after a
        random number of steps: seconds would be other moments on another machine.
        """
        start, before = self.start(), self.num_steps()
        if choose.random() < 0.2:
            time.sleep(choose.uniform(0, startup_s))
        else:
            wanted, first = choose.randint(1, max(1, STEPS - 2 - before)), None
            while start.running() and (done := self.num_steps() - before) < wanted:
                before = min(before, before + done)  # the record may be cut back to the checkpoint
                first = first or (time.monotonic() if done > 0 else None)
                time.sleep(0.005)
            time.sleep(choose.uniform(0, (time.monotonic() - first) / wanted if first else 0.1))
        if not start.running():
            if any(status != 4 for status in start.wait()):
                raise AssertionError(f"ended by itself:\n{start.text()}")
            return None
        rank = choose.randrange(self.num_ranks)
        start.processes[rank].kill()
        statuses = start.wait()
        if 4 in statuses and self.num_steps() == STEPS:  # all steps were done, and another rank had ended
            return None
        if any(status not in (-9, 5) for status in statuses):
            raise AssertionError(f"statuses {statuses} after rank {rank} was killed:\n{start.text()}")
        return f"rank {rank} killed after {self.num_steps()} steps"

    def finish(self) -> float:
        """Let it run to its end; seconds to its first step."""
        start, before = self.start(), self.num_steps()
        while start.running() and self.num_steps() <= before:
            time.sleep(0.02)
        startup_s = time.monotonic() - start.started_s
        if any(status != 4 for status in start.wait()):
            raise AssertionError(f"did not end with its budget:\n{start.text()}")
        return startup_s

    def differences(self, other: "Victim") -> list[str]:
        """Losses and tensors of the last checkpoint in which two finished runs differ."""
        found = []
        mine, theirs = read_metrics(self.run_dir), read_metrics(other.run_dir)
        for name in ("step", "loss", "grad_norm", "samples", "eval_step", "eval_lddt_ca"):
            if getattr(mine, name).tolist() != getattr(theirs, name).tolist():
                found.append(f"{name}: {getattr(mine, name).tolist()} and {getattr(theirs, name).tolist()}")
        left, right = self._tensors(), other._tensors()
        return found + [name for name in left if not torch.equal(left[name], right[name])]

    def _tensors(self) -> dict[str, torch.Tensor]:
        folder = self.run_dir / "checkpoints" / "last" / f"{STEPS:06d}"
        content = torch.load(folder / RESUMABLE_FILE, weights_only=True)
        states = content["optimizer_state_dict"]["state"]
        moments = {f"{i}.{key}": value for i, state in states.items() for key, value in state.items()}
        return content["alphafold_state_dict"] | moments | torch.load(folder / AVERAGED_FILE, weights_only=True)


def kill_and_compare(store: Path, folder: Path, layout: str, rounds: int, seed: int) -> list[str]:
    """``rounds`` kills, over as many runs as it takes; what differs from the uninterrupted run."""
    choose, kills, differing = random.Random(seed), 0, []
    whole = Victim(store, folder / "whole", layout)
    startup_s = whole.finish()
    for number in range(1 + rounds):
        victim = Victim(store, folder / f"run_{number}", layout)
        while kills < rounds and (what := victim.kill(choose, startup_s)):
            kills += 1
            print(f"{layout} {kills}/{rounds}: {what}", flush=True)
        if not (victim.run_dir / "checkpoints" / "last" / f"{STEPS:06d}").exists():
            victim.finish()
        differing += victim.differences(whole)
        if kills == rounds:
            return differing
    raise AssertionError(f"runs end before they are killed: {kills} kills in {1 + rounds} runs")


def main() -> None:
    """The command line."""
    from scalefold.data.made.demo import generate
    from scalefold.data.store.prepare import prepare

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="single")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = generate(folder / "raw", seed=3, num_train=30, num_eval=4)
        prepare(made.layout(), folder / "store", report=lambda text: None)
        differing = kill_and_compare(folder / "store", folder, chosen.layout, chosen.rounds, chosen.seed)
    print(f"{chosen.layout}: {chosen.rounds} kills, {len(differing)} differences")
    print("\n".join(differing[:20]))
    sys.exit(int(bool(differing)))


if __name__ == "__main__":
    main()
