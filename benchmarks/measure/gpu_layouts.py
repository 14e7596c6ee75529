"""The starts of ``gpu_runs.py``: what each is, its settings and its command line."""

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, SCRIPTS
from watched import torchrun

TARGET_REACHED, STEPS_DONE, RANK_LOST, NEXT_PHASE = 0, 4, 5, 6  # exit statuses of ``scalefold train``
KILLED = 128 + 9  # as a shell tells it
STEP_TIMEOUT_S = 20  # of the start that loses a rank; half of it passes before a silent rank is noticed
NEVER = 1_000_000
TINY = [
    "model.evoformer.num_blocks=1",
    "model.structure.num_blocks=2",
    "model.structure.dropout=0.1",
    *(f"model.{stack}.{kind}_dropout=0.2" for stack in ("extra_msa", "evoformer") for kind in ("msa", "pair")),
    "data.train_sequence_crop_size=16",
    "data.max_msa_clusters=6",
    "data.max_extra_msa=8",
]


@dataclass(frozen=True)
class Plan:
    """What all starts share. ``passes``: graphs for up to that many where speed and bits are the subject."""

    store: Path
    work: Path
    steps: int = 24
    passes: int = 2
    tiny: bool = False
    workers: int = 6
    limit_s: float = 200.0
    extra: tuple[str, ...] = ()

    @property
    def evaluate_every(self) -> int:
        """Three evaluations."""
        return max(1, self.steps // 3)

    @property
    def save_every(self) -> int:
        """Two checkpoints, far apart, the second one after the last step."""
        return max(1, self.steps // 2)

    @property
    def act_after(self) -> int:
        """Steps after which a run is asked to stop or loses a rank: before its first checkpoint."""
        return max(2, self.steps // 4)


@dataclass(frozen=True)
class Start:
    """One start of the program and what it must do.

    ``like``: the start whose losses and weights it must have; ``after``: the start that must have ended before, whose
    run it resumes.
    """

    name: str
    layout: str
    ranks: int = 1
    dap: int = 1
    eval_ranks: int = 0
    many_passes: bool = True
    settings: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (STEPS_DONE,)
    act: str = ""  # "stop" or "kill"
    like: str = ""
    after: str = ""
    phase_dap: int = 0  # of its steps, where a phase changes it

    @property
    def is_ruler(self) -> bool:
        """Whether it times bare steps instead of running the program."""
        return self.layout.startswith("ruler")

    @property
    def kind(self) -> str:
        """Of starts that take about as long as each other: a ruler, or a run on as many GPUs."""
        return self.layout if self.is_ruler else f"run on {self.ranks}"

    @property
    def run_name(self) -> str:
        """Its run folder: a resumed start's is that of the start before."""
        return self.after or self.name

    @property
    def replicas(self) -> int:
        """Samples per step."""
        return (self.ranks - self.eval_ranks) // self.dap


def twice(layout: str, **shape: Any) -> list[Start]:
    """The same start two times."""
    return [Start(layout, layout, **shape), Start(f"{layout} again", layout, like=layout, **shape)]


def stopped(layout: str, like: str, **shape: Any) -> Start:
    """A start that is asked to stop."""
    return Start(layout, layout, act="stop", like=like, **shape)


def resumed(layout: str, like: str, **shape: Any) -> Start:
    """The continuation of a stopped one, to the end."""
    return Start(f"{layout} resumed", layout, after=layout, like=like, **shape)


TWO = {"ranks": 2, "statuses": (STEPS_DONE, STEPS_DONE)}
FOUR = {"ranks": 4, "dap": 4}
STARTS = [  # in this order; starts on one GPU stand in pairs
    *twice("one_gpu"),
    *twice("dap2", dap=2, **TWO),
    *twice("dp2", **TWO),
    Start("ruler_two", "ruler_two", 2, dap=2, statuses=(0, 0)),  # early: starts on two are judged by it
    Start("train_eval", "train_eval", 2, eval_ranks=1, many_passes=False, statuses=(STEPS_DONE, 0)),
    Start(
        "target",
        "target",
        many_passes=False,
        settings=("training.target_avg_lddt_ca_value=0.001",),
        statuses=(TARGET_REACHED,),
    ),
    stopped("stop_one_gpu", like="one_gpu"),
    Start("ruler_one", "ruler_one", statuses=(0,)),
    resumed("stop_one_gpu", like="one_gpu"),
    Start(
        "killed",
        "killed",
        2,
        dap=2,
        many_passes=False,
        act="kill",
        settings=(f"parallel.step_timeout_s={STEP_TIMEOUT_S}", f"training.val_every_iters={NEVER}"),
        statuses=(RANK_LOST, KILLED),
    ),
    stopped("stop_dap2", like="dap2", dap=2, **TWO),
    resumed("stop_dap2", like="dap2", dap=2, **TWO),
    Start("phases", "phases", 2, statuses=(NEXT_PHASE, NEXT_PHASE)),
    Start("phases resumed", "phases", phase_dap=2, after="phases", **TWO),
    Start("ruler_four", "ruler_four", statuses=(0,) * 4, **FOUR),
    *twice("dap4", statuses=(STEPS_DONE,) * 4, **FOUR),
]
LAYOUTS = list(dict.fromkeys(start.layout for start in STARTS))


def settings(plan: Plan, start: Start) -> list[str]:
    """Overrides of the system file for one start."""
    size = "ranks" if plan.tiny else "gpus"
    passes = plan.passes if start.many_passes else 1
    return [
        f"parallel.{size}_per_node={start.ranks}",
        f"parallel.dap_size={start.dap}",
        f"parallel.num_eval_ranks={start.eval_ranks}",
        f"training.global_batch_size={start.replicas}",
        "submission.org=generated",
        "submission.platform=gpu_runs",
        f"training.num_train_iters={plan.steps}",
        f"training.val_every_iters={plan.evaluate_every}",
        "training.target_avg_lddt_ca_value=1.0",
        "training.opt_learning_rate_warmup_steps=10",
        "training.seed=5",
        f"data.store_dir={plan.store}",
        f"data.num_workers={plan.workers}",
        f"data.num_recycling_iters={passes - 1}",
        "data.val_max_sequence_length=64",
        f"run.run_dir={run_dir(plan, start)}",
        f"run.checkpoint_every_iters={plan.save_every}",
        "run.log_every_iters=1",
        *(TINY if plan.tiny else []),
        *([two_phases(plan)] if start.layout == "phases" else []),
        *start.settings,
        *plan.extra,
    ]


def two_phases(plan: Plan) -> str:
    """Two replicas until the first evaluation, then both GPUs share a sample: another layout, so another start."""
    first = f"{{name: apart, until_step: {plan.evaluate_every}}}"
    return f"phases=[{first}, {{name: shared, dap_size: 2, global_batch_size: 1}}]"


def run_dir(plan: Plan, start: Start) -> Path:
    """Where the program writes."""
    return plan.work / "runs" / start.run_name.replace(" ", "_")


def places(plan: Plan, start: Start) -> Path:
    """Where this script keeps what the start printed and what is needed to judge it."""
    return plan.work / "starts" / start.name.replace(" ", "_")


def command(plan: Plan, start: Start) -> list[str]:
    """The command line of one start."""
    if start.is_ruler:
        program = [sys.executable, *ruler(plan, start)]
    else:
        config = ROOT / "configs" / ("tiny.yaml" if plan.tiny else "base.yaml")
        program = [sys.executable, "-m", "scalefold", "train", str(config), *settings(plan, start)]
        program += ["--resume"] if start.after else []
    return torchrun(start.ranks, places(plan, start), free_port(), program) if start.ranks > 1 else program


def ruler(plan: Plan, start: Start) -> list[str]:
    """Script and arguments that time bare steps of the same shapes into a table in the start's folder."""
    passes = ["--repeats", "10", "--passes", *map(str, range(1, plan.passes + 1))]
    overrides = [f"data.num_recycling_iters={plan.passes - 1}", *(TINY if plan.tiny else []), *plan.extra]
    shared = [*passes, *(word for override in overrides for word in ("--set", override))]
    if start.ranks == 1:
        return [str(SCRIPTS / "step_time.py"), "--csv", str(places(plan, start) / "step_time.csv"), *shared]
    small = ["--small"] if plan.tiny else []
    sizes = [str(start.dap), *(["1"] if start.ranks == 2 else [])]  # of two replicas, too
    script = [str(SCRIPTS / "multi_gpu.py"), "--skip-exchanges", "--dap", *sizes, *small]
    return [*script, "--out", str(places(plan, start)), *shared]


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
